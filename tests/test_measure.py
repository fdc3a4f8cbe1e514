"""measure() and measure_model(): the one-call entry points."""

import dataclasses
import importlib

import backends
import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize, prune

import ncfast
from ncfast.collapse import collapse_and_distances
from ncfast.measure import _Decisions

import oracle

# ---- measure ----


@pytest.fixture
def case():
    features, labels = oracle.clustered(4, 6, 120, 3.0, dtype=torch.float64)
    return features, labels, torch.randn(4, 6), torch.randn(4)


def test_numpy_and_memory_maps_without_a_copy_or_a_warning(case, tmp_path):
    report = ncfast.measure(*case)
    arrays = [tensor.numpy() for tensor in case]
    assert ncfast.measure(*arrays) == report
    for name, array in zip("hywb", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "hywb"]
    assert not mapped[0].flags.writeable
    assert ncfast.measure(*mapped) == report
    assert ncfast.measure(arrays[0][::-1], arrays[1][::-1], *arrays[2:]).num_samples == 120


def test_test_data_decide_nc4_against_the_training_means(case):
    features, labels, weight, bias = case
    held_out, held_out_labels = oracle.clustered(4, 6, 77, 3.0, seed=1)
    report = ncfast.measure(features, labels, weight, bias, test=(held_out, held_out_labels))
    means = torch.stack([features[labels == c].double().mean(0) for c in range(4)])
    on_test = oracle.decisions(held_out, held_out_labels, means, range(4), weight, bias)
    on_train = oracle.decisions(features, labels, means, range(4), weight, bias)
    assert report.nc4_data == "test"
    assert report.nc4_disagreement == pytest.approx(float(on_test["nc4_disagreement"]), abs=1e-15)
    assert report.test_accuracy == pytest.approx(float(on_test["accuracy"]), abs=1e-15)
    assert report.train_accuracy == pytest.approx(float(on_train["accuracy"]), abs=1e-15)


