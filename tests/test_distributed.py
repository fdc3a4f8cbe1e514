"""ClassStatistics.all_reduce over gloo: held to merge in one process, and to one process that saw it all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, statistics

import ncfast

WORKER = Path(__file__).with_name("distributed_worker.py")


def loaded(path, case):
    stats = ncfast.ClassStatistics(case.C, case.p, scatter=case.scatter)
    stats.load_state_dict(torch.load(path, weights_only=True))
    return stats


def merged(case, ranks):
    total = statistics(case, [ranks[0]])
    for rank in ranks[1:]:
        total.merge(statistics(case, [rank]))
    return total


def assert_agree(ours, theirs, bound):
    """Counts exactly; everything else to `bound` of its own scale."""
    assert torch.equal(ours.counts, theirs.counts)
    assert ours.num_skipped == theirs.num_skipped
    seen = ours.present
    assert torch.equal(seen, theirs.present)
    if not seen.any():
        return
    means, other = ours.means[seen], theirs.means[seen]
    assert (means - other).abs().max() <= bound * other.abs().max()
    assert (ours.trace_within - theirs.trace_within).abs() <= bound * theirs.trace_within
    variances, other = ours.class_variances[seen], theirs.class_variances[seen]
    assert (variances - other).abs().max() <= bound * other.max()
    if ours.scatter is not None:
        within, other = ours.within_covariance, theirs.within_covariance
        assert (within - other).norm() <= bound * other.norm()
        if seen.sum() > 1:
            nc1, other = ncfast.collapse(ours).nc1, ncfast.collapse(theirs).nc1
            assert abs(nc1 - other) <= max(bound, 1e-10) * other  # Σ_B† multiplies by its condition number


@pytest.fixture(scope="module", params=[1, 2, 4])
def run(request, tmp_path_factory):
    """The folder of results of so many ranks."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={request.param}", str(WORKER), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, folder


@pytest.mark.parametrize("name", CASES)
def test_all_reduce_is_merge(run, name):
    ranks, folder = run
    case = CASES[name]
    expected, single = merged(case, list(range(ranks))), statistics(case, list(range(ranks)))
    results = [loaded(folder / f"{name} {rank}.pt", case) for rank in range(ranks)]
    assert_agree(results[0], expected, 1e-12)
    assert_agree(results[0], single, 1e-6)
    for other in results[1:]:  # the same bits everywhere, but for the shifts of classes that nobody saw
        for entry in ("counts", "sums", "sumsq", "scatter"):
            ours, theirs = getattr(results[0], entry), getattr(other, entry)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        assert torch.equal(results[0].shift[other.present], other.shift[other.present])


def test_all_reduce_keeps_float32_shifts(run):
    """A float64 shift would make every later float32 batch be widened."""
    ranks, folder = run
    for name, case in CASES.items():
        result = loaded(folder / f"{name} 0.pt", case)
        wide = case.dtype in (torch.float64, torch.bfloat16)  # "mixed dtypes" has a float64 batch on rank 0
        assert result.shift.dtype == (torch.float64 if wide else torch.float32), (name, ranks)


def test_all_reduce_within_a_group(run):
    ranks, folder = run
    case = CASES["uneven"]
    expected = merged(case, [0] if ranks == 1 else [0, ranks - 1])
    for rank in {0, ranks - 1}:
        assert_agree(loaded(folder / f"pair {rank}.pt", case), expected, 1e-12)


def test_tracker_of_a_ddp_model_reports_on_all_ranks(run):
    """The same history on every rank: that of all features that entered any rank's head."""
    ranks, folder = run
    runs = [torch.load(folder / f"tracked {rank}.pt", weights_only=True) for rank in range(ranks)]
    assert all(other["history"] == runs[0]["history"] for other in runs)
    features = torch.cat([other["features"] for other in runs])
    labels = (torch.arange(30) % 3).repeat(3 * ranks)
    stats = ncfast.ClassStatistics(3, 8).update(features, labels)
    expected = ncfast.collapse(stats, runs[0]["weight"])
    record = runs[0]["history"][1]
    assert (record["epoch"], record["terminal_phase"], record["num_samples"]) == (2, True, 90 * ranks)
    for name in ("nc1", "nc2_equinorm_means", "nc3_self_duality", "trace_within"):
        assert record[name] == pytest.approx(getattr(expected, name), rel=1e-11)  # float64 throughout


@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_a_lost_rank_is_an_error_not_a_hang(tmp_path, how):
    """A process that dies closes its connections; one that stalls runs into the 5 s time-out of the group."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), how],
            env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, _ = ranks[0].communicate(timeout=60)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 0
    assert out.startswith("error:"), out


def test_all_reduce_needs_a_process_group():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        ncfast.ClassStatistics(2, 3).all_reduce()


def test_a_model_sharded_by_fully_shard():
    """Its head's weight is a DTensor."""
    command = [sys.executable, str(WORKER.with_name("sharded_worker.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "as without\n"
