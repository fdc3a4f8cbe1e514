"""Traps that existing code fell into, each shown to be one, and avoided."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ncfast

import oracle


def truth_nc1(features, labels, C):
    return float(oracle.two_pass(features, labels, C)["nc1"])


# (within-class spread, common offset, how far off the naive number is at least)
@pytest.mark.parametrize(("spread", "offset", "wrong"), [(1e-4, 0.0, 0.02), (1e-3, 100.0, 0.5)])
def test_one_pass_float32_moments_cancel(spread, offset, wrong):
    """Σhhᵀ − nμμᵀ in float32: the digits of the within-class scatter are gone."""
    C, p, N = 10, 64, 5000
    features, labels = oracle.clustered(C, p, N, spread, offset=offset)
    sums = torch.zeros(C, p).index_add_(0, labels, features)
    counts = torch.bincount(labels).float()[:, None]
    naive = (features.T @ features - (sums / counts).T @ sums).trace() / N
    stats = ncfast.ClassStatistics(C, p)
    for h, y in zip(features.split(128), labels.split(128), strict=True):
        stats.update(h, y)
    truth = oracle.two_pass(features, labels, C)
    assert abs(naive - truth["trace_within"]) >= wrong * truth["trace_within"]
    oracle.assert_relative(stats.trace_within, truth["trace_within"], oracle.STREAM_BOUND)
    oracle.assert_relative(ncfast.collapse(stats).nc1, truth["nc1"], oracle.STREAM_BOUND)


def test_float32_running_means_drift():
    """A float32 running mean over many batches wanders off; the state's means are float64."""
    C, p, N = 2, 4, 100_000
    features, labels = oracle.clustered(C, p, N, 1e-3, offset=100.0)
    running, seen = torch.zeros(C, p), torch.zeros(C)
    stats = ncfast.ClassStatistics(C, p)
    for h, y in zip(features.split(128), labels.split(128), strict=True):
        for c in range(C):
            own = h[y == c]
            seen[c] += len(own)
            running[c] += (own.sum(0) - len(own) * running[c]) / seen[c]
        stats.update(h, y)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(C)])
    assert (running - means).abs().max() > 1e-6
    oracle.assert_within(stats.means, means, 1e-11)  # a mean of norm 100 in float64, divided once


def test_the_pseudo_inverse_keeps_real_directions_and_drops_rounding():
    """A rank-deficient Σ_B: NC1 neither divides by rounding errors nor deletes small class means."""
    C, p = 6, 300
    directions = torch.linalg.qr(torch.randn(p, C, dtype=torch.float64)).Q.T
    norms = torch.tensor([10.0, 1.0, 0.1, 0.03, 0.03, 0.03], dtype=torch.float64)
    centres = norms[:, None] * directions
    labels = torch.arange(600) % C
    features = centres[labels] + 1e-3 * torch.randn(600, p, dtype=torch.float64)
    report = ncfast.measure(features, labels)
    truth = truth_nc1(features, labels, C)
    oracle.assert_relative(report.nc1, truth, 1e-9)  # condition number (10/0.03)² of the smallest direction
    stats = ncfast.ClassStatistics(C, p).update(features, labels)
    within, between = stats.within_covariance, stats.between_covariance
    float32_cutoff = torch.linalg.pinv(between, hermitian=True, rtol=p * torch.finfo(torch.float32).eps)
    no_cutoff = torch.linalg.pinv(between, hermitian=True, rtol=1e-19)
    right = torch.linalg.pinv(between, hermitian=True)
    assert (within @ float32_cutoff).trace() < 0.5 * (within @ right).trace()
    assert abs((within @ no_cutoff).trace()) > 10 * (within @ right).trace()


# svds(k=C−1) raises when C > p.
@pytest.mark.parametrize(("C", "p"), [(20, 5), (6, 5), (5, 5), (300, 2)])
def test_more_classes_than_dimensions(C, p):
    features, labels = oracle.clustered(C, p, 4 * C, 0.5, dtype=torch.float64)
    oracle.assert_relative(ncfast.measure(features, labels).nc1, truth_nc1(features, labels, C), 1e-9)


