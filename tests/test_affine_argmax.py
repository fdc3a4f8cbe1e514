"""affine_argmax on every backend, against the decision in exact arithmetic."""

import contextlib
from fractions import Fraction

import backends
import pytest
import torch

import ncfast
from ncfast.ops.affine_argmax import center_rule

MACHINES = [(name, None) for name in backends.available("affine_argmax") if name != "cpu"]
if "cpu" in backends.available("affine_argmax"):
    from ncfast import _cpu

    MACHINES += [("cpu", isa) for isa in _cpu.bodies("affine_argmax")]
pytestmark = pytest.mark.parametrize(("backend", "isa"), MACHINES)


@pytest.fixture(autouse=True)
def _forced_isa(isa, monkeypatch):
    """Every instruction set that this machine has, and no other than the one named."""
    if isa is not None:
        monkeypatch.setenv("NCFAST_CPU_ISA", isa)
        assert _cpu.isa("affine_argmax") == isa


@contextlib.contextmanager
def denormals_flushed():
    """On the calling thread, which is then the only one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def exact(features, weight, bias):
    """argmax_c ⟨v_c, h⟩ + b_c in rational arithmetic, the lowest index on ties."""
    rows = [[Fraction(x) for x in row] for row in features.double().tolist()]
    rules = [[Fraction(x) for x in row] for row in weight.double().tolist()]
    biases = [Fraction(b) for b in bias.double().tolist()]
    decisions = []
    for h in rows:
        scores = [
            sum(x * v for x, v in zip(h, rule, strict=True)) + b
            for rule, b in zip(rules, biases, strict=True)
        ]
        decisions.append(scores.index(max(scores)))
    return torch.tensor(decisions, dtype=torch.int64)


def assert_decides(backend, features, weight, bias=None):
    expected = exact(features, weight, torch.zeros(len(weight)) if bias is None else bias)
    with backends.forced("affine_argmax", backend):
        decided = ncfast.affine_argmax(features, weight, bias)
    assert decided.dtype == torch.int64
    assert torch.equal(decided, expected)


# 1: no sum, no choice; 15, 16, 17 and 31, 33: around the lanes and tiles; 64 × 70: several of them; 20, 58
# and 70 classes: a last tile of fewer vectors; C above and below p.
@pytest.mark.parametrize(
    ("N", "p", "C"),
    [
        (1, 1, 1),
        (5, 3, 1),
        (3, 1, 7),
        (17, 15, 16),
        (16, 17, 33),
        (33, 31, 5),
        (64, 70, 40),
        (18, 6, 20),
        (23, 9, 58),
        (31, 18, 70),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(backend, N, p, C, dtype):
    generator = torch.Generator().manual_seed(N * p * C)
    features = torch.randn(N, p, generator=generator).to(dtype)
    weight = torch.randn(C, p, generator=generator)
    bias = torch.randn(C, generator=generator)
    assert_decides(backend, features, weight, bias)
    assert_decides(backend, features, weight.to(dtype))


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e15])
def test_near_ties(backend, offset, scale):
    """Classes whose scores differ by 1e-7 relative, far from the origin, at every scale."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(1, 24, dtype=torch.float64, generator=generator)
    weight = direction + 1e-7 * torch.randn(20, 24, dtype=torch.float64, generator=generator)
    features = (torch.randn(40, 24, dtype=torch.float64, generator=generator) + offset) * scale
    assert_decides(backend, features.float(), weight)
    assert_decides(backend, features.float(), (weight * scale).float())


def test_ties_go_to_the_lowest_index(backend):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 20, generator=generator)[[3, 1, 1, 0, 3, 5, 0, 1]]  # duplicates before and after
    features = torch.randn(50, 20, generator=generator) + 100
    assert_decides(backend, features, weight, torch.zeros(8))
    assert_decides(backend, features, weight[:1].expand(5, 20))
    assert_decides(backend, torch.zeros(3, 20), weight)  # every score is 0


