"""Every input that needs a defined answer or a clear error: every public way in, every backend."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from backends import available, forced
from torch._subclasses import FakeTensorMode

import ncfast

import oracle

BACKENDS = available("class_scatter")
# Those that can be forced for all of a measurement.
WHOLE = sorted({*BACKENDS} & {*available("affine_argmax")} & {*available("pair_geometry")})


def streaming(features, labels, C=3, **options):
    return ncfast.ClassStatistics(C, 4, **options).update(features, labels)


def direct(features, labels, C=3):
    return ncfast.class_scatter(features, labels, torch.zeros(C, 4, dtype=torch.float32))


def at_once(features, labels, C=3):
    return ncfast.measure(features, labels, num_classes=C)


WAYS_IN = pytest.mark.parametrize("way", [streaming, direct, at_once])
GOOD = torch.arange(24.0).reshape(6, 4), torch.arange(6) % 3


@WAYS_IN
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_names_its_row(way, value, dtype, backend):
    features = GOOD[0].to(dtype, copy=True)
    features[4, 3] = features[5, 0] = value  # the first of the two is the one to name
    with ncfast.use_backend(backend), pytest.raises(ValueError, match="NaN or an infinity in row 4"):
        way(features, GOOD[1])


# Just outside, far outside in both directions (an unchecked index would leave the memory), and the
# neighbours of ignore_index.
@WAYS_IN
@pytest.mark.parametrize("label", [3, -1, -99, -101, 2**31, 2**62, -(2**62)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_outside_names_its_row(way, label, backend):
    labels = GOOD[1].clone()
    labels[5] = label
    with ncfast.use_backend(backend), pytest.raises(ValueError, match=f"label {label} in row 5 is outside"):
        way(GOOD[0], labels)


@WAYS_IN
@pytest.mark.parametrize(
    ("features", "labels", "error", "words"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), ValueError, "features must have shape"),
        (torch.zeros(2, 2, 4), torch.zeros(2, dtype=torch.long), ValueError, "features must have shape"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, "features must have shape"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.long), ValueError, "features must have shape"),
        (torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.long), ValueError, "labels must have shape"),
        (torch.zeros(2, 4), torch.tensor(0), ValueError, "labels must have shape"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.long), ValueError, "labels must have shape"),
        (torch.zeros(2, 4, dtype=torch.long), torch.tensor([0, 1]), TypeError, "features must be float32"),
        (torch.zeros(2, 4, dtype=torch.cfloat), torch.tensor([0, 1]), TypeError, "features must be float32"),
        (torch.zeros(2, 4), torch.zeros(2), TypeError, "labels must be integers"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool), TypeError, "labels must be integers"),
        (
            torch.zeros(2, 4),
            torch.zeros(2, dtype=torch.long, device="meta"),
            ValueError,
            "labels are on meta",
        ),
        ([[0.0] * 4], torch.tensor([0]), TypeError, "features must be a torch.Tensor"),
        (torch.zeros(2, 4), [0, 1], TypeError, "labels must be a torch.Tensor"),
    ],
)
def test_ranks_dtypes_and_devices(way, features, labels, error, words):
    with pytest.raises(error, match=words):
        way(features, labels)


def test_features_on_another_device_than_the_state():
    stats = ncfast.ClassStatistics(3, 4)
    with pytest.raises(ValueError, match="features are on meta but the state is on cpu"):
        stats.update(GOOD[0].to("meta"), GOOD[1].to("meta"))
    assert stats.num_samples == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    empty, none = torch.empty(0, 4), torch.empty(0, dtype=torch.long)
    with forced("class_scatter", backend):
        result = ncfast.class_scatter(empty, none, torch.zeros(3, 4), radii=True)
    assert result.radii.shape == (0,)
    assert not any(part.any() for part in result[:4])
    assert streaming(empty, none).num_samples == 0
    with pytest.raises(ValueError, match="no samples"):
        at_once(empty, none)


# Lane − 1, lane and lane + 1 of 16 floats, tile ± 1 of 32, 64 and 128, odd and prime, and a single dimension.
@pytest.mark.parametrize("p", [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 65, 101, 127, 129])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_dimensions(p, backend):
    features, labels = oracle.clustered(3, p, 37, 0.5)
    with forced("class_scatter", backend):
        stats = ncfast.ClassStatistics(3, p, precision="highest").update(features, labels)
    truth = oracle.two_pass(features, labels, 3)
    # Differences, and products of them, are rounded to float32 once each: three roundings, and a fourth to
    # float64 masters from sums of at most 37 terms.
    bound = (3 + 37) * 2.0**-24 * truth["within_covariance"].abs().max() * 4
    oracle.assert_within(stats.within_covariance, truth["within_covariance"], bound, f"p={p}")
    oracle.assert_within(stats.means, truth["means"], 37 * 2.0**-24 * features.abs().max())


@pytest.mark.parametrize("backend", WHOLE)
def test_one_dimension_and_many_classes_are_measured(backend):
    """C > p = 1: Σ_B is one number, and all cosines are ±1."""
    features, labels = oracle.clustered(4, 1, 40, 0.5, dtype=torch.float64)
    with ncfast.use_backend(backend):
        report = ncfast.measure(features, labels)
    truth = oracle.two_pass(features, labels, 4)
    oracle.assert_relative(report.nc1, truth["trace_ratio"] / 4, 1e-12)
    oracle.assert_relative(report.nc2_max_angle_means, truth["nc2_max_angle_means"], 1e-12)


@pytest.mark.parametrize("backend", WHOLE)
def test_one_class(backend):
    with ncfast.use_backend(backend):
        report = at_once(GOOD[0], torch.zeros(6, dtype=torch.long), C=1)
    assert report.trace_between == 0.0
    centred = GOOD[0].double() - GOOD[0].double().mean(0)
    oracle.assert_relative(report.trace_within, centred.square().sum() / 6, 1e-12)
    for name in ("nc1", "trace_ratio", "cdnv", "nc2_equinorm_means", "nc2_equiangular_means", "gnc2"):
        assert getattr(report, name) is None, name


def test_one_class_present_of_several():
    report = at_once(GOOD[0], torch.full((6,), 1), C=3)
    assert (report.num_classes, report.num_absent) == (1, 2)
    assert report.nc1 is None
    assert report.trace_between == 0.0


@pytest.mark.parametrize("backend", WHOLE)
def test_nearest_center_chooses_among_present_and_the_classifier_among_all(backend):
    """Class 1 has no training sample; the classifier prefers it, the nearest centre cannot."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]])
    labels = torch.tensor([0, 0, 2, 2])
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    with ncfast.use_backend(backend):
        agreeing = ncfast.measure(features, labels, weight, torch.zeros(3))
        eager = ncfast.measure(features, labels, weight, torch.tensor([0.0, 9.0, 0.0]))
    assert (agreeing.nc4_disagreement, agreeing.train_accuracy) == (0.0, 1.0)
    assert (eager.nc4_disagreement, eager.train_accuracy) == (1.0, 0.0)
    assert eager.num_absent == 1


