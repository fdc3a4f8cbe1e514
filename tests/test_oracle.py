"""The oracle must reject wrong answers, or the tests that use it prove nothing."""

import dataclasses

import pytest
import torch

import ncfast

import oracle


@pytest.fixture
def case():
    features, labels = oracle.clustered(4, 6, 80, 0.5, dtype=torch.float64)
    return features, labels, torch.randn(4, 6), torch.randn(4)


def test_accepts_the_right_report(case):
    report = ncfast.measure(*case)
    oracle.assert_reports_agree(report, oracle.two_pass(case[0], case[1], 4, *case[2:]), 1e-12)


def test_rejects_a_perturbed_feature(case):
    features, labels, weight, bias = case
    moved = features.clone()
    moved[3] += 1e-3
    truth = oracle.two_pass(moved, labels, 4, weight, bias)
    with pytest.raises(AssertionError, match="off by"):
        oracle.assert_reports_agree(ncfast.measure(*case), truth, 1e-12)


def test_rejects_a_swapped_label(case):
    features, labels, weight, bias = case
    swapped = labels.clone()
    swapped[0] = 1
    truth = oracle.two_pass(features, swapped, 4, weight, bias)
    with pytest.raises(AssertionError, match="off by"):
        oracle.assert_reports_agree(ncfast.measure(*case), truth, 1e-12)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None])
def test_rejects_what_is_no_number(case, wrong):
    report = ncfast.measure(*case)
    with pytest.raises(AssertionError):
        oracle.assert_reports_agree(dataclasses.replace(report, nc1=wrong), report, 1e-3)
    with pytest.raises(AssertionError):
        oracle.assert_relative(wrong, 1.0, 1e-3)


def test_rejects_an_error_just_above_the_bound():
    oracle.assert_relative(1.0 + 0.9e-6, 1.0, 1e-6)
    with pytest.raises(AssertionError):
        oracle.assert_relative(1.0 + 1.1e-6, 1.0, 1e-6)
