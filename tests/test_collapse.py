"""CollapseReport: every field against the float64 truth, a hand-computed case and the ideal geometry."""

import dataclasses
import json
import math
from fractions import Fraction

import mpmath
import pytest
import torch

import ncfast

import oracle
from oracle import EPS

mpmath.mp.dps = 40


def hand_case():
    """C = 3 unbalanced classes in p = 2 dimensions, small integers: all of it exact in fractions."""
    points = {0: [(4, 0), (6, 0)], 1: [(-2, 3), (-2, 5), (-5, 4)], 2: [(-1, -4)]}
    features = [point for own in points.values() for point in own]
    labels = [c for c, own in points.items() for _ in own]
    weight, bias = [(2, 0), (-1, 1), (0, -2)], [Fraction(1, 2), Fraction(-1), Fraction(1, 4)]
    return points, features, labels, weight, bias


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def minus(a, b):
    return tuple(x - y for x, y in zip(a, b, strict=True))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def std(values):
    """Population standard deviation of mpmath numbers."""
    values = list(values)
    centre = mean(values)
    return mpmath.sqrt(mean((value - centre) ** 2 for value in values))


def real(fraction):
    return (
        mpmath.mpf(fraction.numerator) / fraction.denominator if isinstance(fraction, Fraction) else fraction
    )


def norm(vector):
    return mpmath.sqrt(real(Fraction(dot(vector, vector))))


def hand_computed(global_mean):
    """Every number of the hand case in fractions and 40-digit arithmetic, none of it by ncfast or torch."""
    points, features, labels, weight, bias = hand_case()
    C, N = 3, len(features)
    mu = [tuple(Fraction(sum(h[j] for h in points[c]), len(points[c])) for j in range(2)) for c in range(C)]
    over = [Fraction(1, N)] * N if global_mean == "samples" else None
    mu_G = tuple(
        sum(w * h[j] for w, h in zip(over, features, strict=True)) if over else sum(m[j] for m in mu) / C
        for j in range(2)
    )
    m = [minus(c, mu_G) for c in mu]
    within = [
        [sum(Fraction(r[i] * r[j]) for r in residuals) / N for j in range(2)]
        for i in range(2)
        for residuals in [[minus(h, mu[y]) for h, y in zip(features, labels, strict=True)]]
    ]
    between = [[sum(c[i] * c[j] for c in m) / C for j in range(2)] for i in range(2)]
    det = between[0][0] * between[1][1] - between[0][1] ** 2  # Σ_B is invertible here: Σ_B† is its inverse
    inverse = [[between[1][1] / det, -between[0][1] / det], [-between[0][1] / det, between[0][0] / det]]
    pairs = [(a, b) for a in range(C) for b in range(C) if a != b]
    variance = [mean(Fraction(dot(minus(h, mu[c]), minus(h, mu[c]))) for h in points[c]) for c in range(C)]
    numbers = {
        "nc1": sum(within[i][j] * inverse[j][i] for i in range(2) for j in range(2)) / C,
        "trace_within": within[0][0] + within[1][1],
        "trace_between": between[0][0] + between[1][1],
        "cdnv": mean(
            (variance[a] + variance[b]) / (2 * dot(minus(mu[a], mu[b]), minus(mu[a], mu[b])))
            for a, b in pairs
        ),
    }
    numbers["trace_ratio"] = numbers["trace_within"] / numbers["trace_between"]
    numbers = {name: real(Fraction(value)) for name, value in numbers.items()}

    def etf_error(left, right):
        gram = [[real(Fraction(dot(a, b))) for b in right] for a in left]
        size = mpmath.sqrt(sum(g**2 for row in gram for g in row))
        ideal = [[((a == b) - mpmath.mpf(1) / C) / mpmath.sqrt(C - 1) for b in range(C)] for a in range(C)]
        return mpmath.sqrt(sum((gram[a][b] / size - ideal[a][b]) ** 2 for a in range(C) for b in range(C)))

    for whose, rows in (("means", m), ("classifier", weight)):
        norms = [norm(row) for row in rows]
        cosines = [real(Fraction(dot(rows[a], rows[b]))) / (norms[a] * norms[b]) for a, b in pairs]
        numbers[f"nc2_equinorm_{whose}"] = std(norms) / mean(norms)
        numbers[f"nc2_equiangular_{whose}"] = std(cosines)
        numbers[f"nc2_max_angle_{whose}"] = mean(abs(cosine + mpmath.mpf(1) / (C - 1)) for cosine in cosines)
        numbers[f"etf_error_{whose}"] = etf_error(rows, rows)
    numbers["etf_error_product"] = etf_error(weight, m)
    size_w = mpmath.sqrt(sum(norm(row) ** 2 for row in weight))
    size_m = mpmath.sqrt(sum(norm(row) ** 2 for row in m))
    numbers["nc3_self_duality"] = sum(
        (weight[c][j] / size_w - real(m[c][j]) / size_m) ** 2 for c in range(C) for j in range(2)
    )
    units = [tuple(real(x) / norm(row) for x in row) for row in m]
    kernel = [-mpmath.log(dot(minus(units[a], units[b]), minus(units[a], units[b]))) / 2 for a, b in pairs]
    numbers["gnc2"] = std(kernel) / abs(mean(kernel))
    cosines = [real(Fraction(dot(weight[c], m[c]))) / (norm(weight[c]) * norm(m[c])) for c in range(C)]
    numbers["unc3"] = std(cosines) / abs(mean(cosines))
    by_classifier = [max(range(C), key=lambda c: (dot(weight[c], h) + bias[c], -c)) for h in features]
    by_center = [min(range(C), key=lambda c: (dot(minus(h, mu[c]), minus(h, mu[c])), c)) for h in features]
    numbers["nc4_disagreement"] = Fraction(
        sum(a != b for a, b in zip(by_classifier, by_center, strict=True)), N
    )
    numbers["train_accuracy"] = Fraction(sum(a == y for a, y in zip(by_classifier, labels, strict=True)), N)
    numbers["certified_share"] = certified(m, mu, features, labels, weight, bias)
    return numbers


