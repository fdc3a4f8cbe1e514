"""ClassStatistics: streaming, merging, saving; exact in deep collapse; a failed update changes nothing."""

import concurrent.futures
import contextlib
import copy
import math
import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch

import ncfast
from ncfast.ops.class_scatter import (
    WaitingRows,
    accumulate,
    accumulate_by_adding,
    accumulate_waiting,
    admit,
)

import oracle
from oracle import EPS

STATE = ("counts", "shift", "sums", "sumsq", "scatter")


def streamed(features, labels, C, batch=512, **options):
    stats = ncfast.ClassStatistics(C, features.shape[1], **options)
    for h, y in zip(features.split(batch), labels.split(batch), strict=True):
        stats.update(h, y)
    return stats


def bits(stats):
    """The whole state, comparable bit for bit (NaN rows of the shift included)."""
    state = {name: getattr(stats, name) for name in STATE}
    return {k: None if v is None else (v.dtype, v.numpy().tobytes()) for k, v in state.items()}


def assert_same_statistics(one, other, bound=1e-12):
    """The derived statistics agree to `bound` of the largest entry of each."""
    assert torch.equal(one.counts, other.counts)
    present = one.present
    for name in ("means", "class_variances"):
        ours, theirs = getattr(one, name)[present], getattr(other, name)[present]
        oracle.assert_within(ours, theirs, bound * theirs.abs().max(), name)
    for name in ("global_mean", "within_covariance", "between_covariance", "total_covariance"):
        ours, theirs = getattr(one, name), getattr(other, name)
        oracle.assert_within(ours, theirs, bound * theirs.abs().max(), name)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("C", [10, 100])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_deep_collapse(C, offset, spread, backend):
    """NC1 and Tr Σ_W of a float32 stream, against a float64 two-pass truth of the same float32 inputs."""
    features, labels = oracle.clustered(C, 512, 20_000, spread, offset=offset)
    if backend is None:
        stats = streamed(features, labels, C)
    else:
        with ncfast.use_backend(backend):
            stats = streamed(features, labels, C)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(C)])
    residuals = features.double() - means[labels]
    residuals -= torch.stack([residuals[labels == c].mean(0) for c in range(C)])[labels]
    m = means - means.mean(0)  # balanced classes: both global means are this one
    _, s, v = torch.linalg.svd(m, full_matrices=False)
    s, v = s[: C - 1], v[: C - 1]  # generic centred means span exactly C − 1 directions
    nc1 = ((residuals @ v.T).square().sum(0) / s.square()).sum() / len(features)
    oracle.assert_relative(ncfast.collapse(stats).nc1, nc1, oracle.STREAM_BOUND, "nc1")
    trace = residuals.square().sum() / len(features)
    oracle.assert_relative(stats.trace_within, trace, oracle.STREAM_BOUND, "trace")


def test_derived_statistics_against_the_truth():
    features, labels = oracle.clustered(5, 7, 103, 1.0, dtype=torch.float64)
    labels = torch.where(labels == 3, 0, labels)  # unbalanced, and class 3 is absent
    stats = streamed(features, labels, 6, batch=17)
    truth = oracle.two_pass(features, labels, 6)
    present = torch.tensor([True, True, True, False, True, False])
    assert torch.equal(stats.present, present)
    bound = 64 * EPS * features.abs().max()
    oracle.assert_within(stats.means[present], truth["means"], bound)
    assert stats.means[~present].isnan().all()
    assert stats.class_variances[~present].isnan().all()
    oracle.assert_within(stats.global_mean, features.mean(0), bound)
    largest = truth["within_covariance"].abs().max()
    oracle.assert_within(stats.within_covariance, truth["within_covariance"], 1e-13 * largest)
    centred = features - features.mean(0)
    total = centred.T @ centred / len(features)
    oracle.assert_within(stats.total_covariance, total, 1e-13 * total.abs().max())
    m = truth["means"] - features.mean(0)
    between = m.T @ m / 4
    oracle.assert_within(stats.between_covariance, between, 1e-13 * between.abs().max())
    assert stats.num_samples == 103


def test_absent_classes_are_no_mean_at_the_origin():
    stats = ncfast.ClassStatistics(3, 2).update(torch.full((2, 2), 5.0), torch.tensor([0, 2]))
    assert stats.means[1].isnan().all()
    assert torch.equal(stats.means[0], torch.full((2,), 5.0, dtype=torch.float64))


# One batch, batches of one row, a batch that divides N and one that does not.
@pytest.mark.parametrize("batch", [1, 10, 33, 1000])
def test_batch_size_does_not_matter(batch):
    features, labels = oracle.clustered(4, 6, 200, 0.3, offset=50.0, dtype=torch.float64)
    assert_same_statistics(streamed(features, labels, 4, batch), streamed(features, labels, 4, 200))


def test_batch_order_does_not_matter():
    features, labels = oracle.clustered(4, 6, 200, 0.3, offset=50.0, dtype=torch.float64)
    order = torch.randperm(200)
    assert_same_statistics(streamed(features, labels, 4, 20), streamed(features[order], labels[order], 4, 20))


@pytest.mark.parametrize("scatter", [True, False])
def test_merge_is_having_seen_it_all(scatter):
    features, labels = oracle.clustered(4, 6, 240, 0.3, offset=50.0, dtype=torch.float64)
    labels[:80] %= 2  # the first part lacks two classes
    labels[80:160] = 3  # the second holds one class only
    parts = [streamed(features[i : i + 80], labels[i : i + 80], 4, scatter=scatter) for i in (0, 80, 160)]
    whole = streamed(features, labels, 4, scatter=scatter)
    a, b, c = (copy.deepcopy(part) for part in parts)
    left = a.merge(b).merge(c)
    a, b, c = (copy.deepcopy(part) for part in parts)
    right = c.merge(b.merge(a))
    for merged in (left, right):
        if scatter:
            assert_same_statistics(merged, whole)
        assert torch.equal(merged.counts, whole.counts)
        oracle.assert_within(merged.means, whole.means, 64 * EPS * 60)
        oracle.assert_within(merged.trace_within, whole.trace_within, 1e-12 * whole.trace_within)


