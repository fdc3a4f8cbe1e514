"""class_scatter: every instruction set this machine has against the float64 reference."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

import ncfast
from ncfast.ops import dispatch
from ncfast.ops.class_scatter import ClassScatter, class_scatter

import oracle

_cpu = pytest.importorskip("ncfast._cpu")
cpu = pytest.importorskip("ncfast.ops.class_scatter.cpu")

ISAS = _cpu.bodies("class_scatter")
UNIT = 2.0**-24  # float32 rounding unit
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

SHAPES = [  # N, p, C
    (0, 3, 2),  # no rows at all
    (1, 1, 1),  # the smallest
    (2, 1, 3),  # more classes than rows
    (31, 15, 2),  # one below a group of rows and a vector
    (33, 17, 5),  # one above both
    (64, 16, 1),  # exact multiples; one class spans strips
    (65, 31, 4),  # an odd p, one row in the second strip
    (100, 33, 7),
    (257, 95, 300),  # C > p, most classes absent or of one sample
    (300, 97, 3),  # one above two register tiles of every instruction set
    (1100, 193, 11),  # one above a tile that threads work on together
    (1900, 260, 2),  # a panel that they share is filled twice, and classes are longer than a strip
    (2600, 260, 2),  # hardly rows enough for panels of their own, none full, and several tiles
    (150, 2100, 3),  # several of the largest tiles of AMX, the last one narrower
    (17_000, 5, 1500),  # more than one block of the streaming pass, class by class
    (20_000, 5, 3),  # without the scatter, rows as they lie, and classes with more than is held in float32
    (20_000, 40, 200),  # the same, and classes with less
    (20_000, 300, 60),  # the same, a few columns of many rows at a time
    (20_000, 95, 3),  # one tile, with AMX in panels that are filled again, and classes longer than a strip
    (140_000, 65, 20),  # more than one block of such strips
]
if "amx" in ISAS:
    SHAPES.append((20_000, 550, 30))  # a panel for each thread and several tiles, with AMX as well


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("NCFAST_CPU_ISA", request.param)
    assert _cpu.isa("class_scatter") == request.param
    return request.param


def sample(N, p, C, dtype=torch.float32, seed=0):
    """Features [N, p], labels [N] with about one in seven ignored, and a shift [C, p] near the means."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 + torch.randn(C, p, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    features = (means[labels] + torch.randn(N, p, generator=generator)).to(dtype)
    labels[torch.rand(N, generator=generator) < 0.15] = -100
    return features, labels, means + 0.5 * torch.randn(C, p, generator=generator)


def on_cpu(*arguments, **options):
    with ncfast.use_backend("cpu"), dispatch.record() as ran:
        result = class_scatter(*arguments, **options)
    assert ran == [("class_scatter", "cpu")]
    return result


def on_reference(*arguments, **options):
    with ncfast.use_backend("reference"):
        return class_scatter(*arguments, **options)


def product_unit(isa, precision, features):
    """The rounding unit of one product: two bfloat16 keep 16 bits and drop lo·lo, one keeps 8."""
    if features.dtype == torch.float64:
        return 2.0**-53
    bfloat16 = {"amx": {"high": 2.0**-15, "medium": 2.0**-7}, "avx512_bf16": {"medium": 2.0**-7}}
    return bfloat16.get(isa, {}).get(precision, UNIT) if features.shape[1] >= 64 else UNIT