def certified(m, mu, features, labels, weight, bias):
    """The share of samples within both decision radii of the mean of the class, from the definition."""
    del m
    count = 0
    for h, y in zip(features, labels, strict=True):
        reach = norm(minus(h, mu[y]))
        others = [c for c in range(3) if c != y]
        by_center = min(norm(minus(mu[y], mu[c])) / 2 for c in others)
        by_classifier = min(
            real(Fraction(dot(minus(weight[y], weight[c]), mu[y])) + bias[y] - bias[c])
            / norm(minus(weight[y], weight[c]))
            for c in others
        )
        count += reach < min(by_center, by_classifier)
    return Fraction(count, len(features))


@pytest.mark.parametrize("global_mean", ["samples", "classes"])
def test_every_field_of_a_hand_computed_case(global_mean):
    _, features, labels, weight, bias = hand_case()
    report = ncfast.measure(
        torch.tensor(features, dtype=torch.float64),
        torch.tensor(labels),
        torch.tensor(weight, dtype=torch.float64),
        torch.tensor([float(b) for b in bias], dtype=torch.float64),
        global_mean=global_mean,
    )
    expected = hand_computed(global_mean)
    facts = {
        "num_samples": 6,
        "num_classes": 3,
        "num_absent": 0,
        "num_skipped": 0,
        "dim": 2,
        "global_mean": global_mean,
        "nc4_data": "train",
        "test_accuracy": None,
    }
    assert set(expected) | set(facts) == {field.name for field in dataclasses.fields(report)}  # every field
    for name, value in expected.items():
        oracle.assert_within(getattr(report, name), float(value), 1e-12, name)
    for name, value in facts.items():
        assert getattr(report, name) == value, name