def test_equal_rows_get_equal_decisions(backend):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 19, generator=generator).expand(40, 19)
    assert_decides(backend, features, torch.randn(9, 19, generator=generator))
    for _ in range(20):  # on a wall, to the rounding of float64: either class will do, but one for all
        weight = torch.randn(2, 19, dtype=torch.float64, generator=generator)
        row, across = torch.randn(19, dtype=torch.float64, generator=generator), weight[0] - weight[1]
        wall = (row - (row @ across) / (across @ across) * across).expand(40, 19)
        with backends.forced("affine_argmax", backend):
            decided = ncfast.affine_argmax(wall, weight)
        assert (decided == decided[0]).all()


def test_roundings_of_one_sign(backend):
    """The worst case of a float32 sum: 512 products of 2⁻²⁵, each of them lost beside 1."""
    row = torch.full((513,), 2.0**-12)
    sums, single = torch.full((513,), 2.0**-13), torch.zeros(513)
    row[0], sums[0], single[0] = 1, 1, 1 + 2.0**-17  # scores 1 + 2⁻¹⁶ and 1 + 2⁻¹⁷
    # With their opposites, so that centring changes nothing.
    rows, weight = torch.stack([row, -row]), torch.stack([single, sums, -single, -sums])
    assert_decides(backend, rows, weight)
    with denormals_flushed():
        assert_decides(backend, 2.0**-64 * rows, weight)  # norms vanish, scores do not


def test_ties_that_centring_would_break(backend):
    """Scores t Σx + 2⁴⁰ of the same integers in several orders: less a mean, they are rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 1000, (24,), generator=generator).double()
    weight = torch.stack([x[torch.randperm(24, generator=generator)] for _ in range(8)])
    ties = torch.randint(1, 8, (30, 1), generator=generator).expand(30, 24)
    others = torch.randint(1, 8, (30, 24), generator=generator)
    features = torch.cat([ties, others]).float()
    assert_decides(backend, features, weight, torch.full((8,), 2.0**40, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e30])
def test_denormal_and_huge_features(backend, scale):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 9, generator=generator) * scale
    assert_decides(backend, features, torch.randn(5, 9, generator=generator))


def test_partial_sums_beyond_float32(backend):
    """Scores that fit float32, or just do not, after partial sums that do not."""
    generator = torch.Generator().manual_seed(0)
    features = 1e19 * torch.randn(40, 70, generator=generator)
    weight = 1e19 * torch.randn(6, 70, generator=generator)
    features[:, 35:], weight[:, 35:] = features[:, :35], -weight[:, :35]  # every score is nearly 0
    weight[:, 69] *= 1 + 1e-3 * torch.randn(6, generator=generator)
    assert_decides(backend, features, weight)
    assert_decides(backend, features, weight, 1e38 * torch.randn(6, generator=generator))


def test_squares_that_underflow(backend):
    """Small integers times 2⁻⁵⁶⁰: every score is exact, most have ties, and all norms vanish."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-3, 4, (200, 7), generator=generator).double() * 2.0**-560
    weight = torch.randint(-2, 3, (12, 7), generator=generator).double()
    assert_decides(backend, features, weight)
    assert_decides(backend, features * 2.0**560, weight * 2.0**-560)


def test_scores_in_range_of_weights_that_are_not(backend):
    """Enough rows and classes for 8-bit integers, whose sums times a class's scale alone leave float32."""
    generator = torch.Generator().manual_seed(0)
    weight = 1e37 * torch.randn(300, 8, generator=generator)
    features = 0.02 * torch.randn(4200, 8, generator=generator)
    bias = torch.zeros(300)
    for _ in range(2):
        expected = torch.addmm(bias.double(), features.double(), weight.double().T).argmax(1)
        with backends.forced("affine_argmax", backend):
            assert torch.equal(ncfast.affine_argmax(features, weight, bias), expected)
        weight[1] = -weight[0]  # only these two remain as large, and their biases let others win
        weight[2:] *= 0.01
        bias[:2] = -5e36


@pytest.mark.parametrize(
    "largest", [1e39, 1e44]
)  # beyond two bfloat16 and float32, and beyond a scale of integers
def test_a_class_beyond_float32_beside_others(backend, largest):
    """Its norm stays beyond every bound, whatever comes after it."""
    weight = torch.zeros(304, 17, dtype=torch.float64)
    weight[:4, 0] = torch.tensor([largest, -largest, 1e-4 * largest, -1e-4 * largest])
    features = torch.zeros(4200, 17, dtype=torch.float64)
    features[:, 0] = 1e-4 * (1 - 2 * (torch.arange(4200) % 2))
    for rows, classes in [(8, 4), (8, 304), (4200, 304)]:
        with backends.forced("affine_argmax", backend):
            decided = ncfast.affine_argmax(features[:rows], weight[:classes])
        assert torch.equal(decided, torch.arange(rows) % 2)


