"""affine_argmax on the CPU: nearest class centres, and NC4 of collapsed features, beside the best there is.

    pip install faiss-cpu scikit-learn
    python benchmarks/bench_affine_argmax.py               (N=100,000: needs 3 GiB)

Opponents: torch.addmm and argmax in chunks whose size is swept first, torch.cdist in the same chunks,
faiss.IndexFlatL2 and scikit-learn's pairwise_distances_argmin; the last two are left out where they are not
installed. All decide in float32, ncfast as float64 does: how often they differ from it is printed. "one read"
is torch.sum over the features. Times are medians of runs that take turns.
"""

import argparse
import importlib
import importlib.util
import math
import os
import platform
import statistics
import time
from functools import partial

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
        trials = {chunk: partial(function, features[:20_000], means, chunk) for chunk in CHUNKS}
        times = {chunk: min(seconds(trial), seconds(trial)) for chunk, trial in trials.items()}
        best = min(times, key=times.get)
        runs[f"{name}, chunks of {best}"] = partial(function, features, means, best)
    for module, function in (("faiss", faiss), ("sklearn", sklearn)):
        if importlib.util.find_spec(module):
            runs[module] = partial(function, features, means)
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
    """p=512 and nothing certifiable: around the means, and noise alone, where margins are small."""
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
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(C, 2048, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    features = torch.randn(N, 2048, generator=generator).mul_(1e-2).add_(means[labels])
    weight, bias = means / math.sqrt(2048), torch.zeros(C)
    gap = torch.zeros(C, dtype=torch.float64)
    radii = (features - means[labels]).norm(dim=1)  # of the one pass, which the statistics need anyway
    ours = partial(_nc4, (weight, bias, means.double()), features, labels, radii, gap)
    tally = ours()
    runs = opponents(features, means)
    radii_again = partial(ncfast.class_scatter, features, labels, means, scatter=False, radii=True)
    own, streamed, read = (
        statistics.median(seconds(run) for _ in range(rounds)) for run in (ours, radii_again, features.sum)
    )
    both = own + streamed
    total, certified, *_ = tally.tolist()
    print(f"NC4, N={N} p=2048 C={C}, within/mean 1e-2: {certified} of {total} certified")
    print(f"    decisions from known radii {1e3 * own:.1f} ms; with a pass for the radii {1e3 * both:.1f} ms")
    print(f"    one read {1e3 * read:.1f} ms: {both / read:.2f} of them")
    for name, other in runs.items():
        twice = 2 * statistics.median(seconds(other) for _ in range(3))
        ratios = f"ncfast {twice / own:.1f}×, with the pass {twice / both:.1f}×"
        print(f"    {name:36} 2 rules {1e3 * twice:9.1f} ms   {ratios}", flush=True)


def _nc4(rule_and_means, features, labels, radii, gap):
    means = rule_and_means[2]
    # measure() has the distances from NC2; alone, this is the cheapest way to them.
    distances = 2 * ncfast.decision_radius(means, -0.5 * means.square().sum(1), means)
    decisions = importlib.import_module("ncfast.measure")._Decisions
    return decisions(*rule_and_means, torch.arange(C), distances).count(features, labels, radii, gap)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default=None)
    options = parser.parse_args()
    if options.isa:
        os.environ["NCFAST_CPU_ISA"] = options.isa
    isa = _cpu.isa("affine_argmax")
    print(f"{platform.machine()} {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    one_rule(options.rounds)
    collapsed(options.rounds)


if __name__ == "__main__":
    main()