# C = 2 has a single pair; p = C − 1 is the tightest space; p > C the usual one; C = 10 the paper's data sets.
@pytest.mark.parametrize(("C", "p"), [(2, 1), (2, 3), (3, 2), (10, 9), (10, 32)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_an_ideal_simplex_etf_scores_zero(C, p, offset):
    frame = ncfast.simplex_etf(C, p, generator=torch.Generator().manual_seed(p))
    shift = torch.full((p,), offset / math.sqrt(p), dtype=torch.float64)
    labels = torch.arange(C).repeat(4)
    report = ncfast.measure((3 * frame + shift)[labels], labels, frame, -frame @ shift)
    # Features of norm `scale` are stored to EPS · scale; relative to the frame's norm 3 that is what every
    # number inherits.
    stored = (offset + 3) / 3 * EPS
    assert report.nc1 == 0.0
    assert report.trace_within == 0.0
    assert report.nc4_disagreement == 0.0
    assert report.train_accuracy == 1.0
    assert report.nc3_self_duality <= C * (32 * p * stored) ** 2  # a squared norm
    for name in ("nc2_equinorm", "nc2_equiangular", "nc2_max_angle", "etf_error"):
        for whose in ("means", "classifier"):
            assert getattr(report, f"{name}_{whose}") <= 32 * C * p * stored, (name, whose)
    assert report.etf_error_product <= 32 * C * p * stored
    assert report.unc3 <= 32 * p * stored
    # For C = 3 the kernel's mean is −log √3; for C = 2 it is −log 2: no division by a small number.
    assert report.gnc2 <= 32 * C * p * stored


@pytest.mark.parametrize("global_mean", ["samples", "classes"])
# C ≤ p and C > p take different eigenproblems; p = 1 has a single direction.
@pytest.mark.parametrize(("C", "p"), [(4, 7), (7, 4), (5, 5), (3, 1)])
def test_agrees_with_the_two_pass_truth_when_unbalanced(C, p, global_mean):
    features, labels = oracle.clustered(C, p, 150, 2.0, dtype=torch.float64)
    keep = torch.rand(150) > labels / (C + 1)  # class 0 keeps all of its samples, the last one few
    features, labels = features[keep], labels[keep]
    weight, bias = torch.randn(C, p, dtype=torch.float64), torch.randn(C, dtype=torch.float64)
    report = ncfast.measure(features, labels, weight, bias, global_mean=global_mean)
    truth = oracle.two_pass(features, labels, C, weight, bias, global_mean)
    # Nothing here is worse conditioned than the smallest of p directions of random means: 1e-10 leaves six
    # digits.
    oracle.assert_reports_agree(report, truth, 1e-10, 1e-13)
    assert report.train_accuracy == pytest.approx(float(truth["accuracy"]), abs=1e-15)


def test_streaming_collapse_gives_what_measure_gives():
    features, labels = oracle.clustered(5, 8, 200, 1.0, dtype=torch.float64)
    weight = torch.randn(5, 8)
    stats = ncfast.ClassStatistics(5, 8)
    for rows in torch.arange(200).split(33):
        stats.update(features[rows], labels[rows])
    needs_features = {"nc4_disagreement", "nc4_data", "certified_share", "train_accuracy"}
    streamed = ncfast.collapse(stats, weight)
    oracle.assert_reports_agree(
        streamed, ncfast.measure(features, labels, weight), 1e-12, skip=needs_features
    )
    assert all(getattr(streamed, name) is None for name in needs_features)


def test_without_a_classifier_its_numbers_are_none():
    report = ncfast.measure(*oracle.clustered(3, 4, 30, 1.0))
    classifier = {"nc3_self_duality", "nc4_disagreement", "nc4_data", "etf_error_product", "unc3"}
    classifier |= {"certified_share", "train_accuracy", "test_accuracy"}
    for name, value in report.as_dict().items():
        assert (value is None) == (name in classifier or name.endswith("_classifier")), name


def test_without_a_scatter_only_nc1_is_none():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    stats = ncfast.ClassStatistics(3, 4, scatter=False).update(features, labels)
    full = ncfast.collapse(ncfast.ClassStatistics(3, 4).update(features, labels))
    assert full.nc1 is not None
    without = ncfast.collapse(stats)
    assert without.nc1 is None
    oracle.assert_reports_agree(without, full, oracle.STREAM_BOUND, skip={"nc1"})


def test_a_zero_row_of_the_classifier_has_no_angle():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    weight = torch.randn(3, 4)
    weight[1] = 0
    report = ncfast.measure(features, labels, weight)
    assert report.nc2_equiangular_classifier is None
    assert report.unc3 is None
    assert report.nc2_equinorm_classifier is not None
    assert report.nc3_self_duality is not None


def test_absent_classes_are_left_out_of_the_classifier_too():
    features, labels = oracle.clustered(3, 4, 60, 1.0, dtype=torch.float64)
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.zeros(5)
    spread = torch.tensor([0, 2, 3])[labels]  # classes 1 and 4 have no sample
    report = ncfast.measure(features, spread, weight, bias)
    assert (report.num_classes, report.num_absent) == (3, 2)
    dense = ncfast.measure(features, labels, weight[[0, 2, 3]], bias[:3])
    decided = {
        "num_absent",
        "nc4_disagreement",
        "certified_share",
        "train_accuracy",
    }  # all five classes may be decided
    oracle.assert_reports_agree(report, dense, 1e-13, skip=decided)


def test_the_report_is_readable_and_json_safe():
    report = ncfast.measure(*oracle.clustered(3, 4, 30, 1.0))
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == list(report.as_dict())
    assert f"{report.nc1:.6g}" in lines[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.nc1 = 0.0


@pytest.mark.parametrize(
    ("C", "p", "rank"), [(10, 64, 8), (10, 64, 4), (20, 64, 18), (20, 8, 4), (100, 256, 98)]
)
@pytest.mark.parametrize("way", ["dead units", "bottleneck"])
def test_nc1_of_means_of_lower_rank(C, p, rank, way):
    """The same as without the directions that are not there; rounding alone makes those of the means."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(10 * C) % C
        h = torch.randn(C, rank, generator=generator, dtype=torch.float64)[y]
        h += 0.1 * torch.randn(h.shape, generator=generator, dtype=torch.float64)
        frame = torch.eye(rank, p, dtype=torch.float64)
        if way == "bottleneck":  # orthonormal rows leave NC1 as it is
            frame = torch.linalg.qr(torch.randn(p, rank, generator=generator, dtype=torch.float64))[0].T
        nc1 = ncfast.measure(h, y).nc1
        assert ncfast.measure(h @ frame, y).nc1 == pytest.approx(nc1, rel=1e-8)
        assert ncfast.measure((h @ frame).float(), y, precision="highest").nc1 == pytest.approx(nc1, rel=1e-5)