@pytest.mark.parametrize("most", [127, 32767])  # of 8 bits, for many rows and classes, and 16
def test_integers_rounded_to_one_side(backend, most):
    """Sixteen numbers of a row, then of a class, that just vanish beside a 1 in integers up to `most`.

    With them the first class is ahead of the second by a tenth of their sum S, without them 1.9 S behind.
    """
    lost = torch.full((17,), 0.49 / most)
    sixteen, one = torch.ones(17), torch.eye(17)[0]
    sixteen[0] = 0
    behind = 1.9 * (lost * sixteen).sum() * one
    for row, first, second in [
        (one + lost * sixteen, sixteen, behind - sixteen),
        (one + sixteen, one + lost * sixteen, one + behind - lost * sixteen),
    ]:
        features = torch.stack([row, -row])  # with their opposites, so that centring changes nothing
        weight = torch.stack([first, second, -first, -second])
        with backends.forced("affine_argmax", backend):
            assert ncfast.affine_argmax(features, weight).tolist() == [0, 2]
            # What is lost has squares beyond float32.
            assert ncfast.affine_argmax(2.0**-64 * features, weight).tolist() == [0, 2]
            many = ncfast.affine_argmax(features.repeat(2100, 1), torch.cat([weight, torch.zeros(256, 17)]))
        assert torch.equal(many, torch.tensor([0, 2]).repeat(2100))


@pytest.mark.parametrize("p", [131_071, 140_000])  # the most 8-bit products that fit an int32, and more
def test_sums_of_integers_at_their_largest(backend, p):
    """Rows of ±1, each the last one moved by a column, and classes parallel to them."""
    if backend != "cpu":
        pytest.skip("large, and only the C++ kernels multiply integers")
    signs = 1 - 2 * (torch.arange(p + 4200) % 2).float()
    weight = torch.stack([signs[:p], -signs[:p]])
    with backends.forced("affine_argmax", backend):
        decided = ncfast.affine_argmax(signs.as_strided((4200, p), (1, 1)), weight)
    assert torch.equal(decided, torch.arange(4200) % 2)


def test_scales_whose_product_a_thread_takes_for_zero(backend):
    """Scores of 2⁻⁹⁶ from numbers whose scales as 16-bit integers are 2⁻⁶³ each, beside a bias of 2⁻⁹⁸."""
    rows = torch.full((2, 16), 2.0**-50)
    rows[1] *= -1
    with denormals_flushed():
        assert_decides(backend, rows, rows, torch.tensor([0, 2.0**-98]))


