"""affine_argmax in C++ (csrc/cpu/affine_argmax.h): low precision decides within a proven bound.

The ladder: on AMX 8-bit integers where a sample says that they decide most rows, one bfloat16 per number,
then two; on AVX512-VNNI 8-bit integers likewise, 16-bit ones, then float32; float32 elsewhere; then float64
matrix products; then what even their rounding leaves open, ties among them, by the reference. A rung decides
the rows whose best two scores are farther apart than twice its error bound; of others it scores the classes
within that bound in float64, where they are few, and what is still open it passes on.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

import ncfast._cpu as _cpu
from ncfast.ops.affine_argmax import reference

_SAMPLE = 256  # rows behind the middle point
_SCORES = 1 << 22  # float64 scores held at once by the last rungs


def refuses(features: torch.Tensor) -> str | None:
    """Only tensors in the CPU's memory have addresses the kernels can read."""
    return None if features.is_cpu else f"the features are on {features.device}"


class _Rule(NamedTuple):
    """A rule about the middle point m: ⟨v_c − v̄, h − m⟩ + b_c decides as ⟨v_c, h⟩ + b_c does."""

    weight: torch.Tensor  # [C, p] float64: v_c − v̄
    bias: torch.Tensor  # [C] float64: b_c + ⟨v_c − v̄, m⟩, less their average
    weight_slack: float  # rounding of a row of the weight, in norm
    bias_slack: float  # rounding of a bias
    decisions: torch.Tensor  # [N] int64
    decided: torch.Tensor  # [N] bool


def affine_argmax(
    features: torch.Tensor,  # [N, p]
    rules: Sequence[tuple[torch.Tensor, torch.Tensor]],  # (V [C, p], b [C]) each
) -> tuple[torch.Tensor, ...]:  # [N] int64 each
    """Decide on the fastest instruction set here, or NCFAST_CPU_ISA."""
    if features.shape[1] > 1 and features.stride(1) != 1:
        features = features.contiguous()
    N, p = features.shape
    middle = _middle(features)
    about = [_about(middle, weight, bias, N) for weight, bias in rules]
    _cpu.affine_argmax(
        features=features.data_ptr(),
        dtype=str(features.dtype).removeprefix("torch."),
        N=N,
        p=p,
        row_bytes=features.stride(0) * features.element_size(),
        middle=middle.data_ptr(),
        rules=[
            {
                "C": rule.weight.shape[0],
                "weight": rule.weight.data_ptr(),
                "bias": rule.bias.data_ptr(),
                "weight_slack": rule.weight_slack,
                "bias_slack": rule.bias_slack,
                "index": rule.decisions.data_ptr(),
                "decided": rule.decided.data_ptr(),
            }
            for rule in about
        ],
        threads=torch.get_num_threads(),
    )
    for rule, exact in zip(about, rules, strict=True):
        _decide_the_rest(features, middle, rule, exact)
    return tuple(rule.decisions for rule in about)


def _middle(features: torch.Tensor) -> torch.Tensor:
    """A point among the features, [p] float32: rounding errors are relative to the distance from it."""
    sample = features[:: -(-features.shape[0] // _SAMPLE)].double().mean(0)
    largest = torch.finfo(torch.float32).max
    return sample.nan_to_num(0.0, 0.0, 0.0).clamp(-largest, largest).float()


def _about(middle: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, N: int) -> _Rule:
    exact, unit = weight.double(), 2.0**-52
    mean = exact.mean(0)
    centred = (exact - mean).contiguous()
    moved = bias.double() + centred @ middle.double()
    level = moved.mean()
    longest, reach = float(_norms(exact).max()), float(_norms(middle.double()[None]))
    largest = float(bias.double().abs().max()) + 2 * longest * reach + abs(float(level))
    return _Rule(
        weight=centred,
        bias=(moved - level).contiguous(),
        weight_slack=unit * (longest + float(_norms(mean[None]))),
        bias_slack=unit * (middle.shape[0] + 8) * largest + _lost(middle.shape[0]),
        decisions=torch.empty(N, dtype=torch.int64, device=middle.device),
        decided=torch.empty(N, dtype=torch.bool, device=middle.device),
    )


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """[N]: the norms of rows [N, p], and what squares that underflow can take from them."""
    return rows.norm(dim=1) + math.sqrt(rows.shape[1]) * 2.0**-537


def _lost(p: int) -> float:
    """What p products in float64 lose where they underflow."""
    return p * 2.0**-1074


def _decide_the_rest(
    features: torch.Tensor, middle: torch.Tensor, rule: _Rule, exact: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Decide the rows that the kernel left open, in float64."""
    undecided = (~rule.decided).nonzero().squeeze(1)
    if len(undecided) == 0:
        return
    C, p = rule.weight.shape
    if C == 1:
        rule.decisions[undecided] = 0
        return
    longest, largest = float(_norms(rule.weight).max()), float(rule.bias.abs().max())
    for rows in undecided.split(max(1, _SCORES // max(C, p))):
        h = features[rows]
        centred = h.double() - middle.double()
        norm = _norms(centred)
        best = torch.topk(torch.addmm(rule.bias, centred, rule.weight.T), 2)
        # p products and as many additions, each rounded by 2⁻⁵³; norms rounded as much again.
        bound = (p + 8) * 2.0**-52 * (norm * longest + largest) + norm * rule.weight_slack
        bound += rule.bias_slack + _lost(p)
        decided = best.values[:, 0] - best.values[:, 1] > 2 * bound
        rule.decisions[rows[decided]] = best.indices[decided, 0]
        if not decided.all():
            (rule.decisions[rows[~decided]],) = reference.affine_argmax(h[~decided], [exact])
