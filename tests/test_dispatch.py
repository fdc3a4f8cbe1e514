"""dispatch: forced paths run or raise, choices are declared and can be explained."""

import contextlib
import types

import pytest
import torch

import ncfast
from ncfast.ops import dispatch, launch

FEATURES, LABELS = torch.randn(6, 3), torch.arange(6) % 2


def run():
    with dispatch.record() as ran:
        ncfast.class_scatter(FEATURES, LABELS, torch.zeros(2, 3))
    return ran


def test_use_backend_forces_and_restores():
    automatic = run()
    with ncfast.use_backend("reference"):
        assert run() == [("class_scatter", "reference")]
    assert run() == automatic


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("NCFAST_BACKEND", "reference")
    assert run() == [("class_scatter", "reference")]
    monkeypatch.setenv("NCFAST_BACKEND", "")  # set but empty: as if unset
    assert len(run()) == 1


def test_use_backend_beats_the_environment(monkeypatch):
    monkeypatch.setenv("NCFAST_BACKEND", "cuda")
    with ncfast.use_backend("reference"):
        assert run() == [("class_scatter", "reference")]


def test_a_forced_backend_never_falls_back():
    assert not torch.cuda.is_available() or FEATURES.device.type == "cpu"
    with ncfast.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was forced but cannot run"):
        run()


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'gpu'"), ncfast.use_backend("gpu"):
        pass
    monkeypatch.setenv("NCFAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match="NCFAST_BACKEND: unknown backend 'gpu'"):
        run()


@pytest.mark.parametrize("operation", ["class_scatter", "affine_argmax", "pair_geometry"])
def test_explain_names_what_runs(operation):
    lines = dict(dispatch.explain(operation, FEATURES))
    assert tuple(lines) == dispatch.preference(operation, FEATURES)
    assert sorted(lines) == sorted(dispatch.BACKENDS)
    assert list(lines.values()).count("runs") == 1
    with ncfast.use_backend("reference"):
        forced = dict(dispatch.explain(operation, FEATURES))
    assert forced["reference"] == "runs"
    assert forced["cpu"] == "backend 'reference' is forced"


def test_explain_agrees_with_what_ran():
    (_, ran), *_ = run()
    assert dict(dispatch.explain("class_scatter", FEATURES))[ran] == "runs"


def test_a_backend_that_lacks_an_option_is_passed_over(monkeypatch):
    backend = dispatch._module("class_scatter", dispatch.pick("class_scatter", FEATURES))
    assert backend.__name__.endswith(".cpu")
    monkeypatch.setattr(
        backend, "lacks", lambda _, scatter=True, **__: "no scatter" if scatter else None, raising=False
    )
    assert run() == [("class_scatter", "reference")]
    with dispatch.record() as ran:
        ncfast.class_scatter(FEATURES, LABELS, torch.zeros(2, 3), scatter=False)
    assert ran == [("class_scatter", "cpu")]
    with ncfast.use_backend("cpu"), pytest.raises(RuntimeError, match="no scatter"):
        run()


def test_cuda_is_for_devices_that_its_build_runs_on(monkeypatch):
    """A device without machine code in this build (5) is left to Triton or the reference, not tried."""
    _cuda = pytest.importorskip("ncfast._cuda", reason="ncfast was built without CUDA")
    current, asked = [], []

    @contextlib.contextmanager
    def switched(device):
        current.append(device)
        yield
        current.pop()

    def refuses(device):
        assert current == [device]
        asked.append(device)
        return "no kernel image" if device == 5 else None

    def radii(device):
        return types.SimpleNamespace(
            shape=(4,), device=torch.device("cuda", device), is_cuda=True, is_cpu=False
        )

    monkeypatch.setattr(_cuda, "refuses", refuses)
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    launch._refuses.cache_clear()
    try:
        for _ in range(2):
            assert dispatch.refusal("certify", "cuda", radii(5)) == "no kernel image"
            assert dispatch.pick("certify", radii(5)) != "cuda"
            assert dispatch.pick("certify", radii(6)) == "cuda"
        with ncfast.use_backend("cuda"), pytest.raises(RuntimeError, match="no kernel image"):
            dispatch.pick("certify", radii(5))
        assert asked == [5, 6]  # once each
    finally:
        launch._refuses.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_says_so():
    """What refuses is an answer; what is run nevertheless is an error that names the call."""
    _cuda = pytest.importorskip("ncfast._cuda", reason="ncfast was built without CUDA")
    assert _cuda.refuses(0).startswith("CUDA says: ")
    with pytest.raises(RuntimeError, match="cudaSetDevice: "):
        _cuda.run([], 0, 0)


def test_what_is_preferred_depends_on_the_call():
    """With the scatter Triton, but where classes are too small for its row tiles; otherwise CUDA C++."""

    def first(operation, N, **options):
        return dispatch.preference(operation, torch.empty(N, 1), **options)[0]

    assert first("class_scatter", 1024, num_classes=1000) == "triton"
    assert first("class_scatter", 1025, num_classes=1000) == "cuda"
    assert first("class_scatter", 128_000, num_classes=1000) == "triton"
    assert first("class_scatter", 128_000, num_classes=1000, scatter=False) == "cuda"
    assert first("affine_argmax", 1024) == "cuda"
    lines = dispatch.explain("class_scatter", FEATURES, scatter=False)
    assert tuple(backend for backend, _ in lines) == dispatch.BACKENDS


def test_recording_is_local_and_ends():
    with dispatch.record() as outer:
        with dispatch.record() as inner:
            run()
        assert inner == []  # run() records for itself: the innermost list gets the call
        ncfast.class_scatter(FEATURES, LABELS, torch.zeros(2, 3))
    assert len(outer) == 1
    ncfast.class_scatter(FEATURES, LABELS, torch.zeros(2, 3))
    assert len(outer) == 1
