"""pair_geometry: what all pairs of classes say, reduced on the way: no caller ever holds a C×C matrix."""

from typing import NamedTuple, cast

import torch

from ncfast.ops import dispatch
from ncfast.ops.class_scatter import LABEL_DTYPES, as_stored, check_in_memory


class PairGeometry(NamedTuple):
    """Reductions over all ordered pairs c ≠ c′ of the rows u_c of one [C, p] matrix, in float64."""

    cosine_mean: torch.Tensor
    """[]: Avg of cos(u_c, u_c′)."""
    cosine_std: torch.Tensor
    """[]: population standard deviation of cos(u_c, u_c′)."""
    cosine_min: torch.Tensor
    """[]: the smallest cosine."""
    cosine_max: torch.Tensor
    """[]: the largest cosine."""
    max_angle_deviation: torch.Tensor
    """[]: Avg of |cos(u_c, u_c′) + 1/(C − 1)|."""
    log_kernel_mean: torch.Tensor
    """[]: Avg of log ‖û_c − û_c′‖⁻¹, û = u/‖u‖."""
    log_kernel_std: torch.Tensor
    """[]: population standard deviation of log ‖û_c − û_c′‖⁻¹."""
    etf_error: torch.Tensor
    """[]: `etf_error` of the same rows, from the same sweep; NaN when all are zero."""
    nearest_distance: torch.Tensor
    """[C]: min over c′ of ‖u_c − u_c′‖."""
    nearest_index: torch.Tensor
    """[C] int64: the c′ of that minimum, the lowest on ties."""
    cdnv: torch.Tensor | None
    """[]: Avg of (s_c + s_c′) / (2 ‖u_c − u_c′‖²) with the variances s; None when none were given."""


def pair_geometry(vectors: torch.Tensor, variances: torch.Tensor | None = None) -> PairGeometry:
    """Reduce the cosines, distances and kernels of all pairs of rows in one sweep.

    Args:
        vectors: [C, p] floating point, C ≥ 2: centred class means, or a classifier's weight. Computed in
            float64.
        variances: [C] floating point, each class's variance Avg_i ‖h_i − μ_c‖², to get the CDNV.

    Returns:
        PairGeometry. A row of zeros has no direction: every cosine and kernel statistic is then NaN. Two rows
        whose directions are equal in float64 put an infinity in the kernel's, two equal rows one in the CDNV.
        Norms beyond 1e150 may make them NaN, and norms below 1e-150 cost them digits. A row with a NaN makes
        them NaN, and leaves no meaning in the nearest distances.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not agree; C < 2.

    Source: cosines: Papyan, Han & Donoho (PNAS 2020), Figs. 3 and 4; CDNV: Galanti, György & Hutter
    (ICLR 2022); logarithmic kernel: Liu et al. (ICLR 2023) and Wu & Papyan (NeurIPS 2024).
    """
    if torch.compiler.is_compiling():
        given = None if variances is None else variances.detach()
        *shared, cdnv = torch.ops.ncfast.pair_geometry(vectors.detach(), given)
        return PairGeometry._make([*shared, None if variances is None else cdnv])
    _check_rows(vectors, "vectors", minimum=2)
    if variances is not None:
        _check_floating(variances, "variances")
        if variances.shape != vectors.shape[:1]:
            raise ValueError(f"variances must have shape [{vectors.shape[0]}], got {list(variances.shape)}")
        _check_device(variances, "variances", vectors, "vectors")
        variances = as_stored(variances, torch.float64)
    return dispatch.select("pair_geometry", vectors)(as_stored(vectors, torch.float64), variances)


