"""NeuralCollapse as torchmetrics treats its own metrics: batches, epochs, processes, copies, collections."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.figure
import pytest
import torch
import torchmetrics

import ncfast
from ncfast import ClassStatistics
from ncfast.integrations.torchmetrics import CLASSIFIER_FIELDS, MEANS_FIELDS, NeuralCollapse

import oracle

C, P, BATCHES = 5, 12, 8
WORKER = Path(__file__).with_name("torchmetrics_worker.py")


def head():
    torch.manual_seed(3)
    return torch.nn.Linear(P, C)


def batches():
    features, labels = oracle.clustered(C, P, BATCHES * 40, 0.5, offset=20.0, dtype=torch.float64)
    return list(zip(features.split(40), labels.split(40), strict=True))


def expected(parts, classifier=None, fields=MEANS_FIELDS):
    """The same numbers by `measure`'s way, of all these batches together."""
    features, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    weight = None if classifier is None else classifier.weight
    stats = ncfast.ClassStatistics(C, P).update(features, labels)
    report = ncfast.collapse(stats, weight)
    return {name: getattr(report, name) for name in fields}


def assert_agree(values, truth):
    """To float64 rounding times a condition number: the features are float64, and so is all arithmetic."""
    assert list(values) == list(truth)
    for name, value in values.items():
        assert value.dtype == torch.float64
        assert value.shape == ()
        oracle.assert_within(value, truth[name], 1e-11 * abs(truth[name]) + 1e-13, name)


@pytest.mark.parametrize("classifier", [None, head()], ids=["no head", "head"])
def test_forward_is_the_batch_and_compute_the_epoch(classifier):
    fields = MEANS_FIELDS + (CLASSIFIER_FIELDS if classifier else ())
    metric = NeuralCollapse(C, P, classifier)
    for i, batch in enumerate(batches()):
        assert_agree(metric(*batch), expected([batch], classifier, fields))
        assert_agree(metric.compute(), expected(batches()[: i + 1], classifier, fields))
    metric.reset()
    metric.update(*batches()[0])
    assert_agree(metric.compute(), expected(batches()[:1], classifier, fields))


def test_update_is_class_statistics_bit_for_bit():
    metric, stats = NeuralCollapse(C, P), ncfast.ClassStatistics(C, P)
    for features, labels in batches():
        metric.update(features, labels)
        stats.update(features, labels)
        assert stats.num_samples  # read, so that no rows wait, as none do in the metric
    for name in ("counts", "shift", "sums", "sumsq"):
        assert torch.equal(getattr(metric, name), getattr(stats, name))
    assert torch.equal(metric.scatter.triu(), stats.scatter.triu())


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("owner", "name"), [(ClassStatistics, "_recentre"), (NeuralCollapse, "_keep")])
def test_an_update_that_is_interrupted_when_its_sums_are_added(monkeypatch, owner, name):
    """The shift, which became float64, is kept all the same."""
    metric, parts = NeuralCollapse(C, P), batches()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            metric.update(*parts[0])
    assert_agree(metric.compute(), expected(parts))


