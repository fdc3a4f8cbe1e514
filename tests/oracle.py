"""The truth: float64 two-pass formulas, written apart from ncfast, and the bounds that tests hold it to.

Every bound is `error <= bound`, so that a NaN fails. `EPS` is the float64 rounding unit 2⁻⁵².
"""

import dataclasses
import math

import torch

EPS = torch.finfo(torch.float64).eps

# Promised by the README for float32 features of any degree of collapse.
STREAM_BOUND = 1e-6

# The error of one product under precision="high", two bfloat16 for a float32. Over many samples it averages
# out; a test with few of them may see all of it.
HIGH = 2.0**-15

# Of the scatter, relative to the product of its columns' norms: what is left out of a product of rounded
# operands. One, two or three bfloat16 planes leave at most 2⁻⁸, 2⁻¹⁷ or 2⁻²⁶ of a number; "highest" is held
# to that (both operands' rest, and twice the dropped low·middle), the others to less, as what the samples of
# these tests leave partly cancels. Float32 accumulation comes on top.
PRODUCTS = {"highest": 2.0**-24 + 2.0**-25, "high": 3 * 2.0**-18, "medium": 2 * 2.0**-9 + 2.0**-18}


def two_pass(features, labels, num_classes, weight=None, bias=None, global_mean="samples"):
    """All numbers of a report, as a dict, from float64 residuals about float64 means.

    NC1 comes from the singular values of Ṁ, not from an eigenproblem; directions below 1e-9 of the largest
    singular value count as absent, far from both the data of these tests and float64 rounding.
    """
    h = features.double()
    present = [c for c in range(num_classes) if (labels == c).any()]
    C, N = len(present), int(sum((labels == c).sum() for c in present))
    means, variances, residuals = [], [], []
    for c in present:
        own = h[labels == c]
        centre = own.mean(0)
        centre = centre + (own - centre).mean(0)  # the second pass removes the rounding of the first
        means.append(centre)
        residuals.append(own - centre)
        variances.append(residuals[-1].square().sum(1).mean())
    means, variances, residuals = torch.stack(means), torch.stack(variances), torch.cat(residuals)
    counts = torch.tensor([(labels == c).sum() for c in present], dtype=torch.float64)
    share = counts / N if global_mean == "samples" else torch.full_like(counts, 1 / C)
    m = means - means[0]
    m = m - (share[:, None] * m).sum(0)
    truth = {
        "trace_within": residuals.square().sum() / N,
        "trace_between": m.square().sum() / C,
        "means": means,
        "within_covariance": residuals.T @ residuals / N,
    }
    truth["trace_ratio"] = truth["trace_within"] / truth["trace_between"]
    if C == 1:
        return truth
    _, s, v = torch.linalg.svd(m / math.sqrt(C), full_matrices=False)
    kept = s > 1e-9 * s[0]
    spread = (residuals @ v[kept].T).square().sum(0) / N
    truth["nc1"] = (spread / s[kept].square()).sum() / C
    truth |= _frame(m, "means")
    off = ~torch.eye(C, dtype=torch.bool)
    squared = (m[:, None] - m).square().sum(2)
    truth["cdnv"] = ((variances[:, None] + variances) / (2 * squared))[off].mean()
    units = m / m.norm(dim=1, keepdim=True)
    kernel = -0.5 * (units[:, None] - units).square().sum(2)[off].log()
    truth["gnc2"] = kernel.std(correction=0) / kernel.mean().abs()
    if weight is not None:
        w = weight.double()[present]
        truth |= _frame(w, "classifier")
        truth["nc3_self_duality"] = (w / w.norm() - m / m.norm()).square().sum()
        truth["etf_error_product"] = _etf_error(w @ m.T)
        cosines = (w * m).sum(1) / (w.norm(dim=1) * m.norm(dim=1))
        truth["unc3"] = cosines.std(correction=0) / cosines.mean().abs()
        truth |= decisions(features, labels, means, present, weight, bias)
    return truth


