"""affine_argmax on GPUs, in Triton.

A fast pass scores every row against all classes on the matrix units and keeps, per rule, the best two
scores and the index of the best; the [N, C] scores never leave the registers. Two rules share the pass:
their rows are stacked, each tile of the stack is compared under both rules' masks. Features are centred
by a common vector g as they are loaded, the rows of V by their mean and by a power of two, in float64:
neither changes the argmax, and both make the error bound relative to what distinguishes the classes.
Operands are one or two bfloat16 planes.

A row is decided if its best two scores are further apart than twice a proven bound on the error of one,

    |err| ≤ ‖x − x̂‖·‖v‖ + ‖x̂‖·‖v − v̂‖ + ‖x_low‖·‖v_low‖ + γ ‖x̂‖ ‖v‖ + bias,   x = h − g,

with the residuals of this row and the worst class as they really are. γ is the accumulation: a matrix
unit may truncate, so every one of its n additions may lose 2⁻²³ of a partial sum, and partial sums are at
most ‖x̂‖ ‖v‖. The others climb: one plane (skipped when there are too few classes for it to be faster),
two planes, and float64 on the inputs as they were given, where ties go to the lowest index; float64
features start there. Each rung works on a list of rows that the device makes itself: nothing
synchronises.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ncfast.ops import target
from ncfast.ops.target import refuses_device as refuses

__all__ = ["affine_argmax", "refuses"]

_SAMPLED_ROWS = 256  # whose mean is g: any g is right, one near the features' mean makes the bound small
_ONE_PLANE_CLASSES = 512  # from here on the first pass is bound by its products, no more by reading
_BLOCK = 1024  # of `_list_rows` and `_settle`
_RECHECKERS = 1024  # programs that share the rows of the float64 rung


@triton.jit
def _top_two(
    features,  # [N, p]
    center,  # [p_padded] float32: g, zeros beyond p
    high,  # [C_padded, p_padded] bfloat16: both rules' rows, zeros beyond C and p
    low,  # the same: the second plane, when PLANES is 2
    bias,  # [C_padded] float32
    limits,  # [2, 4] float32: per rule what the error bound needs, see `_Stacked`
    rows,  # [N] int64: which rows, when LISTED
    count,  # [1] int64: how many, when LISTED
    index,  # [2, N] int64: the decisions
    undecided,  # [N] int32: bit r is set where rule r is undecided
    N,
    p,
    C,
    split,  # classes below are the first rule's
    p_padded,
    stride_row,
    stride_column,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    PLANES: tl.constexpr,
    LISTED: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    if LISTED:
        total = tl.load(count)
        if tl.program_id(0).to(tl.int64) * BM >= total:
            return
        used = item < total
        row = tl.load(rows + item, used, 0)
    else:
        used = item < N
        row = item
    h = features + row[:, None] * stride_row
    scores, square, residual = _scores(
        h, used, center, high, low, 0, p, p_padded, stride_column, BM, BC, BK, PLANES, True
    )
    lowest = tl.full((BM,), float("-inf"), tl.float32)
    best_a, second_a, index_a = lowest, lowest, tl.zeros((BM,), tl.int32)
    best_b, second_b, index_b = lowest, lowest, tl.zeros((BM,), tl.int32)
    for first in range(0, C, BC):
        if first > 0:
            scores, _, _ = _scores(
                h, used, center, high, low, first, p, p_padded, stride_column, BM, BC, BK, PLANES, False
            )
        c = first + tl.arange(0, BC)
        scores += tl.load(bias + c)[None, :]
        if first < split:
            best_a, second_a, index_a = _keep_two(best_a, second_a, index_a, scores, c, c < split)
        if first + BC > split:
            best_b, second_b, index_b = _keep_two(
                best_b, second_b, index_b, scores, c, (c >= split) & (c < C)
            )
    x = tl.sqrt_rn(square)
    open_a = _is_open(best_a, second_a, x, tl.sqrt_rn(residual), limits)
    open_b = _is_open(best_b, second_b, x, tl.sqrt_rn(residual), limits + 4)
    tl.store(index + row, index_a.to(tl.int64), used)
    if split < C:
        tl.store(index + N + row, (index_b - split).to(tl.int64), used)
        tl.store(undecided + row, open_a.to(tl.int32) + 2 * open_b.to(tl.int32), used)
    else:
        tl.store(undecided + row, open_a.to(tl.int32), used)


@triton.jit
def _scores(
    h,
    used,
    center,
    high,
    low,
    first,
    p,
    p_padded,
    stride_column,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    PLANES: tl.constexpr,
    NORMS: tl.constexpr,
):
    """[BM, BC] ⟨x, v⟩ of BC classes from `first` on; with NORMS also ‖x‖² and ‖x − x̂‖² per row."""
    scores = tl.zeros((BM, BC), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    residual = tl.zeros((BM,), tl.float32)
    v = (first + tl.arange(0, BC)).to(tl.int64)[None, :] * p_padded + tl.arange(0, BK)[:, None]
    for start in range(0, p, BK):
        k = start + tl.arange(0, BK)
        mask = used[:, None] & (k < p)[None, :]
        x = tl.load(h + tl.cast(k, tl.int64)[None, :] * stride_column, mask, 0.0).to(tl.float32)
        x -= tl.load(center + k)[None, :]  # zero beyond p: both are
        x_high = x.to(tl.bfloat16)
        rest = x - x_high.to(tl.float32)
        v_high = tl.load(high + v + start)
        if PLANES == 2:
            x_low = rest.to(tl.bfloat16)
            rest -= x_low.to(tl.float32)
            scores = tl.dot(x_low, v_high, scores)
            scores = tl.dot(x_high, tl.load(low + v + start), scores)
        scores = tl.dot(x_high, v_high, scores)
        if NORMS:
            square += tl.sum(x * x, 1)
            residual += tl.sum(rest * rest, 1)
    return scores, square, residual


@triton.jit
def _keep_two(best, second, index, scores, c, mask):
    """Merge a tile's best two scores under `mask` into those so far; the earlier class wins a tie."""
    scores = tl.where(mask[None, :], scores, float("-inf"))
    tile_best, place = tl.max(scores, 1, return_indices=True)
    others = tl.where(tl.arange(0, scores.shape[1])[None, :] == place[:, None], float("-inf"), scores)
    tile_second = tl.max(others, 1)
    wins = tile_best > best
    second = tl.maximum(tl.where(wins, best, second), tl.where(wins, tile_second, tile_best))
    return tl.where(wins, tile_best, best), second, tl.where(wins, tl.min(c, 0) + place, index)


