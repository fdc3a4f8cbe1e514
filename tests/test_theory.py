"""The theorems of Papyan, Han & Donoho (PNAS 2020), checked on what ncfast computes."""

import math

import pytest
import torch

import ncfast
from ncfast.theory import error_exponent, webb_lowe_classifier

EPS = torch.finfo(torch.float64).eps


# C = 2 is a segment, p = C − 1 the smallest space that holds the frame, p = C the paper's square case.
@pytest.mark.parametrize(("C", "p"), [(2, 1), (2, 2), (3, 2), (10, 9), (10, 10), (10, 64)])
@pytest.mark.parametrize("seed", [None, 0])
def test_simplex_etf_is_one(C, p, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    frame = ncfast.simplex_etf(C, p, generator=generator)
    ideal = C / (C - 1) * (torch.eye(C, dtype=torch.float64) - 1 / C)
    assert frame.shape == (C, p)
    assert (
        frame @ frame.T - ideal
    ).abs().max() <= 8 * C * EPS  # dot products of C terms of at most 1, after a QR
    assert frame.sum(0).abs().max() <= 8 * C * EPS


def test_simplex_etf_poses():
    standard = ncfast.simplex_etf(4, 4)
    expected = math.sqrt(4 / 3) * (torch.eye(4, dtype=torch.float64) - 0.25)
    assert torch.equal(standard, expected)  # the paper's M*, as it stands
    poses = [ncfast.simplex_etf(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(poses[0], poses[1])
    assert not torch.allclose(poses[0], poses[2])


@pytest.mark.parametrize(("C", "p"), [(1, 5), (3, 1), (10, 8)])
def test_simplex_etf_refuses_what_does_not_exist(C, p):
    with pytest.raises(ValueError, match="simplex ETF"):
        ncfast.simplex_etf(C, p)


@pytest.mark.parametrize("C", [2, 3, 10])
def test_theorem_3_the_simplex_etf_attains_the_optimal_exponent(C):
    frame = ncfast.simplex_etf(C, C)
    optimum = C / (C - 1) / 4
    assert abs(error_exponent(frame, frame) - optimum) <= 16 * C * EPS
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(C, C, dtype=torch.float64, generator=generator)
        means /= means.norm(dim=1).max()  # at most unit norm, as the theorem asks
        bias = -0.5 * means.square().sum(1)  # the best linear rule for these means: the nearest centre
        assert error_exponent(means, means, bias) <= optimum
        assert error_exponent(means, torch.randn(C, C, dtype=torch.float64, generator=generator)) <= optimum


def test_an_exponent_of_a_wrong_rule_is_zero():
    frame = ncfast.simplex_etf(3, 3)
    assert error_exponent(frame, frame.roll(1, 0)) == 0.0


@pytest.mark.parametrize(("C", "p"), [(3, 3), (10, 32)])
def test_theorem_1_collapse_makes_the_webb_lowe_classifier_self_dual(C, p):
    generator = torch.Generator().manual_seed(C)
    offset = torch.randn(p, dtype=torch.float64, generator=generator)
    centres = 3 * ncfast.simplex_etf(C, p, generator=generator) + offset
    labels = torch.arange(C).repeat(5)
    features = centres[labels]
    weight, bias = webb_lowe_classifier(ncfast.ClassStatistics(C, p).update(features, labels))
    report = ncfast.measure(features, labels, weight, bias)
    assert (
        report.nc3_self_duality <= (64 * p * EPS) ** 2 * C
    )  # each entry to p roundings; the square of their norm
    assert report.nc4_disagreement == 0.0
    assert report.train_accuracy == 1.0
    # Balanced targets: the least-squares scores are the one-hot labels themselves.
    scores = features @ weight.T + bias
    assert (scores - torch.eye(C, dtype=torch.float64)[labels]).abs().max() <= 256 * p * EPS


def test_webb_lowe_needs_every_class():
    stats = ncfast.ClassStatistics(3, 2).update(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="every class"):
        webb_lowe_classifier(stats)