def decisions(features, labels, means, present, weight, bias):
    """NC4 and the accuracy, one sample and one class at a time's worth of float64 arithmetic."""
    h, w = features.double(), weight.double()
    scores = (h[:, None] * w).sum(2) + (0 if bias is None else bias.double())
    distances = (h[:, None] - means).square().sum(2)
    by_classifier, by_center = scores.argmax(1), torch.tensor(present)[distances.argmin(1)]
    return {
        "nc4_disagreement": (by_classifier != by_center).double().mean(),
        "accuracy": (by_classifier == labels).double().mean(),
    }


def _frame(rows, whose):
    C = len(rows)
    norms = rows.norm(dim=1)
    units = rows / norms[:, None]
    cosines = (units @ units.T)[~torch.eye(C, dtype=torch.bool)]
    return {
        f"nc2_equinorm_{whose}": norms.std(correction=0) / norms.mean(),
        f"nc2_equiangular_{whose}": cosines.std(correction=0),
        f"nc2_max_angle_{whose}": (cosines + 1 / (C - 1)).abs().mean(),
        f"etf_error_{whose}": _etf_error(rows @ rows.T),
    }


def _etf_error(gram):
    C = len(gram)
    ideal = (torch.eye(C, dtype=torch.float64) - 1 / C) / math.sqrt(C - 1)
    return (gram / gram.norm() - ideal).norm()


def assert_within(actual, expected, bound, what=""):
    """Fail unless max |actual − expected| ≤ bound; a NaN on either side fails."""
    difference = torch.as_tensor(actual, dtype=torch.float64) - torch.as_tensor(expected, dtype=torch.float64)
    error = difference.abs().max()
    assert error <= bound, f"{what}: off by {float(error):.3g}, bound {float(bound):.3g}"


def assert_scatter_close(scatter, truth, N, precision="high"):
    """Fail unless the CUDA kernels' scatter of N rows is within its bounds, and symmetric."""
    norms = truth.diagonal().sqrt()
    # Products of rounded planes, added in float32 for at most 2048 rows at a time, three of them per row.
    bound = PRODUCTS[precision] + 2 * min(3 * N, 6144) * 2.0**-24
    assert ((scatter - truth).abs() <= bound * norms[:, None] * norms).all()
    # The diagonal is summed from exact squares: 4 of 32 rows by a warp, of at most 2048.
    assert ((scatter - truth).diagonal().abs() <= (min(N, 256) + 8) * 2.0**-24 * norms.square()).all()
    assert torch.equal(scatter, scatter.T)


def assert_relative(actual, expected, bound, what=""):
    """Fail unless |actual − expected| ≤ bound · |expected|, for one number."""
    assert actual is not None, f"{what}: None"
    assert_within(actual, expected, bound * abs(float(expected)), what)


def assert_reports_agree(report, other, relative, absolute=0.0, skip=()):
    """Fail unless every number of a report agrees with another report or dict to relative·|value| + absolute.

    What is not finite in `other` must be None in the report.
    """
    other = dataclasses.asdict(other) if dataclasses.is_dataclass(other) else other
    for name, value in report.as_dict().items():
        if name in skip or name not in other:
            continue
        expected = other[name]
        if isinstance(expected, float | torch.Tensor):
            expected = float(expected) if math.isfinite(expected) else None
        if isinstance(value, float) and expected is not None:
            assert_within(value, expected, relative * abs(expected) + absolute, name)
        else:
            assert value == expected, name


def clustered(C, p, N, spread, *, offset=0.0, seed=0, dtype=torch.float32, norm=10.0):
    """Features [N, p] of C classes in turn: means of norm `norm`, common offset of norm `offset`, noise."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(C, p, dtype=torch.float64, generator=generator)
    means *= norm / means.norm(dim=1, keepdim=True)
    common = torch.randn(p, dtype=torch.float64, generator=generator)
    common *= offset / common.norm()
    labels = torch.arange(N) % C
    noise = torch.randn(N, p, dtype=torch.float64, generator=generator)
    return (means[labels] + common + spread * noise).to(dtype), labels