def etf_error(left: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
    """Distance from the simplex ETF: ‖G/‖G‖_F − (I − 𝟙𝟙ᵀ/C)/√(C − 1)‖_F with the Gram matrix G = L Rᵀ.

    Args:
        left: [C, p] floating point, C ≥ 2.
        right: [C, p] floating point, or None for R = L.

    Returns:
        [] float64, in [0, 2]; NaN when G is zero, or leaves the range of float64.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not agree; C < 2.

    Source: Zhu et al. (NeurIPS 2021), "A geometric analysis of neural collapse with unconstrained features",
    §5.
    """
    if torch.compiler.is_compiling():
        given = None if right is None else right.detach()
        return cast(torch.Tensor, torch.ops.ncfast.etf_error(left.detach(), given))
    _check_rows(left, "left", minimum=2)
    if right is not None:
        _check_rows(right, "right", minimum=2)
        _check_device(right, "right", left, "left")
        if right.shape != left.shape:
            raise ValueError(f"right must have shape {list(left.shape)}, got {list(right.shape)}")
        right = as_stored(right, torch.float64)
    return dispatch.select("pair_geometry", left, "etf_error")(as_stored(left, torch.float64), right)


def decision_radius(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    anchors: torch.Tensor,
    classes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Distance from each anchor to the decision boundary of its class, under argmax_c ⟨v_c, h⟩ + b_c.

    ρ_a = min_{c ≠ a} [⟨v_a − v_c, μ_a⟩ + b_a − b_c] / ‖v_a − v_c‖: every h with ‖h − μ_a‖ < ρ_a is decided a;
    a negative ρ_a means that the anchor itself is decided otherwise. For the nearest-class-centre rule ρ_a is
    half the distance to the nearest other mean. With one class ρ is +∞. A class c with v_c = v_a counts as +∞
    or −∞, by the biases and then the lower index.

    Args:
        weight: [C, p] floating point.
        bias: [C] floating point, or None for zeros.
        anchors: [A, p] floating point, one per class of `classes`.
        classes: [A] integers, the class a of each anchor; None for 0 … C − 1, when A = C.

    Returns:
        [A] float64, in the units of the features, off by at most (p + 4) 2⁻⁵² (‖μ_a‖ + |ρ_a|) as long as the
        products of their entries and those of the weight are normal numbers. NaN or −∞ where
        they overflow.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not agree.

    Source: Theorem 3 of Papyan, Han & Donoho (PNAS 2020), whose error exponent is β = ½ min_a ρ_a².
    """
    if torch.compiler.is_compiling():
        given = None if bias is None else bias.detach()
        rule = weight.detach(), given
        return cast(torch.Tensor, torch.ops.ncfast.decision_radius(*rule, anchors.detach(), classes))
    checked = _checked_anchors(weight, bias, anchors, classes)
    return dispatch.select("pair_geometry", weight, "decision_radius")(*checked)


def radius_bound(
    weight: torch.Tensor, bias: torch.Tensor, anchors: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor | None:
    """[A] float64: lower bounds of `decision_radius`, or −∞, from ‖v_a − v_c‖ ≤ ‖v_a‖ + ‖v_c‖.

    ρ_a/√2 for a simplex ETF. No distance is asked for, so that the cost is the same however many walls are
    equally near, which is where training leads. None where the backend has nothing cheaper than
    `decision_radius`.
    """
    checked = _checked_anchors(weight, bias, anchors, classes)
    run = dispatch.beside(dispatch.select("pair_geometry", weight, "decision_radius"), "radius_bound")
    return None if run is None else run(*checked)


# What torch.compile sees of the three functions. A CDNV that was not asked for is an empty tensor.
@torch.library.custom_op(
    "ncfast::pair_geometry", mutates_args=(), schema="(Tensor vectors, Tensor? variances) -> Tensor[]"
)
def _pair_geometry_op(vectors: torch.Tensor, variances: torch.Tensor | None) -> list[torch.Tensor]:
    *shared, cdnv = pair_geometry(vectors, variances)
    return [number.clone() for number in shared] + [shared[0].new_empty(0) if cdnv is None else cdnv.clone()]


@_pair_geometry_op.register_fake
def _(vectors: torch.Tensor, variances: torch.Tensor | None) -> list[torch.Tensor]:
    C = vectors.shape[0]
    numbers = [vectors.new_empty((), dtype=torch.float64) for _ in range(8)]
    nearest = [vectors.new_empty(C, dtype=dtype) for dtype in (torch.float64, torch.int64)]
    return [*numbers, *nearest, vectors.new_empty((0,) if variances is None else (), dtype=torch.float64)]


@torch.library.custom_op("ncfast::etf_error", mutates_args=())
def _etf_error_op(left: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    return etf_error(left, right)


@_etf_error_op.register_fake
def _(left: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 (the operator's signature)
    return left.new_empty((), dtype=torch.float64)


@torch.library.custom_op("ncfast::decision_radius", mutates_args=())
def _decision_radius_op(
    weight: torch.Tensor, bias: torch.Tensor | None, anchors: torch.Tensor, classes: torch.Tensor | None
) -> torch.Tensor:
    return decision_radius(weight, bias, anchors, classes)


@_decision_radius_op.register_fake
def _(
    weight: torch.Tensor,
    bias: torch.Tensor | None,  # noqa: ARG001 (the operator's signature)
    anchors: torch.Tensor,
    classes: torch.Tensor | None,  # noqa: ARG001 (the operator's signature)
) -> torch.Tensor:
    return weight.new_empty(anchors.shape[0], dtype=torch.float64)


def _check_floating(tensor: torch.Tensor, name: str) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point torch.Tensor")
    check_in_memory(tensor, name)


def _check_rows(rows: torch.Tensor, name: str, minimum: int) -> None:
    _check_floating(rows, name)
    if rows.ndim != 2 or rows.shape[0] < minimum or rows.shape[1] == 0:
        raise ValueError(f"{name} must have shape [C, p] with C ≥ {minimum}, p ≥ 1, got {list(rows.shape)}")


def _checked_anchors(
    weight: torch.Tensor, bias: torch.Tensor | None, anchors: torch.Tensor, classes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in float64 and int64, with nothing left out."""
    _check_rows(weight, "weight", minimum=1)
    _check_rows(anchors, "anchors", minimum=0)
    C = weight.shape[0]
    bias = weight.new_zeros(C) if bias is None else bias
    classes = torch.arange(C, device=weight.device) if classes is None else classes
    if not isinstance(classes, torch.Tensor) or classes.dtype not in LABEL_DTYPES:
        raise TypeError("classes must be a torch.Tensor of integers")
    check_in_memory(classes, "classes")
    if classes.ndim != 1:
        raise ValueError(f"classes must have shape [A], got {list(classes.shape)}")
    _check_floating(bias, "bias")
    if bias.shape != (C,):
        raise ValueError(f"bias must have shape [{C}], got {list(bias.shape)}")
    if anchors.shape != (classes.shape[0], weight.shape[1]):
        raise ValueError(
            f"anchors must have shape {[classes.shape[0], weight.shape[1]]}, got {list(anchors.shape)}"
        )
    for tensor, name in ((bias, "bias"), (anchors, "anchors"), (classes, "classes")):
        _check_device(tensor, name, weight, "weight")
    classes = classes.detach().long()
    if classes.device.type == "cpu" and ((classes < 0) | (classes >= C)).any():
        raise ValueError(f"classes must lie in [0, {C})")
    return (
        as_stored(weight, torch.float64),
        as_stored(bias, torch.float64),
        as_stored(anchors, torch.float64),
        classes,
    )


def _check_device(tensor: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")
