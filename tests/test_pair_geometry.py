"""pair_geometry, etf_error and decision_radius on every backend, against loops over pairs in float64."""

import math

import backends
import pytest
import torch

import ncfast
from ncfast.ops.pair_geometry import etf_error, radius_bound

import oracle
from oracle import EPS

MACHINES = [(name, None) for name in backends.available("pair_geometry") if name != "cpu"]
if "cpu" in backends.available("pair_geometry"):
    from ncfast import _cpu

    MACHINES += [("cpu", isa) for isa in _cpu.bodies("pair_geometry")]
pytestmark = pytest.mark.parametrize(("backend", "isa"), MACHINES)


@pytest.fixture(autouse=True)
def _forced_isa(isa, monkeypatch):
    """Every instruction set that this machine has, and no other than the one named."""
    if isa is not None:
        monkeypatch.setenv("NCFAST_CPU_ISA", isa)
        assert _cpu.isa("pair_geometry") == isa


def by_loops(vectors, variances):
    """Every reduction from one pair after the other."""
    rows = vectors.double()
    C = len(rows)
    cosines, kernels, cdnv = [], [], []
    nearest = [(math.inf, -1)] * C
    for a in range(C):
        for b in range(C):
            if a == b:
                continue
            unit_a, unit_b = rows[a] / rows[a].norm(), rows[b] / rows[b].norm()
            distance = float((rows[a] - rows[b]).norm())
            cosines.append(float(unit_a @ unit_b))
            kernels.append(-math.log(float((unit_a - unit_b).norm())))
            cdnv.append(float(variances[a] + variances[b]) / (2 * distance**2))
            nearest[a] = min(nearest[a], (distance, b))
    cosines, kernels, cdnv = (torch.tensor(v, dtype=torch.float64) for v in (cosines, kernels, cdnv))
    return {
        "cosine_mean": cosines.mean(),
        "cosine_std": cosines.std(correction=0),
        "cosine_min": cosines.min(),
        "cosine_max": cosines.max(),
        "max_angle_deviation": (cosines + 1 / (C - 1)).abs().mean(),
        "log_kernel_mean": kernels.mean(),
        "log_kernel_std": kernels.std(correction=0),
        "nearest_distance": torch.tensor([d for d, _ in nearest], dtype=torch.float64),
        "nearest_index": torch.tensor([i for _, i in nearest]),
        "cdnv": cdnv.mean(),
    }


