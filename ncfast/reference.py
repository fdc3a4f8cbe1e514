"""The slow, obvious twin of every operation: float64 PyTorch, straight from the formulas.

Each takes the arguments of its fast counterpart (`ncfast.ops`), without checking them.
"""

import torch

from ncfast.ops.affine_argmax.reference import affine_argmax
from ncfast.ops.class_scatter.reference import class_scatter
from ncfast.ops.pair_geometry.reference import decision_radius, etf_error, pair_geometry

__all__ = [
    "affine_argmax",
    "class_scatter",
    "decision_radius",
    "etf_error",
    "nearest_class_center",
    "pair_geometry",
]


def nearest_class_center(features: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """argmin_c ‖h − μ_c‖₂ [N] by float64 differences; ties go to the lowest index."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(features.double(), means.double(), compute_mode=mode).argmin(1)
