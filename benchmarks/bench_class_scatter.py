"""class_scatter on the CPU, side by side with what the machine's best libraries do with the same bytes.

    python benchmarks/bench_class_scatter.py               (N=65,536, p=2048: needs 2 GiB)

The opponent of the scatter is `H.T @ H` alone, which neither centres nor sums per class: PyTorch's and, for
float32, NumPy's, each in a line of its own. NumPy's BLAS sees the symmetry and makes half the products, and
uses AVX-512 on AMD's processors, too, where MKL does not; see that OPENBLAS_CORETYPE is not set. With
`--isa avx2` hold both to AVX2: MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell. Nothing is timed
before its answer agrees with the float64 reference on the first rows. Times are medians of runs that take
turns.
"""

import argparse
import os
import platform
import re
import statistics
import time
from pathlib import Path

import torch

import ncfast
from ncfast import _cpu
from ncfast.ops.class_scatter import class_scatter

N, C = 65_536, 1000
BOUND = {"highest": 1e-5, "high": 1e-4, "medium": 2e-2}  # of the largest diagonal, for one sample of rows


def check(features, labels, shift, precision):
    rows = slice(0, 17_000)  # enough for every path
    answer = class_scatter(features[rows], labels[rows], shift, precision=precision)
    with ncfast.use_backend("reference"):
        truth = class_scatter(features[rows], labels[rows], shift)
    error = (answer.scatter - truth.scatter).abs().max() / truth.scatter.diagonal().max()
    if not (error <= BOUND[precision] and torch.equal(answer.counts, truth.counts)):
        raise SystemExit(f"wrong answer for {precision}: off by {float(error):.3g}")


def medians(functions, rounds):
    """Seconds, the median of each function: all of them in turn, so that a busy moment hits every one."""
    times = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, list_ in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                list_.append(time.perf_counter() - start)
    return [statistics.median(list_) for list_ in times]


def report(name, seconds, opponent, against, extra=""):
    print(f"{name:44} {1e3 * seconds:9.2f} ms   {opponent / seconds:5.2f}× {against}{extra}", flush=True)


def scatter_rows(p, rounds, isa):
    labels = torch.randint(0, C, (N,))
    shift = torch.randn(C, p)
    features = shift[labels] + 0.1 * torch.randn(N, p)
    cases = ((torch.float32, ("high", "medium", "highest")), (torch.bfloat16, ("high", "medium")))
    for dtype, precisions in cases:
        h = features.to(dtype)
        for precision in precisions:
            check(h, labels, shift, precision)
        runs = [lambda h=h: h.T @ h]
        runs += [lambda h=h, q=q: class_scatter(h, labels, shift, precision=q) for q in precisions]
        opponent, *ours = medians(runs, rounds)
        kind = str(dtype).removeprefix("torch.")
        report(f"p={p} {kind} H.T @ H", opponent, opponent, "", f"{2e-9 * N * p * p / opponent:.0f} GFLOP/s")
        if dtype == torch.float32:  # on its own: NumPy's threads keep the cores for a while after a call
            array = h.numpy()
            (numpy,) = medians([lambda x=array: x.T @ x], rounds)
            report(f"p={p} {kind} H.T @ H in NumPy", numpy, opponent, "H.T @ H")
        for precision, seconds in zip(precisions, ours, strict=True):
            report(f"p={p} {kind} {precision} on {isa}", seconds, opponent, "H.T @ H")


def stream_row(p, rounds, classes):
    """Inputs rotate through 1 GiB, past the last-level cache of most machines."""
    copies = max(2, 2**30 // (N * p * 4))
    labels = torch.randint(0, classes, (N,))
    shift = torch.randn(classes, p)
    features = [torch.randn(N, p) for _ in range(copies)]
    turn = iter(range(10**9))

    def following():
        return features[next(turn) % copies]

    runs = [
        lambda: torch.sum(following()),
        lambda: class_scatter(following(), labels, shift, scatter=False),
    ]
    read, ours = medians(runs, max(rounds, copies))
    rate = N * p * 4e-9
    report(
        f"p={p} C={classes} scatter=False",
        ours,
        read,
        "torch.sum",
        f"  {rate / ours:.1f} of {rate / read:.1f} GB/s",
    )


def update_row(rounds, p=512, classes=100, batch=128):
    """A stream of batches; the eager twin keeps float32 sums about the same shift."""
    batches = [(torch.randn(batch, p), torch.randint(0, classes, (batch,))) for _ in range(512)]
    shift = torch.randn(classes, p)

    def ours():
        stats = ncfast.ClassStatistics(classes, p, shift=shift)
        for h, y in batches:
            stats.update(h, y)
        assert stats.num_samples == batch * len(batches)  # read, so that no rows are left waiting

    def eager():
        counts = torch.zeros(classes)
        sums, sumsq, scatter = torch.zeros(classes, p), torch.zeros(classes), torch.zeros(p, p)
        for h, y in batches:
            d = h - shift[y]
            counts.index_add_(0, y, torch.ones(len(y)))
            sums.index_add_(0, y, d)
            sumsq.index_add_(0, y, d.square().sum(1))
            scatter.addmm_(d.T, d)

    opponent, mine = (seconds / len(batches) for seconds in medians([eager, ours], rounds))
    report(f"update, batch={batch} p={p} C={classes}, eager", opponent, opponent, "")
    report(f"update, batch={batch} p={p} C={classes}, ncfast", mine, opponent, "eager")


def peak_row(p, precision="high"):
    """What a call adds to the process beyond its inputs, results included; Linux tells."""
    features, labels, shift = torch.randn(N, p), torch.randint(0, C, (N,)), torch.zeros(C, p)
    class_scatter(features[:100], labels[:100], shift, precision=precision)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present size
    before = _status("VmRSS")
    result = class_scatter(features, labels, shift, precision=precision)
    peak, own = _status("VmHWM") - before, sum(t.nbytes for t in result if t is not None) / 2**20
    allowed = (3 * p * p * 4 + C * p * 8) / 2**20 + 32 * torch.get_num_threads()
    print(f"p={p} {precision}: peak memory {peak:.0f} MiB, results {own:.0f}; allowed {allowed:.0f}")


def _status(name):
    line = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default=None)
    options = parser.parse_args()
    if options.isa:
        os.environ["NCFAST_CPU_ISA"] = options.isa
    isa = _cpu.isa("class_scatter")
    print(f"{platform.machine()} {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if Path("/proc/self/clear_refs").exists():
        for p in options.dim:  # first, as memory that was freed and kept would hide what a call takes
            peak_row(p)
    for p in options.dim:
        scatter_rows(p, options.rounds, isa)
    for classes in (10, 100, C):
        for p in options.dim:
            stream_row(p, options.rounds, classes)
    update_row(options.rounds)


if __name__ == "__main__":
    main()