def test_merge_with_an_empty_state():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    stats, empty = streamed(features, labels, 3), ncfast.ClassStatistics(3, 4)
    before = bits(stats)
    assert bits(stats.merge(empty)) == before
    assert_same_statistics(empty.merge(stats), stats, 0.0)


def test_merge_with_itself_counts_every_sample_twice():
    stats = streamed(*oracle.clustered(3, 4, 30, 1.0), 3)
    once = copy.deepcopy(stats)
    stats.merge(stats)
    assert stats.num_samples == 60
    oracle.assert_within(stats.within_covariance, once.within_covariance, 1e-14)


def test_merge_far_apart_shifts():
    """A shift far from the mean costs digits of float64, and no more than rounding says."""
    features, labels = oracle.clustered(2, 3, 100, 1.0, dtype=torch.float64)
    far = ncfast.ClassStatistics(2, 3, shift=torch.full((2, 3), 1e6, dtype=torch.float64))
    merged = far.update(features[:50], labels[:50]).merge(streamed(features[50:], labels[50:], 2))
    whole = streamed(features, labels, 2)
    # Each entry of the sums is 1e12 per sample, rounded to EPS, 100 of them.
    oracle.assert_within(merged.within_covariance, whole.within_covariance, 100 * EPS * 1e12)


@pytest.mark.parametrize(
    "other",
    [ncfast.ClassStatistics(4, 4), ncfast.ClassStatistics(3, 5), ncfast.ClassStatistics(3, 4, scatter=False)],
)
def test_merge_refuses_what_does_not_fit(other):
    stats = streamed(*oracle.clustered(3, 4, 30, 1.0), 3)
    before = bits(stats)
    with pytest.raises(ValueError, match="cannot merge"):
        stats.merge(other)
    assert bits(stats) == before


def bad_batches():
    good = torch.randn(5, 4)
    labels = torch.tensor([0, 1, 2, 1, 0])
    nan, inf = good.clone(), good.clone()
    nan[3, 2], inf[0, 0] = torch.nan, -torch.inf
    yield "NaN", nan, labels, ValueError, "row 3"
    yield "infinity", inf, labels, ValueError, "row 0"
    yield "label too large", good, torch.tensor([0, 1, 3, 1, 0]), ValueError, "label 3 in row 2"
    yield "negative label", good, torch.tensor([0, -1, 2, 1, 0]), ValueError, "label -1 in row 1"
    yield "float labels", good, labels.float(), TypeError, "labels must be integers"
    yield "boolean labels", good, labels > 0, TypeError, "labels must be integers"
    yield "integer features", good.long(), labels, TypeError, "features must be float"
    yield "wrong width", good[:, :3], labels, ValueError, r"\[N, 4\]"
    yield "one dimension", good[0], labels, ValueError, r"\[N, p\]"
    yield "three dimensions", good[None], labels, ValueError, r"\[N, p\]"
    yield "no columns", good[:, :0], labels, ValueError, "p ≥ 1"
    yield "too few labels", good, labels[:4], ValueError, r"labels must have shape \[5\]"
    yield "one-hot labels", good, torch.eye(3)[labels].long(), ValueError, r"labels must have shape \[5\]"
    yield "another device", good.to("meta"), labels.to("meta"), ValueError, "meta"
    yield "labels elsewhere", good, labels.to("meta"), ValueError, "meta"
    yield "a list", good.tolist(), labels, TypeError, "torch.Tensor"


@pytest.mark.parametrize(
    ("features", "labels", "error", "words"),
    [c[1:] for c in bad_batches()],
    ids=[c[0] for c in bad_batches()],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["first batch", "later batch"])
def test_a_failed_update_leaves_the_state_bit_for_bit(features, labels, error, words, fresh):
    stats = ncfast.ClassStatistics(3, 4)
    if not fresh:
        stats.update(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))  # class 2 still has to choose its shift
    before = bits(stats)
    with pytest.raises(error, match=words):
        stats.update(features, labels)
    assert bits(stats) == before
    stats.update(torch.randn(3, 4), torch.tensor([0, 1, 2]))  # and it still works
    assert stats.num_samples == (3 if fresh else 7)