def test_decisions_do_not_cancel_under_a_common_offset():
    """argmin of ‖h‖² − 2⟨h, μ⟩ + ‖μ‖² in float32 goes wrong far from the origin."""
    features, labels = oracle.clustered(100, 64, 5000, 1.0, offset=300.0, norm=1.0)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(100)])
    exact = ncfast.reference.nearest_class_center(features, means)
    h, mu = features, means.float()
    naive = (h.square().sum(1, keepdim=True) - 2 * h @ mu.T + mu.square().sum(1)).argmin(1)
    assert (naive != exact).sum() >= 10
    assert torch.equal(ncfast.nearest_class_center(features, means), exact)


def test_nc4_uses_the_bias():
    features, labels = oracle.clustered(5, 8, 500, 0.1, offset=50.0, dtype=torch.float64)
    means = torch.stack([features[labels == c].mean(0) for c in range(5)])
    bias = -0.5 * means.square().sum(1)  # with it the classifier is the nearest-centre rule itself
    assert ncfast.measure(features, labels, means, bias).nc4_disagreement == 0.0
    assert ncfast.measure(features, labels, means).nc4_disagreement >= 0.2


def test_an_empty_class_is_no_mean_at_the_origin():
    features, labels = oracle.clustered(4, 6, 100, 0.5, dtype=torch.float64)
    weight = torch.randn(7, 6, dtype=torch.float64)
    with_empty = ncfast.measure(features, labels, weight)
    assert with_empty.num_absent == 3
    alone = ncfast.measure(features, labels)
    for name in ("nc1", "nc2_equinorm_means", "nc2_max_angle_means", "cdnv", "trace_between", "gnc2"):
        assert getattr(with_empty, name) == getattr(alone, name), name
    near_origin = 1e-3 * torch.randn(20, 6, dtype=torch.float64)
    assert (
        ncfast.nearest_class_center(near_origin, torch.cat([torch.full((1, 6), torch.nan), features[:4]])) > 0
    ).all()


def test_deviations_from_the_maximal_angle_do_not_cancel():
    """Avg |cos + 1/(C − 1)|, not |Avg (cos + 1/(C − 1))|, which is 0 for any centred unit vectors."""
    C = 6
    weight = torch.randn(C, C, dtype=torch.float64)
    for _ in range(200):  # alternate between centred and unit rows
        weight = weight - weight.mean(0)
        weight = weight / weight.norm(dim=1, keepdim=True)
    report = ncfast.measure(*oracle.clustered(C, C, 60, 0.5), weight)
    geometry = ncfast.pair_geometry(weight)
    assert abs(geometry.cosine_mean + 1 / (C - 1)) <= 1e-6
    assert report.nc2_max_angle_classifier >= 0.1


def test_the_global_mean_of_unbalanced_classes():
    """μ_G over samples (the paper's) or over classes: NC3 differs, and the report says which."""
    counts = torch.tensor([2000, 500, 100, 20, 4])
    labels = torch.repeat_interleave(torch.arange(5), counts)
    frame = ncfast.simplex_etf(5, 16, generator=torch.Generator().manual_seed(0))
    features = (frame[labels] + 1e-3 * torch.randn(len(labels), 16, dtype=torch.float64)).float()
    by_samples = ncfast.measure(features, labels, frame)
    by_classes = ncfast.measure(features, labels, frame, global_mean="classes")
    assert (by_samples.global_mean, by_classes.global_mean) == ("samples", "classes")
    for report in (by_samples, by_classes):
        truth = oracle.two_pass(features, labels, 5, frame, global_mean=report.global_mean)
        oracle.assert_relative(report.nc3_self_duality, truth["nc3_self_duality"], 1e-9)
    assert by_samples.nc3_self_duality > 10 * by_classes.nc3_self_duality


class Largest(TorchDispatchMode):
    """Remember the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return result


def test_an_update_makes_no_one_hot_matrix():
    """A one-hot [N, C] is most of the time of an update with many classes; here nothing is above N·p, C·p."""
    N, C, p = 500, 1000, 4
    features, labels = torch.randn(N, p), torch.randint(0, C, (N,))
    with Largest() as naive:
        torch.nn.functional.one_hot(labels, C)
    stats = ncfast.ClassStatistics(C, p)
    with Largest() as ours:
        stats.update(features, labels)
    assert naive.elements == N * C
    assert 0 < ours.elements <= C * p
