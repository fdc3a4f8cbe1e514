"""affine_argmax: every decision rule is argmax_c ⟨v_c, h⟩ + b_c."""

from collections.abc import Sequence
from typing import cast

import torch

from ncfast.ops import dispatch
from ncfast.ops.class_scatter import as_stored, check_features, check_in_memory


def affine_argmax(
    features: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Decide argmax_c ⟨v_c, h⟩ + b_c for every row h, without ever holding the [N, C] scores.

    The answer is the float64 answer whatever the dtype of the features: all inputs are taken as exact, and
    the answer is the exact one wherever float64 arithmetic can tell. Of a row whose best scores are closer
    than its rounding errors it is the best of the scores as `ncfast.reference` adds them up, equal ones of
    equal classes among them. Ties go to the lowest index.

    Args:
        features: [N, p] float32, float64, bfloat16 or float16.
        weight: [C, p], the rows v_c, any floating dtype, C ≥ 1; or a sequence of such, one per rule (C may
            differ): all rules are then decided in one read of the features.
        bias: [C] or None (zeros); a sequence of the same length when `weight` is one.

    Returns:
        [N] int64; for a sequence of rules a tuple of them. A row of the features that holds a NaN gives an
        index in range, without meaning.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not agree.

    Source: Papyan, Han & Donoho (PNAS 2020), NC4: the network classifier is (W, b); the nearest-class-centre
    rule argmin_c ‖h − μ_c‖ is (μ, −½‖μ_c‖²).
    """
    if torch.compiler.is_compiling():
        if isinstance(weight, torch.Tensor):
            rule = features.detach(), [weight.detach()], [bias]
            return cast(torch.Tensor, torch.ops.ncfast.affine_argmax(*rule)[0])
        rules = [v.detach() for v in weight], [None] * len(weight) if bias is None else list(bias)
        return tuple(torch.ops.ncfast.affine_argmax(features.detach(), *rules))
    check_features(features)
    if isinstance(weight, torch.Tensor):
        return _decide(features, [_checked_rule(features, weight, bias)])[0]
    biases = [None] * len(weight) if bias is None else list(bias)
    if len(weight) != len(biases):
        raise ValueError(f"got {len(weight)} weights but {len(biases)} biases")
    return _decide(features, [_checked_rule(features, v, b) for v, b in zip(weight, biases, strict=True)])


def nearest_class_center(features: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Decide argmin_c ‖h − μ_c‖₂ for every row h: `affine_argmax` in disguise.

    Args:
        features: [N, p] float32, float64, bfloat16 or float16.
        means: [C, p], any floating dtype.

    Returns:
        [N] int64, the float64 answer; ties go to the lowest index. A mean that holds a NaN (an absent class,
        as in `ClassStatistics.means`) or an infinity is never chosen.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not agree; no finite mean.

    Source: Papyan, Han & Donoho (PNAS 2020), NC4 and Fig. 7.
    """
    if torch.compiler.is_compiling():
        return cast(torch.Tensor, torch.ops.ncfast.nearest_class_center(features.detach(), means.detach()))
    means = _checked_rows(features, means, "means")
    present = means.isfinite().all(1)
    if not present.any():
        raise ValueError("means: no class is present (every row holds a NaN or an infinity)")
    decided = affine_argmax(features, *center_rule(means[present]))
    return present.nonzero().squeeze(1)[decided]


def center_rule(means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest-class-centre rule as an affine rule (V [C, p], b [C]) in float64.

    Written about a point m, so that a large common offset costs no digits: v_c = μ_c − m and
    ⟨v_c, h⟩ + b_c = ⟨v_c, h − m⟩ − ½‖v_c‖².
    """
    means = means.detach().double().contiguous()
    middle = means.mean(0)
    # To the largest power of two in the spread of the means: v_c is about as large as that, and subtracting
    # a point of so few bits from means of few bits is exact, so that ties remain ties.
    unit = torch.exp2(torch.frexp((means - middle).abs().max()).exponent.double() - 1)
    coarse = (middle / unit).round() * unit
    middle = torch.where(coarse.isfinite(), coarse, middle)
    centred = means - middle
    # Equal means get equal biases, whichever their rows: a matrix-vector product would not see to that.
    return centred, -(centred * (0.5 * centred + middle)).sum(1)


def _decide(
    features: torch.Tensor, rules: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    if features.shape[0] == 0 or not rules:
        return tuple(torch.empty(0, dtype=torch.int64, device=features.device) for _ in rules)
    return dispatch.select("affine_argmax", features)(as_stored(features), rules)


def _checked_rows(features: torch.Tensor, rows: object, name: str) -> torch.Tensor:
    check_features(features)
    if not isinstance(rows, torch.Tensor) or not rows.is_floating_point():
        raise TypeError(f"{name} must be a floating-point torch.Tensor")
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] != features.shape[1]:
        raise ValueError(
            f"{name} must have shape [C, {features.shape[1]}] with C ≥ 1, got {list(rows.shape)}"
        )
    if rows.device != features.device:
        raise ValueError(f"{name} is on {rows.device} but features are on {features.device}")
    check_in_memory(rows, name)
    return as_stored(rows)


def _checked_rule(features: torch.Tensor, weight: object, bias: object) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _checked_rows(features, weight, "weight")
    if bias is None:
        return rows, rows.new_zeros(rows.shape[0])
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
        raise TypeError("bias must be a floating-point torch.Tensor or None")
    if bias.shape != rows.shape[:1]:
        raise ValueError(f"bias must have shape [{rows.shape[0]}], got {list(bias.shape)}")
    if bias.device != features.device:
        raise ValueError(f"bias is on {bias.device} but features are on {features.device}")
    check_in_memory(bias, "bias")
    return rows, as_stored(bias)


# What torch.compile sees of the two functions.
@torch.library.custom_op(
    "ncfast::affine_argmax",
    mutates_args=(),
    schema="(Tensor features, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
)
def _affine_argmax_op(
    features: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> list[torch.Tensor]:
    return list(affine_argmax(features, weights, biases))


@_affine_argmax_op.register_fake
def _(
    features: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],  # noqa: ARG001 (the operator's signature)
) -> list[torch.Tensor]:
    return [features.new_empty(features.shape[0], dtype=torch.int64) for _ in weights]


@torch.library.custom_op("ncfast::nearest_class_center", mutates_args=())
def _nearest_class_center_op(features: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    return nearest_class_center(features, means)


@_nearest_class_center_op.register_fake
def _(features: torch.Tensor, means: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 (the operator's signature)
    return features.new_empty(features.shape[0], dtype=torch.int64)