def test_overflowing_squares_are_an_error_and_float64_the_remedy():
    features = torch.tensor([[1e30, 0.0], [-1e30, 0.0], [1.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    with ncfast.use_backend("reference"):
        stats = ncfast.ClassStatistics(2, 2).update(features, labels)
    expected = float(features[0, 0]) ** 2
    oracle.assert_relative(stats.class_variances[0], expected, 4 * EPS)
    # A backend that squares in float32 must say so; float64 features then give the answer.
    try:
        stats = ncfast.ClassStatistics(2, 2).update(features, labels)
    except ValueError as error:
        assert "overflow" in str(error)  # noqa: PT017 (either outcome is right, a wrong number is not)
        stats = ncfast.ClassStatistics(2, 2).update(features.double(), labels)
    oracle.assert_relative(stats.class_variances[0], expected, 1e-6)


def test_skip_leaves_out_what_is_not_finite():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    bad = torch.randn(5, 4)
    bad[:, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan])
    mixed, mixed_labels = torch.cat([bad[:2], features, bad[2:]]), torch.cat([labels[:2], labels, labels[:3]])
    mixed_labels[-1] = -100  # ignored and NaN: not counted twice
    skipping = ncfast.ClassStatistics(3, 4, nonfinite="skip").update(mixed, mixed_labels)
    assert_same_statistics(skipping, streamed(features, labels, 3), 0.0)
    assert skipping.num_skipped == 4
    assert ncfast.collapse(skipping).num_skipped == 4


def test_ignored_rows_are_never_read():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    holes = torch.full((10, 4), torch.nan)
    mixed, mixed_labels = torch.cat([holes, features]), torch.cat([torch.full((10,), -100), labels])
    assert_same_statistics(streamed(mixed, mixed_labels, 3), streamed(features, labels, 3), 0.0)
    own = torch.where(mixed_labels == -100, 7, mixed_labels)
    assert_same_statistics(streamed(mixed, own, 3, ignore_index=7), streamed(features, labels, 3), 0.0)


def test_an_empty_batch_does_nothing():
    stats = streamed(*oracle.clustered(3, 4, 30, 1.0), 3)
    before = bits(stats)
    stats.update(torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    assert bits(stats) == before
    assert len(stats.accumulate(torch.empty(0, 4), torch.empty(0, dtype=torch.long))) == 0


def test_collapse_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        ncfast.collapse(ncfast.ClassStatistics(3, 4))


def test_mixed_dtypes_in_one_stream():
    """float32, then float64 whose first features float32 cannot hold, then bfloat16."""
    features, labels = oracle.clustered(4, 6, 90, 1e-6, offset=100.0, dtype=torch.float64)
    narrow = features[60:].to(torch.bfloat16)
    stats = ncfast.ClassStatistics(4, 6)
    stats.update(features[:30].float(), labels[:30] % 2).update(features[30:60], labels[30:60])
    stats.update(narrow, labels[60:])
    seen = torch.cat([features[:30].float().double(), features[30:60], narrow.double()])
    seen_labels = torch.cat([labels[:30] % 2, labels[30:]])
    truth = oracle.two_pass(seen, seen_labels, 4)
    oracle.assert_relative(stats.trace_within, truth["trace_within"], oracle.STREAM_BOUND)
    # The first batch is of two classes each, up to 20 from the shift, in float32.
    oracle.assert_within(stats.means, truth["means"], 20 * 2.0**-24)


def test_a_given_shift_is_kept_while_it_is_near():
    features, labels = oracle.clustered(3, 4, 60, 1.0, dtype=torch.float64)
    whole = streamed(features, labels, 3)
    near = (whole.means + 0.1).contiguous()
    stats = ncfast.ClassStatistics(3, 4, shift=near).update(features, labels)
    assert torch.equal(stats.shift, near)
    assert stats.shift is not near
    assert_same_statistics(stats, whole)
    far = ncfast.ClassStatistics(3, 4, shift=near + 1e3).update(features, labels)
    oracle.assert_within(far.shift, whole.means, 1e-9)  # moved to the means
    oracle.assert_within(far.within_covariance, whole.within_covariance, 60 * EPS * 1e6 * 4)


def test_a_given_shift_of_a_class_with_one_sample_is_kept_while_it_is_near():
    """One sample has no deviation to compare with; those of the other classes say what is near."""
    features, labels = oracle.clustered(3, 4, 60, 1.0, dtype=torch.float64)
    whole = streamed(features, labels, 3)
    variance = float(whole.trace_within) * 60 / (60 - 3)
    for squares, moved in ((0.98, False), (1.02, True)):
        stats = ncfast.ClassStatistics(4, 4, shift=torch.cat([whole.means, torch.zeros(1, 4)]))
        away = math.sqrt(squares * variance)  # in each of four directions: two deviations in all, almost
        lone = torch.full((1, 4), away, dtype=torch.float64)
        stats.update(torch.cat([features, lone]), torch.cat([labels, torch.tensor([3])]))
        assert torch.equal(stats.shift[3], lone[0] if moved else torch.zeros(4).double())
        assert torch.equal(stats.shift[:3], whole.means)
        oracle.assert_within(stats.means[3], lone[0], EPS * away)


def test_a_shift_far_from_a_lone_sample_leaves_no_doubt_about_others():
    """What float32 adds to its square, 78,400 of 4e12 here, is no deviation."""
    features, labels = oracle.clustered(3, 4, 60, 1.0)
    shift = torch.cat(
        [
            streamed(features, labels, 3).means.float(),
            torch.tensor([[1.1e6, 0.9e6, 1.3e6, 0.7e6], [20.0] * 4]),
        ]
    )
    lone = torch.cat([torch.full((1, 4), 0.1), torch.zeros(1, 4)])
    stats = ncfast.ClassStatistics(5, 4, shift=shift)
    stats.update(torch.cat([features, lone]), torch.cat([labels, torch.tensor([3, 4])]))
    oracle.assert_within(stats.shift[3:], lone, 1.3e6 * 2.0**-24)


def test_accumulate_returns_the_distance_to_the_shift():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    labels[4] = -100
    stats = ncfast.ClassStatistics(3, 4)
    radii = stats.accumulate(features, labels)
    assert radii[4].isnan()
    kept = labels != -100
    expected = (features.double() - stats.shift.double()[labels.clamp(min=0)]).norm(dim=1)[kept]
    # What measure() relies on: p squares of once rounded differences in float32.
    assert ((radii[kept].double() - expected).abs() <= (4 + 8) * 2.0**-24 * expected).all()


# ---- housekeeping ----


@pytest.mark.parametrize("scatter", [True, False])
def test_state_dict_round_trip(tmp_path, scatter):
    stats = streamed(*oracle.clustered(3, 4, 31, 1.0), 3, batch=7, scatter=scatter, nonfinite="skip")
    torch.save(stats.state_dict(), tmp_path / "state.pt")
    loaded = ncfast.ClassStatistics(3, 4, scatter=scatter)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert bits(loaded) == bits(stats)
    assert loaded.num_skipped == stats.num_skipped


def test_a_saved_state_does_not_change_afterwards():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    stats = streamed(features, labels, 3)
    saved, before = stats.state_dict(), bits(stats)
    stats.update(features, labels)
    restored = ncfast.ClassStatistics(3, 4)
    restored.load_state_dict(saved)
    restored.update(features, labels)
    stats.load_state_dict(saved)
    assert bits(stats) == before  # nor did the restored copy write through


def test_resuming_gives_the_same_bits():
    features, labels = oracle.clustered(3, 4, 100, 1.0, offset=10.0)
    whole = streamed(features, labels, 3, batch=10)
    first = streamed(features[:50], labels[:50], 3, batch=10)
    resumed = ncfast.ClassStatistics(3, 4)
    resumed.load_state_dict(first.state_dict())
    for h, y in zip(features[50:].split(10), labels[50:].split(10), strict=True):
        resumed.update(h, y)
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("sums"), "lacks sums"),
        (lambda s: s.update(format=99), "format 99"),
        (lambda s: s.update(counts=torch.zeros(4, dtype=torch.long)), "counts must have shape"),
        (lambda s: s.update(sumsq=s["sumsq"].float()), "sumsq must be torch.float64"),
        (lambda s: s.update(scatter=None), "scatter"),
        (lambda s: s.update(sums=[1, 2]), "sums must be a tensor"),
    ],
)
def test_a_foreign_state_is_refused(change, words):
    stats = streamed(*oracle.clustered(3, 4, 30, 1.0), 3)
    state, before = stats.state_dict(), bits(stats)
    change(state)
    with pytest.raises(ValueError, match=words):
        stats.load_state_dict(state)
    assert bits(stats) == before