def random_cases():
    """Spread from collapsed to hopeless, offsets, absent classes, biased rules, C above and below p."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(5, generator=generator).tolist()
        C, p = int(2 + 9 * draw[0]), int(1 + 12 * draw[1])
        spread, offset = 10 ** (4 * draw[2] - 3), [0.0, 0.0, 30.0][seed % 3]
        yield seed, C, p, spread, offset


@pytest.mark.parametrize("on_test", [False, True])
def test_certificates_change_nothing(on_test):
    """Thousands of decisions: with and without certificates the same numbers."""
    shares = []
    for seed, C, p, spread, offset in random_cases():
        features, labels = oracle.clustered(C, p, 150, spread, offset=offset, seed=seed)
        means = torch.stack([features[labels == c].mean(0) for c in range(C)])
        # Rules from exact nearest centre to noise, some with a class that the training data lack.
        noise = 10.0 ** -(seed % 4) * torch.randn(C + 1, p)
        weight = torch.cat([means, torch.zeros(1, p)]) + noise
        bias = -0.5 * weight.square().sum(1)
        test = None
        if on_test:
            test = oracle.clustered(C, p, 150, spread, offset=offset, seed=seed)
            test[1][::7] = C  # a class without training samples
        reports = [
            ncfast.measure(features, labels, weight, bias, test=test, certificates=flag)
            for flag in (True, False)
        ]
        oracle.assert_reports_agree(*reports, 0.0, skip={"certified_share"})
        assert reports[1].certified_share == 0.0
        shares.append(reports[0].certified_share)
    assert min(shares) == 0.0
    assert max(shares) >= 0.8  # the comparison had certified samples to compare


def test_collapsed_samples_are_all_certified():
    features, labels = oracle.clustered(5, 16, 200, 1e-3, offset=100.0)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(5)])
    report = ncfast.measure(features, labels, means, -0.5 * means.square().sum(1))
    assert report.certified_share == 1.0
    assert report.nc4_disagreement == 0.0


def test_certified_samples_are_not_scored():
    features, labels = oracle.clustered(5, 16, 200, 1e-3)
    means = torch.stack([features[labels == c].mean(0) for c in range(5)])
    with ncfast.ops.dispatch.record() as ran:
        ncfast.measure(features, labels, means, -0.5 * means.square().sum(1))
    assert "affine_argmax" not in {operation for operation, _ in ran}
    with ncfast.ops.dispatch.record() as ran:
        ncfast.measure(features, labels, means, -0.5 * means.square().sum(1), certificates=False)
    assert "affine_argmax" in {operation for operation, _ in ran}


def test_chunks_do_not_show(case, monkeypatch):
    import sys

    whole = ncfast.measure(*case)
    monkeypatch.setattr(sys.modules["ncfast.measure"], "_CHUNK", 6 * 17)  # 17 rows at a time
    oracle.assert_reports_agree(ncfast.measure(*case), whole, 1e-12)
    features = case[0].clone()
    features[101, 3] = torch.inf
    with pytest.raises(ValueError, match="row 101"):  # of the input, not of its chunk
        ncfast.measure(features, *case[1:])
    with pytest.raises(ValueError, match="row 101"):
        ncfast.measure(*case, test=(features, case[1]))


def test_skipping_and_ignoring_leave_rows_out_of_everything(case):
    features, labels, weight, bias = case
    holes = torch.randn(9, 6)
    holes[:5, 0] = torch.nan
    more = torch.cat([holes, features])
    more_labels = torch.cat([torch.tensor([0, 1, 2, 3, 0, -100, -100, -100, -100]), labels])
    skipping = ncfast.measure(more, more_labels, weight, bias, nonfinite="skip", test=(more, more_labels))
    plain = ncfast.measure(*case, test=(features, labels))
    assert skipping.num_skipped == 5
    oracle.assert_reports_agree(skipping, plain, 1e-12, skip={"num_skipped"})


def test_one_class():
    report = ncfast.measure(torch.randn(10, 3), torch.zeros(10, dtype=torch.long), torch.randn(1, 3))
    numbers = {name for name, value in report.as_dict().items() if isinstance(value, float)}
    decided = {"nc4_disagreement", "certified_share", "train_accuracy"}
    assert numbers == {"trace_within", "trace_between"} | decided
    assert report.trace_between == 0.0


def test_identical_features_measure_nothing_between_classes():
    features = torch.full((10, 3), 0.1)  # 0.1 is rounded: means that coincide must not become noise
    report = ncfast.measure(features, torch.arange(10) % 3)
    assert report.trace_within == 0.0
    assert report.trace_between == 0.0
    for name in ("nc1", "trace_ratio", "cdnv", "gnc2", "nc2_equinorm_means", "etf_error_means"):
        assert getattr(report, name) is None, name


def test_classes_of_one_sample():
    report = ncfast.measure(torch.randn(4, 3), torch.arange(4))
    assert report.trace_within == 0.0
    assert report.nc1 == 0.0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": torch.arange(119)}, ValueError, "labels must have shape"),
        ({"labels": torch.arange(120)}, ValueError, "label 4 in row 4 is outside"),
        ({"features": [[1.0]]}, TypeError, "features must be a torch.Tensor or a numpy array"),
        ({"features": np.zeros((120, 6), dtype=">f4")}, TypeError, "byte order"),
        ({"features": np.zeros((120, 6), dtype=int)}, TypeError, "features must be float32"),
        ({"weight": torch.zeros(4, 5)}, ValueError, "weight must have shape"),
        ({"weight": torch.full((4, 6), torch.nan)}, ValueError, "weight holds a NaN"),
        ({"weight": torch.zeros(4, 6, dtype=torch.long)}, TypeError, "weight must be a floating-point"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must have shape"),
        ({"weight": None}, ValueError, "bias was given without weight"),
        ({"global_mean": "median"}, ValueError, "global_mean"),
        ({"precision": "exact"}, ValueError, "precision"),
        ({"nonfinite": "drop"}, ValueError, "nonfinite"),
        ({"test": (torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))}, ValueError, "test features"),
        ({"test": (torch.zeros(3, 6), torch.zeros(2, dtype=torch.long))}, ValueError, "test labels"),
        ({"test": (torch.zeros(3, 6), torch.tensor([0, 9, 0]))}, ValueError, "label 9 in row 1"),
    ],
)
def test_errors(case, change, error, words):
    arguments = dict(zip(("features", "labels", "weight", "bias"), case, strict=True)) | change
    with pytest.raises(error, match=words):
        ncfast.measure(**arguments)


def test_no_samples():
    empty, none = torch.empty(0, 3), torch.empty(0, dtype=torch.long)
    with pytest.raises(ValueError, match="no labelled samples"):
        ncfast.measure(empty, none)
    with pytest.raises(ValueError, match="no samples"):
        ncfast.measure(empty, none, torch.randn(2, 3))
    with pytest.raises(ValueError, match="no labelled samples"):
        ncfast.measure(torch.randn(3, 3), torch.full((3,), -100))


def test_empty_test_data_leave_nc4_unmeasured(case):
    report = ncfast.measure(*case, test=(torch.empty(0, 6), torch.empty(0, dtype=torch.long)))
    assert report.nc4_disagreement is None
    assert report.test_accuracy is None


def test_progress_is_shown_on_request_only(case, capsys):
    ncfast.measure(*case)
    assert capsys.readouterr() == ("", "")
    ncfast.measure(*case, progress=True)
    assert "statistics" in capsys.readouterr().err


# ---- measure_model ----


class Net(torch.nn.Module):
    """Two linear layers after a normalisation and a dropout, both of which behave differently in training."""

    def __init__(self, C=4):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5)
        )
        self.head = torch.nn.Linear(8, C)

    def forward(self, x, scale=1.0):
        return self.head(self.body(x * scale))


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def loader():
    features, labels = oracle.clustered(4, 6, 100, 1.0)
    dataset = torch.utils.data.TensorDataset(features, labels)
    return torch.utils.data.DataLoader(dataset, batch_size=16)


def captured(model, loader):
    model.eval()
    with torch.no_grad():
        return torch.cat([model.body(x) for x, _ in loader]), torch.cat([y for _, y in loader])


def test_measure_model_measures_what_enters_the_head(model, loader):
    report = ncfast.measure_model(model, loader)
    features, labels = captured(model, loader)
    direct = ncfast.measure(features, labels, model.head.weight, model.head.bias)
    oracle.assert_reports_agree(report, direct, 4 * oracle.HIGH, skip={"certified_share"})
    assert report.nc4_data == "train"
    assert report.test_accuracy is None


def test_measure_model_with_test_data(model, loader):
    test = [(torch.randn(10, 6), torch.arange(10) % 4)]
    report = ncfast.measure_model(model, loader, test)
    train, held_out = captured(model, loader), captured(model, test)
    direct = ncfast.measure(*train, model.head.weight, model.head.bias, test=held_out)
    oracle.assert_reports_agree(report, direct, 4 * oracle.HIGH, skip={"certified_share"})


def test_an_iterator_is_read_once(model, loader):
    reads = []

    def once():
        for batch in loader:
            reads.append(len(batch[1]))
            yield batch

    assert ncfast.measure_model(model, once()) == ncfast.measure_model(model, loader)
    assert sum(reads) == 100


def test_everything_is_left_as_found(model, loader):
    model.train()
    model.body[1].eval()  # a frozen layer in a training model
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    ncfast.measure_model(model, loader)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.head._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_everything_is_left_as_found_when_it_fails(model):
    model.train()
    with pytest.raises(ValueError, match="row 2"):
        ncfast.measure_model(model, [(torch.randn(3, 6), torch.tensor([0, 1, 9]))])
    assert all(module.training for module in model.modules())
    assert not model.head._forward_pre_hooks
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: [x, 2.0],  # positional
        lambda x: (x, torch.tensor(2.0)),
        lambda x: {"x": x, "scale": 2.0},  # by keyword
    ],
)
def test_inputs_of_several_arguments(model, loader, inputs):
    batches = [(inputs(x), y) for x, y in loader]
    doubled = [(2 * x, y) for x, y in loader]
    assert ncfast.measure_model(model, batches) == ncfast.measure_model(model, doubled)


def test_head_chooses_another_layer(model, loader):
    first = model.body[0]
    report = ncfast.measure_model(model, [(x, y % 8) for x, y in loader], head=first)
    assert report.dim == 6
    assert report.num_absent == 4  # an 8-class "head", 4 classes in the data


def test_sequences_are_flattened():
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 3, bias=False)

        def forward(self, x):
            return self.head(x)

    tokens, labels = torch.randn(4, 7, 5), torch.randint(0, 3, (4, 7))
    labels[:, -2:] = -100  # padding
    model = Tagger()
    report = ncfast.measure_model(model, [(tokens, labels)])
    flat = ncfast.measure(tokens.reshape(-1, 5), labels.reshape(-1), model.head.weight)
    assert report.num_samples == 20
    oracle.assert_reports_agree(report, flat, 4 * oracle.HIGH, skip={"certified_share"})


def test_half_precision_models(loader):
    model = Net().to(torch.bfloat16)
    report = ncfast.measure_model(model, [(x.to(torch.bfloat16), y) for x, y in loader])
    assert report.num_samples == 100
    assert report.nc1 > 0


def test_the_loader_s_rows_are_counted_over_batches(model, loader):
    batches = [(x.clone(), y) for x, y in loader]
    batches[3][0][5] = torch.nan
    with pytest.raises(ValueError, match="row 53"):
        ncfast.measure_model(model, batches)
    assert ncfast.measure_model(model, batches, nonfinite="skip").num_skipped == 1


@pytest.mark.parametrize(
    ("model", "batches", "error", "words"),
    [
        (torch.nn.Conv1d(1, 1, 1), [], ValueError, "no torch.nn.Linear"),
        (Net(), [], ValueError, "no samples"),
        (Net(), [torch.randn(3, 6)], TypeError, r"\(inputs, labels\)"),
        (Net(), [(torch.randn(3, 6),)], TypeError, r"\(inputs, labels\)"),
        (Net(), [(torch.randn(3, 6), torch.tensor([0, 1]))], ValueError, "labels must have shape"),
        (Net(), [(torch.randn(3, 6), torch.rand(3))], TypeError, "labels must be integers"),
    ],
)
def test_measure_model_errors(model, batches, error, words):
    with pytest.raises(error, match=words):
        ncfast.measure_model(model, batches)


def test_a_head_that_is_not_one(model, loader):
    with pytest.raises(TypeError, match="head must be a module with a weight"):
        ncfast.measure_model(model, loader, head=torch.nn.ReLU())
    with pytest.raises(ValueError, match="called 0 times"):
        ncfast.measure_model(model, loader, head=torch.nn.Linear(6, 4))
    shared = torch.nn.Linear(6, 6)
    with pytest.raises(ValueError, match="called 2 times"):
        ncfast.measure_model(torch.nn.Sequential(shared, shared), loader)


def test_one_absurd_label_is_not_a_million_classes(case):
    features, labels, *_ = case
    labels[3] = 10**12
    with pytest.raises(ValueError, match="largest label is 1000000000000 among 120 samples"):
        ncfast.measure(features, labels)
    labels[3] = 900
    assert ncfast.measure(features, labels).num_absent == 901 - 5


def test_means_that_coincide_to_rounding_have_no_geometry():
    features, _ = oracle.clustered(1, 5, 100, 1.0)
    both = torch.cat([features, features.flip(0)])
    for dtype in (torch.float32, torch.float64):
        report = ncfast.measure(both.to(dtype), torch.arange(200) // 100)
        assert report.nc1 is None
        assert report.trace_ratio is None
        assert report.trace_between == 0.0
        assert report.trace_within > 0.1


def test_tiny_differences_of_weights_give_no_false_certificate():
    features = torch.tensor(
        [[1.0, 0.0], [1.1, 0.0], [-0.5, 0.0], [-1.0, 0.0], [-1.1, 0.0]], dtype=torch.float64
    )
    labels = torch.tensor([0, 0, 0, 1, 1])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64) * 1e-170
    reports = [ncfast.measure(features, labels, weight, certificates=flag) for flag in (True, False)]
    oracle.assert_reports_agree(*reports, 0.0, skip={"certified_share", "etf_error_classifier"})
    assert reports[0].train_accuracy == 0.8


def test_a_head_called_by_keyword(loader):
    class ByKeyword(Net):
        def forward(self, x):
            return self.head(input=self.body(x))

    model = ByKeyword()
    by_position = Net()
    by_position.load_state_dict(model.state_dict())
    assert ncfast.measure_model(model, loader) == ncfast.measure_model(by_position, loader)


def test_test_data_need_a_classifier():
    features, labels = torch.randn(20, 3), torch.arange(20) % 2
    with pytest.raises(ValueError, match="test data were given without weight"):
        ncfast.measure(features, labels, test=(features, labels))


def test_num_classes_below_one():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        ncfast.measure(torch.randn(20, 3), torch.arange(20) % 2, num_classes=0)


def test_the_cpu_kernels_carry_all_of_it():
    """Forced, they run or raise: nothing falls back to the reference. Few samples show bf16x3 as 1e-4."""
    features, labels = oracle.clustered(7, 33, 300, 0.5)
    weight = torch.randn(7, 33)
    with ncfast.use_backend("cpu"), ncfast.ops.dispatch.record() as ran:
        report = ncfast.measure(features, labels, weight)
    assert {backend for _, backend in ran} == {"cpu"}
    rooms = {"class_scatter", "affine_argmax", "pair_geometry", "certify"}
    assert {operation for operation, _ in ran} == rooms
    oracle.assert_reports_agree(report, oracle.two_pass(features, labels, 7, weight), 1e-4, 1e-6)


@pytest.mark.parametrize("apart", [0.0, 1e-15, 1e-12, 1e-9])
def test_means_that_nearly_coincide_certify_nothing_beyond_half_their_distance(apart):
    """Two of three classes 1e-15 apart, beside their norms: what float64 scores say of them is noise."""
    generator = torch.Generator().manual_seed(0)
    p = 40
    means = torch.randn(3, p, generator=generator, dtype=torch.float64)
    means[1] = means[0] + apart * torch.randn(p, generator=generator, dtype=torch.float64)
    labels = torch.arange(3).repeat(30)
    noise = 0.1 * torch.randn(30, 1, p, generator=generator, dtype=torch.float64)
    features = (means + noise - noise.mean(0)).reshape(-1, p)  # the same deviations in every class
    stats = ncfast.ClassStatistics(3, p).update(features, labels)
    _, present, distances = collapse_and_distances(stats)
    decisions = _Decisions(means, None, stats.means, present, distances)
    true = (stats.means[:, None] - stats.means).norm(dim=2) + torch.diag(torch.full((3,), torch.inf))
    for _ in range(2):
        certified = torch.stack(decisions.limits).amin(0)
        assert (certified <= 0.5 * true.amin(1)).all()
        assert certified[2] > 0.1
        decisions._limit(decisions._radius())


@pytest.mark.parametrize(("spread", "exact"), [(1e-2, 0), (0.5, 1)])
def test_bounds_of_the_radii_decide_what_has_collapsed(spread, exact, monkeypatch):
    """Where all walls are equally near, the radii themselves are asked for only if a sample is left open."""
    if "cpu" not in backends.available("pair_geometry"):
        pytest.skip("only the C++ backend has them")
    C, p = 60, 96
    means = 10 * ncfast.simplex_etf(C, p)
    features, labels = means.repeat(20, 1), torch.arange(C).repeat(20)
    features = features + spread * torch.randn(features.shape)
    module, calls = importlib.import_module("ncfast.measure"), []

    def counted(*arguments):
        calls.append(arguments)
        return ncfast.decision_radius(*arguments)

    monkeypatch.setattr(module, "decision_radius", counted)
    sure = ncfast.measure(features, labels, means)
    assert len(calls) == exact
    assert sure.certified_share > 0.9
    monkeypatch.setattr(module, "radius_bound", lambda *_: None)
    assert ncfast.measure(features, labels, means) == sure
    scored = ncfast.measure(features, labels, means, certificates=False)
    assert dataclasses.replace(sure, certified_share=0.0) == scored


@pytest.mark.parametrize(
    "reparametrised",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda head: prune.random_unstructured(head, "weight", 0.5),
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_a_weight_that_the_forward_pass_makes(model, loader, reparametrised):
    """It is the present one, also where a hook has yet to make it, and nothing of the head changes."""
    reparametrised(model.head)
    tracker = ncfast.Tracker(model, model.head)
    inputs, labels = next(iter(loader))
    model(inputs)
    tracker.update(labels)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += torch.randn(parameter.shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stale = vars(model.head).get("weight")
    epoch = tracker.end_epoch()
    assert vars(model.head).get("weight") is stale
    report = ncfast.measure_model(model, loader, head=model.head)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = ncfast.measure(*captured(model, loader), model.head.weight, model.head.bias)
    assert report.nc2_equinorm_classifier == expected.nc2_equinorm_classifier
    assert epoch.nc2_equinorm_classifier == pytest.approx(expected.nc2_equinorm_classifier, rel=1e-12)
    assert report.nc3_self_duality == pytest.approx(expected.nc3_self_duality, rel=1e-6)
    assert report.train_accuracy == expected.train_accuracy


def test_a_model_that_overwrites_what_entered_its_head(loader):
    class Overwriting(Net):
        def forward(self, x):
            features = self.body(x)
            outputs = self.head(features)
            features.zero_()
            return outputs

    torch.manual_seed(0)
    model, ours = Net(), Overwriting()
    ours.load_state_dict(model.state_dict())
    assert ncfast.measure_model(ours, loader) == ncfast.measure_model(model, loader)


class Merging(torch.nn.Linear):
    """As adapters do: in eval mode a further product is part of the weight."""

    merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -1.0 if mode else 1.0
            self.merged = not mode
        return self


def test_a_head_whose_weight_depends_on_its_mode(model, loader):
    model.head = Merging(8, 4)
    expected = model.head.weight.detach().clone()
    tracker = ncfast.Tracker(model)
    inputs, labels = next(iter(loader))
    model(inputs)
    tracker.update(labels)
    tracker.end_epoch()
    assert torch.equal(model.head.weight, expected)
    report = ncfast.measure_model(model, loader)
    assert not model.head.merged
    torch.testing.assert_close(model.head.weight.detach(), expected)
    features, labels = captured(model, loader)
    assert (
        report.train_accuracy
        == ncfast.measure(features, labels, model.head.weight, model.head.bias).train_accuracy
    )


def test_a_weight_read_from_a_cache_keeps_its_gradient(model, loader):
    torch.nn.utils.parametrizations.weight_norm(model.head)
    tracker = ncfast.Tracker(model, model.head)
    inputs, labels = next(iter(loader))
    with parametrize.cached():
        model(inputs)
        tracker.update(labels)
        parametrize._cache.clear()
        tracker.end_epoch()
        assert model.head.weight.requires_grad


@pytest.mark.parametrize("shape", [(4, 5), (2, 10), (5, 4, 2)])
def test_labels_of_another_shape_than_the_features(shape):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    labels = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels must have shape \[5, 4\]"):
        ncfast.measure_model(model, [(torch.randn(5, 4, 6), labels)])
    tracker = ncfast.Tracker(model)
    model(torch.randn(5, 4, 6))
    with pytest.raises(ValueError, match=r"labels must have shape \[5, 4\]"):
        tracker.update(labels)


def test_labels_that_are_flat_already_or_have_an_axis_more():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    inputs, labels = torch.randn(5, 4, 6), torch.arange(20) % 4
    reports = [
        ncfast.measure_model(model, [(inputs, given)])
        for given in (labels, labels.view(5, 4), labels.view(5, 4, 1), labels.view(20, 1))
    ]
    flat = torch.nn.Sequential(model[0], torch.nn.Flatten(0, 1), model[1])
    reports.append(ncfast.measure_model(flat, [(inputs, labels.view(5, 4))]))
    assert all(report == reports[0] for report in reports)
