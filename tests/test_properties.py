"""Random shapes, dtypes, strides and labels through all of it, driven by hypothesis."""

import hypothesis
import torch
from hypothesis import strategies as st

import ncfast

import oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# What the stored numbers of a float32 computation are off by, relative to the largest feature.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24}


@st.composite
def data(draw):
    """Features [N, p] as some view of a larger tensor, labels of some integer dtype, C classes."""
    C, p = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    N = draw(st.integers(1, 80))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-2, 1.0, 1e2]))
    offset = draw(st.sampled_from([0.0, 50.0]))
    features = scale * (torch.randn(N, p, dtype=torch.float64, generator=generator) + offset)
    step, margin = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    storage = torch.full((N * step, p + 2 * margin), torch.nan, dtype=dtype)
    if draw(st.booleans()):
        storage = torch.full((p + 2 * margin, N * step), torch.nan, dtype=dtype).T  # column-major
    view = storage[::step, margin : margin + p]
    view.copy_(features)
    labels = torch.randint(0, C, (N,), generator=generator)
    ignored = torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    labels[ignored] = -100
    labels = labels.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8])))
    return view, labels, C


@hypothesis.given(data(), st.sampled_from(["highest", "high", "medium"]))
def test_class_scatter(case, precision):
    features, labels, C = case
    kept = labels != -100
    shift = torch.randn(C, features.shape[1], generator=torch.Generator().manual_seed(0))
    shift = shift + features[kept].double().mean(0).nan_to_num().to(shift.dtype)
    shift = shift.double() if features.dtype == torch.float64 else shift
    fast = ncfast.class_scatter(features, labels, shift, radii=True, precision=precision)
    slow = ncfast.reference.class_scatter(features, labels, shift, radii=True)
    assert torch.equal(fast.counts, slow.counts)
    unit = UNIT[features.dtype]
    N, p = features.shape
    largest = (
        (features.double() - shift.double()[labels.long().clamp(min=0)])[kept].abs().max()
        if kept.any()
        else 0.0
    )
    oracle.assert_within(fast.sums, slow.sums, 4 * N * unit * largest)
    oracle.assert_within(fast.sumsq, slow.sumsq, 4 * N * p * unit * largest**2)
    products = (
        unit
        if features.dtype == torch.float64
        else {"highest": unit, "high": 2.0**-15, "medium": 2.0**-7}[precision]
    )
    oracle.assert_within(fast.scatter, slow.scatter, 4 * N * max(products, unit) * largest**2)
    assert torch.equal(fast.scatter, fast.scatter.T)
    assert torch.equal(fast.radii.isnan(), ~kept)
    if kept.any():
        error = (fast.radii.double() - slow.radii)[kept].abs()
        assert (error <= (p + 8) * 2.0**-24 * slow.radii[kept]).all()


@hypothesis.given(data(), st.integers(1, 30))
def test_statistics_do_not_depend_on_the_batches(case, batch):
    features, labels, C = case
    whole = ncfast.ClassStatistics(C, features.shape[1], precision="highest").update(features, labels)
    parts = ncfast.ClassStatistics(C, features.shape[1], precision="highest")
    for h, y in zip(features.split(batch), labels.split(batch), strict=True):
        parts.update(h, y)
    half = len(features) // 2
    merged = ncfast.ClassStatistics(C, features.shape[1], precision="highest").update(
        features[:half], labels[:half]
    )
    other = ncfast.ClassStatistics(C, features.shape[1], precision="highest").update(
        features[half:], labels[half:]
    )
    merged.merge(other)
    kept = labels != -100
    size = features[kept].double().abs().max() if kept.any() else 0.0
    spread = 4 * (features[kept].double().std(0).max() if kept.sum() > 1 else 0.0)
    unit = UNIT[features.dtype]
    for stats in (parts, merged):
        assert torch.equal(stats.counts, whole.counts)
        present = whole.present
        oracle_bound = 64 * len(features) * (unit * spread + 2.0**-53 * size)
        if present.any():
            oracle.assert_within(stats.means[present], whole.means[present], oracle_bound)
            bound = 64 * len(features) * (unit * spread**2 + 2.0**-53 * size * spread)
            oracle.assert_within(stats.within_covariance, whole.within_covariance, bound)


@hypothesis.given(data(), st.booleans())
def test_measure_gives_numbers_or_none(case, by_class):
    features, labels, C = case
    hypothesis.assume(bool((labels != -100).any()))
    weight = torch.randn(C, features.shape[1], generator=torch.Generator().manual_seed(0))
    report = ncfast.measure(features, labels, weight, global_mean="classes" if by_class else "samples")
    shares = {"nc4_disagreement", "train_accuracy", "certified_share"}
    for name, value in report.as_dict().items():
        if isinstance(value, float):
            assert 0.0 <= value < float("inf"), name
        if name in shares:
            assert 0.0 <= value <= 1.0
    assert report.num_samples == int((labels != -100).sum())
    assert report.num_classes + report.num_absent == C
    without = ncfast.measure(
        features, labels, weight, global_mean="classes" if by_class else "samples", certificates=False
    )
    oracle.assert_reports_agree(report, without, 0.0, skip={"certified_share"})


@hypothesis.given(data())
def test_decisions_are_those_of_the_reference(case):
    features, _, C = case
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(C, features.shape[1], generator=generator)
    bias = torch.randn(C, generator=generator)
    (expected,) = ncfast.reference.affine_argmax(features, [(weight, bias)])
    assert torch.equal(ncfast.affine_argmax(features, weight, bias), expected)
