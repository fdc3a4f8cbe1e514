"""class_scatter on GPUs, in Triton.

The p×p scatter is cut into tile pairs I ≥ J and the rows into splits; one program holds one tile pair of
one split in registers, subtracts every row's shift as it loads it, and multiplies on the matrix units.
Long sums leave float32 every `_FLUSH_ROWS` rows: the program adds its tile to its own float64 workspace,
which no other program touches, and `_reduce_splits` adds the splits in order, so there are no float
atomics and the result does not depend on timing. All pairs of a split are launched side by side and walk
through the same rows at about the same time: DRAM sees a row about once, L2 p/BP times. The diagonal does
not come from the matrix units, whose dropped lo·lo term would bias it, but from float32 sums of squares.

Many rows per class: rows are gathered in the order of their labels, every class padded to whole row
tiles. A tile then has one class and loads one row of the shift instead of one per feature row, which
halves the traffic from L2; the gather costs nothing, since a piece of a row is at least 64 contiguous
elements wide, and sorting the labels moves a few bytes per row. Programs on the diagonal also store each
tile's column sums and each row's sum of squares, all that sums, sumsq and radii need: the features are
read once. Few rows per class (a batch, a vocabulary): padding would cost more than it saves, so the pairs
walk through the rows as they are and `_class_sums` reads them again, for a batch out of L2. Then nothing
is sorted either up to `_SCANNED_ROWS` rows: a batch takes four launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ncfast.ops import target
from ncfast.ops.class_scatter import ClassScatter
from ncfast.ops.target import refuses

__all__ = ["class_scatter", "refuses"]

_FLUSH_ROWS = 2048  # float32 sums are at most this long; a flush costs as much L2 traffic as 256 rows
_FLUSH_PIECE = tl.constexpr(2048)  # cells at a time: a whole tile in float64 would not fit the registers
_SCANNED_ROWS = 1024  # up to here every class looks through all labels, which is cheaper than sorting them
_SUM_ROWS, _SUM_COLUMNS = 32, 128  # the tile of `_class_sums`
_NORM_ROWS = 128  # the tile of `_row_norms`
_BLOCK = 1024  # of `_place_rows`
_PROGRAMS = 512  # to fill any GPU of today (132 to 304 multiprocessors) at least once


@triton.jit
def _scatter_pairs(
    features,  # [N, p]
    shift,  # [C, p] float32
    rows,  # [slots] int64: the row in each slot, −1 for none (GROUPED), else unused
    labels,  # GROUPED: [slots] int32, the class in each slot; else [N] the labels
    tiles_used,  # [1] int64: row tiles in use (GROUPED), else unused
    partial,  # [splits, pairs, BP, BP] float32: between registers and `work`
    work,  # [splits, pairs, BP, BP] float64
    column_squares,  # [splits, p] float64
    group_sums,  # [tiles, p] float32: Σ(h − k) over each row tile (GROUPED)
    row_squares,  # [column tiles, slots] float32: Σ(h − k)² over each piece of a row (GROUPED)
    N,
    p,
    C,
    slots,
    ignore_index,
    pairs,
    splits,
    stride_row,
    stride_column,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPED: tl.constexpr,
    FLUSH: tl.constexpr,
):
    pair = tl.program_id(0) % pairs
    split = (tl.program_id(0) // pairs).to(tl.int64)
    I, J = _tile_pair(pair)
    left_columns = I * BP + tl.arange(0, BP)
    right_columns = J * BP + tl.arange(0, BP)
    left_used = left_columns < p
    right_used = right_columns < p
    left_offset = left_columns.to(tl.int64) * stride_column
    right_offset = right_columns.to(tl.int64) * stride_column
    tiles = tl.load(tiles_used) if GROUPED else split * 0 + tl.cdiv(N, BN)
    first = tiles * split // splits
    last = tiles * (split + 1) // splits
    own = (split * pairs + pair) * BP * BP
    cell = partial + own + tl.arange(0, BP)[:, None] * BP + tl.arange(0, BP)[None, :]
    for start in range(
        first, tl.maximum(last, first + 1), FLUSH
    ):  # at least once: the workspace is not zeroed
        scatter = tl.zeros((BP, BP), tl.float32)
        squares = tl.zeros((BP,), tl.float32)
        for tile in range(start, tl.minimum(start + FLUSH, last)):
            slot = tile * BN + tl.arange(0, BN)
            if GROUPED:
                row = tl.load(rows + slot)
                used = row >= 0
                label = tl.load(labels + tile * BN).to(tl.int64)
                left_shift = tl.load(shift + label * p + left_columns, left_used, 0.0)[None, :]
                right_shift = tl.load(shift + label * p + right_columns, right_used, 0.0)[None, :]
            else:
                row = slot
                label = tl.load(labels + slot, slot < N, -1)
                used = (slot < N) & (label >= 0) & (label < C) & (label != ignore_index)
                k = shift + label.to(tl.int64)[:, None] * p
                left_shift = tl.load(k + left_columns[None, :], used[:, None] & left_used[None, :], 0.0)
                right_shift = tl.load(k + right_columns[None, :], used[:, None] & right_used[None, :], 0.0)
            h = features + row[:, None] * stride_row
            left_mask = used[:, None] & left_used[None, :]
            right_mask = used[:, None] & right_used[None, :]
            left = tl.load(h + left_offset[None, :], left_mask, 0.0).to(tl.float32)
            right = tl.load(h + right_offset[None, :], right_mask, 0.0).to(tl.float32)
            left = tl.where(left_mask, left - left_shift, 0.0)
            right = tl.where(right_mask, right - right_shift, 0.0)
            if I == J:
                square = left * left
                squares += tl.sum(square, 0)
                if GROUPED:
                    tl.store(row_squares + I.to(tl.int64) * slots + slot, tl.sum(square, 1))
                    tl.store(group_sums + tile * p + left_columns, tl.sum(left, 0), left_used)
            scatter = _add_product(scatter, left, right, PRECISION)
        tl.store(cell, scatter)
        tl.debug_barrier()  # what one thread wrote, another adds
        for piece in range(0, BP * BP, _FLUSH_PIECE):
            place = own + piece + tl.arange(0, _FLUSH_PIECE)
            total = tl.load(partial + place).to(tl.float64)
            if start > first:
                total += tl.load(work + place)
            tl.store(work + place, total)
        square_total = squares.to(tl.float64)
        square_cell = column_squares + split * p + left_columns
        if start > first:
            square_total += tl.load(square_cell, left_used & (left_columns == right_columns), 0.0)
        tl.store(square_cell, square_total, left_used & (left_columns == right_columns))
        tl.debug_barrier()  # before the next flush overwrites what is being added


@triton.jit
def _tile_pair(pair):
    """The pair-th (I, J) of (0, 0), (1, 0), (1, 1), (2, 0), …"""
    I = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    I = tl.where(pair < I * (I + 1) // 2, I - 1, I)  # the square root is rounded
    I = tl.where(pair >= (I + 1) * (I + 2) // 2, I + 1, I).to(tl.int64)
    return I, pair - I * (I + 1) // 2


@triton.jit
def _add_product(total, left, right, PRECISION: tl.constexpr):
    """Total + leftᵀ right with three, two or one bfloat16 planes per operand, the smallest products first."""
    left_high = left.to(tl.bfloat16)
    right_high = right.to(tl.bfloat16)
    if PRECISION != "medium":
        left_rest = left - left_high.to(tl.float32)
        right_rest = right - right_high.to(tl.float32)
        left_middle = left_rest.to(tl.bfloat16)
        right_middle = right_rest.to(tl.bfloat16)
        if PRECISION == "highest":
            left_low = (left_rest - left_middle.to(tl.float32)).to(tl.bfloat16)
            right_low = (right_rest - right_middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(tl.trans(left_low), right_high, total)
            total = tl.dot(tl.trans(left_high), right_low, total)
            total = tl.dot(tl.trans(left_middle), right_middle, total)
        total = tl.dot(tl.trans(left_middle), right_high, total)
        total = tl.dot(tl.trans(left_high), right_middle, total)
    return tl.dot(tl.trans(left_high), right_high, total)


@triton.jit
def _reduce_splits(
    work, column_squares, scatter, p, pairs, splits, BP: tl.constexpr, BM: tl.constexpr
):  # one program per BM rows of a tile pair
    pair = tl.program_id(0).to(tl.int64)
    I, J = _tile_pair(pair)
    within = tl.program_id(1) * BM + tl.arange(0, BM)
    i = I * BP + within
    j = J * BP + tl.arange(0, BP)
    cell = pair * BP * BP + within[:, None] * BP + tl.arange(0, BP)[None, :]
    on_diagonal = i[:, None] == j[None, :]
    total = tl.zeros((BM, BP), tl.float64)
    squares = tl.zeros((BM,), tl.float64)
    for split in range(splits):
        total += tl.load(work + cell + tl.cast(split, tl.int64) * pairs * BP * BP)
        squares += tl.load(
            column_squares + tl.cast(split, tl.int64) * p + i, (i < p) & (J * BP + within == i), 0.0
        )
    total = tl.where(on_diagonal, squares[:, None], total)
    lower = (i[:, None] >= j[None, :]) & (i < p)[:, None]
    tl.store(scatter + i[:, None] * p + j[None, :], total, lower)
    tl.store(scatter + j[None, :] * p + i[:, None], total, lower & (i[:, None] > j[None, :]))


@triton.jit
def _place_rows(order, keys, move, rows, labels, N, C, BLOCK: tl.constexpr):
    """Put the i-th row in label order into the slot i + move[its class]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + i, i < N, C)
    used = key < C
    slot = i + tl.load(move + key, used, 0)
    tl.store(rows + slot, tl.load(order + i, used, 0), used)
    tl.store(labels + slot, key, used)


