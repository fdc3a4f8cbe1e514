"""pair_geometry in C++ (csrc/cpu/pair_geometry.h): float64 Gram tiles, reduced in the cache."""

import functools

import torch

import ncfast._cpu as _cpu
from ncfast.ops.pair_geometry import PairGeometry


def refuses(features: torch.Tensor) -> str | None:
    """Only tensors in the CPU's memory have addresses the kernels can read."""
    return None if features.is_cpu else f"the features are on {features.device}"


def pair_geometry(
    vectors: torch.Tensor,  # [C, p] float64
    variances: torch.Tensor | None,  # [C] float64
) -> PairGeometry:
    """Reduce every pair of the upper triangle."""
    vectors = vectors.contiguous()
    C, p = vectors.shape
    variances = None if variances is None else variances.contiguous()
    statistics = vectors.new_empty(9)
    nearest_distance = vectors.new_empty(C)
    nearest_index = torch.empty(C, dtype=torch.int64, device=vectors.device)
    _cpu.pair_geometry(
        vectors=vectors.data_ptr(),
        C=C,
        p=p,
        variances=0 if variances is None else variances.data_ptr(),
        statistics=statistics.data_ptr(),
        nearest_distance=nearest_distance.data_ptr(),
        nearest_index=nearest_index.data_ptr(),
        threads=torch.get_num_threads(),
    )
    mean, std, low, high, deviation, kernel_mean, kernel_std, etf, cdnv = statistics.unbind()
    return PairGeometry(
        cosine_mean=mean,
        cosine_std=std,
        cosine_min=low,
        cosine_max=high,
        max_angle_deviation=deviation,
        log_kernel_mean=kernel_mean,
        log_kernel_std=kernel_std,
        etf_error=etf,
        nearest_distance=nearest_distance,
        nearest_index=nearest_index,
        cdnv=None if variances is None else cdnv,
    )


def etf_error(left: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    """Project the Gram matrix on the ideal one, and sum what remains; the upper triangle alone for R = L."""
    left = left.contiguous()
    right = left if right is None else right.contiguous()
    C, p = left.shape
    return left.new_tensor(
        _cpu.etf_error(
            left=left.data_ptr(), right=right.data_ptr(), C=C, p=p, threads=torch.get_num_threads()
        )
    )


def decision_radius(
    weight: torch.Tensor,  # [C, p] float64
    bias: torch.Tensor,  # [C] float64
    anchors: torch.Tensor,  # [A, p] float64
    classes: torch.Tensor,  # [A] int64
    *,
    bound: bool = False,
) -> torch.Tensor:  # [A]
    """Screen every pair by its Gram matrix; measure those that may be the nearest boundary.

    With `bound` compute `ncfast.ops.pair_geometry.radius_bound` instead.
    """
    same = (anchors.data_ptr(), anchors.shape, anchors.stride()) == (
        weight.data_ptr(),
        weight.shape,
        weight.stride(),
    )
    weight, bias, classes = weight.contiguous(), bias.contiguous(), classes.contiguous()
    anchors = weight if same else anchors.contiguous()
    radii = weight.new_empty(len(classes))
    _cpu.decision_radius(
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        C=weight.shape[0],
        p=weight.shape[1],
        anchors=anchors.data_ptr(),
        classes=classes.data_ptr(),
        A=len(classes),
        radii=radii.data_ptr(),
        bound=bound,
        threads=torch.get_num_threads(),
    )
    return radii


radius_bound = functools.partial(decision_radius, bound=True)
