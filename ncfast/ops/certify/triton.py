"""certify beside Triton's kernels: compaction is what Triton cannot do well, and PyTorch has it."""

from ncfast.ops.certify.reference import certify
from ncfast.ops.target import refuses_device as refuses

__all__ = ["certify", "refuses"]
