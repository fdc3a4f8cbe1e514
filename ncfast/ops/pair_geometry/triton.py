"""pair_geometry on GPUs, in Triton.

A program holds B rows and walks over tiles of B other rows; a tile of B×B pairs is built in float64
registers, one dimension after the other from the transposed rows, and reduced before the next: nothing
C×C is stored. What is built is not the Gram matrix, which cancels where rows are close, but the squared
distances δ² of the unit rows û by direct differences, from which everything else follows without
cancellation:

    cos = 1 − δ²/2,   log ‖û − û′‖⁻¹ = −½ log δ²,   ‖u − u′‖² = (‖u‖ − ‖u′‖)² + ‖u‖ ‖u′‖ δ².

That is a subtraction and a fused multiply-add per pair and dimension on the float64 units, for C²p
instead of C²p/2 since every program owns the nearest neighbours of its rows. Means and standard
deviations are merged tile by tile from deviations about each tile's own mean. `decision_radius` and
`etf_error` walk the same way. All sums are taken in one order: the results do not depend on timing.
"""

import math

import torch
import triton
import triton.language as tl

from ncfast.ops import target
from ncfast.ops.pair_geometry import PairGeometry
from ncfast.ops.target import refuses_device

_PROGRAMS = 512  # to fill any GPU of today at least once
_B = 32  # rows of a tile: 8 float64 sums per thread, no shared memory but for reductions
_CLOSE = tl.constexpr(
    2.0**-20
)  # δ² below which û's rounding shows in ‖u − u′‖²: it is then summed from u itself
_TINY = tl.constexpr(2.0**-900)  # a smaller square may have underflowed
_STATISTICS = tl.constexpr(9)  # numbers that each program of `_pairs` leaves


def refuses(features: torch.Tensor) -> str | None:
    """Why Triton cannot take these rows, or None: it takes every dtype, in float64."""
    return refuses_device(features)


@triton.jit
def _pairs(
    vectors,  # [p, C] float64: u, transposed
    units,  # [p, C] float64: û, transposed; zero for a row of zeros
    norms,  # [C] float64
    variances,  # [C] float64, when CDNV
    statistics,  # [programs, 9] float64
    nearest,  # [parts, C] float64: the smallest ‖u − u′‖² in each part
    nearest_index,  # [parts, C] int64
    p,
    C,
    parts,
    ideal,  # [1] float64: −1/(C − 1)
    B: tl.constexpr,
    CDNV: tl.constexpr,
):
    part = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    norm_i = tl.load(norms + i, i < C, 1.0)
    variance_i = tl.load(variances + i, i < C, 0.0) if CDNV else norm_i
    first, last = _share(tl.cdiv(C, B), part, parts)
    ideal = tl.load(ideal)
    closest = tl.full((B,), float("inf"), tl.float64)
    closest_index = tl.zeros((B,), tl.int64)
    zero = tl.zeros((), tl.float64)
    count, cosines, cosine_square, lowest, highest = zero, zero, zero, zero + 2.0, zero - 2.0
    deviations, kernels, kernel_square, cdnv = zero, zero, zero, zero
    for tile in range(first, last):
        j = tl.cast(tile, tl.int64) * B + tl.arange(0, B)
        squares = tl.zeros((B, B), tl.float64)
        for k in range(p):
            row = units + tl.cast(k, tl.int64) * C
            difference = tl.load(row + i, i < C, 0.0)[:, None] - tl.load(row + j, j < C, 0.0)[None, :]
            squares += difference * difference
        norm_j = tl.load(norms + j, j < C, 1.0)
        pair = (i < C)[:, None] & (j < C)[None, :] & (i[:, None] != j[None, :])
        directed = (norm_i > 0)[:, None] & (norm_j > 0)[None, :]
        cosine = tl.where(directed, 1.0 - 0.5 * squares, float("nan"))
        kernel = tl.where(directed, -0.5 * tl.log(squares), float("nan"))
        gap = norm_i[:, None] - norm_j[None, :]
        distance = gap * gap + norm_i[:, None] * norm_j[None, :] * squares
        pairs = tl.sum(tl.sum(pair.to(tl.float64), 1), 0)
        if tl.min(tl.min(tl.where(pair, squares, 4.0), 1), 0) < _CLOSE:
            distance = tl.zeros((B, B), tl.float64)
            for k in range(p):
                row = vectors + tl.cast(k, tl.int64) * C
                difference = tl.load(row + i, i < C, 0.0)[:, None] - tl.load(row + j, j < C, 0.0)[None, :]
                distance += difference * difference
        cosines, cosine_square = _merge(cosines, cosine_square, count, cosine, pair, pairs)
        kernels, kernel_square = _merge(kernels, kernel_square, count, kernel, pair, pairs)
        count += pairs
        lowest = tl.minimum(lowest, tl.min(tl.min(tl.where(pair, cosine, 2.0), 1), 0))
        highest = tl.maximum(highest, tl.max(tl.max(tl.where(pair, cosine, -2.0), 1), 0))
        deviations += _total(tl.abs(cosine - ideal), pair)
        if CDNV:
            variance_j = tl.load(variances + j, j < C, 0.0)
            cdnv += _total((variance_i[:, None] + variance_j[None, :]) / (2.0 * distance), pair)
        closer, place = tl.min(tl.where(pair, distance, float("inf")), 1, return_indices=True)
        closest_index = tl.where(closer < closest, tl.min(j, 0) + place, closest_index)
        closest = tl.minimum(closest, closer)
    out = statistics + (tl.program_id(0).to(tl.int64) * parts + part) * _STATISTICS
    tl.store(out, count)
    tl.store(out + 1, cosines)
    tl.store(out + 2, cosine_square)
    tl.store(out + 3, lowest)
    tl.store(out + 4, highest)
    tl.store(out + 5, deviations)
    tl.store(out + 6, kernels)
    tl.store(out + 7, kernel_square)
    tl.store(out + 8, cdnv)
    tl.store(nearest + tl.cast(part, tl.int64) * C + i, closest, i < C)
    tl.store(nearest_index + tl.cast(part, tl.int64) * C + i, closest_index, i < C)