def test_an_update_that_is_interrupted_before_the_scatter_is_mirrored(monkeypatch):
    features, labels = oracle.clustered(C, 100, 80, 0.5)
    metric, stats = NeuralCollapse(C, 100), ncfast.ClassStatistics(C, 100)
    for rows in (slice(0, 40), slice(40, 80)):
        assert stats.update(features[rows], labels[rows]).num_samples  # read, so that no rows wait
    metric.update(features[:40], labels[:40])
    with monkeypatch.context() as patch:
        patch.setattr(NeuralCollapse, "_keep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            metric.update(features[40:], labels[40:])
    nc1 = metric.compute()["nc1"]
    assert nc1 == ncfast.collapse(stats).nc1


def test_head_is_read_when_computed_and_is_no_submodule():
    classifier = head()
    metric = NeuralCollapse(C, P, classifier)
    metric.update(*batches()[0])
    first = metric.compute()
    with torch.no_grad():
        classifier.weight.copy_(torch.randn(C, P))
    metric.update(*batches()[0])
    assert metric.compute()["nc3_self_duality"] != first["nc3_self_duality"]
    assert list(metric.parameters()) == []
    clone = metric.clone()
    assert clone._head.module is classifier


def test_without_scatter_there_is_no_nc1():
    metric = NeuralCollapse(C, P, scatter=False)
    metric.update(*batches()[0])
    metric.update(*batches()[1])
    truth = expected(batches()[:2])
    del truth["nc1"]
    assert_agree(metric.compute(), truth)
    assert "scatter" not in metric.metric_state


def test_what_is_not_measurable_is_nan():
    metric = NeuralCollapse(C, P)
    features, labels = batches()[0]
    metric.update(features, torch.zeros_like(labels))
    values = metric.compute()
    assert values["nc1"].isnan()
    assert values["trace_within"] > 0


def test_a_batch_without_samples_is_nan_and_changes_nothing():
    """All labels ignored, as of a batch of padding; torchmetrics computes every batch by itself."""
    metric = NeuralCollapse(C, P)
    features, labels = batches()[0]
    metric(features, labels)
    for batch in ((features, torch.full_like(labels, -100)), (features[:0], labels[:0])):
        values = metric(*batch)
        assert list(values) == list(MEANS_FIELDS)
        assert all(value.isnan() for value in values.values())
    assert_agree(metric.compute(), expected(batches()[:1]))


def test_inference_mode_may_come_and_go():
    """Lightning validates in inference mode; the same metric may be reset and updated outside of it."""
    metric = NeuralCollapse(C, P)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            metric.reset()
            metric(*batches()[0])
        with torch.inference_mode(not inside):
            metric(*batches()[1])
            metric.update(*batches()[2])
        assert_agree(metric.compute(), expected(batches()[:3]))


def test_scripting():
    """As torchmetrics' own tests ask of every metric."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself
        torch.jit.script(NeuralCollapse(C, P))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()]
)
def test_copies_are_independent(copied):
    metric = NeuralCollapse(C, P, head())
    metric.update(*batches()[0])
    other = copied(metric)
    assert all(torch.equal(value, metric.compute()[name]) for name, value in other.compute().items())
    counts = metric.counts.clone()
    other.update(*batches()[1])
    assert torch.equal(metric.counts, counts)
    assert torch.equal(other.counts, 2 * counts)
    other.reset()
    other.update(*batches()[2])
    assert torch.equal(other.counts, counts)


def test_merge_state():
    one, two = NeuralCollapse(C, P), NeuralCollapse(C, P)
    for batch in batches()[:3]:
        one.update(*batch)
    for batch in batches()[3:]:
        two.update(*batch)
    counts, sums = two.counts.clone(), two.sums.clone()
    one.merge_state(two)
    assert_agree(one.compute(), expected(batches()))
    assert torch.equal(two.counts, counts)
    assert torch.equal(two.sums, sums)
    with pytest.raises(ValueError, match="lacks"):
        one.merge_state({"counts": counts})


def test_states_of_other_dtypes_and_strides_are_converted():
    """Kernels write to their addresses."""
    metric, loaded = NeuralCollapse(C, P), NeuralCollapse(C, P)
    for one in (metric, loaded):
        one.persistent(True)
    metric.update(*batches()[0])
    state = metric.state_dict()
    loaded.load_state_dict(
        {name: value.to(torch.int32 if name == "counts" else torch.float32) for name, value in state.items()}
    )
    loaded.scatter = loaded.scatter.T.contiguous().T
    for one in (metric, loaded):
        one.update(*batches()[1])
    for name, value in metric.compute().items():
        oracle.assert_within(loaded.compute()[name], value, 1e-4 * abs(value) + 1e-6, name)
    assert loaded.sums.dtype == torch.float64
    loaded.sums = loaded.sums[1:]
    with pytest.raises(ValueError, match=r"sums must have shape \[5, 12\]"):
        loaded.update(*batches()[1])


def test_state_is_float64_whatever_is_asked():
    metric = NeuralCollapse(C, P)
    metric.update(*batches()[0])
    before = metric.compute()
    metric.half().float().double()
    for ask in (metric.set_dtype, metric.to):
        ask(torch.float16)
        metric.update(*batches()[0])
        assert (metric.sums.dtype, metric.counts.dtype) == (torch.float64, torch.int64)
        metric.reset()
    metric.update(*batches()[0])
    assert all(torch.equal(value, before[name]) for name, value in metric.compute().items())
    meta = metric.to("meta")
    assert meta.sums.device.type == "meta"
    assert meta.sums.dtype == torch.float64


def test_state_dict():
    metric = NeuralCollapse(C, P)
    metric.update(*batches()[0])
    assert metric.state_dict() == {}
    metric.persistent(True)
    state, other = metric.state_dict(), NeuralCollapse(C, P)
    for _ in range(2):  # the dictionary stays as it was
        other.load_state_dict(state)
        other.update(*batches()[1])
        assert_agree(other.compute(), expected(batches()[:2]))


def test_collection():
    """Beside another metric; keyword arguments go to those that take them."""
    classifier = head()
    collection = torchmetrics.MetricCollection(
        {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(C, average="micro"),
            "samples": NeuralCollapse(C, P, classifier),
            "classes": NeuralCollapse(C, P, global_mean="classes"),
        },
        prefix="train/",
    )
    for features, labels in batches():
        collection.update(preds=classifier(features.float()), features=features, target=labels)
    values = collection.compute()
    assert "train/accuracy" in values
    truth = expected(batches(), classifier, MEANS_FIELDS + CLASSIFIER_FIELDS)
    ours = {name.removeprefix("train/samples_"): value for name, value in values.items()}
    for name, value in truth.items():
        oracle.assert_within(ours[name], value, 1e-6 * abs(value) + 1e-9, name)
    collection.reset()
    assert collection["samples"].counts.sum() == 0
    assert set(collection.clone(prefix="test/").keys(keep_base=True)) == {"accuracy", "samples", "classes"}


def test_hash_tells_metrics_apart():
    assert hash(NeuralCollapse(C, P)) != hash(NeuralCollapse(C, P))


def test_plot():
    metric = NeuralCollapse(C, P)
    values = [metric(*batch) for batch in batches()[:3]]
    for drawn in (metric.plot(), metric.plot(values)):
        figure, _ = drawn
        assert isinstance(figure, matplotlib.figure.Figure)
        matplotlib.pyplot.close(figure)


def test_own_gathering_function():
    """A `dist_sync_fn` of the user's is asked for every state, and the results are merged in its order."""
    others = [NeuralCollapse(C, P) for _ in range(2)]  # the second never sees anything
    for batch in batches()[3:]:
        others[0].update(*batch)
    asked = []

    def gather(tensor, group):
        assert group is None
        (name,) = [name for name, value in metric.metric_state.items() if value is tensor]
        asked.append(name)
        return [tensor, *(getattr(other, name) for other in others)]

    metric = NeuralCollapse(C, P, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    for batch in batches()[:3]:
        metric.update(*batch)
    before, theirs = metric.counts.clone(), others[0].counts.clone()
    assert_agree(metric.compute(), expected(batches()))
    assert asked == list(metric.metric_state)
    assert torch.equal(metric.counts, before)
    assert torch.equal(others[0].counts, theirs)


def test_two_processes():
    """`compute` sums over both, `forward` too with dist_sync_on_step, and both go on from their own state."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_options_are_checked():
    with pytest.raises(ValueError, match="global_mean"):
        NeuralCollapse(C, P, global_mean="median")
    with pytest.raises(ValueError, match="nonfinite"):
        NeuralCollapse(C, P, nonfinite="maybe")
