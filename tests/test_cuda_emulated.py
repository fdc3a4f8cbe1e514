"""The CUDA kernels without a GPU: the plan that would be launched, its PTX executed by an emulator.

NCFAST_PTX_EMULATOR is the folder of the package `ptxemu`. The emulator checks the bounds and the alignment of
every access, and shared memory for races.
"""

import contextlib
import os
import pathlib
import re
import shutil
import struct
import sys
import types

import pytest
import torch

import ncfast
from ncfast.ops import dispatch
from ncfast.ops.class_scatter import class_scatter, shift_dtype

from oracle import PRODUCTS, assert_scatter_close, assert_within

_cuda = pytest.importorskip("ncfast._cuda", reason="ncfast was built without CUDA")
from ncfast.ops import launch as launching  # noqa: E402
from ncfast.ops.certify import certify  # noqa: E402
from ncfast.ops.certify import cuda as certify_cuda  # noqa: E402
from ncfast.ops.class_scatter import cuda  # noqa: E402

EMULATOR = os.environ.get("NCFAST_PTX_EMULATOR", "")
if not pathlib.Path(EMULATOR, "ptxemu").is_dir() or not EMULATOR:
    pytest.skip("NCFAST_PTX_EMULATOR names no PTX emulator", allow_module_level=True)
if shutil.which("nvcc") is None:
    pytest.skip("there is no nvcc", allow_module_level=True)
sys.path.append(EMULATOR)
import ptxemu  # noqa: E402

CSRC = pathlib.Path(__file__).parents[1] / "csrc"
KERNELS = {  # of each source, how their names begin
    "class_moments": ("moments_", "digit_"),
    "class_scatter": ("scatter_",),
    "certify": ("certify_",),
}

SHAPES = [  # N, p, C
    (0, 3, 2),  # no rows: zeros are written all the same
    (1, 1, 1),  # the smallest
    (2, 1, 3),  # more classes than rows
    (33, 17, 5),  # scalars: no row but the first is aligned
    (9, 4, 1),  # one vector per row, one row above a run
    (300, 96, 3),  # 24 or 12 vectors: teams of part of a warp, classes of many runs
    (257, 95, 300),  # C > p, most classes absent; two passes of the sort
    (70, 1040, 2),  # several passes over the columns
    (4200, 8, 70_000),  # three tiles and three passes of the sort
]


@pytest.fixture(scope="module")
def ptx():
    return {
        name: ptxemu.nvcc_ptx(str(CSRC / f"cuda/{name}.cu"), "sm_80", ["-std=c++17", f"-I{CSRC}"])
        for name in ("class_moments", "class_scatter", "certify")
    }


def emulate(ptx, call, memory, race=True, grids=None, fill=0xA5, backwards=False):
    """Execute the plan of a call on its CPU addresses; every byte of the workspace starts as `fill`.

    `grids` names kernels of which only so many blocks are to run. Backwards, they run one by one, the last
    block first.
    """
    # One allocation's addresses are aligned to 64; the plan may ask for 256 and gets it.
    room = torch.full((_cuda.workspace(call) + 256,), fill, dtype=torch.uint8)
    start = -room.data_ptr() % 256
    parts = [room.numpy()[start:][first : first + size] for first, size in _cuda.parts(call)]
    ran = []
    for launch in _cuda.plan(call, room.data_ptr() + start):
        ran.append(launch.kernel)
        grid = (grids or {}).get(launch.kernel, launch.grid)
        if grid == 0:
            continue
        (source,) = (name for name, kernels in KERNELS.items() if launch.kernel.startswith(kernels))
        ptxemu.launch(
            from_the_last_block(ptx[source]) if backwards else ptx[source],
            grid,
            launch.block,
            [launch.parameters],
            kernel=launch.kernel,
            shared=launch.shared,
            memory=[*parts, *memory],
            race=race,
            chunk=launch.block if backwards else ptxemu.DEFAULT_CHUNK,
        )
    return ran


def from_the_last_block(ptx):
    """The same kernels, each block doing what the one as far from the other end of the grid does."""
    opposite = r"\g<0> not.b32 \1, \1; add.s32 \1, \1, %nctaid.x;"
    turned, count = re.subn(r"mov\.u32\s+(%r\d+), %ctaid\.x;", opposite, ptx)
    assert count == ptx.count("%ctaid.x") > 0
    return turned


