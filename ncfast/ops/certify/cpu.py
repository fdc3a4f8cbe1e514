"""certify on the CPU: a few passes over N numbers, beside reading N features; PyTorch's own will do."""

import torch

from ncfast.ops.certify.reference import certify

__all__ = ["certify", "refuses"]


def refuses(radii: torch.Tensor) -> str | None:
    """Tensors that are not in the CPU's memory."""
    return None if radii.is_cpu else f"the radii are on {radii.device}"