def test_pickle_and_deepcopy():
    stats = streamed(*oracle.clustered(3, 4, 30, 1.0), 3)
    for copied in (pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)):
        assert bits(copied) == bits(stats)
        before = bits(stats)
        copied.update(torch.randn(2, 4), torch.tensor([0, 1]))
        assert bits(stats) == before
        assert bits(copied) != before


def test_to_moves_everything():
    stats = streamed(*oracle.clustered(3, 4, 30, 1.0), 3)
    assert stats.to("cpu") is stats
    moved = copy.deepcopy(stats).to("meta")
    assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}


def test_repr_says_what_it_holds():
    assert repr(streamed(*oracle.clustered(3, 4, 30, 1.0), 3)) == (
        "ClassStatistics(num_classes=3, dim=4, num_samples=30, scatter=True, device='cpu')"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"dim": 0},
        {"precision": "exact"},
        {"nonfinite": "ignore"},
        {"shift": torch.zeros(3, 3)},
        {"shift": torch.zeros(3, 4, dtype=torch.long)},
    ],
)
def test_constructor_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ncfast.ClassStatistics(**{"num_classes": 3, "dim": 4} | options)


# ---- complaints that wait, as on a GPU ----


class Deferred(ncfast.ClassStatistics):
    """Treats the CPU as a device with which one does not synchronise."""

    _defers = True


def test_deferred_complaints_leave_the_rows_out_and_raise_at_the_next_look():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    mixed, mixed_labels = (
        torch.cat([torch.randn(3, 4), features]),
        torch.cat([torch.tensor([0, 7, -1]), labels]),
    )
    mixed[0, 0] = torch.nan
    stats = Deferred(3, 4).update(mixed, mixed_labels)
    for look in ("means", "present", "within_covariance", "num_samples"):
        with pytest.raises(ValueError, match="3 rows were left out"):
            getattr(stats, look)
    with pytest.raises(ValueError, match="3 rows were left out"):
        stats.state_dict()
    assert torch.equal(stats.counts, streamed(features, labels, 3).counts)


def test_deferring_does_not_change_the_numbers():
    features, labels = oracle.clustered(3, 4, 30, 1.0)
    stats, at_once = Deferred(3, 4), ncfast.ClassStatistics(3, 4)
    for h, y in zip(features.split(7), labels.split(7), strict=True):
        stats.update(h, y)
        assert at_once.update(h, y).num_samples  # read, so that no rows wait, as none do on a GPU
    assert bits(stats) == bits(at_once)


# ---- small batches wait for each other ----


def waiting(stats):
    residuals = stats.state_dict()["waiting_residuals"]
    return 0 if residuals is None else len(residuals)


