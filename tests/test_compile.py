"""The operations under torch.compile: custom ops with fakes, in a graph that does not break."""

import pytest
import torch

import ncfast
from ncfast.ops.pair_geometry import etf_error

import oracle


def arguments():
    features, labels = oracle.clustered(5, 9, 40, 0.5)
    rows = torch.randn(5, 9)
    return {
        "class_scatter": [
            (features, labels, rows, True, True, "high", -100),
            (features.half(), labels.int(), rows, False, False, "high", 3),
        ],
        "affine_argmax": [(features, [rows], [None]), (features, [rows, rows[:3]], [torch.randn(5), None])],
        "nearest_class_center": [(features, rows)],
        "pair_geometry": [(rows, torch.rand(5)), (rows.double(), None)],
        "etf_error": [(rows, None), (rows, torch.randn(5, 9))],
        "decision_radius": [(rows, None, rows, None), (rows, torch.randn(5), rows[:2], torch.tensor([3, 1]))],
    }


@pytest.mark.parametrize("operation", arguments())
def test_opcheck(operation):
    """Schema, fake, autograd and dynamic shapes, as PyTorch's own checker sees them."""
    for given in arguments()[operation]:
        torch.library.opcheck(getattr(torch.ops.ncfast, operation).default, given)


def measure_like(features, labels, shift, weight, bias):
    """An update and the numbers made of it, with what a user would write between them."""
    moments = ncfast.class_scatter(features, labels, shift, radii=True)
    means = shift + moments.sums / moments.counts[:, None]
    by_classifier, by_center = ncfast.ops.affine_argmax.affine_argmax(
        features * 1.0, [weight.double(), means], [bias, -0.5 * means.square().sum(1)]
    )
    geometry = ncfast.pair_geometry(means - means.mean(0), moments.sumsq / moments.counts)
    return (
        moments.scatter.trace(),
        moments.radii.max(),
        (by_classifier != by_center).double().mean(),
        (by_center != ncfast.nearest_class_center(features, means)).sum(),
        geometry.cosine_std + geometry.cdnv,
        etf_error(weight, means) + ncfast.decision_radius(weight, bias, means).min(),
        ncfast.class_scatter(features, labels, shift, scatter=False).sumsq.sum(),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_without_breaks(dynamic):
    features, labels = oracle.clustered(5, 9, 60, 0.5)
    shift, weight, bias = torch.randn(5, 9), torch.randn(5, 9), torch.randn(5)
    compiled = torch.compile(measure_like, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (60, 41):
        given = features[:rows].requires_grad_(), labels[:rows], shift, weight, bias
        for answer, expected in zip(compiled(*given), measure_like(*given), strict=True):
            oracle.assert_within(answer, expected, 1e-12 * max(1.0, abs(float(expected))))


def test_errors_pass_through():
    compiled = torch.compile(ncfast.class_scatter, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="label 7 in row 1"):
        compiled(torch.randn(3, 2), torch.tensor([0, 7, 1]), torch.zeros(2, 2))
