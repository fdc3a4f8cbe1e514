"""affine_argmax on the CPU: nearest class centres, and NC4 of collapsed features, beside the best there is.

    pip install faiss-cpu scikit-learn
    python benchmarks/bench_affine_argmax.py               (N=100,000: needs 3 GiB)

Opponents: torch.addmm and argmax in chunks whose size is swept first, torch.cdist in the same chunks,
faiss.IndexFlatL2 and scikit-learn's pairwise_distances_argmin; the last two are left out where they are not
installed. All decide in float32, ncfast as float64 does: how often they differ from it is printed. "one read" is
torch.sum over the features. Times are medians of runs that take turns.
"""

import argparse
import importlib
import importlib.util
import math
import os
import platform
import statistics
import time

import torch

import ncfast
from ncfast import _cpu

N, C = 100_000, 1000
CHUNKS = (1024, 4096, 16_384)


def addmm(features, means, chunk):
    offset = -0.5 * means.square().sum(1)
    return torch.cat([torch.addmm(offset, h, means.T).argmax(1) for h in features.split(chunk)])


def cdist(features, means, chunk):
    return torch.cat([torch.cdist(h, means).argmin(1) for h in features.split(chunk)])


def faiss(features, means):
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())
    index = library.IndexFlatL2(means.shape[1])
    index.add(means.numpy())
    return torch.from_numpy(index.search(features.numpy(), 1)[1][:, 0])


def sklearn(features, means):
    from sklearn.metrics import pairwise_distances_argmin

    return torch.from_numpy(pairwise_distances_argmin(features.numpy(), means.numpy()))


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def opponents(features, means):
    """Name -> decisions of one rule, each at its best chunk size."""
    runs = {}
    for name, function in (("addmm + argmax", addmm), ("cdist + argmin", cdist)):
        probe = features[:20_000]
        best = min(CHUNKS, key=lambda chunk: min(seconds(lambda: function(probe, means, chunk)) for _ in "12"))
        runs[f"{name}, chunks of {best}"] = lambda function=function, best=best: function(features, means, best)
    for module, function in (("faiss", faiss), ("sklearn", sklearn)):
        if importlib.util.find_spec(module):
            runs[module] = lambda function=function: function(features, means)
    return runs


def compare(title, ours, others, rounds, truth):
    runs = {"ncfast": ours} | others
    for name, run in runs.items():
        wrong = int((run() != truth).sum())
        if name == "ncfast" and wrong:
            raise SystemExit(f"{title}: {wrong} decisions are not those of float64")
        print(f"    {name}: {wrong} decisions differ from float64's")
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(list_) for name, list_ in times.items()}
    print(title)
    for name, median in medians.items():
        print(f"    {name:36} {1e3 * median:9.1f} ms   ncfast {median / medians['ncfast']:.2f}×", flush=True)
    return medians["ncfast"]


def one_rule(rounds):
    """p=512: nothing is certifiable; the features around the means, and plain noise, where margins are small."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(C, 512, generator=generator)
    noise = torch.randn(N, 512, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    for title, features in (("around the means", means[labels] + noise), ("noise alone", noise)):
        truth = addmm(features.double(), means.double(), 4096)
        compare(
            f"nearest_class_center, N={N} p=512 C={C}, {title}",
            lambda features=features: ncfast.nearest_class_center(features, means),
            opponents(features, means),
            rounds,
            truth,
        )


def collapsed(rounds):
    """Both rules at p=2048 and within/mean 1e-2: the certificates decide from the radii of the one pass."""
    _Decisions = importlib.import_module("ncfast.measure")._Decisions  # NC4 alone, without the statistics

    generator = torch.Generator().manual_seed(0)
    means = torch.randn(C, 2048, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    features = torch.randn(N, 2048, generator=generator).mul_(1e-2).add_(means[labels])
    weight, bias = means / math.sqrt(2048), torch.zeros(C)
    wide = means.double()
    shift, gap = means, torch.zeros(C, dtype=torch.float64)
    radii = (features - means[labels]).norm(dim=1)  # of the one pass, which the statistics need anyway
    ours = lambda: _Decisions(weight, bias, wide).count(features, labels, radii, gap)  # noqa: E731
    tally = ours()
    runs = opponents(features, means)
    print(f"NC4, N={N} p=2048 C={C}, within/mean 1e-2: {tally.certified} of {tally.total} certified")
    run, read = statistics.median(seconds(ours) for _ in range(rounds)), []
    for _ in range(rounds):
        read.append(seconds(features.sum))
    streamed = statistics.median(
        seconds(
            lambda: ncfast.class_scatter(features, labels, shift, scatter=False, radii=True)
        )
        for _ in range(rounds)
    )
    read = statistics.median(read)
    print(f"    decisions from known radii {1e3 * run:.1f} ms; with a pass for the radii {1e3 * (run + streamed):.1f} ms")
    print(f"    one read {1e3 * read:.1f} ms: {(run + streamed) / read:.2f} of them")
    for name, other in runs.items():
        twice = 2 * statistics.median(seconds(other) for _ in range(3))
        print(f"    {name:36} 2 rules {1e3 * twice:9.1f} ms   ncfast {twice / run:.1f}×, "
              f"with the pass {twice / (run + streamed):.1f}×", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default=None)
    options = parser.parse_args()
    if options.isa:
        os.environ["NCFAST_CPU_ISA"] = options.isa
    print(f"{platform.machine()} {_cpu.isa('affine_argmax')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    one_rule(options.rounds)
    collapsed(options.rounds)


if __name__ == "__main__":
    main()
