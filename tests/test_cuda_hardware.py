"""The CUDA kernels on a GPU: `make gpu`."""

import pytest
import torch

import ncfast
from ncfast.ops import dispatch
from ncfast.ops.class_scatter import class_scatter

pytest.importorskip("ncfast._cuda", reason="ncfast was built without CUDA")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3, 2), (33, 17, 5), (5000, 96, 300), (20_000, 1040, 2)], ids=str)
def test_class_moments(shape, dtype):
    N, p, C = shape
    features, shift = torch.randn(N, p).to(dtype).cuda(), torch.randn(C, p, device="cuda")
    labels = torch.randint(-1, C, (N,), device="cuda")
    options = {"scatter": False, "radii": True, "ignore_index": -1}
    with ncfast.use_backend("reference"):
        # The reference does not round the shift; the operation does, when it is called.
        truth = class_scatter(features, labels, shift, **options)
    with ncfast.use_backend("cuda"), dispatch.record() as ran:
        result, again = (class_scatter(features, labels, shift, **options) for _ in range(2))
    assert ran == [("class_scatter", "cuda")] * 2
    assert torch.equal(result.counts, truth.counts)
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    # One rounding per difference of up to |h| + |k| < 12; the sums of squares are positive terms.
    relative = 4 * unit + 2 * (N + p + 8) * 2.0**-52
    assert ((result.sums - truth.sums).abs() <= relative * 12 * truth.counts[:, None]).all()
    assert ((result.sumsq - truth.sumsq).abs() <= relative * truth.sumsq).all()
    assert ((result.radii - truth.radii).abs() <= 2 * relative * truth.radii)[labels >= 0].all()
    for a, b in zip(result, again, strict=True):
        assert a is b or torch.equal(a.nan_to_num(), b.nan_to_num())