def assert_close(result, truth, features, labels, shift, isa, precision):
    """Every number within its rounding: unit × number of roundings × the sum of the magnitudes added."""
    unit = 2.0**-53 if features.dtype == torch.float64 else UNIT
    N, p = features.shape
    kept = labels >= 0
    y = labels[kept].long()
    residuals = (features.double()[kept] - shift.to(torch.float64 if unit < UNIT else torch.float32)[y]).abs()
    assert torch.equal(result.counts, truth.counts)
    long = N * 2.0**-52  # of the float64 sums over N, here and in the reference
    # 32 residuals, each rounded once, are added before float64 takes over.
    magnitude = torch.zeros_like(truth.sums).index_add_(0, y, residuals)
    assert ((result.sums - truth.sums).abs() <= (34 * unit + long) * magnitude).all()
    assert ((result.sumsq - truth.sumsq).abs() <= ((p + 8) * unit + long) * truth.sumsq).all()
    if truth.radii is not None:
        assert torch.equal(result.radii.isnan(), ~kept)
        assert ((result.radii - truth.radii)[kept].abs() <= (p + 8) * unit * truth.radii[kept]).all()
    if truth.scatter is not None:
        assert torch.equal(result.scatter, result.scatter.T)
        per_product = product_unit(isa, precision, features) + min(N, 4096) * unit
        assert ((result.scatter - truth.scatter).abs() <= per_product * (residuals.T @ residuals)).all()
        diagonal = truth.scatter.diagonal()
        assert ((result.scatter.diagonal() - diagonal).abs() <= (36 * unit + long) * diagonal).all()


def assert_same_bits(result, *others):
    for other in others:
        for a, b in zip(result, other, strict=True):
            assert a is b is None or torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa, shape, dtype):
    data = sample(*shape, dtype)
    truth = on_reference(*data, radii=True)
    for precision in ("highest", "high", "medium"):
        assert_close(on_cpu(*data, radii=True, precision=precision), truth, *data, isa, precision)
    streamed = on_cpu(*data, radii=True, scatter=False)
    assert streamed.scatter is None
    assert_close(streamed, truth._replace(scatter=None), *data, isa, "high")


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.usefixtures("isa")
def test_ignored_rows_are_never_read(scatter):
    features, labels, shift = sample(200, 40, 5)
    clean = on_cpu(features, labels, shift, radii=True, scatter=scatter)
    features[labels == -100] = torch.nan
    dirty = on_cpu(features, labels, shift, radii=True, scatter=scatter)
    assert_same_bits(clean, dirty)


@pytest.mark.usefixtures("isa")
def test_everything_ignored():
    result = on_cpu(torch.full((50, 9), torch.nan), torch.full((50,), 7), torch.zeros(9, 9), ignore_index=7)
    assert not result.counts.any()
    assert not result.scatter.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(isa, dtype):
    """Rows apart, an offset that aligns nothing, every other column, one row many times, int32 labels."""
    wide, labels, shift = sample(150, 61, 4, torch.float32)
    wide = torch.cat([wide.new_full((150, 3), torch.nan), wide, wide.new_full((150, 2), torch.nan)], 1).to(
        dtype
    )
    views = [
        (wide[:, 3:64], labels, shift),
        (wide[::2, 3:64], labels[::2], shift),
        (wide[:, 3:64:2], labels.int(), shift[:, ::2]),
        (wide[:1, 3:64].expand(150, 61), labels, shift),
        (wide.T.contiguous().T[:, 3:64], labels, shift),
    ]
    for features, y, k in views:
        result = on_cpu(features, y, k, radii=True, precision="highest")
        assert_close(result, on_reference(features, y, k, radii=True), features, y, k, isa, "highest")


@pytest.mark.usefixtures("isa")
def test_long_views_without_the_scatter(isa):
    """Rows as they lie, if with gaps in between; most of them of one class, one class absent."""
    features, labels, shift = sample(16_000, 48, 6)
    labels[torch.rand(16_000, generator=torch.Generator().manual_seed(1)) < 0.9] = 4
    labels[labels == 2] = -100
    expected = on_reference(features[::2, :24], labels[::2], shift[:, :24], scatter=False, radii=True)
    views = [(features[::2, :24], labels.int()[::2]), (features[::2].T.contiguous().T[:, :24], labels[::2])]
    for h, y in views:
        result = on_cpu(h, y, shift[:, :24], scatter=False, radii=True)
        assert_close(result, expected, h, y, shift[:, :24], isa, "high")
    constant = on_cpu(features[:1].expand(16_000, 48), labels, shift, scatter=False)
    assert torch.equal(constant.counts, torch.bincount(labels[labels >= 0], minlength=6))
    once = (features[0].double() - shift.double()) * constant.counts[:, None]
    oracle.assert_within(constant.sums, once, 34 * UNIT * once.abs().max())


