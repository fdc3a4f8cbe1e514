"""What waits for the GPU and what never does, shown without one.

`ClassStatistics.update` and the operations: tensors on the device "meta" have shapes but no data, so that
whatever would need a value on the host (`.item()`, `bool()`, `nonzero`, boolean indexing, `.cpu()`) raises.
`measure` needs values in the end: `onlooker` writes down where.
"""

import contextlib

import onlooker
import pytest
import torch
import triton_machines

import ncfast
from ncfast.ops import dispatch

import oracle


@pytest.fixture
def launches(monkeypatch):
    """The Triton launchers with the kernels left out: a list of what would have been launched."""
    triton = pytest.importorskip("triton")
    from ncfast.ops import target
    from ncfast.ops.affine_argmax import triton as affine_argmax
    from ncfast.ops.class_scatter import triton as class_scatter

    for room in (affine_argmax, class_scatter):
        monkeypatch.setattr(room, "refuses", lambda _: None)
    names = []

    def launch(kernel, grid):
        assert all(isinstance(extent, int) for extent in grid)
        return lambda *_, **__: names.append(kernel.fn.__name__)

    monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", launch)
    monkeypatch.setattr(target, "architecture", lambda: "sm_90")
    return names


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("nonfinite", ["error", "skip"])
@pytest.mark.parametrize(("N", "C"), [(128, 10), (2000, 3), (2000, 900)])  # scanned, grouped, sorted
def test_update_does_not_wait(backend, nonfinite, N, C, launches):
    stats = ncfast.ClassStatistics(C, 7, nonfinite=nonfinite, device="meta")
    features, labels = torch.empty(N, 7, device="meta"), torch.zeros(N, dtype=torch.int64, device="meta")
    with ncfast.use_backend(backend):
        stats.update(features, labels)
        stats.update(features.bfloat16(), labels.int())
        stats.accumulate(features, labels)
    assert launches.count("_row_norms") == (3 if backend == "triton" else 0)


@pytest.mark.parametrize("C", [5, 600])
def test_affine_argmax_does_not_wait(C, launches):
    rules = [torch.empty(C, 20, device="meta")] * 2
    with ncfast.use_backend("triton"):
        ncfast.affine_argmax(torch.empty(70, 20, device="meta"), rules, [None, None])
    assert "_settle" in launches


def test_everything_is_chosen_for_the_device_of_the_features(launches, monkeypatch):
    """With GPUs of two architectures in a machine, the current one need not be that of the features."""
    from ncfast.ops import target

    inside = []

    @contextlib.contextmanager
    def active(_):
        inside.append(True)
        yield
        inside.pop()

    def architecture():
        assert inside
        return "sm_90"

    monkeypatch.setattr(target, "active", active)
    monkeypatch.setattr(target, "architecture", architecture)
    features, labels = torch.empty(300, 20, device="meta"), torch.zeros(300, dtype=torch.int64, device="meta")
    with ncfast.use_backend("triton"):
        ncfast.class_scatter(features, labels, torch.empty(5, 20, device="meta"))
        ncfast.affine_argmax(features, torch.empty(5, 20, device="meta"))
    assert {"_scatter_pairs", "_top_two"} <= set(launches)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
    ],
)
def test_what_waits_raises(call):
    with pytest.raises((RuntimeError, NotImplementedError)):
        call(torch.ones(3, device="meta"))