@triton.jit
def _share(tiles, part, parts):
    """The first tile of the part-th of `parts` equal shares, and the first after it, in 32-bit divisions."""
    each, more = tiles // parts, tiles % parts
    first = part * each + tl.minimum(part, more)
    return first, first + each + (part < more).to(tl.int32)


@triton.jit
def _total(values, mask):
    return tl.sum(tl.sum(tl.where(mask, values, 0.0), 1), 0)


@triton.jit
def _merge(total, square, count, values, mask, more):
    """Add `more` values to a sum and to a sum of squares about the mean, as Chan, Golub & LeVeque do."""
    added = _total(values, mask)
    mean = added / tl.maximum(more, 1.0)
    deviation = values - mean
    gap = mean - total / tl.maximum(count, 1.0)
    square += _total(deviation * deviation, mask)
    # Without this test, an infinite sum would make a NaN of the first tile's gap times zero.
    square += tl.where((count > 0) & (more > 0), gap * gap * (count * more / (count + more)), 0.0)
    return total + added, square


@triton.jit
def _radii(
    weight,  # [p, C] float64: v, transposed
    bias,  # [C] float64
    own,  # [p, A] float64: v_a, transposed
    anchors,  # [p, A] float64: μ_a, transposed
    classes,  # [A] int64
    radii,  # [parts, A] float64
    p,
    C,
    A,
    parts,
    B: tl.constexpr,
):
    part = tl.program_id(1)
    anchor = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    used = anchor < A
    a = tl.load(classes + anchor, used, 0)
    bias_a = tl.load(bias + a)
    first, last = _share(tl.cdiv(C, B), part, parts)
    radius = tl.full((B,), float("inf"), tl.float64)
    for tile in range(first, last):
        c = tl.cast(tile, tl.int64) * B + tl.arange(0, B)
        lead = tl.zeros((B, B), tl.float64)
        square = tl.zeros((B, B), tl.float64)
        differ = tl.zeros((B, B), tl.int32)
        for k in range(p):
            row = tl.cast(k, tl.int64) * A + anchor
            difference = tl.load(own + row, used, 0.0)[:, None]
            difference -= tl.load(weight + tl.cast(k, tl.int64) * C + c, c < C, 0.0)[None, :]
            lead += difference * tl.load(anchors + row, used, 0.0)[:, None]
            square += difference * difference
            differ |= (difference != 0).to(tl.int32)
        lead = tl.where(tl.abs(lead) < float("inf"), lead, float("nan"))  # an overflow is no distance
        lead += bias_a[:, None] - tl.load(bias + c, c < C, 0.0)[None, :]
        # No boundary where the rows are equal: the larger bias wins everywhere, then the lower index.
        wins = (lead > 0) | ((lead == 0) & (c[None, :] > a[:, None]))
        distance = tl.where(wins & (differ == 0), float("inf"), float("-inf"))
        # Squares that underflowed tell no distance: nothing is certified then.
        distance = tl.where(square > _TINY, lead / tl.sqrt(square), distance)
        distance = tl.where(distance == distance, distance, float("-inf"))  # tl.min would pass over a NaN
        other = (c < C)[None, :] & (c[None, :] != a[:, None])
        radius = tl.minimum(radius, tl.min(tl.where(other, distance, float("inf")), 1))
    tl.store(radii + tl.cast(part, tl.int64) * A + anchor, radius, used)


