"""class_scatter, straight from the formula in float64: slow and obvious."""

import torch

from ncfast.ops.class_scatter import ClassScatter


def refuses(features: torch.Tensor) -> None:  # noqa: ARG001 (one signature for every backend)
    """The reference takes every device and dtype."""
    return None


def class_scatter(
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p]
    *,
    scatter: bool = True,
    radii: bool = False,
    precision: str = "high",  # noqa: ARG001 (float64 serves every precision)
    ignore_index: int = -100,
) -> ClassScatter:
    """Compute all of `ncfast.ops.class_scatter` in float64, holding the [N, p] residuals."""
    C, p = shift.shape
    kept = labels != ignore_index
    y = torch.where(kept, labels, 0).long()
    residuals = torch.where(kept[:, None], features.double() - shift.double()[y], 0.0)  # [N, p]
    squares = residuals.square().sum(1)  # [N]
    return ClassScatter(
        counts=torch.zeros(C, dtype=torch.int64, device=features.device).index_add_(0, y, kept.long()),
        sums=residuals.new_zeros(C, p).index_add_(0, y, residuals),
        sumsq=residuals.new_zeros(C).index_add_(0, y, squares),
        scatter=residuals.T @ residuals if scatter else None,
        radii=torch.where(kept, squares.sqrt(), torch.nan) if radii else None,
    )