# In order: the numbers of NC1–NC3; the rows without a certificate, to compact them; the numbers of NC4.
NUMBERS, COMPACTION, DECISIONS = "_read: tolist", "certify: nonzero", "of: tolist"
# Not until the numbers are read is it known that a class is absent, or the means so ill-conditioned that NC1
# needs an eigenproblem: what that changes is measured again.
ABSENT = ["collapse_and_distances: index", NUMBERS]
EIGENPROBLEM = [
    "_nc1_by_eigenvalues: index",
    "_nc1_by_eigenvalues: index",
    "collapse_and_distances: _local_scalar_dense",
]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The Triton backend in the emulator, on tensors of the device that writes down what waits."""
    triton_machines.start("sm_80")
    import triton

    from ncfast.ops import target

    launch = triton.runtime.JITFunction.__getitem__

    def launch_on_cpu(kernel, grid):
        run = launch(kernel, grid)
        return lambda *args, **options: run(*onlooker.held(args), **options)

    monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", launch_on_cpu)
    monkeypatch.setattr(target, "refuses_device", lambda _: None)
    for room in ("affine_argmax", "certify", "pair_geometry"):  # whoever has imported them by now
        monkeypatch.setattr(f"ncfast.ops.{room}.triton.refuses", lambda _: None)


def collapsing(spread, seed=0):
    """Three classes, 60 rows of 6 dimensions, a classifier that is not the nearest class centre."""
    features, labels = oracle.clustered(3, 6, 60, spread, seed=seed)
    labels[5] = -100
    return features, labels


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("spread", [0.01, 3.0])  # all rows have certificates, or few
def test_measure_waits_for_its_numbers_only(spread):
    given = (*collapsing(spread), torch.randn(3, 6), torch.randn(3))
    with ncfast.use_backend("triton"), onlooker.onlooking() as waits, dispatch.record() as ran:
        report = ncfast.measure(*onlooker.on_device(given))
    assert waits == [NUMBERS, COMPACTION, DECISIONS]
    assert {"class_scatter", "pair_geometry"} <= {operation for operation, _ in ran}
    oracle.assert_reports_agree(report, ncfast.measure(*given), oracle.HIGH, 1e-12)


@pytest.mark.usefixtures("on_a_gpu")
def test_measure_with_test_data_and_an_absent_class():
    features, labels = collapsing(0.5)
    given = features, torch.where(labels == 1, 2, labels), torch.randn(3, 6), torch.randn(3)
    held_out = collapsing(0.5, seed=1)
    with ncfast.use_backend("triton"), onlooker.onlooking() as waits:
        report = ncfast.measure(*onlooker.on_device(given), test=onlooker.on_device(held_out))
    assert waits == [NUMBERS, *ABSENT, *2 * [COMPACTION, DECISIONS]]
    oracle.assert_reports_agree(report, ncfast.measure(*given, test=held_out), oracle.HIGH, 1e-12)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("C", "p"), [(4, 6), (6, 3)])  # the Gram matrix of the means, Σ_B
@pytest.mark.parametrize("flat", [False, True])  # whether the means are nearly on a line
def test_collapse_waits_once_unless_ill_conditioned(C, p, flat):
    features, labels = oracle.clustered(C, p, 40, 0.1)
    features[:, 1:] *= 1e-6 if flat else 1.0
    stats = ncfast.ClassStatistics(C, p).update(features, labels)
    given = onlooker.on_device(vars(stats))
    on_device = ncfast.ClassStatistics(C, p, device=onlooker.DEVICE)
    vars(on_device).update(given)
    with ncfast.use_backend("triton"), onlooker.onlooking() as waits:
        report = ncfast.collapse(on_device)
    assert waits == [NUMBERS, *(EIGENPROBLEM if flat else [])]
    oracle.assert_reports_agree(report, ncfast.collapse(stats), oracle.HIGH, 1e-12)


@pytest.mark.usefixtures("on_a_gpu")
def test_what_is_refused_late_is_named():
    """Nothing waits for the check of the rows, and still the message says where."""
    features, labels = collapsing(0.5)
    weight, rows = torch.randn(3, 6), torch.arange(len(labels))
    outside, broken = labels.masked_fill(rows == 7, 3), features.masked_fill(rows[:, None] == 4, torch.nan)
    for arguments, options, words in (
        ((features, outside, weight), {}, "label 3 in row 7 is outside"),
        ((broken, labels, weight), {}, "infinity in row 4"),
        ((features, labels, weight), {"test": (features, outside)}, "label 3 in row 7 is outside"),
        ((features, labels, weight), {"test": (broken, labels)}, "infinity in row 4"),
        ((features, labels, weight / 0), {}, "weight holds"),
        ((features, labels, weight, weight[:, 0] / 0), {}, "bias holds"),
        ((features, labels - 200), {"num_classes": 3}, "label -200 in row 0"),
        ((features, torch.full_like(labels, -100), weight), {}, "no samples"),
    ):
        given = onlooker.on_device((arguments, options))
        with ncfast.use_backend("triton"), onlooker.onlooking(), pytest.raises(ValueError, match=words):
            ncfast.measure(*given[0], **given[1])


@pytest.mark.parametrize(
    ("call", "operation"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.index_put_((x > 0,), x[0]), "index_put_"),
        (lambda x: x.equal(x), "equal"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: torch.ones(3).to(x.device), "_to_copy"),
        (lambda x: x.copy_(torch.ones(3)), "copy_"),
        (lambda x: x.new_tensor([1.0]), "new_tensor"),
    ],
)
def test_the_onlooker_sees_what_waits(call, operation):
    x = onlooker.on_device(torch.ones(3))
    with onlooker.onlooking() as waits:
        x[[0, 2]] = x.sort().values[:2] + 1  # does not wait
        assert waits == []
        call(x)
    assert waits == [operation]
