"""The CUDA kernels on a GPU: `make gpu`."""

import pytest
import torch

import ncfast
from ncfast.ops import dispatch
from ncfast.ops.certify import certify
from ncfast.ops.class_scatter import class_scatter

from oracle import PRODUCTS, assert_scatter_close

_cuda = pytest.importorskip("ncfast._cuda", reason="ncfast was built without CUDA")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SHAPES = [  # N, p, C
    (0, 3, 2),
    (33, 17, 5),
    (5000, 96, 300),
    (20_000, 1040, 2),
    (3000, 2048, 2),  # teams of several warps, in several passes but for 16 bits
]


def sample(N, p, C, dtype=torch.float32):
    features, shift = torch.randn(N, p).to(dtype).cuda(), torch.randn(C, p, device="cuda")
    return features, torch.randint(-1, C, (N,), device="cuda"), shift


def compute(inputs, **options):
    """The reference's answer, and the kernels' twice: they are deterministic."""
    options |= {"radii": True, "ignore_index": -1}
    with ncfast.use_backend("reference"):
        truth = class_scatter(*inputs, **options)
    with ncfast.use_backend("cuda"), dispatch.record() as ran:
        result, again = (class_scatter(*inputs, **options) for _ in range(2))
    assert ran == [("class_scatter", "cuda")] * 2
    for a, b in zip(result, again, strict=True):
        assert a is b or torch.equal(a.nan_to_num(), b.nan_to_num())
    assert torch.equal(result.counts, truth.counts)
    return result, truth


def test_the_device_is_taken():
    assert _cuda.refuses(torch.cuda.current_device()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_moments(shape, dtype):
    N, p, _ = shape
    inputs = sample(*shape, dtype)
    result, truth = compute(inputs, scatter=False)
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    # One rounding per difference of up to |h| + |k| < 12; the sums of squares are positive terms.
    relative = 4 * unit + 2 * (N + p + 8) * 2.0**-52
    assert ((result.sums - truth.sums).abs() <= relative * 12 * truth.counts[:, None]).all()
    assert ((result.sumsq - truth.sumsq).abs() <= relative * truth.sumsq).all()
    assert ((result.radii - truth.radii).abs() <= 2 * relative * truth.radii)[inputs[1] >= 0].all()


@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (2_000_000, 20, 3)], ids=str)  # the last flushes
def test_class_scatter(shape, dtype, precision):
    result, truth = compute(sample(*shape, dtype), precision=precision)
    assert_scatter_close(result.scatter, truth.scatter, shape[0], precision)


@pytest.mark.parametrize("N", [0, 1, 100_000])
def test_certify(N):
    radii, labels = torch.rand(N, device="cuda"), torch.randint(-1, 6, (N,), device="cuda")
    radii[::5] = torch.nan
    gap, first, second = torch.rand(3, 5, dtype=torch.float64, device="cuda")
    options = {"scale": 1 + 2.0**-20, "offset": 2.0**-62}
    with ncfast.use_backend("reference"):
        want = certify(radii, labels, gap, [first, second], **options)
    with ncfast.use_backend("cuda"), dispatch.record() as ran:
        got = certify(radii, labels, gap, [first, second], **options)
    assert ran == [("certify", "cuda")]
    assert got[:2] == want[:2]
    assert torch.equal(got.undecided, want.undecided)


def test_on_a_stream_of_its_own():
    """Work queued on the current stream before the call is waited for."""
    features, labels, shift = sample(3000, 200, 7)
    expected = compute((features, labels, shift))[0]
    late = torch.full_like(features, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), ncfast.use_backend("cuda"):
        torch.cuda._sleep(10**8)  # cycles: some 50 ms
        late.copy_(features)
        result = class_scatter(late, labels, shift, radii=True, ignore_index=-1)
    torch.cuda.synchronize()
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert result.sums.isfinite().all()  # NaNs would be equal as well