# ---- layouts: nothing outside the view may be read into the result ----


def layouts(features):
    """The same numbers as views of poisoned storage; what lies around them is NaN."""
    N, p = features.shape
    wide = torch.full((2 * N + 1, p + 7), math.nan, dtype=features.dtype)
    wide[1::2, 3 : 3 + p] = features
    columns = torch.full((p + 2, N + 3), math.nan, dtype=features.dtype)
    columns[1 : 1 + p, 2 : 2 + N] = features.T
    gaps = torch.full((N, 3 * p), math.nan, dtype=features.dtype)
    gaps[:, 1::3] = features
    flat = torch.full((N * p + 1,), math.nan, dtype=features.dtype)
    flat[1:] = features.reshape(-1)
    return {
        "every other row of a wider matrix": wide[1::2, 3 : 3 + p],
        "column-major inside a larger one": columns[1 : 1 + p, 2 : 2 + N].T,
        "every third column": gaps[:, 1::3],
        "contiguous, not aligned": flat[1:].view(N, p),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(dtype, backend):
    features, labels = oracle.clustered(3, 19, 41, 1.0, dtype=dtype)
    shift = torch.zeros(3, 19)
    with forced("class_scatter", backend):
        plain = ncfast.class_scatter(features, labels, shift, radii=True)
        for name, view in layouts(features).items():
            assert torch.equal(view, features), name
            for ours, theirs in zip(
                ncfast.class_scatter(view, labels, shift, radii=True), plain, strict=True
            ):
                # The same numbers in the same order give the same bits, but torch sums by its own lights.
                bound = 0.0 if backend != "reference" else 64 * 41 * oracle.EPS * theirs.abs().max()
                oracle.assert_within(ours, theirs, bound, name)


@pytest.mark.parametrize("backend", WHOLE)
def test_results_are_where_the_features_are(backend):
    """Not on the default device: a kernel would write to addresses that are not its own."""
    features, labels = GOOD
    weight = torch.eye(3, 4)
    expected = ncfast.measure(features, labels, weight).as_dict()
    with ncfast.use_backend(backend), torch.device("meta"):
        assert ncfast.measure(features, labels, weight).as_dict() == pytest.approx(expected)
        assert ncfast.nearest_class_center(features, weight).device.type == "cpu"


@pytest.mark.parametrize("backend", WHOLE)
def test_a_negation_still_to_come(backend):
    """PyTorch keeps the sign of a conjugate's imaginary part, say, out of memory."""
    features, labels, weight = GOOD[0].double() - 7.5, GOOD[1], torch.eye(3, 4, dtype=torch.float64)
    lazy, lazy_weight = torch._neg_view(-features), torch._neg_view(-weight)
    assert lazy.is_neg()
    with ncfast.use_backend(backend):
        for call in (
            lambda h, w: ncfast.measure(h, labels, w).as_dict(),
            lambda h, w: ncfast.class_scatter(h, labels, w).sums.tolist(),
            lambda h, w: ncfast.affine_argmax(h, w).tolist(),
            lambda h, w: ncfast.decision_radius(w, None, h[:3]).tolist(),
        ):
            expected = call(features, weight)
            assert call(lazy, weight) == expected
            assert call(features, lazy_weight) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_repeated_by_stride_zero(backend):
    with forced("class_scatter", backend):
        stats = streaming(torch.arange(4.0).expand(50, 4), torch.zeros(1, dtype=torch.long).expand(50))
    assert stats.num_samples == 50
    assert stats.trace_within == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [2**32, -(2**40)])  # zero, if they were cut to 32 bits
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_an_ignore_index_that_no_label_can_hold(backend, ignore_index, dtype):
    features, labels = GOOD
    with forced("class_scatter", backend):
        result = ncfast.class_scatter(
            features, labels.to(dtype), torch.zeros(3, features.shape[1]), ignore_index=ignore_index
        )
    assert torch.equal(result.counts, labels.bincount(minlength=3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(tmp_path, backend):
    """Rows 2³⁰ elements apart in a sparse file: an offset of 32 bits wraps around at the third."""
    step, N, p = 2**30, 4, 8
    storage = np.memmap(tmp_path / "sparse", dtype=np.float16, mode="w+", shape=((N - 1) * step + p,))
    view = torch.from_numpy(storage).as_strided((N, p), (step, 1))
    rows = torch.arange(N * p, dtype=torch.float16).reshape(N, p)
    view.copy_(rows)
    labels = torch.tensor([0, 1, 0, 1])
    with forced("class_scatter", backend):
        far = ncfast.class_scatter(view, labels, torch.zeros(2, p))
        near = ncfast.class_scatter(rows, labels, torch.zeros(2, p))
    assert torch.equal(far.sums, near.sums)
    assert torch.equal(far.scatter, near.scatter)


# The reference would hold all N·p residuals in float64: 17 GB.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_more_than_2_to_the_31_elements(backend):
    """N·p > 2³¹ as a stride-0 view; all rows but the outermost are ignored, and so cost nothing to read."""
    N, p = 2**19 + 1, 4096
    features = torch.ones(1, p).expand(N, p)
    assert features.numel() > 2**31
    labels = torch.full((N,), -100)
    labels[0], labels[-1] = 0, 1
    with forced("class_scatter", backend):
        result = ncfast.class_scatter(features, labels, torch.zeros(2, p), scatter=False)
    assert result.counts.tolist() == [1, 1]
    assert result.sumsq.tolist() == [float(p), float(p)]


# ---- autograd ----


@pytest.mark.parametrize("backend", WHOLE)
def test_gradients_are_not_tracked(backend):
    features = GOOD[0].clone().requires_grad_()
    weight = torch.nn.Parameter(torch.randn(3, 4))
    with ncfast.use_backend(backend):
        stats = streaming(features * 1.0, GOOD[1])  # not a leaf either
        bias = torch.nn.Parameter(torch.zeros(3))
        report = ncfast.measure(features, GOOD[1], weight, bias)
        plain = ncfast.measure(features.detach(), GOOD[1], weight.detach(), bias.detach())
        decided = ncfast.affine_argmax(features, weight)
    tensors = [value for value in vars(stats).values() if isinstance(value, torch.Tensor)]
    assert not any(tensor.requires_grad for tensor in [*tensors, decided, stats.means])
    assert report == plain
    assert features.grad is None
    assert weight.grad is None


def test_inference_mode():
    plain = ncfast.measure(*GOOD, torch.eye(3, 4))
    with torch.inference_mode():
        assert ncfast.measure(GOOD[0].clone(), GOOD[1].clone(), torch.eye(3, 4)) == plain
        stats = streaming(GOOD[0].clone(), GOOD[1].clone())
    assert stats.num_samples == 6


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


WITHOUT_ADDRESS = [
    (freed, "in memory"),
    (torch.Tensor.to_sparse, "dense"),
    (FakeTensorMode().from_tensor, "in memory"),
]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("without", "words"), WITHOUT_ADDRESS)
def test_tensors_without_an_address(without, words):
    """Which kernels would read at 0."""
    (h, y), W = GOOD, torch.randn(3, 4)
    b = torch.randn(3)
    calls = [
        ("features", lambda: streaming(without(h), y)),
        ("labels", lambda: streaming(h, without(y))),
        ("shift", lambda: streaming(h, y, shift=without(W))),
        ("features", lambda: direct(without(h), y)),
        ("shift", lambda: ncfast.class_scatter(h, y, without(W))),
        ("features", lambda: at_once(without(h), y)),
        ("weight", lambda: ncfast.measure(h, y, without(W))),
        ("bias", lambda: ncfast.measure(h, y, W, without(b))),
        ("weight", lambda: ncfast.affine_argmax(h, without(W))),
        ("bias", lambda: ncfast.affine_argmax(h, W, without(b))),
        ("means", lambda: ncfast.nearest_class_center(h, without(W))),
        ("vectors", lambda: ncfast.pair_geometry(without(W))),
        ("variances", lambda: ncfast.pair_geometry(W, without(b))),
        ("anchors", lambda: ncfast.decision_radius(W, b, without(W))),
        ("classes", lambda: ncfast.decision_radius(W, b, W, without(torch.arange(3)))),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"{name} must be {words}"):
            call()


def test_a_shift_that_is_not_finite():
    h, y = GOOD
    with pytest.raises(ValueError, match="the shift of class 1 holds a NaN"):
        ncfast.class_scatter(h, y, torch.tensor([0.0, torch.nan, torch.nan])[:, None].expand(3, 4))
    unused = torch.tensor([0.0, 0.0, 0.0, torch.inf])[:, None].expand(4, 4)
    assert ncfast.class_scatter(h, y, unused).counts.tolist() == [2, 2, 2, 0]
    for row in (torch.inf, torch.tensor([torch.nan, 0, 0, 0]), torch.tensor([0, 0, 0, torch.nan])):
        shift = torch.zeros(3, 4)
        shift[1] = row
        with pytest.raises(ValueError, match="every row of shift must be finite, or NaN throughout"):
            ncfast.ClassStatistics(3, 4, shift=shift)


@pytest.mark.parametrize(
    ("ignore_index", "error"), [(None, TypeError), (1.5, TypeError), (2**63, ValueError)]
)
def test_an_ignore_index_that_is_none(ignore_index, error):
    h, y = GOOD
    for call in (
        lambda: ncfast.ClassStatistics(3, 4, ignore_index=ignore_index),
        lambda: ncfast.class_scatter(h, y, torch.zeros(3, 4), ignore_index=ignore_index),
        lambda: ncfast.measure(h, y, torch.randn(3, 4), ignore_index=ignore_index),
    ):
        with pytest.raises(error, match="ignore_index must"):
            call()


def test_what_names_a_row_goes_through_pickle():
    with pytest.raises(ValueError, match="label 7 in row 3") as caught:
        streaming(torch.randn(5, 4), torch.tensor([0, 1, 2, 7, 0]))
    for copied in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert str(copied) == str(caught.value)
        assert copied.row == 3