def small_batches(seed=0):
    """Twenty batches of 1 to 256 rows, 2,600 in all, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 256, 255, 2, *torch.randint(1, 256, (16,), generator=generator).tolist()]
    features, labels = oracle.clustered(7, 33, sum(sizes), 0.3)
    labels[torch.rand(len(labels), generator=generator) < 0.1] = -100
    return list(zip(features.split(sizes), labels.split(sizes), strict=True))


def assert_all_seen(stats, batches, bound=1e-5):
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    used = labels >= 0
    truth = oracle.two_pass(features[used], labels[used], stats.num_classes)
    assert torch.equal(stats.counts, torch.bincount(labels[used], minlength=stats.num_classes))
    oracle.assert_within(stats.means, truth["means"], bound * features[used].abs().max(), "means")
    largest = truth["within_covariance"].abs().max()
    oracle.assert_within(stats.within_covariance, truth["within_covariance"], bound * largest, "covariance")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_small_batches_add_up(dtype, backend):
    batches = [(h.to(dtype), y) for h, y in small_batches()]
    stats, most = ncfast.ClassStatistics(7, 33, precision="highest"), 0
    with ncfast.use_backend(backend) if backend else contextlib.nullcontext():
        for batch in batches:
            stats.update(*batch)
            most = max(most, waiting(stats))
        assert_all_seen(stats, batches)
    if backend == "reference":
        assert most == 0
    else:
        assert 512 < most < 1024  # rows do wait, and then no longer
    assert waiting(stats) == 0


def test_rows_of_several_dtypes_wait_together():
    """Their residuals do, which are float32 for all but float64 features."""
    batches = small_batches()
    for i, dtype in enumerate([torch.bfloat16, torch.float16]):
        batches[1 + i :: 3] = [(h.to(dtype), y) for h, y in batches[1 + i :: 3]]
    stats, most = ncfast.ClassStatistics(7, 33, precision="highest"), 0
    for batch in batches:
        stats.update(*batch)
        most = max(most, waiting(stats))
    assert_all_seen(stats, [(h.float(), y) for h, y in batches])
    assert 512 < most < 1024


def test_rows_that_wait_are_copies():
    batches = small_batches()
    stats = ncfast.ClassStatistics(7, 33, precision="highest")
    for h, y in batches:
        reused, labels = h.clone(), y.clone()
        stats.update(reused, labels)
        reused.fill_(torch.nan)
        labels.fill_(6)
    assert_all_seen(stats, batches)


def test_reading_at_any_time():
    batches = small_batches()
    stats = ncfast.ClassStatistics(7, 33, precision="highest")
    reads = ("counts", "sums", "sumsq", "scatter", "means", "within_covariance", "num_samples", "present")
    for i, batch in enumerate(batches):
        stats.update(*batch)
        getattr(stats, reads[i % len(reads)])
        assert waiting(stats) == 0
    assert_all_seen(stats, batches)


def test_larger_batches_wide_ones_and_distances_in_between():
    batches = small_batches()
    features, labels = oracle.clustered(7, 33, 400, 0.3)
    stats = ncfast.ClassStatistics(7, 33, precision="highest")
    for i, batch in enumerate(batches):
        stats.update(*batch)
        if i == 8:
            stats.update(features, labels)
        if i == 10:
            assert stats.accumulate(features[:5], labels[:5]).isfinite().all()
        if i == 12:
            batches[13] = (batches[13][0].to(torch.bfloat16).float(), batches[13][1])
            batches[13][0].requires_grad_()
        if i == 14:
            stats.update(features[:9].double(), labels[:9])  # all later rows are widened
    seen = [*batches, (features, labels), (features[:5], labels[:5]), (features[:9], labels[:9])]
    assert_all_seen(stats, [(h.detach(), y) for h, y in seen])


@pytest.mark.parametrize(
    "leave", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: s.to("cpu")]
)
def test_copies_take_the_waiting_rows_along(leave):
    batches = small_batches()
    stats = ncfast.ClassStatistics(7, 33, precision="highest")
    for batch in batches[:-1]:
        stats.update(*batch)
    assert waiting(stats) > 0
    assert_all_seen(leave(stats).update(*batches[-1]), batches)


def test_merging_states_whose_rows_wait():
    batches = small_batches()
    one, other = (ncfast.ClassStatistics(7, 33, precision="highest") for _ in range(2))
    for i, batch in enumerate(batches):
        (one if i < 9 else other).update(*batch)
    assert waiting(one) > 0
    assert waiting(other) > 0
    assert_all_seen(one.merge(other), batches)


def test_a_refused_batch_leaves_the_waiting_rows():
    batches = small_batches()
    stats = ncfast.ClassStatistics(7, 33, precision="highest")
    for h, y in batches:
        before = copy.deepcopy(stats.state_dict())
        wrong = h.clone()
        wrong[-1, -1] = torch.inf
        with pytest.raises(ValueError, match=f"infinity in row {len(h) - 1}"):
            stats.update(wrong, y.clamp(min=0))
        with pytest.raises(ValueError, match=f"label 7 in row {len(h) - 1}"):
            stats.update(h, torch.where(torch.arange(len(y)) == len(y) - 1, 7, y.clamp(min=0)))
        after = stats.state_dict()
        for name, value in before.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            bits_of = (lambda v: v.nan_to_num()) if name == "shift" else lambda v: v
            assert same(bits_of(after[name]), bits_of(value)), name
        stats.update(h, y)
    assert_all_seen(stats, batches)


@pytest.mark.parametrize("at", [1, 7, 13, 19])
def test_resuming_while_rows_wait_gives_the_same_bits(at, tmp_path):
    batches = small_batches()
    batches[0][0][:] += 50.0  # an outlier for a first feature: the shift moves, when it would have moved
    whole, first = (ncfast.ClassStatistics(7, 33) for _ in range(2))
    for i, batch in enumerate(batches):
        whole.update(*batch)
        if i < at:
            first.update(*batch)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = ncfast.ClassStatistics(7, 33)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[at:]:
        resumed.update(*batch)
    assert waiting(resumed) == waiting(whole)
    assert bits(resumed) == bits(whole)


def test_a_refused_batch_does_not_have_full_rows_added():
    """Neither the last one before they are added, nor one that could not wait with them."""
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    stats = ncfast.ClassStatistics(7, 33)
    while waiting(stats) < 900:  # shifts are looked at ever more rarely
        stats.update(features, labels)
    wrong = torch.where(torch.arange(200) == 199, 7, labels)
    for h in (features, features.bfloat16(), features.repeat(2, 1)):
        before = waiting(stats)
        with pytest.raises(ValueError, match="label 7 in row"):
            stats.update(h, wrong.repeat(len(h) // 200))
        assert waiting(stats) == before
    seen = int(stats._counts.sum()) + waiting(stats)
    stats.update(features, labels)
    assert waiting(stats) == 0
    assert stats.num_samples == seen + 200


def test_a_shift_stays_while_rows_wait_about_it():
    """A large batch far from it, with a new class: it moves shifts that no other rows are about."""
    ours, at_once = (ncfast.ClassStatistics(3, 8, precision="highest") for _ in range(2))
    features, _ = oracle.clustered(1, 8, 4000, 0.1)
    labels = 1 + torch.arange(4000) % 2
    for stats in (ours, at_once):
        for _ in range(3):
            stats.update(features[:50], torch.zeros(50, dtype=torch.int64))
        stats.update(torch.full((2, 8), 1e3), torch.ones(2, dtype=torch.int64))
        if stats is at_once:
            assert stats.num_samples == 152
        else:
            assert waiting(stats) > 0
    assert torch.equal(ours.accumulate(features, labels), at_once.accumulate(features, labels))
    assert torch.equal(ours.shift, at_once.shift)
    assert_same_statistics(ours, at_once, 1e-6)


def test_threads_that_update_lose_nothing():
    """From the first batches on, of which some begin to wait, while others read."""
    features, labels = oracle.clustered(7, 96, 64 * 60 // 7 + 1, 0.3)
    batches = list(zip(features[: 64 * 60].split(64), labels[: 64 * 60].split(64), strict=True))
    whole = ncfast.ClassStatistics(7, 96, precision="highest").update(features[: 64 * 60], labels[: 64 * 60])
    for _ in range(30):
        stats, done = ncfast.ClassStatistics(7, 96, precision="highest"), threading.Event()

        def read(stats=stats, done=done):
            while not done.is_set():
                assert stats.scatter is not None

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            reader = pool.submit(read)
            writers = [
                pool.submit(lambda part=part, stats=stats: [stats.update(*b) for b in part])
                for part in (batches[::3], batches[1::3], batches[2::3])
            ]
            try:
                for writer in writers:
                    writer.result()
            finally:
                done.set()
            reader.result()
        assert_same_statistics(stats, whole, 1e-5)
        assert torch.equal(stats.scatter, stats.scatter.T)


def test_threads_that_read_add_waiting_rows_once():
    features, labels = oracle.clustered(7, 512, 200, 0.3)
    stats = ncfast.ClassStatistics(7, 512).update(features, labels).update(features, labels)
    assert waiting(stats) == 0
    stats.update(features, labels)
    done = threading.Event()

    def watch():
        while not done.is_set():
            assert stats.num_samples <= 60_000
            assert stats.scatter is not None
            saved = ncfast.ClassStatistics(7, 512)
            saved.load_state_dict(stats.state_dict())
            assert saved.num_samples <= 60_000
            oracle.assert_relative(saved.scatter.trace(), saved.sumsq.sum(), 1e-5)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        watchers = [pool.submit(watch) for _ in range(2)]
        try:
            for _ in range(297):
                stats.update(features, labels)
        finally:
            done.set()
        for watcher in watchers:
            watcher.result()
    assert stats.num_samples == 60_000
    whole = ncfast.ClassStatistics(7, 512).update(features.repeat(300, 1), labels.repeat(300))
    oracle.assert_within(
        stats.within_covariance, whole.within_covariance, 1e-4 * whole.within_covariance.abs().max()
    )


def test_float32_rows_wait_while_the_shift_becomes_float64(tmp_path):
    batches = small_batches()[:6]
    features, labels = oracle.clustered(7, 33, 60, 0.3)
    stats = ncfast.ClassStatistics(7, 33, precision="highest")
    for batch in batches:
        stats.update(*batch)
    stats.update(features.double(), labels)
    assert waiting(stats) > 0
    torch.save(stats.state_dict(), tmp_path / "state.pt")
    resumed = ncfast.ClassStatistics(7, 33, precision="highest")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (stats, resumed):
        state = one.state_dict()
        assert (state["waiting_residuals"].dtype, state["shift"].dtype) == (torch.float32, torch.float64)
        one.update(features, labels)  # not with those
        assert_all_seen(one, [*batches, (features, labels), (features, labels)])
        one.update(features, labels)
        assert one.state_dict()["waiting_residuals"].dtype == torch.float64
    assert bits(resumed) == bits(stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 8, 9, 15, 16, 17, 512])
def test_rows_wait_in_an_odd_number_of_whole_cache_lines(p, dtype):
    """Kernels write whole vectors."""
    row = WaitingRows(torch.empty(1, p, dtype=dtype)).residuals.stride(0) * dtype.itemsize
    assert row % 128 == 64
    assert 0 <= row - p * dtype.itemsize < 128


def test_rows_that_find_no_room_do_not_wait():
    """As when several threads add to one state: nobody's memory is written to."""
    pytest.importorskip("ncfast._cpu")
    features, labels = oracle.clustered(7, 33, 180, 0.3)
    rows = WaitingRows.of(torch.zeros(1100, 33), torch.zeros(1100, dtype=torch.int64))
    shift = torch.zeros(7, 33)
    for there_is_room in (True, False):
        assert admit(rows, features, labels, shift) is there_is_room
        assert len(rows) == 1280


