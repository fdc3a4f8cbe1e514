"""What must not change a report: the order, the names, the pose and the place of the features."""

import dataclasses

import pytest
import torch

import ncfast

import oracle
from oracle import EPS

C, P, N = 5, 8, 300
SIZED = ("trace_within", "trace_between")  # in squared feature units


@pytest.fixture(scope="module")
def case():
    features, labels = oracle.clustered(C, P, N, 1.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(C, P, dtype=torch.float64, generator=generator)
    bias = torch.randn(C, dtype=torch.float64, generator=generator)
    return features, labels, weight, bias


# Float64 sums of N terms in another order differ by N · EPS; NC1 inverts Σ_B, well conditioned here.
BOUND = 64 * N * EPS


def test_permutation_of_the_samples(case):
    features, labels, weight, bias = case
    order = torch.randperm(N)
    moved = ncfast.measure(features[order], labels[order], weight, bias)
    oracle.assert_reports_agree(moved, ncfast.measure(*case), BOUND)


def test_relabelling_of_the_classes(case):
    features, labels, weight, bias = case
    names = torch.randperm(C)
    renamed, renamed_bias = torch.empty_like(weight), torch.empty_like(bias)
    renamed[names], renamed_bias[names] = weight, bias
    moved = ncfast.measure(features, names[labels], renamed, renamed_bias)
    oracle.assert_reports_agree(moved, ncfast.measure(*case), BOUND)


def test_rotation(case):
    features, labels, weight, bias = case
    rotation = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64)).Q
    moved = ncfast.measure(features @ rotation, labels, weight @ rotation, bias)
    oracle.assert_reports_agree(moved, ncfast.measure(*case), BOUND)


def test_translation_by_1e6(case):
    """Features of size 1e6 are stored to 1e6 · EPS: next to a spread of 1, that is all it costs."""
    features, labels, weight, bias = case
    place = torch.full((P,), 1e6, dtype=torch.float64)
    moved = ncfast.measure(features + place, labels, weight, bias - weight @ place)
    oracle.assert_reports_agree(moved, ncfast.measure(*case), 64 * 1e6 * EPS)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 2.0, 1e12])
def test_scaling(case, scale):
    features, labels, weight, bias = case
    moved = ncfast.measure(features * scale, labels, weight, bias * scale)
    still = ncfast.measure(*case)
    still = dataclasses.replace(still, **{name: getattr(still, name) * scale**2 for name in SIZED})
    oracle.assert_reports_agree(moved, still, BOUND)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_of_the_classifier(case, scale):
    features, labels, weight, bias = case
    moved = ncfast.measure(features, labels, weight * scale, bias * scale)
    oracle.assert_reports_agree(moved, ncfast.measure(*case), BOUND)


def test_strides_and_slices(case):
    features, labels, weight, bias = case
    wide = torch.full((2 * N, P + 5), torch.nan, dtype=torch.float64)
    wide[1::2, 3 : 3 + P] = features
    views = {
        "slice of a wider matrix": wide[1::2, 3 : 3 + P],
        "transposed": features.T.contiguous().T,
        "reversed twice": features.flip(0).flip(0),
    }
    spaced = torch.stack([labels, -labels], 1)[:, 0]
    still = ncfast.measure(*case)
    for name, view in views.items():
        assert torch.equal(view, features), name
        oracle.assert_reports_agree(ncfast.measure(view, spaced, weight.T.contiguous().T, bias), still, BOUND)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_label_dtypes(case, dtype):
    features, labels, weight, bias = case
    assert ncfast.measure(features, labels.to(dtype), weight, bias) == ncfast.measure(*case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_features_are_taken_as_they_are(case, dtype):
    """The report of a narrow tensor is that of the same numbers in float64, but for the products."""
    features, labels, weight, bias = case
    narrow = features.to(dtype)
    report = ncfast.measure(narrow, labels, weight, bias, precision="highest")
    wide = ncfast.measure(narrow.double(), labels, weight, bias)
    oracle.assert_reports_agree(report, wide, 64 * 2.0**-24, skip={"certified_share"})


def test_thread_count_does_not_matter(case):
    threads = torch.get_num_threads()
    reports = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            reports.append(ncfast.measure(case[0].float(), case[1], *case[2:]))
    finally:
        torch.set_num_threads(threads)
    for report in reports[1:]:
        oracle.assert_reports_agree(report, reports[0], BOUND)


def test_inputs_are_left_alone(case):
    copies = [tensor.clone() for tensor in case]
    leaves = [case[0].clone().requires_grad_(), case[1], case[2].clone().requires_grad_(), case[3]]
    assert ncfast.measure(*leaves) == ncfast.measure(*case)
    assert leaves[0].grad is None
    for tensor, before in zip(case, copies, strict=True):
        assert torch.equal(tensor, before)