@triton.jit
def _gram(
    left,  # [p, C] float64, transposed
    right,  # [p, C] float64, transposed
    scale,  # [1] float64: 1/‖G‖, when IDEAL; a division here would be a call that spills
    sums,  # [programs] float64
    p,
    C,
    parts,
    ideal,  # [2] float64: its entries on and off the diagonal, when IDEAL
    B: tl.constexpr,
    IDEAL: tl.constexpr,
):
    """Each program's share of ‖G‖², or with IDEAL of ‖G/‖G‖ − ideal‖²."""
    part = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    first, last = _share(tl.cdiv(C, B), part, parts)
    total = tl.zeros((), tl.float64)
    factor = tl.load(scale) if IDEAL else total
    for tile in range(first, last):
        j = tl.cast(tile, tl.int64) * B + tl.arange(0, B)
        gram = tl.zeros((B, B), tl.float64)
        for k in range(p):
            row = tl.cast(k, tl.int64) * C
            l = tl.load(left + row + i, i < C, 0.0)
            r = tl.load(right + row + j, j < C, 0.0)
            gram += l[:, None] * r[None, :]
        if IDEAL:
            gram = gram * factor - tl.where(i[:, None] == j[None, :], tl.load(ideal), tl.load(ideal + 1))
        total += _total(gram * gram, (i < C)[:, None] & (j < C)[None, :])
    tl.store(sums + tl.program_id(0) * parts + part, total)


def pair_geometry(vectors: torch.Tensor, variances: torch.Tensor | None) -> PairGeometry:
    """Compute `ncfast.ops.pair_geometry` without anything of size C×C."""
    C, p = vectors.shape
    scale = _scale(vectors)
    vectors = vectors * scale
    norms = vectors.norm(dim=1)
    units = torch.where(norms[:, None] > 0, vectors / norms[:, None], 0.0).T.contiguous()
    blocks, parts = _grid(C, C)
    statistics = norms.new_empty(blocks * parts, _STATISTICS.value)
    nearest = norms.new_empty(parts, C)
    index = norms.new_zeros(parts, C, dtype=torch.int64)
    ideal = norms.new_full((1,), -1 / (C - 1))
    with target.active(vectors):
        _pairs[(blocks, parts)](
            vectors.T.contiguous(),
            units,
            norms,
            norms if variances is None else variances * scale * scale,
            statistics,
            nearest,
            index,
            p,
            C,
            parts,
            ideal,
            B=_B,
            CDNV=variances is not None,
            **target.OPTIONS,
        )
    count, cosines, cosine_square, lowest, highest, deviations, kernels, kernel_square, cdnv = statistics.T
    pairs = C * (C - 1)
    cosine_mean, cosine_std = _moments(count, cosines, cosine_square, pairs)
    kernel_mean, kernel_std = _moments(count, kernels, kernel_square, pairs)
    nearest_index = _first_of(nearest, index, C)
    return PairGeometry(
        cosine_mean=cosine_mean,
        cosine_std=cosine_std,
        # tl.min and tl.max pass over a NaN, the mean does not
        cosine_min=torch.where(cosine_mean.isnan(), torch.nan, lowest.min().clamp(min=-1.0)),
        cosine_max=torch.where(cosine_mean.isnan(), torch.nan, highest.max().clamp(max=1.0)),
        max_angle_deviation=deviations.sum() / pairs,
        log_kernel_mean=kernel_mean,
        log_kernel_std=kernel_std,
        etf_error=etf_error(vectors, None),
        nearest_distance=(vectors - vectors[nearest_index]).norm(dim=1) / scale,
        nearest_index=nearest_index,
        cdnv=None if variances is None else cdnv.sum() / pairs,
    )