# Shapes whose rows a matrix-vector product of a BLAS adds up in more than one order.
@pytest.mark.parametrize(("C", "p"), [(7, 5), (11, 19), (37, 64)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_equal_means_are_ties(backend, C, p, offset):
    generator = torch.Generator().manual_seed(C)
    means = torch.randn(C, p, generator=generator, dtype=torch.float64) + offset
    means = torch.cat([means, means.flip(0), means])  # each mean three times
    features = (means[:C].repeat(20, 1) + 0.3 * torch.randn(20 * C, p, generator=generator)).float()
    _, bias = center_rule(means.T.contiguous().T)  # whatever their layout
    assert torch.equal(bias[2 * C :], bias[:C])
    with backends.forced("affine_argmax", backend):
        decided = ncfast.nearest_class_center(features, means)
    assert decided.max() < C
    assert torch.equal(decided, (features.double()[:, None] - means[:C]).square().sum(2).argmin(1))


@pytest.mark.parametrize("offset", [1e3, 1e6, 1e9])
def test_centers_far_from_the_origin(backend, offset):
    """float64 samples off their walls by more than the rounding of what is given."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(50, 16, generator=generator, dtype=torch.float64) + offset
    features = torch.randn(5000, 16, generator=generator, dtype=torch.float64) + offset
    nearest = (features[:, None] - means).square().sum(2).topk(2, largest=False)
    clear = nearest.values[:, 1] - nearest.values[:, 0] > 32 * 16 * 2.0**-53 * offset
    assert clear.sum() > 4900
    with backends.forced("affine_argmax", backend):
        decided = ncfast.nearest_class_center(features, means)
    assert torch.equal(decided[clear], nearest.indices[clear, 0])


def test_exact_ties_of_centers(backend):
    """Small integers: distances are exact, and half of the samples lie between two centres."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        means = torch.randint(-4, 5, (5, 2), generator=generator).double()
        features = torch.randint(-8, 9, (30, 2), generator=generator) / 2
        with backends.forced("affine_argmax", backend):
            decided = ncfast.nearest_class_center(features, means)
        distances = (features.double()[:, None] - means).square().sum(2)
        assert torch.equal(decided, distances.argmin(1))


# Columns around a tile of 8-bit numbers; a last group of one vector of classes, or two.
@pytest.mark.parametrize(
    ("C", "p", "scale", "dtype"),
    [
        (260, 63, 1.0, torch.float32),
        (300, 64, 1e12, torch.bfloat16),
        (270, 65, 1e-12, torch.float64),
        (260, 200, 1e-3, torch.float32),
        (10, 64, 1e-2, torch.float16),
    ],
)
def test_hard_rows_among_easy_ones(backend, C, p, scale, dtype):
    """So many easy rows and classes that a coarse level is worth it, which the others must not be left to.

    Near ties of relative size 1e-6 to 1e-1, rows of which a single entry sets the scale, far rows, and rows
    that are no numbers.
    """
    generator = torch.Generator().manual_seed(p)
    N = 4200
    means = 10 * torch.randn(C, p, generator=generator, dtype=torch.float64)
    y = torch.randint(0, C, (N,), generator=generator)
    features = means[y] + torch.randn(N, p, generator=generator, dtype=torch.float64)
    other = means[(y + 1) % C]
    gap = 10.0 ** (-6 + 5 * torch.rand(N, 1, generator=generator, dtype=torch.float64))
    tie = 0.5 * (means[y] + other) + gap * torch.randn(N, 1, generator=generator) * (means[y] - other)
    kind = torch.arange(N) % 40
    features = torch.where(kind[:, None] < 5, tie, features)
    features[kind == 5, p // 2] *= 300
    features[kind == 6] *= 1e4
    features[kind == 7] = 0
    features[7], features[8, 1] = torch.nan, torch.inf
    features = (features * scale).to(dtype)
    weight = means * scale
    bias = -0.5 * weight.square().sum(1)
    scores = torch.addmm(bias, features.double(), weight.T)
    best = scores.topk(2).values
    unit = 2.0**-53 * (features.double().norm(dim=1) * weight.norm(dim=1).max() + bias.abs().max())
    clear = best[:, 0] - best[:, 1] > 4 * (p + 8) * unit  # what float64 itself can tell
    assert clear.sum() > 0.99 * N
    with backends.forced("affine_argmax", backend):
        decided, again = ncfast.affine_argmax(features, [weight, weight], [bias, bias])
    assert torch.equal(decided, again)
    assert torch.equal(decided[clear], scores.argmax(1)[clear])
    assert ((decided >= 0) & (decided < C)).all()


def test_denormals_times_huge_weights(backend):
    generator = torch.Generator().manual_seed(0)
    features = 1e-44 * torch.randn(50, 3, dtype=torch.float64, generator=generator)
    assert_decides(backend, features, 1e30 * torch.randn(6, 3, dtype=torch.float64, generator=generator))


def test_nan_rows_give_an_index_in_range(backend):
    features = torch.randn(6, 5)
    features[1], features[4, 2] = torch.nan, torch.inf
    weight = torch.randn(3, 5)
    with backends.forced("affine_argmax", backend):
        decided = ncfast.affine_argmax(features, weight)
    assert ((decided >= 0) & (decided < 3)).all()
    good = [0, 2, 3, 5]
    assert torch.equal(decided[good], exact(features[good], weight, torch.zeros(3)))


def test_strided_views(backend):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(41, 30, generator=generator)
    assert_decides(backend, wide[1::2, 3:22], torch.randn(7, 40, generator=generator)[:, 1::2][:, :19])
    assert_decides(backend, wide.T, torch.randn(7, 41, generator=generator))


def test_several_rules_at_once(backend):
    features = torch.randn(30, 6)
    weights = [torch.randn(4, 6), torch.randn(9, 6, dtype=torch.float64)]
    biases = [None, torch.randn(9)]
    with backends.forced("affine_argmax", backend):
        together = ncfast.affine_argmax(features, weights, biases)
        apart = [ncfast.affine_argmax(features, w, b) for w, b in zip(weights, biases, strict=True)]
    assert isinstance(together, tuple)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_nearest_class_center(backend, offset):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(40, 12, dtype=torch.float64, generator=generator) + offset
    features = (means[torch.arange(400) % 40] + torch.randn(400, 12, generator=generator)).float()
    with backends.forced("affine_argmax", backend):
        decided = ncfast.nearest_class_center(features, means)
        with_absent = ncfast.nearest_class_center(
            features, torch.cat([torch.full((2, 12), torch.nan), means])
        )
        with_infinite = ncfast.nearest_class_center(
            features, torch.cat([means, torch.full((1, 12), torch.inf)])
        )
    assert torch.equal(decided, ncfast.reference.nearest_class_center(features, means))
    assert torch.equal(with_absent, decided + 2)
    assert torch.equal(with_infinite, decided)


def test_thread_count_does_not_matter(backend):
    features, weight = torch.randn(3000, 20), torch.randn(30, 20)
    threads, decisions = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            with backends.forced("affine_argmax", backend):
                decisions.append(ncfast.affine_argmax(features, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(decisions[0], other) for other in decisions[1:])


@pytest.mark.parametrize(("slack", "decides"), [(0.0, True), (0.5, True), (1.1, False)])
def test_the_slack_of_the_weight_leaves_rows_open(backend, slack, decides):
    """Rows of norm 3 on the axis of two opposite classes of norm 1: scores that differ by 6."""
    if backend != "cpu":
        pytest.skip("others decide by no bound")
    features = torch.zeros(40, 17)
    features[:, 5] = torch.tensor([3.0, -3.0]).repeat(20)
    weight = torch.zeros(2, 17, dtype=torch.float64)
    weight[:, 5] = torch.tensor([1.0, -1.0])
    zeros = torch.zeros(17), torch.zeros(2, dtype=torch.float64)
    index, decided = torch.full((40,), -1), torch.zeros(40, dtype=torch.bool)
    rule = {
        "C": 2,
        "weight": weight.data_ptr(),
        "bias": zeros[1].data_ptr(),
        "weight_slack": slack,
        "bias_slack": 0.0,
        "index": index.data_ptr(),
        "decided": decided.data_ptr(),
    }
    _cpu.affine_argmax(features.data_ptr(), "float32", 40, 17, 17 * 4, zeros[0].data_ptr(), [rule], 1)
    assert decided.tolist() == [decides] * 40
    if decides:
        assert index.tolist() == [0, 1] * 20


def test_no_rows(backend):  # noqa: ARG001 (nothing runs)
    assert ncfast.affine_argmax(torch.empty(0, 4), torch.randn(3, 4)).shape == (0,)
    assert [len(d) for d in ncfast.affine_argmax(torch.empty(0, 4), [torch.randn(3, 4)] * 2)] == [0, 0]


def test_errors(backend):  # noqa: ARG001 (nothing runs)
    features = torch.randn(5, 4)
    for weight, bias, error, words in [
        (torch.randn(3, 5), None, ValueError, r"weight must have shape \[C, 4\]"),
        (torch.randn(0, 4), None, ValueError, "C ≥ 1"),
        (torch.zeros(3, 4, dtype=torch.long), None, TypeError, "weight must be a floating-point"),
        (torch.randn(3, 4), torch.zeros(4), ValueError, r"bias must have shape \[3\]"),
        (torch.randn(3, 4), [0.0, 0.0, 0.0], TypeError, "bias must be"),
        ([torch.randn(3, 4)], [None, None], ValueError, "1 weights but 2 biases"),
        (torch.randn(3, 4, device="meta"), None, ValueError, "meta"),
    ]:
        with pytest.raises(error, match=words):
            ncfast.affine_argmax(features, weight, bias)
    with pytest.raises(ValueError, match="no class is present"):
        ncfast.nearest_class_center(features, torch.full((2, 4), torch.nan))
