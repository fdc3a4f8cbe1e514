"""The Triton backend against the float64 reference: interpreted, as emulated PTX, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
import triton_machines

import ncfast
from ncfast.ops import dispatch
from ncfast.ops.pair_geometry import etf_error

from oracle import PRODUCTS, assert_within

# The interpreter computes log 0 and ∞ − ∞ with numpy, which warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

UNIT = 2.0**-24  # float32 rounding unit

SCATTER_SHAPES = [  # N, p, C
    (0, 3, 2),  # no rows
    (1, 1, 1),  # one of everything
    (5, 3, 9),  # more classes than rows
    (33, 65, 2),  # one above a row tile and a column tile
    (300, 130, 2),  # grouped: classes of several tiles; three column tiles
    (300, 144, 2),  # the same where rows are aligned
    (300, 80, 60),  # aligned, too few rows per class to group
    (1100, 17, 300),  # sorted, too few rows per class to group; most classes of a few rows
]
PRECISIONS = ["highest", "high", "medium"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=triton_machines.MACHINES)
def device(request):
    return triton_machines.start(request.param)


@pytest.fixture
def races(monkeypatch):
    """A function that starts an emulator with race detection."""

    def start(machine):
        triton_machines.start(machine, races=True)
        from ptxemu.memory import RaceChecker

        fail = RaceChecker.fail

        def judged(self, kind, byte, warp, bad, why):
            # Several warps may hold the same part of a tensor, and Triton lets each of them store it.
            if "in the same instruction" not in why:
                fail(self, kind, byte, warp, bad, why)

        monkeypatch.setattr(RaceChecker, "fail", judged)

    return start


def run(backend, operation, *arguments, **options):
    """Call on a forced backend, and fail if another one ran."""
    with ncfast.use_backend(backend), dispatch.record() as ran:
        result = operation(*arguments, **options)
    assert {name for _, name in ran} == {backend}
    return result


def sample(N, p, C, dtype=torch.float32, offset=3.0):
    """Features near means far from the origin, labels of which some are ignored, a shift near the means."""
    means = offset + torch.randn(C, p)
    labels = torch.randint(0, C, (N,))
    features = (means[labels] + torch.randn(N, p)).to(dtype)
    labels[torch.rand(N) < 0.1] = -100
    return features, labels, means + 0.1 * torch.randn(C, p)


def check_scatter(device, features, labels, shift, precision="high", **options):
    arguments = [tensor.to(device) for tensor in (features, labels, shift)]
    got = run("triton", ncfast.class_scatter, *arguments, radii=True, precision=precision, **options)
    want = run("reference", ncfast.class_scatter, features, labels, shift, radii=True)
    p = features.shape[1]
    square = want.sumsq.sum()
    assert torch.equal(got.counts.cpu(), want.counts)
    # The subtraction is rounded, and sums of at most 128 float32 go into float64.
    spread = (want.counts * want.sumsq).sqrt()[:, None]
    error = (got.sums.cpu() - want.sums).abs()
    assert (error <= 130 * UNIT * spread).all()
    # p squares are added in float32.
    assert ((got.sumsq.cpu() - want.sumsq).abs() <= (p + 8) * UNIT * want.sumsq).all()
    assert torch.equal(got.radii.cpu().isnan(), want.radii.isnan())
    radii = want.radii.nan_to_num()
    assert ((got.radii.cpu().nan_to_num() - radii).abs() <= (p + 8) * UNIT * radii).all()
    if got.scatter is not None:
        norms = want.scatter.diagonal().sqrt()
        bound = PRODUCTS[precision] + 2 * min(3 * len(features), 6144) * UNIT
        error = (got.scatter.cpu() - want.scatter).abs()
        assert (error <= bound * norms[:, None] * norms).all()
        # The diagonal is summed from exact squares: its error does not depend on the precision.
        assert_within(got.scatter.diagonal().cpu(), want.scatter.diagonal(), 2048 * UNIT * float(square))
        assert torch.equal(got.scatter, got.scatter.T)
    return got


@pytest.mark.parametrize(("N", "p", "C"), SCATTER_SHAPES)
def test_class_scatter_shapes(device, N, p, C):
    check_scatter(device, *sample(N, p, C))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("C", "p"), [(1, 70), (40, 70), (40, 80)])  # grouped; direct; with aligned rows
def test_class_scatter_precisions_and_dtypes(device, precision, dtype, C, p):
    features, labels, shift = sample(130, p, C, dtype)
    check_scatter(device, features, labels, shift, precision)


@pytest.mark.parametrize("C", [2, 90])
def test_class_scatter_without_the_scatter(device, C):
    assert check_scatter(device, *sample(1500, 20, C), scatter=False).scatter is None


def test_class_scatter_strides_and_labels(device):
    """A transposed view, every other row, int32 labels, labels out of range left out."""
    features, labels, shift = sample(100, 24, 3)
    check_scatter(device, features.T.contiguous().T, labels.int(), shift)
    check_scatter(device, features[::2], labels[::2], shift)
    check_scatter(device, features[:, 3:20], labels, shift[:, 3:20])
    from ncfast.ops.class_scatter import triton as kernels

    outside = torch.where(torch.arange(100) % 7 == 0, 12345, labels)
    with_outside = kernels.class_scatter(features.to(device), outside.to(device), shift.to(device))
    ignored = torch.where(outside == 12345, -100, outside)
    assert torch.equal(
        with_outside.counts.cpu(), check_scatter(device, features, ignored, shift).counts.cpu()
    )


def test_class_scatter_in_deep_collapse(device):
    """Within-class deviations 1e-4 of the norm: nothing cancels, in any precision."""
    means = 10 * torch.randn(4, 40, dtype=torch.float64)
    labels = torch.arange(400) % 4
    features = (means[labels] + 1e-3 * torch.randn(400, 40, dtype=torch.float64)).float()
    first = features[:4]  # the shift that ClassStatistics would choose
    for precision in PRECISIONS:
        check_scatter(device, features, labels, first, precision)


def test_class_scatter_repeats_bit_for_bit(device):
    arguments = [tensor.to(device) for tensor in sample(700, 70, 2)]
    first, second = (run("triton", ncfast.class_scatter, *arguments, radii=True) for _ in range(2))
    assert torch.equal(first.scatter, second.scatter)
    assert torch.equal(first.sums, second.sums)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_tile_and_flush(device, precision, monkeypatch):
    """What N decides in the chooser, at a size that an emulator can run: large tiles, several flushes."""
    from ncfast.ops.class_scatter import triton as kernels

    choose = kernels.choose_tile
    monkeypatch.setattr(
        kernels, "choose_tile", lambda a, word, size, _N, *rest: choose(a, word, size, 1 << 20, *rest)
    )
    monkeypatch.setattr(kernels, "_FLUSH_ROWS", 64)
    check_scatter(device, *sample(600, 144, 2), precision)
    check_scatter(device, *sample(600, 140, 2), precision)  # rows that are not aligned


AFFINE_SHAPES = [  # N, p, classes of each rule
    (1, 1, (1,)),  # no choice
    (33, 17, (5, 3)),  # odd p, two rules in one tile
    (65, 70, (130, 10)),  # two rows tiles, classes in two tiles, a tile of both rules
    (65, 80, (130, 10)),  # the same where rows are aligned
    (9, 5, (3, 2, 4)),  # a third rule takes a second launch
    (70, 40, (500, 30)),  # the one-plane rung comes first
]


@pytest.mark.parametrize(("N", "p", "classes"), AFFINE_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_argmax_shapes(device, N, p, classes, dtype):
    features = (torch.randn(N, p) + 2).to(dtype)
    weights, biases = [torch.randn(C, p) for C in classes], [torch.randn(C) for C in classes]
    check_argmax(device, features, weights, biases)


def check_argmax(device, features, weights, biases):
    want = run("reference", ncfast.affine_argmax, features, weights, biases)
    biases = [None if bias is None else bias.to(device) for bias in biases]
    got = run("triton", ncfast.affine_argmax, features.to(device), [w.to(device) for w in weights], biases)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_affine_argmax_near_ties(device, scale):
    """Scores that differ by 1e-7 relative, far from the origin: the float64 rung decides."""
    direction = torch.randn(1, 24, dtype=torch.float64)
    weight = direction + 1e-7 * torch.randn(20, 24, dtype=torch.float64)
    features = ((torch.randn(40, 24, dtype=torch.float64) + 100) * scale).float()
    check_argmax(device, features, [weight], [None])


def test_affine_argmax_ties_float64_and_nonfinite(device):
    weight = torch.randn(6, 20)[[3, 1, 1, 0, 3, 5, 0, 1]]
    features = torch.randn(30, 20).round()
    check_argmax(device, features, [weight.round()], [torch.zeros(8)])
    check_argmax(device, features.double(), [weight.round(), weight], [None, None])
    features[3, 4], features[7, 0] = torch.nan, torch.inf
    decided = run("triton", ncfast.affine_argmax, features.to(device), weight.round().to(device))
    assert ((decided >= 0) & (decided < 8)).all()
    assert not decided.is_floating_point()


@pytest.mark.parametrize("planes", [1, 2])
def test_error_bound_holds_and_is_not_absurd(device, planes):
    """Every score of the fast pass is within its bound, and the bound within 2⁻⁴ of ‖x‖‖v‖."""
    from ncfast.ops.affine_argmax import triton as kernels

    features, weight, bias = torch.randn(64, 90) + 5, torch.randn(16, 90), torch.randn(16)
    center = kernels._center(features.to(device))
    tile = kernels.choose_tile(kernels.target.architecture(), 16, kernels.target.aligned(features))
    rules = [(weight.to(device), bias.to(device))]
    stacked = kernels._stacked(rules, center, tile)
    x = features.to(device) - center
    high = x.bfloat16().float()
    low = (x - high).bfloat16().float() if planes == 2 else torch.zeros_like(x)
    v = weight.double() - weight.double().mean(0)
    planes_of_v = stacked.planes[:planes, :16, :90].double().cpu().sum(0)
    scale = (planes_of_v * v).sum() / v.square().sum()
    scale = 2.0 ** torch.log2(scale).round()
    exact = (features.double() - center.double().cpu()) @ (v * scale).T
    fast = (high + low).double().cpu() @ planes_of_v.T
    fast -= low.double().cpu() @ stacked.planes[1, :16, :90].double().cpu().T * (planes == 2)
    limits = stacked.limits[planes - 1, 0].double().cpu()
    rest = (x - high - low).norm(dim=1).double().cpu()
    bound = x.norm(dim=1).double().cpu() * limits[0] + rest * limits[1] + limits[2]
    assert ((fast - exact).abs() <= bound[:, None]).all()
    assert (bound <= 2.0**-4 * x.norm(dim=1).double().cpu()).all()


@pytest.mark.parametrize("one_plane_classes", [2, 3])  # one plane first; two at once
def test_accumulation_that_always_loses(device, one_plane_classes, monkeypatch):
    """Near ties behind long sums whose every addition rounds the same way.

    ⟨x, v⟩ = 1 + 126 · 15/16 · 2⁻²⁴ − 1 − τ is positive, but a matrix unit that adds 16 products to a float32
    at a time never gets beyond 1, and ends with −τ. Nothing else is rounded: all numbers are bfloat16, and
    rows and classes come in pairs of either sign, so that their means are zero.
    """
    from ncfast.ops.affine_argmax import triton as kernels

    monkeypatch.setattr(kernels, "_ONE_PLANE_CLASSES", one_plane_classes)
    features, weight = torch.full((3, 2048), 2.0**-14), torch.full((1, 2048), 15 / 16 * 2.0**-14)
    features[:, :16] = features[:, -16:] = weight[:, :16] = weight[:, -16:] = 0
    features[:, 0], features[:, -2], features[:, -1] = 1, -1, -(2.0**-10) * torch.tensor([1.0, 1.25, 1.5])
    weight[:, 0], weight[:, -2], weight[:, -1] = 1, 1, 2.0**-8
    features, weight = torch.cat([features, -features]), torch.cat([weight, -weight])
    right = [0, 0, 0, 1, 1, 1]
    with ncfast.use_backend("reference"):
        assert ncfast.affine_argmax(features, weight).tolist() == right
    given = features.to(device), weight.to(device)
    assert run("triton", ncfast.affine_argmax, *given).tolist() == right
    if device == "cpu" and not triton_machines.INTERPRETED:
        # It is the bound on p additions that saves them: with that on one addition all are decided wrongly.
        limits = kernels._limits
        monkeypatch.setattr(kernels, "_limits", lambda _, *rest: limits(1, *rest))
        assert run("triton", ncfast.affine_argmax, *given).tolist() == right[::-1]


def test_what_is_not_finite_reaches_float64(device):
    """Whatever the best two scores make of NaN and infinity, the row's norm or the classes' keeps it open."""
    features, weight, bias = torch.randn(40, 24), torch.randn(20, 24), torch.randn(20)
    huge = features * torch.logspace(0, 38, 40)[:, None]  # squares overflow from 1e19 on
    huge[2, 3], huge[4, 0] = torch.inf, -torch.inf
    check_argmax(device, huge, [weight], [bias])
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = weight.clone()
        broken[[2, 17], [0, 5]] = value  # a class of such scores: never the best where they are NaN
        check_argmax(device, features, [broken, weight], [bias, bias])
        check_argmax(device, features, [weight], [bias.index_fill(0, torch.tensor([0, 13]), value)])


@pytest.mark.parametrize(("C", "p"), [(2, 1), (33, 7)])  # the fewest; one above a tile
@pytest.mark.parametrize("close", [False, True])
def test_pair_geometry(device, C, p, close):
    vectors, variances = torch.randn(C, p, dtype=torch.float64), torch.rand(C, dtype=torch.float64)
    if close:
        vectors[1] = vectors[0] * (1 + 1e-9)
    want = run("reference", ncfast.pair_geometry, vectors, variances)
    got = run("triton", ncfast.pair_geometry, vectors.to(device), variances.to(device))
    for name, ours, theirs in zip(want._fields, got, want, strict=True):
        # The distance of two unit rows that should be equal is one of rounding errors: its logarithm says
        # nothing.
        if not (close and "kernel" in name):
            largest = float(theirs.abs().max())
            assert_within(ours.cpu(), theirs, 64 * 2.0**-52 * p * max(1.0, largest), name)


def test_pair_geometry_without_a_direction(device):
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    got = run("triton", ncfast.pair_geometry, vectors.to(device))
    assert got.cosine_mean.isnan()
    assert got.cosine_min.isnan()
    assert got.log_kernel_std.isnan()
    assert got.nearest_index.tolist() == [1, 0, 0]
    assert got.nearest_distance.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(("C", "p"), [(2, 1), (6, 4), (35, 5)])
def test_etf_error_and_decision_radius(device, C, p):
    left, right = torch.randn(2, C, p, dtype=torch.float64)
    for pair in ((left,), (left, right)):
        got = run("triton", etf_error, *(rows.to(device) for rows in pair))
        assert_within(got.cpu(), run("reference", etf_error, *pair), 1e-13 * C)
    left[1] = left[0]  # equal rows: the bias decides
    bias = torch.randn(C, dtype=torch.float64)
    want = run("reference", ncfast.decision_radius, left, bias, right)
    got = run("triton", ncfast.decision_radius, left.to(device), bias.to(device), right.to(device)).cpu()
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite])
    bound = 2 * (p + 4) * 2.0**-52 * (right.norm(dim=1) + want.abs())
    assert ((got - want).abs() <= bound)[finite].all()


def test_decision_radius_of_any_scale(device):
    """Rows that differ by what underflows when squared are not equal, and certify nothing."""
    weight, anchors = torch.randn(2, 5, 3, dtype=torch.float64)
    want = run("reference", ncfast.decision_radius, weight, None, anchors)
    for scale in (2.0**-700, 2.0**700):
        got = run("triton", ncfast.decision_radius, (weight * scale).to(device), None, anchors.to(device))
        assert_within(got.cpu(), want, 32 * 2.0**-52 * float(anchors.norm() + want.abs().max()))
    weight[1:3] = 1e-170 * torch.randn(2, 3, dtype=torch.float64)
    want = run("reference", ncfast.decision_radius, weight, None, anchors)
    got = run("triton", ncfast.decision_radius, weight.to(device), None, anchors.to(device)).cpu()
    bound = 16 * 2.0**-52 * (anchors.norm(dim=1) + want.abs())
    assert (got <= want + bound).all()
    assert (got[[1, 2]] == -torch.inf).all()
    assert ((got - want).abs() <= bound)[[0, 3, 4]].all()


@pytest.mark.parametrize("machine", ["sm_80", "sm_90"])  # elsewhere the tensor is copied first
def test_offsets_beyond_32_bits(machine, tmp_path):
    """Rows, then columns 2²⁶ elements apart in a sparse file: 32 bits wrap around at the 33rd."""
    device = triton_machines.start(machine)
    N, p, step = 40, 20, 2**26
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=N * step, dtype=torch.float16)
    rows, labels, weight = torch.randn(N, p).half(), torch.arange(N) % 2, torch.randn(9, N)
    view = storage.as_strided((N, p), (step, 1))
    view.copy_(rows)
    for C in (1, 20):  # grouped; direct
        check_scatter(device, view, labels % C, torch.zeros(C, p))
    check_argmax(device, view, [weight[:, :p]], [None])
    view = storage.as_strided((p, N), (1, step))
    for C in (1, 20):
        check_scatter(device, view, labels[:p] % C, torch.zeros(C, N))
    check_argmax(device, view, [weight], [None])


@pytest.mark.parametrize("exponent", [-1010, -600, -500, 500, 600, 1010])
def test_no_scale_matters_to_pairs(device, exponent):
    """What pairs of rows say about rows whose squares leave the range of float64."""
    left, right = torch.randn(2, 5, 3, dtype=torch.float64).bfloat16().double()
    scale = 2.0**exponent
    variances = torch.rand(5, dtype=torch.float64)
    want = run("reference", ncfast.pair_geometry, left, variances)
    # Variances are squares themselves: there are none where those leave the range.
    given = [(left * scale).to(device)] + ([(variances * scale * scale).to(device)] * (abs(exponent) == 500))
    got = run("triton", ncfast.pair_geometry, *given)
    for name, ours, theirs in zip(want._fields, got, want, strict=True):
        if ours is not None:
            ours = ours.cpu() / scale if name == "nearest_distance" else ours.cpu()
            assert_within(ours, theirs, 256 * 2.0**-52 * max(1.0, float(theirs.abs().max())), name)
    got = run("triton", etf_error, given[0], right.to(device))
    assert_within(got.cpu(), run("reference", etf_error, left, right), 1e-12)


def test_decision_radius_of_nan(device):
    """Nothing is certified by a number that is none."""
    weight, anchors = torch.randn(2, 40, 3, dtype=torch.float64)
    bias = torch.zeros(40, dtype=torch.float64)
    want = run("reference", ncfast.decision_radius, weight, bias, anchors)
    for broken in range(3):
        given = [weight.clone(), bias.clone(), anchors.clone()]
        given[broken][37] = torch.nan
        certified = run("reference", ncfast.decision_radius, *given) > -torch.inf
        got = run("triton", ncfast.decision_radius, *(tensor.to(device) for tensor in given)).cpu()
        assert torch.equal(got > -torch.inf, certified)
        if certified.any():
            assert_within(got[certified], want[certified], 1e-12)


@pytest.mark.parametrize("machine", ["sm_80", "sm_90"])
def test_no_races_in_shared_memory(machine, races):
    """Every kernel once with the emulator's race detector."""
    races(machine)
    for precision in PRECISIONS:
        check_scatter("cpu", *sample(140, 70, 1), precision)
        check_scatter("cpu", *sample(140, 80, 1), precision)  # rows that are aligned
        check_scatter("cpu", *sample(70, 70, 40), precision)
    for p in (40, 48):
        check_argmax("cpu", torch.randn(33, p), [torch.randn(20, p)], [None])
    vectors = torch.randn(33, 3, dtype=torch.float64)
    run("triton", ncfast.pair_geometry, vectors, vectors[:, 0].square())
    run("triton", etf_error, vectors)
    run("triton", ncfast.decision_radius, vectors, None, vectors)


@pytest.mark.skipif(triton_machines.INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    """Run this file in a process whose Triton interprets kernels."""
    if reason := (triton_machines.missing("sm_80")):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-k", "interpreter and not in_the", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-4000:]
