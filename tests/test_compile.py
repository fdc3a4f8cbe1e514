"""The operations under torch.compile: custom ops with fakes, in a graph that does not break."""

import pytest
import torch
from backends import available

import ncfast
from ncfast.ops.pair_geometry import etf_error

import oracle


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """How often a function is compiled is limited, whoever compiled it."""
    torch._dynamo.reset()


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
@pytest.mark.parametrize("backend", sorted({"cpu", "reference"} & {*available("class_scatter")}))
def test_opcheck(operation, backend):
    """Schema, fake, autograd and dynamic shapes, as PyTorch's own checker sees them."""
    with ncfast.use_backend(backend):
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


def update_like(stats, features, labels):
    stats.update(features * 1.0, labels)
    return features.sum()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"scatter": False, "nonfinite": "skip"}, torch.float32),
        ({"ignore_index": 2}, torch.float64),  # the shift becomes float64 in the graph
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_update_in_one_graph(options, dtype, dynamic):
    """Batches of two sizes; the last goes through the eager `update`, as nothing had been compiled.

    Compiled, every batch is added at once; reading a number makes eager do the same.
    """
    features, labels = oracle.clustered(5, 9, 200, 0.5, dtype=dtype)
    if "nonfinite" in options:
        features[70, 3] = torch.nan
    ours, eager = (ncfast.ClassStatistics(5, 9, **options) for _ in range(2))
    compiled = torch.compile(update_like, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    batches = zip(features.split([60, 60, 40, 40]), labels.split([60, 60, 40, 40]), strict=True)
    for i, batch in enumerate(batches):
        assert compiled(ours, *batch).isnan() == batch[0].sum().isnan()
        update_like(eager, *batch)
        assert eager.num_samples
        if i == 2:
            compiled = update_like
    assert ours.num_samples == eager.num_samples
    assert ours.num_skipped == eager.num_skipped == len(features) - len(features[features.isfinite().all(1)])
    for name in ("counts", "shift", "sums", "sumsq", "scatter"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(eager, name), rtol=0, atol=0, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("scatter", [True, False])
def test_a_graph_updates_a_state_from_inference_mode(scatter):
    """Where the compiler lets it: AOTAutograd raises."""
    features, labels = oracle.clustered(5, 9, 60, 0.5)
    with torch.inference_mode():
        stats = ncfast.ClassStatistics(5, 9, scatter=scatter).update(features, labels)
    torch.compile(update_like, fullgraph=True, backend="eager")(stats, features, labels)
    assert stats.num_samples == 120


def test_a_graph_adds_the_rows_that_wait():
    """Rows of eager updates, read or followed by an update in a graph."""
    features, labels = oracle.clustered(5, 9, 60, 0.5)

    def step(stats, features, labels):
        before = stats.counts.sum()
        return before, stats.update(features, labels).sums.sum() + stats.scatter.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = (ncfast.ClassStatistics(5, 9) for _ in range(2))
    for i in range(12):
        if i % 4 == 3:
            (n, total), (expected_n, expected) = (
                compiled(ours, features, labels),
                step(eager, features, labels),
            )
            assert n == expected_n == 60 * i
            torch.testing.assert_close(total, expected)
        else:
            ours.update(features, labels)
            eager.update(features, labels)
    assert ours.num_samples == eager.num_samples == 720


def test_float64_in_a_graph_while_float32_rows_wait():
    features, labels = oracle.clustered(5, 9, 200, 0.5)
    stats = ncfast.ClassStatistics(5, 9)
    for h, y in zip(features[:150].split(30), labels[:150].split(30), strict=True):
        stats.update(h, y)
    assert stats.state_dict()["waiting_residuals"] is not None
    torch.compile(update_like, fullgraph=True, backend="aot_eager")(
        stats, features[150:].double(), labels[150:]
    )
    truth = oracle.two_pass(features, labels, 5)
    oracle.assert_relative(stats.trace_within, truth["trace_within"], oracle.STREAM_BOUND)


def test_update_that_raises_in_a_graph_leaves_the_state():
    stats = ncfast.ClassStatistics(2, 3).update(torch.randn(6, 3), torch.arange(6) % 2)
    before = stats.state_dict()
    compiled = torch.compile(update_like, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="label 7 in row 1"):
        compiled(stats, torch.randn(3, 3), torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match=r"shape \[N, 3\]"):
        compiled(stats, torch.randn(3, 4), torch.tensor([0, 1, 1]))
    after = stats.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("counts", "shift", "sums", "scatter"))


def test_errors_pass_through():
    compiled = torch.compile(ncfast.class_scatter, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="label 7 in row 1"):
        compiled(torch.randn(3, 2), torch.tensor([0, 7, 1]), torch.zeros(2, 2))


@pytest.mark.parametrize("given", [False, True])
def test_a_state_made_inside_the_graph(given):
    features, labels = torch.randn(20, 4), torch.arange(20) % 3
    shift = torch.zeros(3, 4) if given else None

    def counts(features, labels, shift):
        return ncfast.ClassStatistics(3, 4, shift=shift).update(features, labels).counts

    torch._dynamo.reset()
    compiled = torch.compile(counts, fullgraph=True, backend="aot_eager")
    assert compiled(features, labels, shift).tolist() == [7, 7, 6]


def test_vmap_over_the_reference():
    rows = torch.randn(6, 5, 4)
    with ncfast.use_backend("reference"):
        together = torch.vmap(lambda vectors: ncfast.pair_geometry(vectors).cosine_mean)(rows)
        apart = torch.stack([ncfast.pair_geometry(vectors).cosine_mean for vectors in rows])
    torch.testing.assert_close(together, apart)