@triton.jit
def _is_open(best, second, x, residual, limits):
    """Whether the best two scores are closer than twice the error bound, or the bound is not a finite number.

    It is not where a score is not: a score is no larger than the norm of its row, and a class that is not
    finite leaves no finite limit.
    """
    bound = x * tl.load(limits) + residual * tl.load(limits + 1) + tl.load(limits + 2)
    return ~(best - second > 2.0 * bound)


@triton.jit
def _list_rows(undecided, places, rows, N, BLOCK: tl.constexpr):
    """Write every undecided row to its place in the list, given how many there are up to and with it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_open = tl.load(undecided + row, row < N, 0) != 0
    place = tl.load(places + row, is_open, 1)
    tl.store(rows + place - 1, row, is_open)


@triton.jit
def _recheck(
    features,  # [N, p]
    weight,  # [C, p] as given
    bias,  # [C] as given
    rows,  # [N] int64
    count,  # [1] int64
    best,  # [parts, N] float64
    index,  # [parts, N] int64
    N,
    p,
    C,
    parts,
    stride_row,
    stride_column,
    stride_class,
    stride_weight,
    stride_bias,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Score the listed rows in float64, one row and one part of the classes at a time."""
    part = tl.program_id(1).to(tl.int64)
    total = tl.load(count)
    for item in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0)):
        h = features + tl.load(rows + item) * stride_row
        top = tl.full((), float("-inf"), tl.float64)
        arg = tl.zeros((), tl.int64)
        for first in range(C * part // parts, C * (part + 1) // parts, BC):
            c = first + tl.arange(0, BC)
            mine = c < C * (part + 1) // parts
            scores = tl.zeros((BC, BK), tl.float64)
            for start in range(0, p, BK):
                k = (start + tl.arange(0, BK)).to(tl.int64)
                x = tl.load(h + k * stride_column, k < p, 0.0).to(tl.float64)
                v = weight + c[:, None] * stride_class + k[None, :] * stride_weight
                v = tl.load(v, mine[:, None] & (k < p)[None, :], 0.0).to(tl.float64)
                scores += v * x[None, :]
            score = tl.sum(scores, 1) + tl.load(bias + c * stride_bias, mine, 0.0).to(tl.float64)
            score = tl.where(mine & (score == score), score, float("-inf"))
            tile_top, place = tl.max(score, 0, return_indices=True)
            if tile_top > top:
                top = tile_top
                arg = first + place
        tl.store(best + part * N + item, top)
        tl.store(index + part * N + item, arg)


@triton.jit
def _settle(undecided, rows, count, best, index, decided, N, parts, BIT: tl.constexpr, BLOCK: tl.constexpr):
    """Put the best part's class where the rule is undecided; the first part wins a tie."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = item < tl.load(count)
    row = tl.load(rows + item, used, 0)
    top = tl.load(best + item, used, 0.0)
    arg = tl.load(index + item, used, 0)
    for part in range(1, parts):
        offset = tl.cast(part, tl.int64) * N
        other = tl.load(best + offset + item, used, 0.0)
        arg = tl.where(other > top, tl.load(index + offset + item, used, 0), arg)
        top = tl.maximum(top, other)
    is_open = (tl.load(undecided + row, used, 0) & BIT) != 0
    tl.store(decided + row, arg, used & is_open)


class Tile(NamedTuple):
    """How `_top_two` is cut: BM rows, BC classes and BK dimensions at a time."""

    BM: int
    BC: int
    BK: int
    warps: int
    stages: int

    def shared_bytes(self, architecture: str, planes: int, element_size: int) -> int:
        """A bound on the shared memory of one program: the operands, and what is being fetched meanwhile."""
        operands = self.BK * (self.BM + self.BC) * 2 * planes
        fetched = (self.stages - 1) * self.BK * (self.BM * element_size + self.BC * 2 * planes + 4)
        if architecture.startswith("gfx"):
            fetched = 0  # it waits in registers
        return operands + fetched + 8192  # reductions across warps


def choose_tile(architecture: str, C: int, aligned: bool) -> Tile:
    """As many classes at a time as there are, up to 64: `benchmarks.codegen` finds no spill.

    sm_80, sm_86, sm_89 and sm_120 hold operands in registers (mma.sync), which have room for half as much.
    Rows that are not `aligned` are fetched element by element, and every element takes registers for its
    address.
    """
    scattered = not aligned and not architecture.startswith("gfx")
    BC = min(32 if scattered else 64, max(16, triton.next_power_of_2(C)))
    return Tile(64, BC, 32 if scattered or architecture in target.OPERANDS_IN_REGISTERS else 64, 4, 2)


class _Stacked(NamedTuple):
    """One or two rules, ready for the fast pass."""

    center: torch.Tensor
    """[p_padded] float32: g."""
    planes: torch.Tensor
    """[2, C_padded, p_padded] bfloat16: the rows v̂ = (v − v̄)·2ᵉ and what they leave over, 2ᵉ‖v‖ ≤ 1."""
    bias: torch.Tensor
    """[C_padded] float32: 2ᵉ(b + ⟨v − v̄, g⟩), less the average of that."""
    limits: torch.Tensor
    """[2 (planes − 1), 2 (rule), 4] float32: the error of a score is at most ‖x‖·l₀ + ‖x − x̂‖·l₁ + l₂."""


def affine_argmax(
    features: torch.Tensor,  # [N, p]
    rules: Sequence[tuple[torch.Tensor, torch.Tensor]],  # (V [C, p], b [C]) each
) -> tuple[torch.Tensor, ...]:  # [N] int64 each
    """Decide every row under every rule, two rules at a time. Never synchronises."""
    center = _center(features)
    decisions: list[torch.Tensor] = []
    with target.active(features):
        for i in range(0, len(rules), 2):
            decisions += _decide(features, rules[i : i + 2], center)
    return tuple(decisions)


def _decide(
    features: torch.Tensor, rules: Sequence[tuple[torch.Tensor, torch.Tensor]], center: torch.Tensor
) -> list[torch.Tensor]:
    N = features.shape[0]
    C = sum(len(weight) for weight, _ in rules)
    index = features.new_empty(len(rules), N, dtype=torch.int64)
    undecided = features.new_empty(N, dtype=torch.int32)
    rows = index.new_empty(N)
    count = index.new_full((1,), N)
    rungs = [1, 2] if C >= _ONE_PLANE_CLASSES else [2]
    if features.dtype == torch.float64:
        torch.arange(N, out=rows)
        undecided.fill_(3)
        rungs = []
    else:
        tile = choose_tile(target.architecture(), C, target.aligned(features))
        stacked = _stacked(rules, center, tile)
    for planes in rungs:
        _top_two[(triton.cdiv(N, tile.BM),)](
            features,
            stacked.center,
            *stacked.planes,
            stacked.bias,
            stacked.limits[planes - 1],
            rows,
            count,
            index,
            undecided,
            N,
            features.shape[1],
            C,
            len(rules[0][0]),
            len(stacked.center),
            *features.stride(),
            BM=tile.BM,
            BC=tile.BC,
            BK=tile.BK,
            PLANES=planes,
            LISTED=planes != rungs[0],
            num_warps=tile.warps,
            num_stages=tile.stages,
            **target.all_registers(),
            **target.OPTIONS,
        )
        places = (undecided != 0).cumsum(0)
        count = places[-1:].clone()
        _list_rows[(triton.cdiv(N, _BLOCK),)](undecided, places, rows, N, BLOCK=_BLOCK, **target.OPTIONS)
    for r, (weight, bias) in enumerate(rules):
        _decide_exactly(features, weight, bias, rows, count, undecided, index[r], bit=1 << r)
    return list(index)


def _decide_exactly(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    undecided: torch.Tensor,
    decided: torch.Tensor,
    bit: int,
) -> None:
    """Overwrite `decided` where the rule's bit is set in `undecided`."""
    (N, p), C = features.shape, len(weight)
    parts = min(16, triton.cdiv(C, 256))
    best = features.new_empty(parts, N, dtype=torch.float64)
    index = rows.new_empty(parts, N)
    _recheck[(min(N, _RECHECKERS), parts)](
        features,
        weight,
        bias,
        rows,
        count,
        best,
        index,
        N,
        p,
        C,
        parts,
        *features.stride(),
        *weight.stride(),
        *bias.stride(),
        BC=16,
        BK=128,
        **target.OPTIONS,
    )
    _settle[(triton.cdiv(N, _BLOCK),)](
        undecided, rows, count, best, index, decided, N, parts, BIT=bit, BLOCK=_BLOCK, **target.OPTIONS
    )


def _center(features: torch.Tensor) -> torch.Tensor:
    """[p] float32: the mean of some rows spread over all; whatever is not finite counts as zero."""
    sample = features[:: triton.cdiv(features.shape[0], _SAMPLED_ROWS)].float()
    return torch.where(sample.isfinite(), sample, 0.0).double().mean(0).float()


def _stacked(
    rules: Sequence[tuple[torch.Tensor, torch.Tensor]], center: torch.Tensor, tile: Tile
) -> _Stacked:
    C, p = sum(len(weight) for weight, _ in rules), len(center)
    C_padded, p_padded = triton.cdiv(C, tile.BC) * tile.BC, triton.cdiv(p, tile.BK) * tile.BK
    planes = center.new_zeros(2, C_padded, p_padded, dtype=torch.bfloat16)
    biases = center.new_zeros(C_padded)
    limits = center.new_zeros(2, 2, 4)
    g = center.double()
    first = 0
    for r, (weight, bias) in enumerate(rules):
        v, b = weight.double(), bias.double()
        longest = _longest(v)
        v = v - v.mean(0)
        scale = torch.exp2(-torch.frexp(_longest(v))[1].double())
        v = v * scale
        b = b * scale
        offset = b + v @ g
        rest = v.clone()
        for i in range(2):
            plane = planes[i, first : first + len(v), :p]
            plane.copy_(rest)
            rest -= plane
            # The second plane of v, or zero: what the product of the two second planes would have added.
            low = _longest(planes[1, first : first + len(v)].double()) if i else 0.0
            limits[i, r, :3] = _limits(
                p_padded, i + 1, _longest(v), _longest(rest), low, longest * scale, b, offset, g
            )
        biases[first : first + len(v)] = offset - offset.mean()
        first += len(v)
    padded = center.new_zeros(p_padded)
    padded[:p] = center
    return _Stacked(padded, planes, biases, limits)


def _limits(
    p: int,
    planes: int,
    length: torch.Tensor,  # [] max ‖v̂‖
    residual: torch.Tensor,  # [] max ‖v̂ − its planes‖
    low: torch.Tensor | float,  # [] max ‖second plane‖ when there are two
    given: torch.Tensor,  # [] max ‖v‖ as given, scaled like v̂
    bias: torch.Tensor,  # [C] as given, scaled
    offset: torch.Tensor,  # [C] the bias about g
    g: torch.Tensor,
) -> torch.Tensor:
    """[3]: the bound of the file's first paragraph, a function of ‖x‖ and ‖x − x̂‖ as the kernel has them."""
    # A matrix instruction adds k ≥ 8 products and the sum so far.
    lost = (1 if planes == 1 else 3) * p * 9 / 8 * 2.0**-23
    if lost > 0.1:
        return length.new_full((3,), torch.inf)  # p > 200,000: nothing is decided here
    gamma = 1.2 * lost  # lost/(1 − lost), and the planes' norms exceed the rows' by at most 2⁻⁸
    per_x = (
        2.0**-24 * length  # x = h − g was rounded
        + residual
        + 2.0**-8 * low  # the second plane of x is at most that, relative to x
        + (gamma + 2.0**-22) * length  # the products, and adding the bias
        + 2.0**-51 * given  # v − v̄ was rounded in float64
    )
    per_residual = length + residual
    constant = (
        2.0**-22 * (offset - offset.mean()).abs().max()
        + (p + 8) * 2.0**-52 * ((length + given) * g.norm() + bias.abs().max())
        + p**0.5 * 2.0**-60  # squares that underflow in ‖x‖
    )
    # The norms of x are float32 sums of p squares; 2⁻¹⁰ covers the rounding of the bound itself.
    return torch.stack([per_x, per_residual, constant]) * (1 + 2.0**-10 + (p + 8) * 2.0**-24)


def _longest(rows: torch.Tensor) -> torch.Tensor:
    """[]: the largest norm of a row."""
    return rows.norm(dim=1).max()
