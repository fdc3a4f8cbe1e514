"""One rank of tests/test_distributed.py, `torchrun distributed_worker.py FOLDER`; and its data."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import leave

import ncfast


class Case(NamedTuple):
    C: int
    p: int
    rows: tuple[int, ...]  # samples of rank 0, 1, …; the last entry also of every further rank
    classes: str = "all"  # "all", or "own": rank r sees the classes c with c % 4 == r only
    dtype: torch.dtype = torch.float32
    offset: float = 0.0
    spread: float = 1.0  # within-class standard deviation beside means of norm about √p
    shift: str = "first"  # "first" feature seen; "given": a shift per rank, one standard deviation off
    scatter: bool = True
    nonfinite: int = 0  # rows with a NaN, to be skipped, on every rank


CASES = {
    "large": Case(C=1000, p=512, rows=(1500, 2500)),
    "uneven": Case(C=7, p=33, rows=(1, 1000, 17, 300)),
    "empty rank": Case(C=5, p=8, rows=(0, 200, 100)),
    "no samples at all": Case(C=3, p=4, rows=(0,)),
    "own classes": Case(C=8, p=16, rows=(100,), classes="own"),  # at 1 and 2 ranks some classes stay absent
    "far": Case(C=10, p=64, rows=(400, 600), offset=100.0, spread=1e-3),
    "far float64": Case(C=10, p=64, rows=(400, 600), offset=1e6, spread=1e-3, dtype=torch.float64),
    "mixed dtypes": Case(C=4, p=5, rows=(50,), dtype=torch.bfloat16),  # rank 0 adds a float64 batch
    "given shifts": Case(C=6, p=10, rows=(80,), shift="given", offset=10.0),
    "no scatter": Case(C=6, p=10, rows=(80, 40), scatter=False),
    "skipped": Case(C=3, p=6, rows=(30, 50), nonfinite=2),
}


def batches(case: Case, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What one rank sees."""
    shared = torch.Generator().manual_seed(0)
    means = torch.randn(case.C, case.p, generator=shared, dtype=torch.float64) + case.offset
    own = torch.Generator().manual_seed(1 + rank)
    N = case.rows[min(rank, len(case.rows) - 1)]
    labels = torch.randint(0, case.C, (N,), generator=own)
    if case.classes == "own":
        labels = labels // 4 * 4 + rank
    noise = torch.randn(N, case.p, generator=own, dtype=torch.float64)
    features = (means[labels] + case.spread * noise).to(case.dtype)
    features[: case.nonfinite, 0] = torch.nan
    half = N // 2
    wide = torch.float64 if case.dtype == torch.bfloat16 and rank == 0 else case.dtype
    return [(features[:half], labels[:half]), (features[half:].to(wide), labels[half:])]


def statistics(case: Case, ranks: list[int]) -> ncfast.ClassStatistics:
    """The state of one process that sees what these ranks see."""
    shift = None
    if case.shift == "given":
        own = torch.Generator().manual_seed(100 + ranks[0])
        shift = torch.randn(case.C, case.p, generator=own) + case.offset
    # Few samples a class see all of the rounding of precision="high": "highest" lets the merging show.
    stats = ncfast.ClassStatistics(
        case.C, case.p, scatter=case.scatter, precision="highest", nonfinite="skip", shift=shift
    )
    for rank in ranks:
        for features, labels in batches(case, rank):
            stats.update(features, labels)
    return stats


def main(folder: Path) -> None:
    """Reduce every case and leave the result in the folder; then see that what must raise does."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, case in CASES.items():
        torch.save(statistics(case, [rank]).all_reduce().state_dict(), folder / f"{name} {rank}.pt")

    pair = dist.new_group(sorted({0, ranks - 1}))  # a group that is not the world
    if rank in (0, ranks - 1):
        alone = statistics(CASES["uneven"], [rank]).all_reduce(pair)
        torch.save(alone.state_dict(), folder / f"pair {rank}.pt")

    torch.save(tracked(rank), folder / f"tracked {rank}.pt")

    evaluate_alone(rank)

    refusing = statistics(CASES["uneven"], [rank])
    if rank == ranks - 1:
        refusing._refused += 3  # what a GPU's update leaves behind
    expect(f"3 rows of all {ranks} ranks were left out", refusing)
    if ranks > 1:
        some = ncfast.ClassStatistics(2, 3, scatter=rank == 0)
        expect(f"1 of {ranks} do", some)


def tracked(rank: int) -> dict[str, Any]:
    """Two epochs of a DistributedDataParallel model: what entered the head, and the history."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    tracker = ncfast.Tracker(parallel)
    entered: list[torch.Tensor] = []
    model[2].register_forward_hook(lambda _, inputs, __: entered.append(inputs[0].detach()))
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    generator = torch.Generator().manual_seed(rank)
    labels = torch.arange(30) % 3
    for _ in range(2):
        entered.clear()
        for _ in range(3):
            inputs = torch.randn(30, 5, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(parallel(inputs), labels).backward()
            tracker.update(labels)
            optimizer.step()
        tracker.end_epoch(train_accuracy=1.0)
    features = torch.cat(entered)
    return {"history": tracker.history, "features": features, "weight": model[2].weight.detach()}


def evaluate_alone(rank: int) -> None:
    """Rank 0 measures while the others go on: no pass may wait for them to broadcast batch norm's buffers."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    if rank == 0:
        loader = [(torch.randn(30, 5), torch.arange(30) % 3)]
        for wrapped in (parallel, torch.compile(parallel, backend="eager")):
            report = ncfast.Tracker(wrapped).evaluate(loader)
            assert report == ncfast.measure_model(model, loader)


def expect(message: str, stats: ncfast.ClassStatistics) -> None:
    before = tensors(stats)
    with pytest.raises(ValueError, match=message):
        stats.all_reduce()
    assert all(torch.equal(old, new) for old, new in zip(before, tensors(stats), strict=True))


def tensors(stats: ncfast.ClassStatistics) -> list[torch.Tensor]:
    return [value.nan_to_num() for value in vars(stats).values() if isinstance(value, torch.Tensor)]


def fail_midway(folder: Path, how: str) -> None:
    """Rank 1 leaves between the two collectives; rank 0 must get an error and keep its state."""
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=5)
    )
    stats = statistics(CASES["uneven"], [rank])
    if rank == 1:
        both = dist.all_reduce

        def first_only(*args, **kwargs):
            both(*args, **kwargs)
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)

        dist.all_reduce = first_only
    before = tensors(stats)
    try:
        stats.all_reduce()
    except RuntimeError as error:
        print("error:", error, flush=True)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors(stats), strict=True))
    os._exit(0)  # at once: to leave a group that has failed may take long


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        fail_midway(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
        leave()