@triton.jit
def _class_sums(
    features,  # [N, p]
    shift,  # [C, p] float32
    labels,  # [N], when SOURCE is "labels"
    rows,  # [slots] int64 the row in each slot, when SOURCE is "slots"
    group_sums,  # [tiles, p] float32, when SOURCE is "groups"
    starts,  # [C] int64: the class's first slot or tile
    lengths,  # [C] int64: its slots or tiles
    sums,  # [parts, C, p] float64
    row_squares,  # [column tiles, slots] float32, unless SOURCE is "groups"
    N,
    p,
    C,
    slots,
    ignore_index,
    parts,
    stride_row,
    stride_column,
    BN: tl.constexpr,
    BP: tl.constexpr,
    SOURCE: tl.constexpr,
):  # one program per class, part of its rows, and BP columns
    c = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BP + tl.arange(0, BP)
    inside = columns < p
    if SOURCE == "labels":
        first = c * 0
        last = first + N
        k = tl.load(shift + c * p + columns, inside, 0.0)
    else:
        start = tl.load(starts + c)
        length = tl.load(lengths + c)
        first = start + length * part // parts
        last = start + length * (part + 1) // parts
        k = tl.load(shift + c * p + columns, inside, 0.0)
    total = tl.zeros((BP,), tl.float64)
    for begin in range(first, last, BN):
        slot = begin + tl.arange(0, BN)
        used = slot < last
        if SOURCE == "groups":
            d = tl.load(
                group_sums + slot[:, None] * p + columns[None, :], used[:, None] & inside[None, :], 0.0
            )
        else:
            if SOURCE == "labels":
                row = slot
                label = tl.load(labels + slot, used, -1)
                used = used & (label == c) & (label != ignore_index)
            else:
                row = tl.load(rows + slot, used, 0)
            h = features + row[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
            mask = used[:, None] & inside[None, :]
            d = tl.where(mask, tl.load(h, mask, 0.0).to(tl.float32) - k[None, :], 0.0)
            squares = row_squares + tl.program_id(1).to(tl.int64) * slots + slot
            tl.store(squares, tl.sum(d * d, 1), used)
        total += tl.sum(d, 0).to(tl.float64)
    tl.store(sums + (part * C + c) * p + columns, total, inside)


@triton.jit
def _row_norms(
    row_squares,  # [column tiles, slots] float32
    labels,  # [N], when SCAN
    rows,  # [slots] int64, unless SCAN
    starts,  # [C] int64, unless SCAN
    counts,  # [C] int64: written when SCAN, else read
    sumsq,  # [parts, C] float64
    radii,  # [N] float32, NaN where nothing is written, when RADII
    N,
    C,
    slots,
    ignore_index,
    column_tiles,
    parts,
    BN: tl.constexpr,
    SCAN: tl.constexpr,
    RADII: tl.constexpr,
):  # one program per class and part of its rows
    c = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    if SCAN:
        first = c * 0
        last = first + N
    else:
        start = tl.load(starts + c)
        length = tl.load(counts + c)
        first = start + length * part // parts
        last = start + length * (part + 1) // parts
    total = tl.zeros((BN,), tl.float64)
    seen = tl.zeros((BN,), tl.int64)
    for begin in range(first, last, BN):
        slot = begin + tl.arange(0, BN)
        used = slot < last
        row = slot
        if SCAN:
            label = tl.load(labels + slot, used, -1)
            used = used & (label == c) & (label != ignore_index)
        square = tl.zeros((BN,), tl.float32)
        for tile in range(column_tiles):
            square += tl.load(row_squares + tl.cast(tile, tl.int64) * slots + slot, used, 0.0)
        total += square.to(tl.float64)
        seen += used.to(tl.int64)
        if RADII:
            if not SCAN:
                row = tl.load(rows + slot, used, 0)
            tl.store(radii + row, tl.sqrt_rn(square), used)
    tl.store(sumsq + part * C + c, tl.sum(total, 0))
    if SCAN:
        tl.store(counts + c, tl.sum(seen, 0))


class Tile(NamedTuple):
    """How `_scatter_pairs` is cut: BP×BP cells of the scatter, BN rows at a time."""

    BP: int
    BN: int
    warps: int
    stages: int

    def shared_bytes(self, architecture: str, precision: str, element_size: int) -> int:
        """A bound on the shared memory of one program."""
        planes = {"highest": 3, "high": 2, "medium": 1}[precision]  # of 2 bytes, per operand
        operands = 2 * self.BN * self.BP * 2 * planes
        flushed = 4 * self.BP * self.BP  # the tile on its way from the matrix layout to a row-wise one
        if architecture.startswith("gfx"):
            return max(operands, flushed)  # what is being fetched waits in registers
        fetched = (self.stages - 1) * 2 * self.BN * (self.BP * (element_size + 4) + 16)  # features and shift
        return max(operands + fetched, flushed) + 8192  # reductions across warps


def choose_tile(
    architecture: str, precision: str, element_size: int, N: int, p: int, C: int, aligned: bool
) -> Tile:
    """The largest tile that `benchmarks.codegen` finds free of spills; a small one for little work.

    sm_80, sm_86, sm_89 and sm_120 hold operands in registers (mma.sync), the others read them from shared
    memory. Rows that are not `aligned` are fetched element by element, and every element takes registers for
    its address: half as many rows then.
    """
    little = p <= 64 or N <= 4096
    if not aligned and not architecture.startswith("gfx"):
        if little or (architecture in target.OPERANDS_IN_REGISTERS and precision != "medium"):
            return Tile(64, 16, 4, 2)
        return Tile(128, 16, 8, 2)
    if architecture in target.OPERANDS_IN_REGISTERS:
        if precision == "highest":
            return Tile(64, 16, 4, 2) if N >= 64 * C else Tile(128, 16, 8, 2)  # grouped or not
        if precision == "high":
            two_spill = architecture == "sm_120" or element_size == 2
            return Tile(64, 32, 8, 2) if little else Tile(128, 16, 8, 1 if two_spill else 2)
    return Tile(64, 32, 4, 2) if little else Tile(128, 32, 8, 2)


def class_scatter(
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p] float32
    *,
    scatter: bool = True,
    radii: bool = False,
    precision: str = "high",
    ignore_index: int = -100,
) -> ClassScatter:
    """Compute `ncfast.ops.class_scatter`; a label outside [0, C) is left out. Never synchronises."""
    (N, p), C = features.shape, shift.shape[0]
    shift, labels = shift.contiguous(), labels.contiguous()
    product = distances = None
    with target.active(features):
        aligned = target.aligned(features)
        tile = choose_tile(target.architecture(), precision, features.element_size(), N, p, C, aligned)
        # Padding every class to whole tiles then adds an eighth of the rows at most, on average.
        grouped = scatter and N >= 4 * tile.BN * C
        rows = _rows_by_class(labels, C, ignore_index, tile.BN if grouped else None)
        group_sums = row_squares = features.new_empty(0, dtype=torch.float32)
        if grouped:
            group_sums = row_squares.new_empty(rows.slots // tile.BN, p)
            row_squares = row_squares.new_empty(triton.cdiv(p, tile.BP), rows.slots)
        if scatter:
            product = _scatter(features, shift, rows, tile, precision, ignore_index, group_sums, row_squares)
        if radii:
            distances = features.new_full((N,), torch.nan, dtype=torch.float32)
        if not grouped:
            row_squares = row_squares.new_empty(triton.cdiv(p, _SUM_COLUMNS), N)
        sums = _sums(features, shift, rows, ignore_index, group_sums, row_squares)
        sumsq = _norms(row_squares, rows, ignore_index, N, C, distances)
    return ClassScatter(rows.counts, sums, sumsq, product, distances)


class _Rows(NamedTuple):
    """Where the rows of each class are: in slots that follow each other, or known from the labels only."""

    labels: torch.Tensor
    """[N] as given; when grouped [slots], the class in each slot."""
    slots: int
    rows: torch.Tensor | None
    """[slots] int64: the row in each slot, −1 for none; None when not sorted."""
    starts: torch.Tensor | None
    """[C] int64: each class's first slot; None when not sorted."""
    counts: torch.Tensor
    """[C] int64; `_row_norms` fills it when not sorted."""
    tiles: torch.Tensor | None
    """[C + 1] int64, when grouped: each class's first row tile, and the number of tiles."""


def _rows_by_class(labels: torch.Tensor, C: int, ignore_index: int, BN: int | None) -> _Rows:
    """Sort the rows by class, each class padded to whole tiles of BN; leave a small batch as it is."""
    N = len(labels)
    if BN is None and N <= _SCANNED_ROWS:
        return _Rows(labels, N, None, None, labels.new_empty(C, dtype=torch.int64), None)
    used = (labels >= 0) & (labels < C) & (labels != ignore_index)
    keys, order = torch.where(used, labels, C).to(torch.int32).sort(stable=True)
    bounds = torch.searchsorted(keys, torch.arange(C + 1, dtype=torch.int32, device=keys.device))
    counts = bounds.diff()
    if BN is None:
        return _Rows(labels, N, order, bounds[:C], counts, None)
    tiles = bounds.new_zeros(C + 1)
    torch.cumsum((counts + (BN - 1)) // BN, 0, out=tiles[1:])
    starts = tiles[:C] * BN
    slots = (N // BN + C) * BN  # at most: how many there are is known on the device only
    rows = order.new_full((slots,), -1)
    slot_labels = keys.new_zeros(slots)
    _place_rows[(triton.cdiv(N, _BLOCK),)](
        order, keys, starts - bounds[:C], rows, slot_labels, N, C, BLOCK=_BLOCK, **target.OPTIONS
    )
    return _Rows(slot_labels, slots, rows, starts, counts, tiles)


def _scatter(
    features: torch.Tensor,
    shift: torch.Tensor,
    rows: _Rows,
    tile: Tile,
    precision: str,
    ignore_index: int,
    group_sums: torch.Tensor,
    row_squares: torch.Tensor,
) -> torch.Tensor:
    """[p, p] float64; when grouped, also fill `group_sums` and `row_squares`."""
    N, p = features.shape
    blocks = triton.cdiv(p, tile.BP)
    pairs = blocks * (blocks + 1) // 2
    splits = max(1, min(triton.cdiv(_PROGRAMS, pairs), N // (8 * tile.BN)))
    work = features.new_empty(splits, pairs, tile.BP, tile.BP, dtype=torch.float64)
    column_squares = work.new_empty(splits, p)
    grouped = rows.tiles is not None
    _scatter_pairs[(pairs * splits,)](
        features,
        shift,
        rows.rows if grouped else rows.labels,
        rows.labels,
        rows.labels if rows.tiles is None else rows.tiles[-1:],
        torch.empty_like(work, dtype=torch.float32),
        work,
        column_squares,
        group_sums,
        row_squares,
        N,
        p,
        shift.shape[0],
        rows.slots,
        ignore_index,
        pairs,
        splits,
        *features.stride(),
        BN=tile.BN,
        BP=tile.BP,
        PRECISION=precision,
        GROUPED=grouped,
        FLUSH=_FLUSH_ROWS // tile.BN,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({} if target.aligned(features) else target.all_registers()),
        **target.OPTIONS,
    )
    product = work.new_empty(p, p)
    BM = 16
    _reduce_splits[(pairs, tile.BP // BM)](
        work, column_squares, product, p, pairs, splits, BP=tile.BP, BM=BM, **target.OPTIONS
    )
    return product


def _sums(
    features: torch.Tensor,
    shift: torch.Tensor,
    rows: _Rows,
    ignore_index: int,
    group_sums: torch.Tensor,
    row_squares: torch.Tensor,
) -> torch.Tensor:
    """[C, p] float64; unless grouped, also fill `row_squares`."""
    (N, p), C = features.shape, shift.shape[0]
    starts, lengths, source, length = rows.starts, rows.counts, "slots", N
    if rows.starts is None:
        starts, source = rows.counts, "labels"
    elif rows.tiles is not None:
        starts, lengths, source, length = rows.tiles, rows.tiles.diff(), "groups", len(group_sums)
    blocks = triton.cdiv(p, _SUM_COLUMNS)
    parts = _parts(length, C, blocks, source == "labels")
    sums = features.new_empty(parts, C, p, dtype=torch.float64)
    _class_sums[(C, blocks, parts)](
        features,
        shift,
        rows.labels,
        rows.labels if rows.rows is None else rows.rows,
        group_sums,
        starts,
        lengths,
        sums,
        row_squares,
        N,
        p,
        C,
        rows.slots,
        ignore_index,
        parts,
        *features.stride(),
        BN=_SUM_ROWS,
        BP=_SUM_COLUMNS,
        SOURCE=source,
        **target.OPTIONS,
    )
    return sums[0] if parts == 1 else sums.sum(0)


def _norms(
    row_squares: torch.Tensor, rows: _Rows, ignore_index: int, N: int, C: int, radii: torch.Tensor | None
) -> torch.Tensor:
    """[C] float64 sums of squares; also fill `radii`, and the counts where they are not known."""
    scan = rows.starts is None
    parts = _parts(N, C, 1, scan)
    sumsq = row_squares.new_empty(parts, C, dtype=torch.float64)
    _row_norms[(C, parts)](
        row_squares,
        rows.labels,
        rows.counts if scan else rows.rows,
        rows.counts if scan else rows.starts,
        rows.counts,
        sumsq,
        sumsq if radii is None else radii,
        N,
        C,
        rows.slots,
        ignore_index,
        row_squares.shape[0],
        parts,
        BN=_NORM_ROWS,
        SCAN=scan,
        RADII=radii is not None,
        **target.OPTIONS,
    )
    return sumsq[0] if parts == 1 else sumsq.sum(0)


def _parts(length: int, C: int, blocks: int, scan: bool) -> int:
    """Into how many parts to cut the `length` slots of C classes: enough programs, none of them idle."""
    return 1 if scan else max(1, min(triton.cdiv(_PROGRAMS, C * blocks), length // (C * 4 * _SUM_ROWS)))
