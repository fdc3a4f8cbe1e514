"""pair_geometry on the CPU, beside PyTorch computing the same numbers.

    python benchmarks/bench_pair_geometry.py               (C=32,768: a few minutes, 2 GiB for the opponent)

Opponents: with the full C×C matrices, in float64 and in float32; and where C×C would not fit in chunks of
rows, whose size is swept first. float32 opponents get the answer right to a few digits only. Nothing is timed
before the answers agree. Times are medians of runs that take turns.
"""

import argparse
import platform
import resource
import statistics
import time

import torch

import ncfast
from ncfast import _cpu


def full(vectors, variances):
    """One line a number, with the C×C matrices."""
    C = len(vectors)
    pairs = ~torch.eye(C, dtype=torch.bool)
    norms = vectors.norm(dim=1)
    gram = vectors @ vectors.T
    cosines = (gram / norms / norms[:, None])[pairs]
    kernels = -0.5 * (2 - 2 * cosines).log()
    squares = norms.square()[:, None] + norms.square() - 2 * gram
    nearest = squares.fill_diagonal_(torch.inf).min(1)
    cdnv = ((variances[:, None] + variances) / (2 * squares)).sum() / (C * (C - 1))
    deviations = (cosines + 1 / (C - 1)).abs()
    ideal = (torch.eye(C, dtype=gram.dtype) - 1 / C) / (C - 1) ** 0.5
    return {
        "etf_error": (gram / gram.norm() - ideal).norm(),
        "cosine_mean": cosines.mean(),
        "cosine_std": cosines.std(correction=0),
        "cosine_min": cosines.min(),
        "cosine_max": cosines.max(),
        "max_angle_deviation": deviations.mean(),
        "log_kernel_mean": kernels.mean(),
        "log_kernel_std": kernels.std(correction=0),
        "nearest_distance": nearest.values.sqrt(),
        "nearest_index": nearest.indices,
        "cdnv": cdnv,
    }


def chunked(vectors, variances, rows):
    """The same from `rows` rows of the matrices at a time, written in place wherever that is possible."""
    C = len(vectors)
    norms = vectors.norm(dim=1)
    units, squares = vectors / norms[:, None], norms.square()
    sums = dict.fromkeys(("cosine", "square", "deviation", "kernel", "kernel_square", "cdnv"), 0.0)
    low, high, distances, indices = torch.inf, -torch.inf, [], []
    for start in range(0, C, rows):
        own = torch.arange(start, min(start + rows, C))
        place = (torch.arange(len(own)), own)
        cosines = units[own] @ units.T
        cosines[place] = 0
        sums["cosine"] += float(cosines.sum())
        sums["square"] += float(cosines.square().sum())
        high = max(high, float(cosines.max()))
        low = min(low, float(cosines.min()))
        deviations = (cosines + 1 / (C - 1)).abs_()
        deviations[place] = 0
        sums["deviation"] += float(deviations.sum())
        kernels = cosines.mul_(-2).add_(2).log_().mul_(-0.5)
        kernels[place] = 0
        sums["kernel"] += float(kernels.sum())
        sums["kernel_square"] += float(kernels.square_().sum())
        d = torch.addmm(squares, vectors[own], vectors.T, alpha=-2).add_(squares[own, None])
        d[place] = torch.inf
        nearest = d.min(1)
        distances.append(nearest.values)
        indices.append(nearest.indices)
        sums["cdnv"] += float(d.reciprocal_().mul_(variances + variances[own, None]).sum()) / 2
    mean = {name: value / (C * (C - 1)) for name, value in sums.items()}
    # ‖G/‖G‖ − E‖² = 2 − 2⟨G, E⟩/‖G‖, and ‖V Vᵀ‖ = ‖Vᵀ V‖.
    along = (squares.sum() - vectors.sum(0).square().sum() / C) / (C - 1) ** 0.5
    return {
        "etf_error": (2 - 2 * along / (vectors.T @ vectors).norm()).sqrt(),
        "cosine_mean": mean["cosine"],
        "cosine_std": (mean["square"] - mean["cosine"] ** 2) ** 0.5,
        "cosine_min": low,
        "cosine_max": high,
        "max_angle_deviation": mean["deviation"],
        "log_kernel_mean": mean["kernel"],
        "log_kernel_std": (mean["kernel_square"] - mean["kernel"] ** 2) ** 0.5,
        "nearest_distance": torch.cat(distances).sqrt(),
        "nearest_index": torch.cat(indices),
        "cdnv": mean["cdnv"],
    }


def check(answer, other, bound):
    for name, value in other.items():
        mine, value = (torch.as_tensor(x, dtype=torch.float64) for x in (getattr(answer, name), value))
        error = (mine != value).double().mean() if name == "nearest_index" else (mine - value).abs().max()
        if not error <= bound:
            raise SystemExit(f"the answers differ in {name} by {float(error):.3g}")


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(C, p, rounds, opponents):
    """`opponents`: name -> (function of vectors and variances, dtype)."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(C, p, generator=generator)
    variances = torch.rand(C, generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = ncfast.pair_geometry(vectors, variances)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    functions = {"ncfast": lambda: ncfast.pair_geometry(vectors, variances)}
    for name, (function, dtype) in opponents.items():
        given = vectors.to(dtype), variances.to(dtype)
        check(answer, function(*given), 1e-9 if dtype == torch.float64 else 2e-2)
        functions[name] = lambda function=function, given=given: function(*given)
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    own, peak = medians["ncfast"], (after - before) / 1024
    products = C * (C - 1) / 2 * p / own / 1e9
    print(f"C={C} p={p}, ncfast: {own:.3f} s, {products:.1f} GFMA/s, {peak:.0f} MiB more at peak")
    for name in opponents:
        print(
            f"    {name:24} {medians[name]:9.3f} s   ncfast {medians[name] / medians['ncfast']:.2f}×",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="leave C=32,768 out")
    options = parser.parse_args()
    isa = _cpu.isa("pair_geometry")
    print(f"{platform.machine()} {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if not options.small:  # first, so that its peak memory is its own
        probe, ones = torch.randn(8192, 768), torch.ones(8192)
        best = min((256, 1024, 4096), key=lambda rows: seconds(lambda: chunked(probe, ones, rows)))
        print(f"chunks of {best} rows")
        compare(
            32_768,
            768,
            1,
            {
                "chunked, float64": (lambda v, s: chunked(v, s, best), torch.float64),
                "chunked, float32": (lambda v, s: chunked(v, s, best), torch.float32),
            },
        )
    for C, p in ((1000, 2048), (100, 512)):
        compare(
            C,
            p,
            5 * options.rounds,
            {"full, float64": (full, torch.float64), "full, float32": (full, torch.float32)},
        )


if __name__ == "__main__":
    main()