def execute(
    ptx,
    features,
    labels,
    shift,
    scatter=False,
    radii=True,
    precision="high",
    ignore_index=-100,
    in_use=None,
    **emulation,
):
    """What `cuda.class_scatter` does, with the launch emulated and the results poisoned; also what ran.

    Of the features the kernels may read the rows `in_use` alone, if that is given.
    """
    result, call, read = cuda.describe(
        features,
        labels,
        shift.to(shift_dtype(features.dtype)),
        scatter,
        radii,
        precision,
        ignore_index,
    )
    outputs = [tensor for tensor in result if tensor is not None]
    for tensor in outputs:  # NaN is an answer among the radii
        tensor.fill_(-1 if tensor.dtype == torch.int64 or tensor is result.radii else torch.nan)
    if in_use is not None:
        assert read[0] is features
        read = [features[in_use].numpy(), *read[1:]]  # of a tensor the emulator takes the whole storage
    ran = emulate(ptx, call, [*read, *outputs], **emulation)
    return result, ran


def emulate_room(monkeypatch, ptx, room):
    """Have the backend of a room take CPU tensors, and emulate what it would launch."""
    tensors, described = [], room.describe

    def describe(*arguments):
        result, call, read = described(*arguments)
        tensors[:] = [*read, *(tensor for tensor in result if tensor is not None)]
        return result, call, read

    monkeypatch.setattr(room, "describe", describe)
    monkeypatch.setattr(room, "refuses", lambda _: None)
    monkeypatch.setattr(room, "run", lambda call, _: emulate(ptx, call, tensors))


