"""measure() end to end, beside straightforward eager PyTorch in float32 computing the same numbers.

    python -m pytest benchmarks/bench_measure.py            (N=100,000, p=2048, C=1000: needs 4 GiB)

"isotropic": within/mean 1, nothing certifiable; "collapsed": within/mean 1e-2.
"""

import math

import pytest
import torch

import ncfast

N, P, C = 100_000, 2048, 1000
CHUNK = (
    8192  # rows of the [N, C] scores at a time: the fastest of 1024 … 65,536 here, and it bounds the memory
)


def eager(features, labels, weight, bias):
    """NC1–NC4 and their kin as one writes them down: p×p covariance, eigh, C×C and chunked N×C matrices."""
    counts = torch.bincount(labels, minlength=C).float()
    means = torch.zeros(C, P).index_add_(0, labels, features) / counts[:, None]
    residuals = features - means[labels]
    within = residuals.T @ residuals / N
    variances = torch.zeros(C).index_add_(0, labels, residuals.square().sum(1)) / counts
    del residuals
    centred = means - features.mean(0)
    between = centred.T @ centred / C
    values, vectors = torch.linalg.eigh(between)
    kept = values > 1e-5 * values[-1]  # float32: the usual cutoff p · eps deletes real directions
    quadratic = (vectors[:, kept] * (within @ vectors[:, kept])).sum(0)
    numbers = {"nc1": (quadratic / values[kept]).sum() / C}
    off = ~torch.eye(C, dtype=torch.bool)
    ideal = (torch.eye(C) - 1 / C) / math.sqrt(C - 1)
    for name, rows in (("means", centred), ("classifier", weight)):
        norms = rows.norm(dim=1)
        units = rows / norms[:, None]
        cosines = (units @ units.T)[off]
        numbers[f"nc2_equinorm_{name}"] = norms.std(correction=0) / norms.mean()
        numbers[f"nc2_equiangular_{name}"] = cosines.std(correction=0)
        numbers[f"nc2_max_angle_{name}"] = (cosines + 1 / (C - 1)).abs().mean()
        gram = rows @ rows.T
        numbers[f"etf_error_{name}"] = (gram / gram.norm() - ideal).norm()
        if name == "means":
            kernel = -torch.cdist(units, units)[off].log()
            numbers["gnc2"] = kernel.std(correction=0) / kernel.mean().abs()
    distances = torch.cdist(means, means)[off].square()
    numbers["cdnv"] = ((variances[:, None] + variances)[off] / (2 * distances)).mean()
    product = weight @ centred.T
    numbers["etf_error_product"] = (product / product.norm() - ideal).norm()
    cosines = torch.cosine_similarity(weight, centred)
    numbers["unc3"] = cosines.std(correction=0) / cosines.mean().abs()
    numbers["nc3_self_duality"] = (weight / weight.norm() - centred / centred.norm()).square().sum()
    numbers["trace_within"], numbers["trace_between"] = within.trace(), between.trace()
    numbers["trace_ratio"] = within.trace() / between.trace()
    disagreeing = correct = 0
    offset = -0.5 * means.square().sum(1)
    for h, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        by_classifier = torch.addmm(bias, h, weight.T).argmax(1)
        by_center = torch.addmm(offset, h, means.T).argmax(1)
        disagreeing += (by_classifier != by_center).sum()
        correct += (by_classifier == y).sum()
    numbers["nc4_disagreement"], numbers["train_accuracy"] = disagreeing / N, correct / N
    return {name: float(value) for name, value in numbers.items()}


@pytest.fixture(scope="module", params=[("isotropic", 1.0), ("collapsed", 1e-2)], ids=lambda case: case[0])
def data(request):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(C, P, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    features = torch.randn(N, P, generator=generator).mul_(request.param[1]).add_(means[labels])
    return features, labels, means / math.sqrt(P), torch.zeros(C)


@pytest.fixture(scope="module")
def answers(data):
    """Both answers, compared before anything is timed: float32 is right to a few digits at these scales."""
    report, other = ncfast.measure(*data), eager(*data)
    wrong = {
        name: (getattr(report, name), value)
        for name, value in other.items()
        if not abs(getattr(report, name) - value) <= 1e-3 * abs(value) + 1e-3
    }
    assert not wrong, wrong
    return report


@pytest.mark.benchmark(group="measure")
@pytest.mark.parametrize("who", ["eager", "ncfast"])
def test_measure(benchmark, data, answers, who):
    benchmark.extra_info["certified_share"] = answers.certified_share
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(eager if who == "eager" else ncfast.measure, args=data, rounds=5, warmup_rounds=1)