# C = 2: one pair; C and p around lanes and tiles of 8, 16 and 32; C > p and p = 1.
@pytest.mark.parametrize(
    ("C", "p"), [(2, 1), (2, 5), (3, 8), (7, 9), (15, 4), (16, 16), (17, 33), (33, 7), (40, 65)]
)
def test_against_loops(backend, C, p):
    generator = torch.Generator().manual_seed(C * p)
    vectors = torch.randn(C, p, generator=generator, dtype=torch.float64)
    if p == 1:
        vectors = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)  # equal directions would have no kernel
    variances = torch.rand(C, generator=generator, dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(vectors, variances)
        plain = ncfast.pair_geometry(vectors.float())
    expected = by_loops(vectors, variances)
    # Dot products of p terms, then averages over pairs.
    bound = 8 * (p + C) * EPS
    for name, value in expected.items():
        size = max(1.0, float(value.double().abs().max()))
        oracle.assert_within(getattr(geometry, name), value, 4 * bound * size, name)
    assert plain.cdnv is None
    assert geometry.nearest_index.dtype == torch.int64


def test_close_rows_do_not_cancel(backend):
    """Rows 1e-7 apart at norm 1: right to 1e-8 relative, where a Gram matrix would lose it all."""
    base = torch.randn(1, 10, dtype=torch.float64)
    vectors = base / base.norm() + 1e-7 * torch.randn(6, 10, dtype=torch.float64)
    expected = by_loops(vectors, torch.ones(6))
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(vectors, torch.ones(6))
    oracle.assert_within(geometry.nearest_distance, expected["nearest_distance"], 1e-8 * 1e-7)
    assert torch.equal(geometry.nearest_index, expected["nearest_index"])
    oracle.assert_relative(geometry.cdnv, expected["cdnv"], 1e-8)
    oracle.assert_within(geometry.log_kernel_mean, expected["log_kernel_mean"], 1e-8)


def test_a_simplex_etf(backend):
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(
            ncfast.simplex_etf(10, 16, generator=torch.Generator().manual_seed(0))
        )
        error = etf_error(ncfast.simplex_etf(10, 16))
    for name, value in {
        "cosine_mean": -1 / 9,
        "cosine_min": -1 / 9,
        "cosine_max": -1 / 9,
        "cosine_std": 0.0,
        "max_angle_deviation": 0.0,
        "log_kernel_mean": -0.5 * math.log(20 / 9),
        "log_kernel_std": 0.0,
    }.items():
        oracle.assert_within(getattr(geometry, name), value, 64 * 16 * EPS, name)
    oracle.assert_within(error, 0.0, 64 * 16 * EPS)


def test_rows_without_a_direction_and_equal_rows(backend):
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(vectors)
        equal = ncfast.pair_geometry(twins, torch.ones(3))
    assert geometry.cosine_mean.isnan()
    assert geometry.log_kernel_std.isnan()
    assert geometry.nearest_distance.tolist() == [1.0, 1.0, 1.0]
    assert equal.nearest_distance.tolist() == [0.0, 0.0, math.sqrt(2)]
    assert equal.nearest_index.tolist() == [1, 0, 0]
    assert equal.cdnv == math.inf
    assert equal.log_kernel_mean == math.inf


def test_one_dimension_has_two_directions(backend):
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(torch.tensor([[0.1], [-3.0], [0.7]]))
    assert geometry.cosine_min == -1
    assert geometry.cosine_max == 1
    assert geometry.log_kernel_mean == math.inf  # 0.1 and 0.7 point exactly the same way


@pytest.mark.parametrize(("C", "p"), [(2, 1), (5, 9), (33, 8)])
def test_etf_error(backend, C, p):
    left, right = torch.randn(C, p, dtype=torch.float64), torch.randn(C, p)
    ideal = (torch.eye(C, dtype=torch.float64) - 1 / C) / math.sqrt(C - 1)
    with backends.forced("pair_geometry", backend):
        own, crossed = etf_error(left), etf_error(left, right)
        zero = etf_error(torch.zeros(C, p))
    for error, gram in ((own, left @ left.T), (crossed, left @ right.double().T)):
        oracle.assert_within(error, (gram / gram.norm() - ideal).norm(), 8 * (p + C) * EPS)
    assert zero.isnan()


@pytest.mark.parametrize(("C", "p"), [(1, 3), (2, 1), (6, 4), (17, 33)])
def test_decision_radius_is_the_distance_to_the_boundary(backend, C, p):
    weight, bias = torch.randn(C, p, dtype=torch.float64), torch.randn(C, dtype=torch.float64)
    anchors = weight + 0.3 * torch.randn(C, p, dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        radii = ncfast.decision_radius(weight, bias, anchors)
        some = ncfast.decision_radius(weight, bias, anchors[C // 2 :], torch.arange(C // 2, C))
    assert torch.equal(some, radii[C // 2 :])
    if C == 1:
        assert radii.tolist() == [math.inf]
        return
    for a in range(C):
        walls = [
            float(((weight[a] - weight[c]) @ anchors[a] + bias[a] - bias[c]) / (weight[a] - weight[c]).norm())
            for c in range(C)
            if c != a
        ]
        bound = (p + 4) * 2.0**-52 * (float(anchors[a].norm()) + abs(min(walls)))  # as the docstring promises
        oracle.assert_within(radii[a], min(walls), 2 * bound)


def test_decision_radius_certifies(backend):
    """Just inside the radius the rule decides a, in every direction; across the nearest wall it does not."""
    C, p = 6, 4
    means = 3 * torch.randn(C, p, dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        radii = ncfast.decision_radius(means, -0.5 * means.square().sum(1), means)
        nearest = ncfast.pair_geometry(means)
    oracle.assert_within(radii, nearest.nearest_distance / 2, 64 * EPS * 10)
    for a in range(C):
        steps = torch.randn(200, p, dtype=torch.float64)
        steps *= radii[a] / steps.norm(dim=1, keepdim=True)
        inside = means[a] + (1 - 1e-9) * steps
        assert (ncfast.reference.nearest_class_center(inside, means) == a).all()
        towards = means[nearest.nearest_index[a]] - means[a]
        across = means[a] + (1 + 1e-9) * radii[a] * towards / towards.norm()
        assert ncfast.reference.nearest_class_center(across[None], means) != a


def test_decision_radius_of_equal_rules(backend):
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with backends.forced("pair_geometry", backend):
        tied = ncfast.decision_radius(weight, None, weight)
        biased = ncfast.decision_radius(weight, torch.tensor([0.0, 1.0, 0.0]), weight)
    wall = 1 / math.sqrt(2)
    oracle.assert_within(tied[[0, 2]], torch.tensor([wall, wall]), 1e-7)
    assert tied[1] == -math.inf  # the lower index wins every tie
    assert biased[0] == -math.inf
    oracle.assert_within(biased[1], 2 * wall, 1e-7)


def rows_of(kind, C, p):
    generator = torch.Generator().manual_seed(C + p)
    rows = torch.randn(C, p, generator=generator, dtype=torch.float64)
    if kind == "offset":  # every cosine near 1, every distance small beside the norms
        return rows + 1e3
    if kind == "clusters":  # most pairs fine, some far too close for a Gram matrix
        return rows[torch.arange(C) % (C // 4)] + 1e-7 * rows
    if kind == "twins":  # exact ties
        return rows[torch.arange(C) % (C // 2)]
    if kind == "scales":
        return rows * torch.logspace(-8, 8, C, dtype=torch.float64)[:, None]
    if kind == "huge":  # squares of norms overflow when they are squared again
        return rows * 1e120
    return rows


# 48 rows are a tile, 8 a panel, 128 columns a step of the product; and C > p.
SHAPES = [(47, 7), (48, 128), (49, 129), (97, 300), (200, 9)]


@pytest.mark.parametrize("kind", ["plain", "offset", "clusters", "twins", "scales"])
@pytest.mark.parametrize(("C", "p"), SHAPES)
def test_against_the_reference(backend, kind, C, p):
    rows = rows_of(kind, C, p)
    variances = torch.rand(C, dtype=torch.float64) * rows.square().mean()
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(rows, variances)
    truth = ncfast.reference.pair_geometry(rows, variances)
    # A unit vector is rounded to EPS/2, beside which 1e-7 between two of them is right to 1e-8 relative.
    bound = {"clusters": 1e-7, "offset": 1e-10}.get(kind, 32 * (p + C) * EPS)
    for name in ("cosine_mean", "cosine_std", "cosine_min", "cosine_max", "max_angle_deviation"):
        oracle.assert_within(getattr(geometry, name), getattr(truth, name), 32 * (p + C) * EPS, name)
    if kind == "twins":
        assert geometry.log_kernel_mean == geometry.cdnv == math.inf
    else:
        for name in ("log_kernel_mean", "log_kernel_std", "cdnv"):
            oracle.assert_relative(getattr(geometry, name), getattr(truth, name), bound, name)
    oracle.assert_within(geometry.etf_error, truth.etf_error, 32 * (p + C) * EPS)
    relative = (geometry.nearest_distance - truth.nearest_distance).abs() / truth.nearest_distance
    assert (relative[truth.nearest_distance > 0] <= 4 * (p + 8) * EPS).all()
    assert (geometry.nearest_distance[truth.nearest_distance == 0] == 0).all()
    if kind != "offset":  # rounding decides between distances that agree to the last digits
        assert torch.equal(geometry.nearest_index, truth.nearest_index)


def rules_and_anchors(kind, C, p):
    """What `decision_radius` takes, three times; classes are None where every class has its anchor."""
    weight = rows_of(kind, C, p)
    bias = torch.randn(C, dtype=torch.float64) * weight.square().mean()
    aside = weight + 0.1 * weight.abs().mean() * torch.randn(C, p, dtype=torch.float64)
    classes = torch.arange(C).flip(0)[: C // 2]
    return [
        (weight, -0.5 * weight.square().sum(1), weight, None),
        (weight, bias, aside, None),
        (weight, torch.zeros(C), aside[classes], classes),
    ]


@pytest.mark.parametrize("kind", ["plain", "offset", "clusters", "twins", "scales", "huge"])
@pytest.mark.parametrize(("C", "p"), SHAPES)
def test_decision_radius_keeps_its_promise(backend, kind, C, p):
    """Within the bound of the docstring, twice: the reference has the same."""
    for *rule, anchors, of in rules_and_anchors(kind, C, p):
        with backends.forced("pair_geometry", backend):
            radii = ncfast.decision_radius(*rule, anchors, of)
        with ncfast.use_backend("reference"):
            truth = ncfast.decision_radius(*rule, anchors, of)
        bound = 2 * (p + 4) * 2.0**-52 * (anchors.norm(dim=1) + truth.abs())
        assert (((radii - truth).abs() <= bound) | (radii == truth)).all()


@pytest.mark.parametrize("spread", [3e-1, 1e-1, 1e-2, 1e-4, 1e-8, 1e-15])
def test_decision_radius_near_collapse(backend, spread):
    """All walls about equally near, as collapse has it: no precision may miss the nearest."""
    C, p = 200, 260
    weight = ncfast.simplex_etf(C, p).double()
    weight += spread * torch.randn(C, p, dtype=torch.float64) * weight.norm(dim=1).mean() / p**0.5
    anchors = weight + 1e-3 * torch.randn(C, p, dtype=torch.float64) / p**0.5
    bias = 1e-3 * torch.randn(C, dtype=torch.float64)
    for rule, points in [((weight, bias), anchors), ((weight, -0.5 * weight.square().sum(1)), weight)]:
        with backends.forced("pair_geometry", backend):
            radii = ncfast.decision_radius(*rule, points)
        with ncfast.use_backend("reference"):
            truth = ncfast.decision_radius(*rule, points)
        bound = 2 * (p + 4) * 2.0**-52 * (points.norm(dim=1) + truth.abs())
        assert ((radii - truth).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["plain", "offset", "clusters", "twins", "scales", "huge"])
@pytest.mark.parametrize(("C", "p"), SHAPES)
def test_radius_bound(backend, isa, kind, C, p):
    """Below every radius, and no lower than what it is made of says, but for the rounding of the products."""
    for weight, bias, anchors, classes in rules_and_anchors(kind, C, p):
        of = torch.arange(C) if classes is None else classes
        with backends.forced("pair_geometry", backend):
            bound = radius_bound(weight, bias, anchors, of)
        if bound is None:
            assert not backend.startswith("cpu")
            return
        assert ((bound == -torch.inf) | (bound > 0)).all()
        assert (bound <= ncfast.decision_radius(weight, bias, anchors, of)).all()
        scores, norms = anchors @ weight.T + bias, weight.norm(dim=1)
        lead = scores.gather(1, of[:, None]) - scores
        loose = lead / (norms[of][:, None] + norms)
        loose[torch.arange(len(of)), of] = torch.inf
        expected = loose.min(1).values
        # A product of rows of norm 1 is off by up to 2⁻⁷ in bfloat16, as by what float32 adds up elsewhere.
        unit = 2.0**-7 if isa in ("avx512_bf16", "amx") else (p + 8) * 2.0**-22
        rounding = unit * anchors.norm(dim=1) * norms.max() + 1e-9 * bias.abs().max()
        expected -= rounding / norms[norms > 0].min()
        if kind in ("plain", "huge") and p > 1:
            assert (expected > 0).any()
        assert (bound >= expected)[expected > 0].all()


@pytest.mark.parametrize("p", [1, 40, 700])
def test_radius_bound_of_opposite_rows(backend, p):
    """Two opposite rows are as far apart as their norms say: nothing but the rounding is between the two."""
    for _ in range(50):
        row, anchors = torch.randn(p, dtype=torch.float64), torch.randn(2, p, dtype=torch.float64)
        rule = torch.stack([row, -row]), torch.zeros(2), anchors, (anchors @ row < 0).long()
        with backends.forced("pair_geometry", backend):
            bound = radius_bound(*rule)
        if bound is None:
            return
        radii = ncfast.decision_radius(*rule)
        assert (bound <= radii).all()
        assert (bound >= radii - 0.01 * anchors.norm(dim=1))[radii > 0.01 * anchors.norm(dim=1)].all()


def test_decision_radius_of_an_anchor_that_is_not_there(backend):
    """An anchor of NaN, an absent class's mean, has no radius and changes no other."""
    weight, anchors = torch.randn(2, 60, 40, dtype=torch.float64)
    others = torch.arange(60) != 7
    with backends.forced("pair_geometry", backend):
        expected = ncfast.decision_radius(weight, None, anchors)
        anchors[7] = torch.nan
        radii = ncfast.decision_radius(weight, None, anchors)
    assert radii[7].isnan()
    assert torch.equal(radii[others], expected[others])


def test_cosines_that_agree_do_not_cancel(backend):
    """A standard deviation of 1e-9 about a cosine of 0.8: E[x²] − E[x]² would be noise."""
    C, p = 60, 64
    common = torch.zeros(C, p, dtype=torch.float64)
    common[:, 0] = 2.0
    rows = common + torch.eye(C, p, dtype=torch.float64).roll(1, 1)
    rows += 1e-9 * torch.randn(C, p, dtype=torch.float64)
    cosines = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    others = cosines[~torch.eye(C, dtype=torch.bool)]
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(rows)
    assert others.std(correction=0) < 1e-8
    oracle.assert_within(geometry.cosine_std, others.std(correction=0), 4 * p * EPS)


@pytest.mark.parametrize("kind", ["plain", "clusters"])
def test_any_number_of_threads_gives_the_same_bits(backend, kind):
    C, p = 200, 100
    rows, variances = rows_of(kind, C, p), torch.rand(C)
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            with backends.forced("pair_geometry", backend):
                radii = ncfast.decision_radius(rows, torch.zeros(C), rows + 0.1)
                geometry = ncfast.pair_geometry(rows, variances)
                answers.append((*geometry, radii, etf_error(rows), etf_error(rows, rows + 1.0)))
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":  # whose products are torch's
        assert all(torch.equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))


def test_etf_error_of_any_scale(backend):
    rows = torch.randn(7, 5, dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        errors = [etf_error(scale * rows) for scale in (1.0, 1e-150, 1e150)]
    for error in errors[1:]:
        oracle.assert_relative(error, errors[0], 64 * EPS)


def test_etf_error_near_an_etf_does_not_cancel(backend):
    """To first order the error is proportional to the perturbation, down to 1e-12 of it."""
    frame = ncfast.simplex_etf(10, 16, generator=torch.Generator().manual_seed(0))
    bump = torch.randn(10, 16, dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        small, smaller = etf_error(frame + 1e-6 * bump), etf_error(frame + 1e-8 * bump)
    oracle.assert_relative(small / smaller, 100.0, 1e-4)


def test_many_classes_in_closed_form(backend):
    """So many that tasks hold several blocks of rows; no C×C matrix, in the kernel or here."""
    if backend == "reference":
        pytest.skip("holds C×C matrices")
    C, p = 6200, 16
    rows = torch.randn(C, p, dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(rows, torch.ones(C))
    units = rows / rows.norm(dim=1, keepdim=True)
    pairs = C * (C - 1)
    mean = (units.sum(0).square().sum() - C) / pairs  # Σ_{c, c′} cos = ‖Σ û‖²
    squares = ((units.T @ units).square().sum() - C) / pairs  # Σ_{c, c′} cos² = ‖Σ û ûᵀ‖²
    oracle.assert_within(geometry.cosine_mean, mean, 64 * p * EPS)
    oracle.assert_within(geometry.cosine_std, (squares - mean.square()).sqrt(), 64 * p * EPS)
    some = torch.arange(0, C, 97)
    distances = torch.cdist(rows[some], rows, compute_mode="donot_use_mm_for_euclid_dist")
    distances[torch.arange(len(some)), some] = torch.inf
    nearest = distances.min(1)
    assert torch.equal(geometry.nearest_index[some], nearest.indices)
    oracle.assert_within(geometry.nearest_distance[some], nearest.values, 8 * p * EPS * 10)


def test_any_integers_are_classes_and_any_number_of_anchors(backend):
    """More anchors than classes, the same class twice, none at all; int32 and strided."""
    weight, anchors = torch.randn(4, 6), torch.randn(9, 6)
    classes = torch.arange(18)[::2] % 4
    with backends.forced("pair_geometry", backend):
        radii = ncfast.decision_radius(weight, None, anchors, classes.int())
        none = ncfast.decision_radius(weight, None, anchors[:0], classes[:0])
    with ncfast.use_backend("reference"):
        truth = ncfast.decision_radius(weight, None, anchors, classes)
    oracle.assert_within(radii, truth, 100 * EPS * 10)
    assert none.shape == (0,)


def test_anchors_may_share_the_memory_of_the_weight(backend):
    """Where the first number is the same and the rest is not: other strides, other lengths."""
    square = torch.randn(6, 6, dtype=torch.float64)
    long = torch.randn(600, 8, dtype=torch.float64)
    many = torch.arange(600) % 3
    for weight, anchors, classes in [
        (square, square.T, None),
        (long[:12:2], long[:6], None),
        (long[:3, :5], long[:, :5], many),  # copied apart: only the anchors have 600 rows
        (long[:3], long, many),
        (long[:6, :5], long[:6, :5], None),
    ]:
        with backends.forced("pair_geometry", backend):
            radii = ncfast.decision_radius(weight, None, anchors, classes)
        with ncfast.use_backend("reference"):
            truth = ncfast.decision_radius(weight, None, anchors.clone(), classes)
        bound = 2 * (weight.shape[1] + 4) * 2.0**-52 * (anchors.norm(dim=1) + truth.abs())
        oracle.assert_within((radii - truth) / bound, torch.zeros(len(radii)), 1.0)


def test_decision_radius_of_any_scale(backend):
    """Powers of two change no digit, though the square of a lead or of an anchor would underflow."""
    C, p = 40, 8
    weight = torch.randn(C, p, dtype=torch.float64)
    anchors = torch.randn(C, p, dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        expected = ncfast.decision_radius(weight, None, anchors)
        for a, b in [(0, -600), (-100, -700), (400, 400)] + [(-449, -80 - n) for n in range(16)]:
            radii = ncfast.decision_radius(weight * 2.0**a, None, anchors * 2.0**b) * 2.0**-b
            bound = 2 * (p + 4) * 2.0**-52 * (anchors.norm(dim=1) + expected.abs())
            oracle.assert_within((radii - expected) / bound, torch.zeros(C), 1.0, f"{a} {b}")


def test_equal_distances_go_to_the_lowest_index(backend):
    """From a row to itself plus the same numbers in any order: exact, which a Gram matrix is not."""
    generator = torch.Generator().manual_seed(0)
    p = 40
    row = torch.full((1, p), 2.0**27 + 1, dtype=torch.float64)
    added = 2.0**12 * torch.randint(-(2**16), 0, (p,), generator=generator).double()
    around = torch.stack([row[0] + added[torch.randperm(p, generator=generator)] for _ in range(100)])
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(torch.cat([around, row]))
    assert geometry.nearest_index[100] == 0
    oracle.assert_within(geometry.nearest_distance[100], added.square().sum().sqrt(), 0.0)


def test_leads_that_overflow_certify_nothing(backend):
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    with backends.forced("pair_geometry", backend):
        for a, b in [(1e250, 1e60), (1e150, 1e160)]:
            radii = ncfast.decision_radius(weight * a, None, weight * b)
            assert not (radii > b * (1 + 1e-12)).any()
        apart = ncfast.decision_radius(weight, torch.tensor([0.0, -torch.inf]), weight)
    assert apart.tolist() == [math.inf, -math.inf]  # a bias may be infinite, and so may a radius


def test_norms_that_overflow_make_nothing_up(backend):
    rows = torch.randn(60, 9, dtype=torch.float64)
    truth = ncfast.pair_geometry(rows)
    rows[17] *= 1e160
    with backends.forced("pair_geometry", backend):
        geometry = ncfast.pair_geometry(rows)
    for name in (
        "cosine_mean",
        "cosine_std",
        "cosine_min",
        "cosine_max",
        "log_kernel_mean",
        "log_kernel_std",
    ):
        value = getattr(geometry, name)
        assert value.isnan() or (value - getattr(truth, name)).abs() <= 64 * 9 * EPS


def test_cosines_of_parallel_rows_stay_in_range(backend):
    factors = torch.tensor([[1.0], [2.5], [-0.3], [7.7]], dtype=torch.float64)
    for _ in range(50):
        with backends.forced("pair_geometry", backend):
            geometry = ncfast.pair_geometry(factors * torch.randn(5, dtype=torch.float64))
        assert -1 <= geometry.cosine_min <= -1 + 1e-15
        assert 1 - 1e-15 <= geometry.cosine_max <= 1


def test_cosines_of_any_scale(backend):
    """Norms whose product underflows, and norms whose product would if both were inverted first."""
    rows = torch.randn(20, 6, dtype=torch.float64)
    names = ("cosine_mean", "cosine_std", "cosine_min", "cosine_max", "log_kernel_mean")
    with backends.forced("pair_geometry", backend):
        expected = ncfast.pair_geometry(rows)
        for scale in (2.0**-490, 2.0**-516, 2.0**490):
            geometry = ncfast.pair_geometry(rows * scale)
            for name in names:  # 2^-516 leaves squares 41 bits
                oracle.assert_within(getattr(geometry, name), getattr(expected, name), 6 * 2.0**-38, name)


def test_errors(backend):  # noqa: ARG001 (nothing runs)
    rows = torch.randn(3, 4)
    for call, error, words in [
        (lambda: ncfast.pair_geometry(rows[:1]), ValueError, "C ≥ 2"),
        (lambda: ncfast.pair_geometry(rows[0]), ValueError, "C, p"),
        (lambda: ncfast.pair_geometry(rows.long()), TypeError, "vectors must be"),
        (lambda: ncfast.pair_geometry(rows, torch.ones(4)), ValueError, "variances must have shape"),
        (lambda: etf_error(rows, torch.randn(3, 5)), ValueError, "right must have shape"),
        (lambda: ncfast.decision_radius(rows, torch.ones(2), rows), ValueError, "bias must have shape"),
        (lambda: ncfast.decision_radius(rows, None, rows[:2]), ValueError, "anchors must have shape"),
        (lambda: ncfast.decision_radius(rows, None, rows.to("meta")), ValueError, "meta"),
        (lambda: ncfast.decision_radius(rows, None, rows, torch.ones(3)), TypeError, "classes"),
        (lambda: ncfast.decision_radius(rows, None, rows, [0, 1, 2]), TypeError, "classes"),
        (lambda: ncfast.decision_radius(rows, None, rows, torch.ones(3, 2).long()), ValueError, "classes"),
        (lambda: ncfast.decision_radius(rows, None, rows, torch.tensor(0)), ValueError, "classes"),
        (lambda: ncfast.decision_radius(rows, None, rows, torch.tensor([0, 3, 1])), ValueError, "classes"),
        (lambda: ncfast.decision_radius(rows, None, rows, torch.tensor([0, -1, 1])), ValueError, "classes"),
        (lambda: radius_bound(rows, torch.zeros(3), rows, torch.tensor([0, 3, 1])), ValueError, "classes"),
    ]:
        with pytest.raises(error, match=words):
            call()