def test_float16_bits():
    """All finite half-precision numbers, denormals and zeros among them, are widened exactly."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[halves.isfinite()]
    assert len(halves) == 2 * 31 * 1024
    labels = torch.arange(len(halves))
    shift = torch.zeros(len(halves), 1)
    assert torch.equal(on_cpu(halves[:, None], labels, shift, scatter=False).sums[:, 0], halves.double())
    packed = on_cpu(halves.reshape(-1, 32), labels[: len(halves) // 32], torch.zeros(len(halves) // 32, 32))
    assert torch.equal(packed.sums, halves.double().reshape(-1, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("N", "scatter"), [(90, True), (90, False), (9000, False)])
@pytest.mark.usefixtures("isa")
def test_nonfinite(dtype, bad, N, scatter):
    features, labels, shift = sample(N, 35, 3, dtype)
    labels[77] = 2
    for column in (0, 20, 34):
        broken = features.clone()
        broken[77, column] = bad
        with pytest.raises(ValueError, match="row 77"):
            on_cpu(broken, labels, shift, scatter=scatter)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_a_small_batch_accepts_does_not_overflow(isa, precision):  # noqa: ARG001 (a fixture)
    """Rows on either side of the largest square that is taken, whose sums of squares are rounded."""
    limit = math.sqrt(torch.finfo(torch.float32).max / 2**20)
    taken = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        row = torch.randn(1, 100, generator=generator)
        square = 0.5 ** (seed % 2) * (1 + 1e-7 * torch.randn((), generator=generator))  # about all, or half
        row *= limit * square.sqrt() / row.norm()
        stats = ncfast.ClassStatistics(1, 100, shift=torch.zeros(1, 100), precision=precision)
        with ncfast.use_backend("cpu"):
            stats.update(torch.zeros(1, 100), torch.tensor([0]))  # the first batch goes another way
            with contextlib.suppress(ValueError):
                taken += int(stats.update(row, torch.tensor([0])).num_samples - 1)
        assert stats.sumsq.isfinite().all()
        assert stats.scatter.isfinite().all()
    assert 0 < taken < 60


def test_squares_that_overflow():
    features, labels, shift = sample(90, 35, 3)
    with pytest.raises(ValueError, match="overflow"):
        on_cpu(features * 1e19, labels, shift)
    on_cpu((features * 1e19).double(), labels, shift)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    "shape",
    [
        (1900, 260, 2),
        (3000, 100, 7),
        (70_000, 3, 2),
        (140_000, 65, 7),
        (20_000, 550, 5),
        (20_000, 70, 300),
        (20_000, 300, 60),
    ],
    ids=str,
)
@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit(shape, precision):
    data = sample(*shape)
    before = torch.get_num_threads()
    try:
        for scatter in (True, False):
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(on_cpu(*data, radii=True, scatter=scatter, precision=precision))
            assert_same_bits(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(30_000, 600, 70), (70_000, 20, 4)], ids=str)
@pytest.mark.usefixtures("isa")
def test_one_large_class_among_small_and_absent_ones(monkeypatch, shape):
    """Tasks then have a few classes or hundreds of them, or none; the numbers are the reference's."""
    features, labels, shift = sample(*shape)
    generator = torch.Generator().manual_seed(2)
    labels[(torch.rand(len(labels), generator=generator) < 0.8) & (labels >= 0)] = 1
    labels[labels == 3] = -100
    truth = on_reference(features, labels, shift, scatter=False, radii=True)
    results = []
    for threads in (1, 2, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(on_cpu(features, labels, shift, scatter=False, radii=True))
        assert_close(results[-1], truth, features, labels, shift, "any", "high")
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("order", "p", "dtype"),
    [
        ("mixed", 213, torch.float32),  # p leaves a rest of 21 columns
        ("mixed", 256, torch.float64),  # none
        ("by class", 256, torch.float32),
        ("apart", 201, torch.float64),
        ("one row", 201, torch.float32),
    ],
)
def test_windows(isa, monkeypatch, order, p, dtype):
    """By one and two threads rows are read a window at a time, by eight class by class: the same bits."""
    features, labels, shift = sample(20_000, p, 60, dtype)
    labels[1_000:1_200] = -100  # more than a window
    if order == "by class":
        labels = labels.sort().values
    if order == "one row":
        features = features[:1].expand(20_000, p)
    else:
        features[labels == -100] = torch.nan
    if order == "apart":
        features = torch.stack([features, torch.full_like(features, torch.nan)], dim=1)[:, 0]
    truth = on_reference(features, labels, shift, scatter=False, radii=True)
    results = []
    for threads in (1, 2, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(on_cpu(features, labels, shift, scatter=False, radii=True))
        outside = labels.clone()
        outside[15_000] = 60
        with pytest.raises(ValueError, match="label 60 in row 15000"):
            on_cpu(features, outside, shift, scatter=False)
    assert_close(results[0], truth, features, labels, shift, isa, "high")
    assert_same_bits(*results)


def test_forced_isa(monkeypatch):
    data = sample(10, 3, 2)
    monkeypatch.setenv("NCFAST_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="mmx"):
        on_cpu(*data)
    for name, available in _cpu.isas():
        monkeypatch.setenv("NCFAST_CPU_ISA", name)
        if not available:
            with pytest.raises(RuntimeError, match=name):
                on_cpu(*data)
        elif name == "avx512_bf16":  # an operation without a body for it takes one that it includes
            assert _cpu.isa("affine_argmax") == "avx512_vnni"


@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("N", [64, 6400, 70_000])
def test_labels_out_of_range(monkeypatch, N, threads, scatter):
    """The C++ itself tells: nobody looks at the labels before it, and they may change under its feet."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    features, labels, shift = sample(N, 20, 3)
    for outside in (2**62, -(2**62), 3, -1, 2**31, 2**32, 2**32 + 1, -(2**32)):
        wild = labels.clone()
        wild[N - 5 :] = outside
        with pytest.raises(ValueError, match=rf"label {outside} in row {N - 5} is outside \[0, 3\)"):
            on_cpu(features, wild, shift, scatter=scatter)
    on_cpu(features, labels, shift, scatter=scatter)


# within/mean ratio, common offset
COLLAPSE = [(1.0, 0.0), (1e-2, 0.0), (1e-4, 0.0), (1e-5, 0.0), (1e-4, 100.0), (1e-5, 100.0)]
NC1_BOUND = {"highest": oracle.STREAM_BOUND, "high": oracle.STREAM_BOUND, "medium": 1e-4}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", COLLAPSE, ids=str)
@pytest.mark.parametrize("batch", [128, 20_000])
def test_deep_collapse(case, batch):
    """Formulas that square before they centre are off by 25 % to 192× here."""
    spread, offset = case
    features, labels = oracle.clustered(10, 64, 4000, spread, offset=offset)
    truth = oracle.two_pass(features, labels, 10)
    for precision, bound in NC1_BOUND.items():
        with ncfast.use_backend("cpu"):
            stats = ncfast.ClassStatistics(10, 64, precision=precision)
            for rows in torch.arange(4000).split(batch):
                stats.update(features[rows], labels[rows])
        nc1 = ncfast.collapse(stats).nc1
        oracle.assert_relative(nc1, truth["nc1"], bound, f"NC1, {precision}")
        oracle.assert_relative(stats.trace_within, truth["trace_within"], oracle.STREAM_BOUND, precision)
        if precision != "medium":
            covariance = truth["within_covariance"]
            largest = covariance.diagonal().max()
            oracle.assert_within(stats.within_covariance, covariance, 1e-5 * largest, precision)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_error_does_not_grow_with_the_samples(precision):
    """The same rows 400 times over: every sum is 400 times the first, to what was promised for the first.

    Rows are sorted 2²⁰ at a time, which does not divide the repetitions.
    """
    features, labels, shift = sample(10_000, 8, 3)
    once = on_reference(features, labels, shift, radii=True)
    many = on_cpu(features.repeat(400, 1), labels.repeat(400), shift, radii=True, precision=precision)
    radii = many.radii.view(400, 10_000)
    assert torch.equal(radii.isnan(), once.radii.isnan().expand(400, -1))
    assert ((radii - once.radii).abs() <= 1e-6 * once.radii).logical_or(radii.isnan()).all()
    for a, b in zip(many[1:4], once[1:4], strict=True):
        assert ((a / 400 - b).abs() <= 1e-6 * b.abs().max()).all()


@pytest.mark.parametrize("may_wait", [True, False])
@pytest.mark.parametrize(("N", "p"), [(60, 33), (250, 300)])  # the larger one by all threads
@pytest.mark.usefixtures("isa")
def test_a_small_batch_is_added_as_a_whole_or_not_at_all(monkeypatch, N, p, may_wait):
    """A bad last row must not leave a trace, neither in the sums nor in the shifts chosen."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    features, labels, _ = sample(N, p, 5)
    labels[-2:] = 1
    with ncfast.use_backend("cpu"):
        stats = ncfast.ClassStatistics(5, p).update(features[labels != 1], labels[labels != 1])
        stats._rows_may_wait = may_wait
        state = {name: value for name, value in vars(stats).items() if isinstance(value, torch.Tensor)}
        before = {name: value.clone() for name, value in state.items()}
        for bad in (torch.nan, torch.inf, 1e30):
            broken = features.clone()
            broken[-1, 20] = bad
            with pytest.raises(ValueError, match=rf"row {N - 1}|overflow"):
                stats.update(broken, labels)
        broken[labels == 1, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            stats.update(broken, labels)
        with pytest.raises(ValueError, match=f"row {N - 1}"):
            stats.update(features, torch.cat([labels[:-1], torch.tensor([5])]))
        for name, value in before.items():
            assert vars(stats)[name].numpy().tobytes() == value.numpy().tobytes(), name
        assert stats.state_dict()["waiting_residuals"] is None
        stats.update(features, labels)
        assert int(stats.counts[1]) == int((labels == 1).sum())
        stats.update(features, labels)
        if may_wait:
            state = stats.state_dict()
            residuals = (features.double() - state["shift"][labels.clamp(min=0)].double())[labels >= 0]
            assert torch.equal(state["waiting_residuals"], residuals.to(state["shift"].dtype))
            assert torch.equal(state["waiting_labels"], labels[labels >= 0])
    assert int(stats.counts[1]) == 2 * int((labels == 1).sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    data = sample(3000, 100, 7)
    expected = cpu.class_scatter(*data, scatter=False)
    child = os.fork()
    if not child:
        # Only the kernel: PyTorch's own threads do not survive a fork.
        counts, sumsq = torch.zeros(2, 7, dtype=torch.int64)
        sums = torch.zeros(7, 100, dtype=torch.float64)
        cpu._run(ClassScatter(counts, sums, sumsq.double(), None, None), *data, "high", -100, "whole")
        os._exit(0 if bytes(sums.numpy()) == bytes(expected.sums.numpy()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FORK = """
import os, signal, torch, ncfast
from ncfast.ops.class_scatter import class_scatter
torch.set_num_threads(2)
h, y, shift = torch.randn(6000, 300), torch.zeros(6000, dtype=torch.long), torch.zeros(1, 300)
h @ h[:300].T  # PyTorch's threads, which do not survive a fork, exist; no kernel of ours has run
child = os.fork()
if not child:
    signal.alarm(20)
    counts = class_scatter(h, y, shift).counts
    os._exit(counts.item() != 6000)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_before_the_first_kernel_has_them_too():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"


@pytest.mark.parametrize(("N", "p"), [(4_000_000, 512), (65_536, 2048)])
def test_ctrl_c_stops_a_long_call(monkeypatch, N, p):
    """Of several blocks, and of one: some of the rows have not been counted."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # more might be done before
    features, labels = torch.zeros(1, p).expand(N, p), (torch.arange(N) // 512).int()
    C = int(labels[-1]) + 1
    counts = torch.zeros(C, dtype=torch.int64)
    sumsq, sums, scatter = (torch.zeros(shape, dtype=torch.float64) for shape in ((C,), (C, p), (p, p)))
    result = ClassScatter(counts, sums, sumsq, scatter, None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    try:
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            cpu._run(result, features, labels, torch.zeros(C, p), "highest", -100, "whole")
    finally:
        signal.signal(signal.SIGINT, before)
    assert int(counts.sum()) < N