def test_a_signal_handler_reads_a_number_while_the_state_is_saved(monkeypatch):
    """The rows that waited are then not in the state twice."""
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    stats = ncfast.ClassStatistics(7, 33, precision="highest").update(features, labels)
    stats._rows_then = 10_000
    stats.update(features, labels)
    assert waiting(stats) > 0
    tensors = ncfast.ClassStatistics._tensors

    def interrupted(self):
        assert self.num_samples == 400
        return tensors(self)

    monkeypatch.setattr(ncfast.ClassStatistics, "_tensors", interrupted)
    state = stats.state_dict()
    monkeypatch.undo()
    saved = ncfast.ClassStatistics(7, 33)
    saved.load_state_dict(state)
    assert saved.num_samples == 400


def lines_of(code):
    return sorted({line for _, _, line in code.co_lines() if line} - {code.co_firstlineno})


@contextlib.contextmanager
def handled(is_meant, handle):
    """Call handle(line) before every line of code that is meant, as a signal's handler is called."""

    def trace(frame, event, _):
        if not is_meant(frame.f_code):
            return None
        if event == "line":
            sys.settrace(None)
            handle(frame.f_lineno)
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def handled_at(code, line, handle):
    return handled(lambda running: running is code, lambda now: handle() if now == line else None)


def interrupt():
    raise KeyboardInterrupt


def test_a_signal_while_waiting_rows_are_added(monkeypatch):
    """It is handled when the kernel has returned: the rows are then in the sums, and no longer wait."""
    cpu = pytest.importorskip("ncfast._cpu")
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    stats, truth = (ncfast.ClassStatistics(7, 33) for _ in range(2))
    for _ in range(5):
        stats.update(features, labels)
        assert truth.update(features, labels).num_samples
    assert waiting(stats) > 0
    run = cpu.class_scatter

    def interrupted(*arguments, **options):
        run(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "class_scatter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stats.num_samples  # noqa: B018 (reading it adds the rows)
    monkeypatch.undo()
    assert stats.num_samples == 1000
    assert_same_statistics(stats, truth, 1e-6)


def test_a_signal_before_enough_rows_are_added(monkeypatch):
    """They still wait, and there is room for no other batch until they are added."""
    pytest.importorskip("ncfast._cpu")
    features, labels = oracle.clustered(7, 33, 256, 0.3)
    stats = ncfast.ClassStatistics(7, 33).update(*oracle.clustered(7, 33, 3000, 0.3))

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ncfast.ClassStatistics, "_add_waiting", interrupted)
    for _ in range(3):
        stats.update(features, labels)
    with pytest.raises(KeyboardInterrupt):
        stats.update(features, labels)
    monkeypatch.undo()
    assert waiting(stats) == 1024
    resumed = ncfast.ClassStatistics(7, 33)
    resumed.load_state_dict(stats.state_dict())
    for one in (stats, resumed):
        for _ in range(3):
            one.update(features, labels)
        assert one.num_samples == 3000 + 7 * 256


