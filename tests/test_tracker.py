"""Tracker: the numbers of the features that really entered the head, and a model left as it was."""

import copy
import dataclasses
import gc
import io
import json
import pickle

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch._dynamo.testing import CompileCounter

import ncfast
from ncfast.history import COLUMNS, read_history

import oracle

C, P, B = 4, 6, 32


def network():
    """Convolutional, with batch norm and dropout: training mode differs from eval mode."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8, P),
        nn.ReLU(),
        nn.Linear(P, C),
    )


def data(batches=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(B, 3, 8, 8, generator=generator), torch.randint(0, C, (B,), generator=generator))
        for _ in range(batches)
    ]


class Witness:
    """An independent record of what enters the head."""

    def __init__(self, head):
        self.features = []
        head.register_forward_hook(self.see)

    def see(self, _head, inputs, _output):
        self.features.append(inputs[0].detach().clone())


def train(model, tracker, batches, *, optimizer=None, use_step=False, transform=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05)
    for inputs, labels in batches:
        inputs = inputs if transform is None else transform(inputs)
        if use_step:
            with tracker.step(labels):
                loss = nn.functional.cross_entropy(model(inputs), labels)
        else:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            tracker.update(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_is_the_truth(report, witness, batches, weight, shift=None):
    """Bit for bit what `ClassStatistics` makes of the features that entered; returns that."""
    stats = ncfast.ClassStatistics(C, P, shift=shift)
    for features, (_, labels) in zip(witness.features, batches, strict=True):
        stats.update(features, labels)
    expected = ncfast.collapse(stats, weight.detach())
    assert dataclasses.replace(report, train_accuracy=None) == expected
    return stats


@pytest.mark.parametrize("use_step", [False, True])
def test_numbers_are_those_of_the_features_of_the_epoch(use_step):
    model, batches = network(), data()
    witness = Witness(model[-1])
    tracker = ncfast.Tracker(model)
    shift = None
    for epoch in (1, 2):  # the second about the means of the first
        witness.features.clear()
        train(model, tracker, batches, use_step=use_step)
        report = tracker.end_epoch(train_accuracy=0.5)
        stats = assert_is_the_truth(report, witness, batches, model[-1].weight, shift)
        shift = stats.means.float()
        assert (report.num_samples, report.num_classes, report.dim) == (6 * B, C, P)
        assert tracker.history[-1] == {"epoch": epoch, "terminal_phase": False, **report.as_dict()}
    assert report.nc4_disagreement is None
    assert report.train_accuracy == 0.5


def test_the_shift_of_an_epoch_is_the_means_of_the_last():
    model = network()
    tracker = ncfast.Tracker(model)
    train(model, tracker, data())
    means = tracker.statistics.means
    tracker.end_epoch()
    assert torch.equal(tracker.statistics.shift, means.float())
    assert tracker.statistics.shift.dtype == torch.float32
    train(model, tracker, data(1))
    assert torch.equal(tracker.statistics.shift, means.float())


def test_a_class_absent_from_one_epoch_may_come_in_the_next():
    model = network()
    tracker = ncfast.Tracker(model)
    (inputs, labels), *rest = data()
    train(model, tracker, [(inputs, labels.clamp(max=C - 2))])
    assert tracker.end_epoch().num_absent == 1
    shift = tracker.statistics.shift.clone()
    assert shift[C - 1].isnan().all()
    witness = Witness(model[-1])
    train(model, tracker, rest)
    assert_is_the_truth(tracker.end_epoch(), witness, rest, model[-1].weight, shift)


def test_autocast():
    model, batches = network(), data()
    witness = Witness(model[-1])
    tracker = ncfast.Tracker(model)
    for inputs, labels in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        assert tracker._capture.features.dtype == torch.bfloat16
        tracker.update(labels)
        loss.backward()
    assert_is_the_truth(tracker.end_epoch(), witness, batches, model[-1].weight)


def test_channels_last():
    model, batches = network().to(memory_format=torch.channels_last), data()
    witness = Witness(model[-1])
    tracker = ncfast.Tracker(model)
    train(model, tracker, batches, transform=lambda x: x.to(memory_format=torch.channels_last))
    assert_is_the_truth(tracker.end_epoch(), witness, batches, model[-1].weight)


def test_gradient_accumulation():
    model, batches = network(), data()
    witness = Witness(model[-1])
    tracker = ncfast.Tracker(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for i, (inputs, labels) in enumerate(batches):
        (nn.functional.cross_entropy(model(inputs), labels) / 3).backward()
        tracker.update(labels)  # after the backward pass this time
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_is_the_truth(tracker.end_epoch(), witness, batches, model[-1].weight)


@pytest.mark.parametrize("made", ["before compile", "after compile"])
def test_compiled_model_is_one_graph_compiled_once(made):
    """Also when passes follow each other without an update: nothing of the capture is guarded on."""
    torch.compiler.reset()
    model, batches, compiler = network(), data(), CompileCounter()
    if made == "before compile":
        tracker = ncfast.Tracker(model)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    if made == "after compile":
        tracker = ncfast.Tracker(compiled)
    train(compiled, tracker, batches)
    for inputs, _ in batches[:3]:
        compiled(inputs)
    assert compiler.frame_count == 1
    assert tracker.end_epoch().num_samples == 6 * B
    torch.compiler.reset()


def test_compiled_model_captures_what_eager_does():
    torch.compiler.reset()
    reports = []
    for compiled in (False, True):
        model = network()
        model[5].p = 0.0  # dropout draws other numbers when compiled
        tracker = ncfast.Tracker(model)
        runs = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        train(runs, tracker, data())
        reports.append(tracker.end_epoch())
    # aot_eager decomposes batch norm: float32 rounding, over six steps of training
    oracle.assert_reports_agree(reports[1], reports[0], 1e-3)
    torch.compiler.reset()


def test_compiled_and_run_before_the_tracker_is_an_error_that_names_the_remedy():
    torch.compiler.reset()
    model = torch.compile(network(), backend="eager")
    (inputs, labels), *_ = data()
    model(inputs)
    tracker = ncfast.Tracker(model)
    model(inputs)
    with pytest.raises(ValueError, match=r"torch\.compiler\.reset\(\)"):
        tracker.update(labels)
    torch.compiler.reset()
    model(inputs)
    tracker.update(labels)
    assert tracker.statistics.num_samples == B


def test_evaluate_sees_a_model_compiled_earlier():
    torch.compiler.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    batches = data()
    compiled(batches[0][0])
    expected = ncfast.measure_model(model, batches)
    assert ncfast.measure_model(compiled, batches) == expected
    torch.compiler.reset()


def test_validation_passes_do_not_count():
    model, batches = network(), data()
    tracker = ncfast.Tracker(model)
    inputs, labels = batches[0]
    train(model, tracker, batches[:1])
    model.eval()
    model(inputs)
    with torch.no_grad():
        model.train()
        model(inputs)  # as torch.optim.swa_utils.update_bn does
    with pytest.raises(ValueError, match="no features were captured"):
        tracker.update(labels)
    assert tracker.statistics.num_samples == B


def test_step_captures_in_eval_mode_too():
    """Fine-tuning with frozen batch norm runs the whole model in eval mode."""
    model = network().eval()
    tracker = ncfast.Tracker(model)
    (inputs, labels), *_ = data()
    with tracker.step(labels):
        model(inputs)
    assert tracker.statistics.num_samples == B
    model(inputs)
    with pytest.raises(ValueError, match="no features"):
        tracker.update(labels)


def test_a_step_that_raises_leaves_nothing():
    model = network()
    tracker = ncfast.Tracker(model)
    (inputs, labels), *_ = data()
    with pytest.raises(RuntimeError, match="shape"), tracker.step(labels):
        model(inputs).view(7)
    assert tracker.statistics.num_samples == 0
    with pytest.raises(ValueError, match="no features"):
        tracker.update(labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [(torch.zeros(3, dtype=torch.long), "labels must have shape"), (torch.full((B,), C), "is outside")],
)
def test_labels_that_do_not_fit(labels, words):
    model = network()
    tracker = ncfast.Tracker(model)
    (inputs, right), *_ = data()
    train(model, tracker, [(inputs, right)])
    before = tracker.statistics.state_dict()
    model(inputs)
    with pytest.raises(ValueError, match=words):
        tracker.update(labels)
    after = tracker.statistics.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("counts", "sums", "scatter"))


def test_token_features_and_ignored_labels():
    """Features [batch, time, p] with labels [batch, time], some of them padding."""
    head = nn.Linear(P, C)
    model = nn.Sequential(nn.Linear(3, P), head)
    tracker = ncfast.Tracker(model)
    labels = torch.randint(0, C, (5, 7))
    labels[:, -2:] = -100
    with tracker.step(labels):
        model(torch.randn(5, 7, 3))
    assert tracker.end_epoch().num_samples == 25


def test_evaluate_is_measure_model_and_joins_the_history():
    model, batches = network(), data()
    tracker = ncfast.Tracker(model)
    train(model, tracker, batches)
    before = tracker.statistics.sums.clone()
    report = tracker.evaluate(batches, batches[:2], epoch=10)
    assert report == ncfast.measure_model(model, batches, batches[:2])
    assert report.nc4_disagreement is not None
    assert tracker.history == [{"epoch": 10, "terminal_phase": False, **report.as_dict()}]
    assert model.training
    assert torch.equal(tracker.statistics.sums, before)
    tracker.end_epoch()
    assert tracker.history[-1]["epoch"] == 11


class NamesItsInput(nn.Module):
    """Calls its head by keyword."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(P, C)

    def forward(self, x):
        return self.fc(input=x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_called_by_keyword(compiled):
    torch.compiler.reset()
    model = NamesItsInput()
    tracker = ncfast.Tracker(model)
    before, features, labels = structure(NamesItsInput()), torch.randn(B, P), torch.arange(B) % C
    runs = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    runs(features)
    tracker.update(labels)
    expected = ncfast.ClassStatistics(C, P).update(features, labels)
    assert torch.equal(tracker.statistics.sums, expected.sums)
    tracker.remove()
    assert [key for key, value in structure(model).items() if "hook" in key[1] and value] == [
        key for key, value in before.items() if "hook" in key[1] and value
    ]
    torch.compiler.reset()


def test_inference_mode_may_come_and_go():
    """What is made in inference mode cannot be written to outside of it: the tracker must not mind."""
    model, batches = network(), data()
    witness = Witness(model[-1])
    tracker = ncfast.Tracker(model)
    train(model, tracker, batches[:2])
    with torch.inference_mode():
        for inputs, labels in batches[2:4]:
            with tracker.step(labels):
                model(inputs)
    train(model, tracker, batches[4:])
    with torch.inference_mode():
        report = tracker.end_epoch()
    assert_is_the_truth(report, witness, batches, model[-1].weight)
    train(model, tracker, batches)
    assert tracker.end_epoch().num_samples == 6 * B


def test_labels_that_are_no_tensor():
    model = network()
    tracker = ncfast.Tracker(model)
    (inputs, labels), *_ = data()
    for given in (labels.numpy(), labels.tolist()):
        model(inputs)
        tracker.update(given)
    assert tracker.statistics.num_samples == 2 * B


def structure(model):
    """Every attribute of every module; of a container, its items."""
    attributes = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            attributes[path, name] = list(value.items()) if isinstance(value, dict) else value
    return attributes


def test_removed_leaves_the_model_as_it_was():
    model = network()
    before, state = structure(model), copy.deepcopy(model.state_dict())
    (inputs, labels), *_ = data()
    with ncfast.Tracker(model) as tracker:
        assert structure(model) != before
        with tracker.step(labels):
            model.eval()(inputs)
        model.train()
    assert structure(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(inputs)
    with pytest.raises(ValueError, match="no features"):
        tracker.update(labels)


def test_gradients_and_outputs_are_bit_for_bit_those_without():
    results = []
    for tracked in (False, True):
        model = network()
        tracker = ncfast.Tracker(model) if tracked else None
        (inputs, labels), *_ = data()
        output = model(inputs)
        if tracker:
            tracker.update(labels)
        nn.functional.cross_entropy(output, labels).backward()
        results.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_copies_of_the_model_do_not_take_the_tracker_along():
    """An exponential moving average is a deepcopy; a checkpoint may be a pickle of the module."""
    model = network()
    tracker = ncfast.Tracker(model)
    (inputs, labels), *_ = data()
    model(inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (hook,) = other[-1]._forward_pre_hooks.values()
        assert hook.features is None
        other(torch.randn_like(inputs[:1]).expand(2, -1, -1, -1))
    tracker.update(labels)  # of the pass through the tracked model
    assert tracker.statistics.num_samples == B


def test_captured_features_are_detached_and_held_for_one_pass_only():
    model = network()
    tracker = ncfast.Tracker(model)
    inputs, labels = data()[0]
    model(inputs)
    first = tracker._capture.features
    assert not first.requires_grad
    model(inputs)
    assert tracker._capture.features is not first
    tracker.update(labels)
    assert tracker._capture.features is None


def test_memory_does_not_grow():
    """What Python and torch hold after many updates is what they held after a few."""
    head = nn.Linear(P, C)
    tracker = ncfast.Tracker(nn.Sequential(head))
    features, labels = torch.randn(B, P), torch.arange(B) % C

    def held():  # what other tests left may go meanwhile, but nothing may come
        gc.collect()
        real = (torch.Tensor, nn.Parameter)  # not the fakes that torch.compile leaves
        tensors = [thing for thing in gc.get_objects() if type(thing) in real]
        return len(tensors), sum(tensor.nbytes for tensor in tensors)

    def steps(count):
        for _ in range(count):
            head(features)
            tracker.update(labels)

    steps(10)
    before = held()
    steps(500)
    assert all(now <= then for now, then in zip(held(), before, strict=True))
    tracker.end_epoch()
    steps(10)
    before = held()
    for _ in range(3):
        tracker.end_epoch()
        steps(10)
    assert all(now <= then for now, then in zip(held(), before, strict=True))


ERRORS = [0.5, 0.0, 0.25, 0.0, 0.0]


def run(errors=ERRORS):
    model = network()
    tracker = ncfast.Tracker(model)
    for error in errors:
        train(model, tracker, data(2))
        tracker.end_epoch(None if error is None else 1 - error, test_accuracy=0.25)
    return tracker


def test_terminal_phase():
    tracker = run()
    assert tracker.first_zero_error == 2
    assert tracker.lasting_zero_error == 4
    assert [record["terminal_phase"] for record in tracker.history] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("errors", "first", "lasting", "marks"),
    [
        ([0.1], None, None, [False]),
        ([0.0, 0.1], 1, None, [True, True]),
        ([None, None], None, None, [None, None]),
        ([0.1, None, 0.0, None], 3, 3, [False, False, True, True]),
    ],
)
def test_terminal_phase_unknown_or_lost(errors, first, lasting, marks):
    tracker = run(errors)
    assert (tracker.first_zero_error, tracker.lasting_zero_error) == (first, lasting)
    assert [record["terminal_phase"] for record in tracker.history] == marks


def test_end_epoch_refuses_a_percentage_and_an_empty_epoch():
    tracker = run([0.5])
    train(tracker.model, tracker, data(1))
    with pytest.raises(ValueError, match=r"train_accuracy must be in \[0, 1\], got 93"):
        tracker.end_epoch(93.0)
    tracker.end_epoch()
    with pytest.raises(ValueError, match="no samples"):
        tracker.end_epoch()


def test_what_raises_leaves_the_epoch_as_it_was():
    model = network()
    tracker = ncfast.Tracker(model)
    train(model, tracker, data(2))
    before = tracker.statistics.num_samples
    with pytest.raises(TypeError):
        tracker.end_epoch(epoch="last")
    kept = float(model[-1].weight.data[0, 0])
    model[-1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight holds a NaN"):
        tracker.end_epoch()
    model[-1].weight.data[0, 0] = kept
    assert tracker.end_epoch().num_samples == before
    assert [record["epoch"] for record in tracker.history] == [1]


def test_an_unknown_option_is_refused_before_anything_is_hooked():
    model = network()
    before = structure(model)
    for option in ({"global_mean": "median"}, {"precision": "exact"}, {"nonfinite": "maybe"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            ncfast.Tracker(model, **option)
    assert structure(model) == before


@pytest.mark.parametrize("epoch", [np.int64(3), torch.tensor(3)])
def test_epochs_of_any_integer_type_are_saved(tmp_path, epoch):
    tracker = ncfast.Tracker(network())
    train(tracker.model, tracker, data(1))
    tracker.end_epoch(torch.tensor(1.0), epoch=epoch)
    tracker.save(tmp_path / "run.json")
    assert read_history(tmp_path / "run.json") == tracker.history
    tracker.load_state_dict(tracker.state_dict())
    assert tracker.history[0]["epoch"] == 3
    with pytest.raises(TypeError, match="integer"):
        tracker.evaluate(data(1), epoch=3.5)


def test_a_model_without_a_linear_layer():
    with pytest.raises(ValueError, match=r"pass head="):
        ncfast.Tracker(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match=r"weight \[C, p\]"):
        ncfast.Tracker(nn.Sequential(nn.ReLU()), nn.ReLU())


# ---- histories ----


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_history_files_are_exact(tmp_path, suffix):
    tracker = run([None, *ERRORS])
    path = tmp_path / f"run{suffix}"
    tracker.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert read_history(path) == tracker.history
    resumed = ncfast.Tracker(network())
    resumed.load(path)
    assert resumed.first_zero_error == tracker.first_zero_error
    train(resumed.model, resumed, data(1))
    resumed.end_epoch()
    assert resumed.history[-1]["epoch"] == 7
    assert resumed.history[-1]["terminal_phase"] is True


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_history_cut_short_is_refused(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    run([0.5, 0.0]).save(path)
    whole = path.read_text()
    for length in range(0, len(whole), 7):
        if suffix == ".csv" and whole[:length].endswith("\n"):
            continue  # a table with fewer rows is a table
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match=r"run\.(csv|json)"):
            read_history(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "a,b\n1,2\n"),
        ("a.json", '{"epoch": 1}'),
        ("a.json", '[{"epoch": 1}]'),
        ("a.txt", ""),
    ],
)
def test_foreign_history_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="history"):
        read_history(tmp_path / name)


def test_damaged_cells_are_refused(tmp_path):
    path = tmp_path / "run.csv"
    run([0.5]).save(path)
    header, row = path.read_text().splitlines()
    for name, cell in (("epoch", "one"), ("terminal_phase", "maybe"), ("nc1", "0,1"), ("num_samples", "")):
        cells = row.split(",")
        cells[list(COLUMNS).index(name)] = cell
        path.write_text(f"{header}\n{','.join(cells)}\n")
        with pytest.raises(ValueError, match=r"run\.csv"):
            read_history(path)


def test_pandas():
    pandas = pytest.importorskip("pandas")
    tracker = run()
    frame = tracker.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [1, 2, 3, 4, 5]
    assert list(frame["nc1"]) == [record["nc1"] for record in tracker.history]


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


def test_log():
    tracker = run()
    writer, calls = Writer(), []
    tracker.log(writer)
    tracker.log(calls.append, prefix="nc/")
    last = tracker.history[-1]
    numbers = {name: value for name, value in last.items() if isinstance(value, int | float)}
    del numbers["epoch"]
    assert {"nc1", "train_accuracy", "num_samples", "terminal_phase"} <= set(numbers)
    assert "nc4_disagreement" not in numbers  # not measurable in one pass
    assert writer.scalars == [(f"collapse/{name}", value, 5) for name, value in numbers.items()]
    assert calls == [{**{f"nc/{name}": value for name, value in numbers.items()}, "epoch": 5}]
    with pytest.raises(TypeError, match="add_scalar"):
        tracker.log(None)
    with pytest.raises(ValueError, match="no epoch"):
        ncfast.Tracker(network()).log(writer)


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = run([0.5, 0.0])
    with tensorboard.SummaryWriter(tmp_path) as writer:
        tracker.log(writer)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("collapse/nc1")
    assert event.step == 2
    assert event.value == pytest.approx(tracker.history[-1]["nc1"], rel=2**-24)  # stored as float32


def test_log_fits_weights_and_biases():
    """`wandb.log(data, step=None)` takes one dict of names to numbers, and counts its own steps."""
    logged = []

    def log(data, step=None):
        assert step is None
        assert all(isinstance(name, str) and type(value) in (int, float) for name, value in data.items())
        logged.append(json.loads(json.dumps(data)))

    tracker = ncfast.Tracker(network())
    for error in ERRORS[:2]:
        train(tracker.model, tracker, data(2))
        tracker.end_epoch(1 - error)
        tracker.log(log)
    assert [entry["epoch"] for entry in logged] == [1, 2]
    assert [entry["collapse/terminal_phase"] for entry in logged] == [0.0, 1.0]
    assert [entry["collapse/nc1"] for entry in logged] == [record["nc1"] for record in tracker.history]


def test_plot(tmp_path):
    """The figure of the history: every line its numbers, NC4 where `evaluate` measured it, both marks."""
    tracker = run()
    tracker.evaluate(data(2), epoch=6)
    figure = tracker.plot(path=tmp_path / "run.png", title="a run")
    lines = {axes.get_title(loc="left")[:6]: axes.lines for axes in figure.axes}
    for panel, names in {
        "Fig. 2": ["nc2_equinorm_means", "nc2_equinorm_classifier"],
        "Fig. 6": ["nc1"],
        "Fig. 7": ["nc4_disagreement"],
    }.items():
        for line, name in zip(lines[panel], names, strict=False):
            assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]
            drawn = np.array([record[name] for record in tracker.history], dtype=float)
            assert np.array_equal(line.get_ydata(), drawn, equal_nan=True)
    assert np.isfinite(lines["Fig. 7"][0].get_ydata()).tolist() == [False] * 5 + [True]
    dashed = [line.get_xdata()[0] for line in lines["Fig. 6"] if line.get_linestyle() == "--"]
    assert dashed == [tracker.first_zero_error]
    assert imread(tmp_path / "run.png").ndim == 3
    with pytest.raises(ValueError, match="no records"):
        ncfast.Tracker(network()).plot()


# ---- checkpoints ----


def test_state_dict_round_trips_through_weights_only():
    tracker = run([0.5, 0.0])
    train(tracker.model, tracker, data(2))
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = ncfast.Tracker(network())
    other.load_state_dict(torch.load(file, weights_only=True))
    other.head.load_state_dict(tracker.head.state_dict())
    assert other.history == tracker.history
    assert other.end_epoch(1.0) == tracker.end_epoch(1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("history"), "lacks history"),
        (lambda state: state.update(format=99), "format 99"),
        (lambda state: state["statistics"].update(counts=[1]), "counts must be a tensor"),
        (lambda state: state["history"][0].pop("nc1"), "not a history"),
        (lambda state: state.update(history=5), "history must be a list"),
    ],
)
def test_a_foreign_state_is_refused(change, words):
    tracker = run([0.5])
    state = copy.deepcopy(tracker.state_dict())
    change(state)
    history = list(tracker.history)
    with pytest.raises(ValueError, match=words):
        tracker.load_state_dict(state)
    assert tracker.history == history