def etf_error(left: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    """Walk over the pairs twice: for ‖G‖, then for the distance from the ideal."""
    C, p = left.shape
    left = (left * _scale(left)).T.contiguous()
    right = left if right is None else (right * _scale(right)).T.contiguous()
    blocks, parts = _grid(C, C)
    sums = left.new_empty(2, blocks * parts)
    root = math.sqrt(C - 1)
    ideal = left.new_full((2,), -1 / C / root)  # filled on the device: a copy from the host would wait
    ideal[0] = (1 - 1 / C) / root
    norm = ideal
    with target.active(left):
        for second in (False, True):
            _gram[(blocks, parts)](
                left,
                right,
                1 / norm,
                sums[int(second)],
                p,
                C,
                parts,
                ideal,
                B=_B,
                IDEAL=second,
                **target.OPTIONS,
            )
            norm = sums[int(second)].sum().sqrt()
    return norm


def decision_radius(
    weight: torch.Tensor,  # [C, p]
    bias: torch.Tensor,  # [C]
    anchors: torch.Tensor,  # [A, p]
    classes: torch.Tensor,  # [A]
) -> torch.Tensor:  # [A]
    """Compute `ncfast.ops.pair_geometry.decision_radius` by direct differences v_a − v_c."""
    (C, p), A = weight.shape, len(classes)
    if A == 0:
        return weight.new_empty(0)
    scale = _scale(weight)
    weight, bias = weight * scale, bias * scale
    blocks, parts = _grid(A, C)
    radii = weight.new_empty(parts, A)
    with target.active(weight):
        _radii[(blocks, parts)](
            weight.T.contiguous(),
            bias.contiguous(),
            weight[classes].T.contiguous(),
            anchors.T.contiguous(),
            classes.long().contiguous(),
            radii,
            p,
            C,
            A,
            parts,
            B=_B,
            **target.OPTIONS,
        )
    return radii.amin(0)


def _scale(rows: torch.Tensor) -> torch.Tensor:
    """[]: the power of two that makes the largest entry about 1, so that squares stay in range."""
    largest = rows.abs().amax()
    scale = (torch.frexp(largest).mantissa / largest).clamp(max=2.0**1022)
    return torch.where(largest > 0, scale, 1.0)


def _grid(rows: int, others: int) -> tuple[int, int]:
    """Blocks of rows, and parts of the other rows' tiles: enough programs, none without a tile."""
    blocks = triton.cdiv(rows, _B)
    return blocks, max(1, min(triton.cdiv(_PROGRAMS, blocks), triton.cdiv(others, _B)))


def _moments(
    count: torch.Tensor, sums: torch.Tensor, squares: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation from each program's count, sum and squares about its mean."""
    mean = sums.sum() / pairs
    gap = torch.where(count > 0, sums / count - mean, 0.0)
    return mean, ((squares + count * gap.square()).sum() / pairs).sqrt()


def _first_of(smallest: torch.Tensor, index: torch.Tensor, C: int) -> torch.Tensor:
    """[C]: the index that belongs to the smallest of all parts, the lowest on ties."""
    return torch.where(smallest == smallest.amin(0), index, C - 1).amin(0)