def test_a_signal_handler_reads_the_state():
    """At whatever line of an update in C++, as one that saves a checkpoint does before it returns."""
    pytest.importorskip("ncfast._cpu")
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    codes = [ncfast.ClassStatistics._add_now.__code__, accumulate.__code__, accumulate_waiting.__code__]
    for rows_wait in (True, False):
        truth = ncfast.ClassStatistics(7, 33).update(features.repeat(3, 1), labels.repeat(3))
        for code in codes[2:] if rows_wait else codes[:2]:
            for line in lines_of(code):
                stats = ncfast.ClassStatistics(7, 33).update(features, labels).update(features, labels)
                stats._rows_may_wait = rows_wait
                stats._rows_then = 10_000

                def read(stats=stats):
                    assert stats.scatter is not None

                with handled_at(code, line, read):
                    stats.update(features, labels)
                    assert stats.num_samples == 600
                assert torch.equal(stats.scatter, stats.scatter.T)
                assert_same_statistics(stats, truth, 1e-5)


@pytest.mark.parametrize("rows_wait", [True, False])
def test_a_signal_while_results_are_added(rows_wait):
    """At whatever line of Python it is handled, all of a batch is in the sums or nothing."""
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    code = accumulate_by_adding.__code__
    outcomes = []

    def run(interrupted):
        stats = ncfast.ClassStatistics(7, 33).update(features, labels)
        if rows_wait:
            stats._waiting = WaitingRows.of(features, labels)

        try:
            with handled_at(code, interrupted, interrupt):
                stats._add_waiting() if rows_wait else stats.update(features, labels)
        finally:
            outcomes.append((int(stats._counts.sum()), waiting(stats), float(stats._scatter.sum())))

    with ncfast.use_backend("reference"):
        run(None)
        for line in lines_of(code):
            with contextlib.suppress(KeyboardInterrupt):
                run(line)
    added, others = outcomes[0], set(outcomes) - {outcomes[0]}
    assert added[:2] == (400, 0)
    assert [other[:2] for other in others] == [(200, 200 if rows_wait else 0)]
    assert sum(outcome in others for outcome in outcomes) > 10


@pytest.mark.parametrize(
    ("before", "dtype"),
    [(0, torch.float64), (2, torch.float64), (2, torch.float32), (5, torch.float32)],
    ids=["first, wide", "wide", "waits", "added with those that wait"],
)
def test_an_interrupted_update_is_all_or_nothing(before, dtype):
    """At whatever line of ncfast's Python: the shifts are there, too, and the scatter can be read."""
    features, labels = oracle.clustered(4, 33, 200, 0.5)
    batches = [(features, labels)] * before + [(features.to(dtype), labels)]
    home = str(Path(ncfast.__file__).parent)

    def update(interrupted):
        """Return the state after all batches, and how many lines the last one took."""
        stats = ncfast.ClassStatistics(4, 33, precision="highest")
        stats._rows_then = 10**9  # shifts stay, and rows wait
        for batch in batches[:before]:
            stats.update(*batch)
        lines = 0

        def count(_):
            nonlocal lines
            lines += 1
            if lines == interrupted:
                interrupt()

        try:
            with handled(lambda code: code.co_filename.startswith(home), count):
                stats.update(*batches[-1])
        finally:
            seen.append(stats)
        return lines

    seen = []
    update(None)  # which loads modules
    lines = update(None)
    assert lines > 50
    for line in range(1, lines + 1):
        with pytest.raises(KeyboardInterrupt):
            update(line)
    assert {stats.num_samples for stats in seen} == {200 * before, 200 * before + 200}
    for stats in seen:
        if stats.num_samples:
            assert_all_seen(stats, batches[: stats.num_samples // 200])


def test_waiting_rows_are_added_by_who_admitted_them():
    """Whatever backend is forced meanwhile: reading a number runs nowhere else, and cannot fail."""
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    stats = ncfast.ClassStatistics(7, 33)
    for _ in range(5):
        stats.update(features, labels)
    assert waiting(stats) > 0
    with ncfast.use_backend("cuda"):
        assert stats.num_samples == 1000


def test_rows_that_wait_since_inference_mode():
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    with torch.inference_mode():
        stats = ncfast.ClassStatistics(7, 33)
        for _ in range(5):
            stats.update(features, labels)
    state = stats.state_dict()
    with ncfast.use_backend("reference"):  # which adds with PyTorch's operators
        stats.load_state_dict(state)
        assert stats.num_samples == 1000
    assert len(state["waiting_residuals"]) > 0
    assert len(pickle.dumps(stats)) < len(pickle.dumps(state))  # nothing of the buffer but the rows that wait


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_inference_mode_between_batches(nonfinite, backend):
    """Rows join those that wait, and are added, whatever the state's tensors were made in."""
    if backend == "cpu":
        pytest.importorskip("ncfast._cpu")
    features, labels = oracle.clustered(7, 33, 1500, 0.3)
    with torch.inference_mode():
        stats = ncfast.ClassStatistics(7, 33, nonfinite=nonfinite)
    with ncfast.use_backend(backend):
        for i, (h, y) in enumerate(zip(features.split(100), labels.split(100), strict=True)):
            with torch.inference_mode(i % 3 == 0):
                stats.update(h, y)
    assert (stats.num_samples, stats.num_skipped) == (1500, 0)


def test_sums_are_not_for_assignment():
    """Kernels write to their addresses: another dtype or stride would be another's memory."""
    stats = ncfast.ClassStatistics(7, 33)
    for name in STATE:
        with pytest.raises(AttributeError):
            setattr(stats, name, getattr(stats, name))


def test_an_interrupted_load_leaves_the_old_state_or_the_new_one():
    features, labels = oracle.clustered(7, 33, 200, 0.3)
    old = ncfast.ClassStatistics(7, 33).update(features, labels)
    new = ncfast.ClassStatistics(7, 33)
    for batch in small_batches():
        new.update(*batch)
    assert waiting(new) > 0
    state, code = new.state_dict(), ncfast.ClassStatistics.load_state_dict.__code__
    outcomes = {str(bits(old)), str(bits(new))}
    seen = set()
    for line in lines_of(code):
        stats = copy.deepcopy(old)
        with contextlib.suppress(KeyboardInterrupt), handled_at(code, line, interrupt):
            stats.load_state_dict(state)
        seen.add(str(bits(stats)))
    assert seen == outcomes


def test_rows_that_cannot_be_waiting_are_refused():
    batches = small_batches()
    stats = ncfast.ClassStatistics(7, 33)
    for batch in batches:
        stats.update(*batch)
    state = stats.state_dict()
    residuals, labels = state["waiting_residuals"], state["waiting_labels"]
    assert len(residuals) > 1
    unseen = state["shift"].clone()
    unseen[labels[0]] = torch.nan
    nan = residuals.clone()
    nan[1, 2] = torch.nan
    changes = [
        ({"waiting_residuals": None}, "two tensors or None"),
        ({"waiting_labels": labels.tolist()}, "two tensors or None"),
        ({"waiting_residuals": residuals[:, 1:]}, r"shapes \[R, 33\] and \[R\]"),
        ({"waiting_labels": labels[1:]}, r"shapes \[R, 33\] and \[R\]"),
        ({"waiting_residuals": residuals[0, 0]}, r"shapes \[R, 33\] and \[R\]"),
        (
            {"waiting_residuals": residuals[:1].repeat(1281, 1), "waiting_labels": labels[:1].repeat(1281)},
            "R ≤ 1280",
        ),
        ({"waiting_residuals": residuals.double()}, "torch.float64 with labels of torch.int64 wait about"),
        ({"waiting_residuals": residuals.long()}, "no rows of torch.int64"),
        ({"waiting_labels": labels.int()}, "labels of torch.int32"),
        ({"waiting_labels": labels + 7}, "no samples can leave"),
        ({"waiting_labels": labels - 7}, "no samples can leave"),
        ({"waiting_residuals": nan}, "no samples can leave"),
        ({"waiting_residuals": residuals * 1e37}, "no samples can leave"),
        ({"waiting_residuals": residuals.to_sparse()}, "two tensors or None"),
        ({"shift": unseen, "counts": torch.zeros_like(state["counts"])}, "has no shift"),
        ({"recentring": [1]}, "recentring must be two counts"),
        ({"recentring": [1, -1]}, "recentring must be two counts"),
        ({"recentring": None}, "recentring must be two counts"),
    ]
    with pytest.raises(ValueError, match="no rows wait where the scatter is not kept"):
        ncfast.ClassStatistics(7, 33, scatter=False).load_state_dict(state | {"scatter": None})
    other = ncfast.ClassStatistics(7, 33)
    for change, words in changes:
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state | change)
        assert other.num_samples == 0
    other.load_state_dict(state)
    assert bits(other) == bits(stats)


# ---- shifts that are not near their class ----


@pytest.mark.parametrize("batch", [64, 512, 200_000])
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-6])
def test_a_mislabelled_first_sample_costs_no_digits(batch, spread):
    """The first feature of every class belongs to another: the shift must not stay there."""
    features, labels = oracle.clustered(2, 16, 200_000, spread)
    features[:2] = features[:2].flip(0)
    stats = streamed(features, labels, 2, batch=batch)
    truth = oracle.two_pass(features, labels, 2)
    oracle.assert_relative(stats.trace_within, truth["trace_within"], oracle.STREAM_BOUND, "trace")
    # The stray samples make up nearly all of NC1: each is a single product of precision "high".
    oracle.assert_relative(ncfast.collapse(stats).nc1, truth["nc1"], oracle.HIGH, "nc1")
    # They were 10 or more from the means; a batch's own mean is nearer by its count.
    assert ((stats.shift.double() - truth["means"]).norm(dim=1) <= 1.0).all()