def sample(N, p, C, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = 3 + torch.randn(C, p, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    labels[: N // 2] = min(1, C - 1)  # half of the rows in one class
    labels = labels[torch.randperm(N, generator=generator)]
    features = (means[labels] + torch.randn(N, p, generator=generator)).to(dtype)
    labels[torch.rand(N, generator=generator) < 0.15] = -100
    return features, labels, means + 0.5 * torch.randn(C, p, generator=generator)


def assert_close(result, features, labels, shift, ignore_index=-100, precision="high"):
    """Differences carry one rounding, u |h - k|; float64 adds N + p roundings of what was summed."""
    shift = shift.to(shift_dtype(features.dtype))
    with ncfast.use_backend("reference"):
        truth = class_scatter(
            features, labels, shift, scatter=result.scatter is not None, radii=True, ignore_index=ignore_index
        )
    assert torch.equal(result.counts, truth.counts)
    N, p = features.shape
    unit = 2.0**-53 if features.dtype == torch.float64 else 2.0**-24
    relative = 2 * unit + (N + p + 8) * 2.0**-52
    kept = labels != ignore_index
    y = labels[kept].long()
    magnitude = (features[kept].double() - shift.double()[y]).abs()
    summed = torch.zeros_like(truth.sums).index_add_(0, y, magnitude)
    assert ((result.sums - truth.sums).abs() <= relative * summed).all()
    assert ((result.sumsq - truth.sumsq).abs() <= 2 * relative * truth.sumsq).all()
    if result.radii is not None:
        assert torch.equal(result.radii.isnan(), ~kept)
        bound = (relative + unit) * truth.radii[kept]
        assert ((result.radii[kept].double() - truth.radii[kept]).abs() <= bound).all()
    if result.scatter is not None:
        assert_scatter_close(result.scatter, truth.scatter, N, precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_moments(ptx, shape, dtype):
    features, labels, shift = sample(*shape, dtype)
    result, ran = execute(ptx, features, labels, shift, race=shape[0] < 1000)
    assert_close(result, features, labels, shift)
    vector = 16 // dtype.itemsize if shape[1] * dtype.itemsize % 16 == 0 else 1
    assert shape[0] == 0 or any(name.endswith(f"ELi{vector}E") for name in ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 1])
def test_teams_of_several_warps(ptx, dtype, start):
    """512 pieces of 16 bytes, or elements of rows that are not aligned: a block passes over them twice."""
    p = 512 if start else 512 * 16 // dtype.itemsize
    features, labels, shift = sample(20, p + 16, 2, dtype)
    features, shift = features[:, start : start + p], shift[:, :p]
    _, call, _ = cuda.describe(features, labels, shift, False, True, "high", -100)
    (rows,) = [launch for launch in _cuda.plan(call, 0) if launch.kernel.startswith("moments_rows")]
    run, team = struct.unpack("ii", rows.parameters[-8:])
    assert (run, team) == (8, 256)
    result, _ = execute(ptx, features, labels, shift)
    assert_close(result, features, labels, shift)


def test_rows_far_apart(ptx):
    """2 GiB from row to row, offsets beyond 32 bits. Memory that is not written to is not taken either."""
    far = torch.empty(2**30 + 16).as_strided((3, 8), (2**29 + 4, 1))
    near, _, shift = sample(3, 8, 2)
    far.copy_(near)
    labels = torch.tensor([1, 0, 1])
    for scatter in (False, True):
        result, ran = execute(ptx, far, labels, shift, scatter=scatter)
        assert_close(result, near, labels, shift)
        assert any(name.startswith("moments_rows") and name.endswith("ELi4E") for name in ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(ptx, dtype):
    """Rows padded to 16 bytes with an odd p, rows off by an element, and aligned rows within others."""
    for start, stop, vector in ((0, 45, True), (1, 46, False), (8, 11, True)):
        wide, labels, shift = sample(40, 64, 3, dtype)
        features = wide[::2, start:stop]
        result, ran = execute(ptx, features, labels[::2], shift[:, start:stop])
        assert_close(result, features, labels[::2], shift[:, start:stop])
        assert any(name.endswith(f"ELi{16 // dtype.itemsize if vector else 1}E") for name in ran)


def test_labels(ptx):
    """int32, strided, another ignore_index; labels out of range are left out as well."""
    features, labels, shift = sample(60, 8, 4)
    narrow = torch.stack([labels.clamp(min=0), labels], 1).int()[:, 0]
    result, _ = execute(ptx, features, narrow, shift, ignore_index=2)
    assert_close(result, features, narrow, shift, ignore_index=2)
    labels[::3], labels[1::3] = 4, -1
    result, _ = execute(ptx, features, labels, shift, ignore_index=-5)
    out = torch.where((labels < 0) | (labels >= 4), -100, labels)
    assert_close(result, features, out, shift)


def test_long_runs(ptx):
    """Enough rows for runs of 32; few are used, so that few are emulated. Row i is the numbers from i on."""
    N, p, C = 66_000, 256, 3
    features = torch.randn(N + p - 1).unfold(0, p, 1)
    labels = torch.full((N,), -100)
    kept = torch.arange(7, N, 443)
    labels[kept] = torch.randint(0, C, kept.shape)
    shift = torch.randn(C, p)
    result, call, read = cuda.describe(features, labels, shift, False, True, "high", -100)
    groups = [-(-N // (32 * 32**level)) for level in (1, 2, 3)]  # of 32 runs of 32 rows; of 32 such; of these
    joins = [one.grid for one in _cuda.plan(call, 0) if one.kernel == "moments_join"]
    assert joins == [-(-9 * n // 8) for n in groups]  # 257 columns are nine tiles; a block has eight warps
    assert groups[-1] == 1
    emulate(ptx, call, [*read, *(t for t in result if t is not None)], race=False)
    assert int(result.radii.isnan().sum()) == N - len(kept)
    assert_close(result._replace(radii=result.radii[kept]), features[kept], labels[kept], shift)


def test_classes_of_many_runs(ptx):
    """Runs of 8 rows, groups of 256, of 8192, of all: classes that end at the end of each, or one row beside.

    Of whole numbers, whose sums are exact in any order.
    """
    ends = [255, 256, 512, 520, 527, 528, 768, 1025, 1280, 1282, 8192, 16384, 16385, 16385, 25_000, 25_003]
    N, p, C = ends[-1], 4, len(ends)
    counts = torch.tensor([0, *ends]).diff()
    labels = torch.arange(C).repeat_interleave(counts)[torch.randperm(N)]
    features, shift = torch.randint(-9, 10, (N, p)).float(), torch.randint(-9, 10, (C, p)).float()
    result, ran = execute(ptx, features, labels, shift, race=False)
    assert ran.count("moments_join") == 3
    with ncfast.use_backend("reference"):
        truth = class_scatter(features, labels, shift, scatter=False)
    assert torch.equal(result.counts, counts)
    assert torch.equal(result.sums, truth.sums)
    assert torch.equal(result.sumsq, truth.sumsq)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("in_use", [slice(10, 47), slice(0, 0)])  # runs and row tiles end within; none
def test_ignored_rows_are_never_read(ptx, in_use, scatter):
    features, labels, shift = sample(60, 8, 4)
    kept = torch.zeros(60, dtype=torch.bool)
    kept[in_use] = True
    labels = torch.where(kept, labels.clamp(min=0), -100)
    features[~kept] = torch.nan
    result, _ = execute(ptx, features, labels, shift, scatter=scatter, radii=False, in_use=in_use)
    assert result.radii is None
    assert result.counts.sum() == kept.sum()
    assert_close(result, features.nan_to_num(), labels, shift)


def assert_the_same(first, again):
    """Bit for bit, whatever the workspace held (0xFF are NaNs) and in whatever order the blocks ran."""
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())


def test_is_deterministic_and_translates(ptx):
    features, labels, shift = sample(1500, 20, 3)
    assert_the_same(
        execute(ptx, features, labels, shift)[0],
        execute(ptx, features, labels, shift, race=False, fill=0xFF, backwards=True)[0],
    )
    # Integers about 2²⁰ are exact: translation changes no bit.
    exact, near = features.round(), shift.round()
    here, _ = execute(ptx, exact, labels, near)
    there, _ = execute(ptx, exact + 2**20, labels, near + 2**20)
    assert torch.equal(here.sums, there.sums)
    assert torch.equal(here.sumsq, there.sumsq)


@pytest.mark.parametrize("withheld", [0, 1, 2])
@pytest.mark.parametrize("scatter", [False, True])
def test_every_bound_is_checked(ptx, withheld, scatter):
    """The emulator is no rubber stamp: it refuses features, labels or a shift that end one row early."""
    inputs = [tensor.contiguous() for tensor in sample(16, 8, 2)]
    inputs[1].clamp_(min=0)
    result, call, read = cuda.describe(*inputs, scatter, True, "high", -100)
    allowed = [tensor.numpy() for tensor in (*read, *(t for t in result if t is not None))]
    allowed[withheld] = allowed[withheld][:-1]
    with pytest.raises(ptxemu.PTXError, match="out-of-bounds"):
        emulate(ptx, call, allowed)


def test_alignment_is_checked(ptx, monkeypatch):
    """Nor does the emulator let pass 16 bytes read from rows that begin 4 bytes off."""
    features, labels, shift = sample(17, 8, 2)
    _, call, read = (
        described := cuda.describe(features[:16], labels[:16], shift, False, False, "high", -100)
    )
    was, off = (struct.pack("Q", features.data_ptr() + offset) for offset in (0, 4))

    def plan(call, workspace):
        for one in make(call, workspace):
            given = {name: getattr(one, name) for name in ("kernel", "grid", "block", "shared")}
            yield types.SimpleNamespace(**given, parameters=one.parameters.replace(was, off))

    make = _cuda.plan
    monkeypatch.setattr(_cuda, "plan", plan)
    memory = [*read, *(tensor for tensor in described[0] if tensor is not None)]
    with pytest.raises(ptxemu.PTXError, match=r"misaligned"):
        emulate(ptx, call, memory)


@pytest.mark.parametrize("N", [0, 1, 31, 257, 1024, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rules", [1, 2])
def test_certify(ptx, N, dtype, rules):
    """Exactly the reference's decisions, in order; what lies behind them stays as it was."""
    inputs, options = certificates(N, dtype, rules), {"scale": 1 + 2.0**-20, "offset": 2.0**-62}
    (undecided, counts), call, read = certify_cuda.describe(*inputs, *options.values())
    undecided.fill_(-1)
    counts.fill_(-1)
    emulate(ptx, call, [*read, undecided, counts])
    with ncfast.use_backend("reference"):
        total, decided, rest = certify(*inputs, **options)
    assert counts.tolist() == [total, *decided, *[0] * (2 - rules), len(rest)]
    assert torch.equal(undecided[: len(rest)], rest)
    assert (undecided[len(rest) :] == -1).all()


def test_certify_rounds_as_the_reference(ptx):
    """Limits at the very bound of every sample, each of its own class, and just above it."""
    generator, N = torch.Generator().manual_seed(0), 2000
    radii, gap = (torch.rand(N, dtype=torch.float64, generator=generator) for _ in range(2))
    scale, offset = 1 + 2.0**-20, 0.1
    bound = radii * scale + offset + gap
    limits = bound, bound.nextafter(torch.tensor(torch.inf, dtype=torch.float64))
    for rules, decided in ((limits, [0, N]), (limits[::-1], [N, 0])):
        (undecided, counts), call, read = certify_cuda.describe(
            radii, torch.arange(N), gap, rules, scale, offset
        )
        emulate(ptx, call, [*read, undecided, counts])
        assert counts.tolist() == [N, *decided, N]


def test_certify_of_many_rows(ptx):
    """More blocks than the scan adds at a time, 256; labels of one class, half of them decided."""
    N = 263_000
    radii = torch.rand(N)
    inputs = radii, torch.zeros(1, dtype=torch.int64).expand(N), *torch.tensor([[0.0], [0.5]]).double()
    (undecided, counts), call, read = certify_cuda.describe(*inputs[:3], [inputs[3]], 1.0, 0.0)
    emulate(ptx, call, [*read, undecided, counts], race=False)
    expected = (radii >= 0.5).nonzero().squeeze(1)
    assert counts.tolist() == [N, N - len(expected), 0, len(expected)]
    assert torch.equal(undecided[: len(expected)], expected)


def test_certify_through_its_room(ptx, monkeypatch):
    """int32 labels that are strided, and limits that are not contiguous."""
    radii, labels, gap, limits = certificates(300, torch.float32, 2)
    labels = torch.stack([labels, labels], 1).int()[:, 1]
    limits = list(torch.stack(limits, 1).unbind(1))
    emulate_room(monkeypatch, ptx, certify_cuda)
    for rules in (limits, limits[:1]):
        with ncfast.use_backend("cuda"), dispatch.record() as ran:
            got = certify(radii, labels, gap, rules, offset=0.01)
        assert ran == [("certify", "cuda")]
        with ncfast.use_backend("reference"):
            want = certify(radii, labels, gap, rules, offset=0.01)
        assert got[:2] == want[:2]
        assert torch.equal(got.undecided, want.undecided)


def certificates(N, dtype, rules):
    """Radii, labels, gaps and limits with everything in them: rows and labels out of use, infinite limits."""
    C, generator = 5, torch.Generator().manual_seed(N)
    radii = torch.rand(N, generator=generator).to(dtype)
    radii[torch.rand(N, generator=generator) < 0.2] = torch.nan
    labels = torch.randint(-1, C + 1, (N,), generator=generator)
    gap = 0.1 * torch.rand(C, dtype=torch.float64, generator=generator)
    limits = torch.rand(rules, C, dtype=torch.float64, generator=generator) + 0.2
    limits[0, 1], limits[0, 2] = torch.inf, -torch.inf
    return radii, labels, gap, list(limits)


def test_the_bound_rejects_a_wrong_answer(ptx):
    features, labels, shift = sample(50, 8, 3)
    result, _ = execute(ptx, features, labels, shift)
    result.sums[1, 3] += 1e-3
    with pytest.raises(AssertionError):
        assert_close(result, features, labels, shift)
    result.sums[1, 3] = torch.nan
    with pytest.raises(AssertionError):
        assert_close(result, features, labels, shift)


SCATTER_SHAPES = [  # N, p, C
    (0, 3, 2),  # no rows: zeros are written all the same
    (1, 1, 1),  # the smallest
    (33, 129, 2),  # one above a tile of rows and of columns: three pairs, tails of one
    (31, 128, 40),  # one below a tile of rows; C > N
    (600, 131, 3),  # two splits
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SCATTER_SHAPES, ids=str)
def test_class_scatter(ptx, shape, dtype):
    features, labels, shift = sample(*shape, dtype)
    result, ran = execute(ptx, features, labels, shift, scatter=True)
    assert_close(result, features, labels, shift)
    vector = 16 // dtype.itemsize if shape[1] * dtype.itemsize % 16 == 0 else 1
    assert any(name.startswith("scatter_pairs") and name.endswith(f"ELi{vector}ELi2E") for name in ran)
    assert ran[-1] == "scatter_reduce"


@pytest.mark.parametrize("p", [136, 131])  # a tail of 8 columns, aligned; of 3, not aligned
@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_class_scatter_precisions(ptx, precision, dtype, p):
    features, labels, shift = sample(70, p, 4, dtype)
    result, ran = execute(ptx, features, labels, shift, scatter=True, precision=precision)
    assert_close(result, features, labels, shift, precision=precision)
    code = _CODES[dtype], 1 if p % 8 else 16 // dtype.itemsize, cuda._PLANES[precision]
    assert "scatter_pairsILi{}ELi{}ELi{}E".format(*code) in ran


_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def test_no_kernel_is_left_out(ptx):
    """These are all that were compiled. Tests above assert of each template's variants that they run them."""
    plain = {
        "class_moments": [
            "moments_encode",
            "moments_bounds",
            "moments_join",
            "digit_count",
            "digit_scan",
            "digit_scatter",
        ],
        "class_scatter": ["scatter_reduce"],
        "certify": ["certify_count", "certify_scan", "certify_write"],
    }
    variants = {
        "class_moments": [
            f"moments_rowsILi{d}ELi{v}E" for d, wide in enumerate((4, 2, 8, 8)) for v in (1, wide)
        ],
        "class_scatter": [
            f"scatter_pairsILi{d}ELi{v}ELi{planes}E"
            for d, wide in ((0, 4), (2, 8), (3, 8))
            for v in (1, wide)
            for planes in cuda._PLANES.values()
        ],
        "certify": [],
    }
    for source, text in ptx.items():
        entries = re.findall(r"\.entry (\w+)", text)
        names = [*plain[source], *variants[source]]
        assert len(entries) == len(names)
        for name in names:
            assert sum(name in entry for entry in entries) == 1


def test_class_scatter_flushes(ptx):
    """Sums over more than 2048 rows leave float32 in between: one split, whose first tile is emulated.

    2048 rows of one class, of whole numbers, and 52 of the next, 2⁻¹⁰ of them: float32 would lose these.
    """
    N, p, pairs, cells = 2100, 23 * 128 + 1, 300, 64
    labels = (torch.arange(N) >= 2048).long()
    row = 1.0 + torch.arange(p) % 7
    features = torch.tensor([1.0, 2.0**-10])[labels][:, None] * row
    result, call, read = cuda.describe(features, labels, torch.zeros(2, p), True, False, "high", -100)
    (launch,) = [one for one in _cuda.plan(call, 0) if one.kernel.startswith("scatter_pairs")]
    assert launch.grid == pairs
    grids = {launch.kernel: 1, "scatter_reduce": cells, "moments_rowsILi0ELi1E": 0, "moments_join": 0}
    emulate(ptx, call, [*read, *(t for t in result if t is not None)], grids=grids)
    of_tile = row[:128].double()
    assert torch.equal(result.scatter[:128, :128], (2048 + 52 * 2.0**-20) * torch.outer(of_tile, of_tile))


@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_class_scatter_of_integers_is_exact(ptx, precision, dtype):
    features, labels, shift = sample(300, 136, 4)
    features, shift = (4 * features).round().to(dtype), (4 * shift).round()
    result, _ = execute(ptx, features, labels, shift, scatter=True, precision=precision)
    with ncfast.use_backend("reference"):
        truth = class_scatter(features, labels, shift)
    assert torch.equal(result.scatter, truth.scatter)
    assert torch.equal(result.sums, truth.sums)


def test_class_scatter_views(ptx):
    """Rows padded to 16 bytes with an odd p, rows off by an element; int32 labels, some out of range."""
    for start, stop, vector in ((0, 45, 4), (1, 46, 1)):
        wide, labels, shift = sample(80, 64, 3)
        labels[5], labels[6] = 3, -1
        features, own = wide[::2, start:stop], labels[::2].int()
        out = torch.where((own < 0) | (own >= 3), -100, own)
        result, ran = execute(ptx, features, own, shift[:, start:stop], scatter=True)
        assert_close(result, features, out, shift[:, start:stop])
        assert any(name.endswith(f"ELi{vector}ELi2E") for name in ran)


def test_class_scatter_deep_collapse(ptx):
    """Within-class noise of 1e-5 about means of norm 100: centred before anything is rounded or squared."""
    _, labels, _ = sample(90, 40, 3)
    means = 10 * torch.randn(3, 40)
    features = means[labels.clamp(min=0)] + 1e-4 * torch.randn(90, 40)
    shift = torch.stack([features[labels == c][0] for c in range(3)])
    result, _ = execute(ptx, features, labels, shift, scatter=True)
    assert_close(result, features, labels, shift)


def test_class_scatter_is_deterministic(ptx):
    inputs = sample(800, 130, 3)  # three splits
    assert_the_same(
        execute(ptx, *inputs, scatter=True, race=False)[0],
        execute(ptx, *inputs, scatter=True, race=False, fill=0xFF, backwards=True)[0],
    )


def test_through_the_public_call(ptx, monkeypatch):
    """`ncfast.class_scatter` and `ClassStatistics` on this backend, all but the launch itself."""
    emulate_room(monkeypatch, ptx, cuda)
    features, labels, shift = sample(50, 20, 3)
    with ncfast.use_backend("cuda"), dispatch.record() as ran:
        result = class_scatter(features, labels, shift, radii=True)
        thin = class_scatter(features.double(), labels, shift, scatter=False)
        stats = ncfast.ClassStatistics(3, 20)
        stats.update(features, labels)
        stats.update(features.bfloat16(), labels)
    assert ran == [("class_scatter", "cuda")] * 4
    assert_close(result, features, labels, shift)
    assert_close(thin, features.double(), labels, shift)
    with ncfast.use_backend("reference"):
        other = ncfast.ClassStatistics(3, 20)
        other.update(features, labels)
        other.update(features.bfloat16(), labels)
    assert torch.equal(stats.counts, other.counts)
    assert_within(stats.means, other.means, 1e-6)
    scale = float(other.within_covariance.diagonal().max())
    assert_within(stats.within_covariance, other.within_covariance, 2 * PRODUCTS["high"] * scale)


def test_run_launches_the_plan_on_the_current_stream(monkeypatch):
    """Without a GPU: the plan of the call, a workspace as large as it needs, the device's current stream."""
    device = torch.device("cpu")
    entered, launched, rooms = [], [], []
    stream = types.SimpleNamespace(device=types.SimpleNamespace(index=3), cuda_stream=77)
    empty = torch.empty

    def allocate(*shape, **options):
        rooms.append(empty(*shape, **options))
        return rooms[-1]

    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    features, labels, shift = sample(300, 8, 3)
    for scatter in (False, True):
        _, call, _ = cuda.describe(features, labels, shift, scatter, True, "high", -100)
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "run", lambda plan, index, at: launched.append((plan, index, at)))
            patch.setattr(torch, "empty", allocate)
            launching.run(call, device)
        plan, index, at = launched.pop()
        assert (entered.pop(), index, at) == (device, 3, 77)
        assert rooms[-1].numel() == _cuda.workspace(call)
        expected = _cuda.plan(call, rooms[-1].data_ptr())
        assert [(launch.kernel, launch.grid, launch.shared) for launch in plan] == [
            (launch.kernel, launch.grid, launch.shared) for launch in expected
        ]


def test_what_it_takes():
    """The CPU's features are refused, float64 products left to the reference."""
    assert "cpu" in cuda.refuses(torch.zeros(1, 1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert cuda.lacks(torch.zeros(1, 1, dtype=dtype)) is None
    wide = torch.zeros(1, 1, dtype=torch.float64)
    assert "float64" in cuda.lacks(wide)
    assert cuda.lacks(wide, scatter=False) is None
    assert "dimensions" in cuda.lacks(torch.zeros(1, 1).expand(1, 2**30), scatter=False)


def test_devices_with_little_shared_memory_are_left_to_triton(monkeypatch):
    """99 KiB, as on sm_86, 89 and 120, are enough for 16-bit features; `lacks` asks for what it uses."""
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: types.SimpleNamespace(
            shared_memory_per_block_optin=101_376, shared_memory_per_block=49_152
        ),
    )
    for dtype, taken in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        features, labels, shift = sample(40, 8, 2, dtype)
        on_device = types.SimpleNamespace(is_cuda=True, shape=(40, 8), dtype=dtype, device="cuda")
        reason = cuda.lacks(on_device)
        assert (reason is None) == taken
        assert cuda.lacks(on_device, scatter=False) is None
        _, call, _ = cuda.describe(features, labels, shift, True, False, "highest", -100)
        largest = max(launch.shared for launch in _cuda.plan(call, 0))
        assert (largest <= 101_376) == taken
        assert taken or f"needs {largest} bytes" in reason
