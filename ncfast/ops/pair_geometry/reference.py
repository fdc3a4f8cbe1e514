"""pair_geometry, straight from the formulas in float64 with the full C×C matrices: slow and obvious."""

import math

import torch

from ncfast.ops.pair_geometry import PairGeometry


def refuses(features: torch.Tensor) -> None:  # noqa: ARG001 (one signature for every backend)
    """The reference takes every device and dtype."""
    return None


def pair_geometry(vectors: torch.Tensor, variances: torch.Tensor | None) -> PairGeometry:
    """Build every pair's cosine, distance and kernel, then reduce."""
    C = vectors.shape[0]
    pairs = ~torch.eye(C, dtype=torch.bool, device=vectors.device)
    scaled = vectors / vectors.abs().amax(1, keepdim=True)  # squares of norms might overflow
    units = scaled / scaled.norm(dim=1, keepdim=True)
    cosines = (units @ units.T)[pairs]
    kernels = -_distances(units)[pairs].log()
    distances = _distances(vectors)
    nearest = distances.masked_fill(~pairs, torch.inf).min(1)
    cdnv = None
    if variances is not None:
        cdnv = ((variances[:, None] + variances) / (2 * distances.square()))[pairs].mean()
    return PairGeometry(
        cosine_mean=cosines.mean(),
        cosine_std=cosines.std(correction=0),
        cosine_min=cosines.min().clamp(min=-1.0),  # not by rounding beyond a cosine
        cosine_max=cosines.max().clamp(max=1.0),
        max_angle_deviation=(cosines + 1 / (C - 1)).abs().mean(),
        log_kernel_mean=kernels.mean(),
        log_kernel_std=kernels.std(correction=0),
        etf_error=etf_error(vectors, None),
        nearest_distance=nearest.values,
        nearest_index=nearest.indices,
        cdnv=cdnv,
    )


def etf_error(left: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    """Subtract the two C×C matrices."""
    C = left.shape[0]
    gram = left @ (left if right is None else right).T
    gram = gram / gram.abs().max()  # no scale matters, and squares might overflow
    ideal = (torch.eye(C, dtype=gram.dtype, device=gram.device) - 1 / C) / math.sqrt(C - 1)
    return (gram / gram.norm() - ideal).norm()


def decision_radius(
    weight: torch.Tensor,  # [C, p]
    bias: torch.Tensor,  # [C]
    anchors: torch.Tensor,  # [A, p]
    classes: torch.Tensor,  # [A]
) -> torch.Tensor:  # [A]
    """Measure each anchor's distance to every boundary of its class."""
    radii = weight.new_full((len(classes),), torch.inf)
    every = torch.arange(weight.shape[0], device=weight.device)
    for i, a in enumerate(classes.tolist()):
        difference = weight[a] - weight
        lead = difference @ anchors[i]
        # Nothing is known of a lead that overflows: it must not pass for an infinite distance, as a bias may.
        lead = torch.where(lead.isfinite(), lead, torch.nan) + (bias[a] - bias)
        largest = difference.abs().amax(1)
        # Scaled before it is squared: a tiny difference must not underflow to none.
        length = largest * (difference / largest[:, None]).norm(dim=1)
        same = largest == 0  # no boundary: the larger bias wins everywhere, then the lower index
        wins = (lead > 0) | ((lead == 0) & (every > a))
        distance = torch.where(same, torch.where(wins, torch.inf, -torch.inf), lead / length)
        distance[a] = torch.inf
        radii[i] = distance.min()
    return radii


def _distances(rows: torch.Tensor) -> torch.Tensor:
    """[C, C] Euclidean distances by direct differences: products cancel where rows are close."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