def test_shifts_and_states_of_any_strides():
    features, labels = oracle.clustered(5, 8, 10, 1.0)
    shift = torch.randn(8, 5).T
    ours = ncfast.ClassStatistics(5, 8, shift=shift).update(features, labels).update(features, labels)
    theirs = ncfast.ClassStatistics(5, 8, shift=shift.contiguous())
    theirs.update(features, labels).update(features, labels)
    assert torch.equal(ours.means, theirs.means)
    state = theirs.state_dict()
    for name in ("shift", "sums", "scatter"):
        state[name] = state[name].T.contiguous().T
    resumed = ncfast.ClassStatistics(5, 8)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.update(features, labels).means, theirs.update(features, labels).means)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_inference_mode_may_come_and_go(backend):
    """A state made, moved to better shifts or merged in inference mode goes on outside of it, and back."""
    features, labels = oracle.clustered(3, 4, 60, 0.5)
    far = torch.full((1, 4), 1e3), torch.zeros(1, dtype=torch.int64)  # an outlier: the shift moves later
    truth = ncfast.ClassStatistics(3, 4).update(*far)
    for _ in range(4):
        truth.update(features, labels)
    for inside in (True, False):
        with ncfast.use_backend(backend) if backend else contextlib.nullcontext():
            with torch.inference_mode(inside):
                stats = ncfast.ClassStatistics(3, 4).update(*far).update(features, labels)
                other = copy.deepcopy(ncfast.ClassStatistics(3, 4).update(features, labels))
            with torch.inference_mode(not inside):
                stats.merge(other)
                stats.update(features, labels)
                state = stats.state_dict()
            stats.load_state_dict(state)
            stats.accumulate(features, labels)
        assert_same_statistics(stats, truth, 1e-5)  # float32 sums of squares, precision high


def test_merge_into_a_state_whose_shift_was_given():
    """And is far from what the other one has seen, which sits 10^11 times its spread from it."""
    generator = torch.Generator().manual_seed(0)
    means = 1e6 + torch.randn(4, 8, dtype=torch.float64, generator=generator)
    labels = torch.arange(400) % 4
    features = means[labels] + 1e-5 * torch.randn(400, 8, dtype=torch.float64, generator=generator)
    seen = ncfast.ClassStatistics(4, 8).update(features, labels)
    given = ncfast.ClassStatistics(4, 8, shift=torch.zeros(4, 8)).merge(seen)
    oracle.assert_relative(given.trace_within, seen.trace_within, 1e-12)
    assert torch.equal(given.counts, seen.counts)
    # A class that neither has seen keeps the shift that was given.
    some = ncfast.ClassStatistics(4, 8).update(features[labels < 3], labels[labels < 3])
    shift = ncfast.ClassStatistics(4, 8, shift=torch.ones(4, 8)).merge(some).shift
    assert torch.equal(shift[:3], some.shift[:3])
    assert torch.equal(shift[3], torch.ones(8, dtype=shift.dtype))
