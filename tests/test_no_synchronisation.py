"""ClassStatistics.update never waits for the GPU, shown without one.

Tensors on the device "meta" have shapes but no data: whatever would need a value on the host (`.item()`,
`bool()`, `nonzero`, boolean indexing, `.cpu()`) raises.
"""

import pytest
import torch

import ncfast


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
