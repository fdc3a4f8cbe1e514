"""The three operations on a GPU, beside eager PyTorch doing the same there.

    python benchmarks/bench_gpu.py                         (N=262,144, p=1024: 8 GiB of GPU memory)

Every backend that takes the features, the preferred one first: here is decided what `dispatch.preference`
estimates. Opponents: H.T @ H of the centred features, in float32, TF32 and bfloat16, with index_add for the
sums; addmm and argmax in chunks; the full C×C matrices. Answers are checked against the float64 reference
before anything is timed, on all rows, as other kernels run on few. Medians of runs that take turns, timed by
CUDA events: from when the device begins a run to when it ends it, launches it has to wait for included.
"read" is torch.sum over the features. `--device cpu --rows 2048` tries the script by the clock where there is
no GPU: that is all it has been run on.
"""

import argparse
import statistics
import time
from functools import partial

import torch

import ncfast
from ncfast.ops import dispatch
from ncfast.ops.certify import certify
from ncfast.ops.class_scatter import class_scatter

P, C = 1024, 1000


def seconds(function, device):
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def compare(title, runs, device, rounds):
    """`runs`: name -> function; the first is ours."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 2):  # two to compile and to warm up
        for name, run in runs.items():
            elapsed = seconds(run, device)
            if turn > 1:
                times[name].append(elapsed)
    medians = {name: statistics.median(list_) for name, list_ in times.items()}
    own = medians[next(iter(runs))]
    print(title)
    for name, median in medians.items():
        print(f"    {name:28} {1e3 * median:9.3f} ms   ncfast {median / own:.2f}×", flush=True)


def scatter(features, labels, shift, matmul):
    """Sums, squares and scatter of the centred rows; `matmul` is a (dtype, TF32 allowed) pair."""
    dtype, tf32 = matmul
    torch.backends.cuda.matmul.allow_tf32 = tf32
    d = features - shift[labels]
    sums = torch.zeros_like(shift).index_add_(0, labels, d)
    sumsq = torch.zeros_like(shift[:, 0]).index_add_(0, labels, d.square().sum(1))
    product = d.to(dtype).T @ d.to(dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    return sums, sumsq, product


def decide(features, means, chunk=16_384):
    offset = -0.5 * means.square().sum(1)
    return torch.cat([torch.addmm(offset, h, means.T).argmax(1) for h in features.split(chunk)])


def pairs(means):
    """Part of the numbers only: cosines and nearest distances from the full matrices in float64."""
    u = means.double()
    gram = u @ u.T
    norms = gram.diagonal().sqrt()
    cosines = gram / norms / norms[:, None]
    distances = torch.cdist(u, u).fill_diagonal_(torch.inf)
    return cosines.std(), (cosines + 1 / (C - 1)).abs().mean(), distances.min(1), distances.log().mean()


def backends(operation, function, features, *arguments, **options):
    """{"ncfast, backend": the call on it}, the one that would be picked first; not the float64 reference."""
    about = {"scatter": options["scatter"]} if "scatter" in options else {}
    if operation == "class_scatter":
        about["num_classes"] = C

    def forced(backend):
        with ncfast.use_backend(backend):
            return function(features, *arguments, **options)

    return {
        f"ncfast, {backend}": partial(forced, backend)
        for backend in dispatch.preference(operation, features, **about)
        if backend != "reference" and dispatch.refusal(operation, backend, features, **about) is None
    }


def check(runs, truth, bound):
    """Every answer of class_scatter; `bound` is the scatter's, as nothing else depends on the precision."""
    sumsq = truth.sumsq.clamp_min(1e-300)  # or no rows
    reach = (truth.counts * sumsq).sqrt().clamp_min(1e-300)[:, None]  # |Σd| ≤ √(n Σd²)
    for name, run in runs.items():
        result = run()
        errors = [(result.sumsq - truth.sumsq).abs() / sumsq, (result.sums - truth.sums).abs() / reach]
        if result.radii is not None:
            errors.append((result.radii - truth.radii).abs() / truth.radii)
        right = torch.equal(result.counts, truth.counts) and all(error.max() <= 1e-5 for error in errors)
        if result.scatter is not None:
            error = (result.scatter - truth.scatter).abs().max() / truth.scatter.diagonal().max()
            right &= bool(error <= bound)
        if not right:
            raise SystemExit(f"wrong answer of {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shift = torch.randn(C, P, device=device)
    labels = torch.randint(0, C, (options.rows,), device=device)
    features = shift[labels] + 0.1 * torch.randn(options.rows, P, device=device)
    print(f"{name}, torch {torch.__version__}")
    read = {"read": features.sum}
    opponents = {
        "highest": ("float32", (torch.float32, False), 1e-5),
        "high": ("TF32", (torch.float32, True), 1e-4),
        "medium": ("bfloat16", (torch.bfloat16, False), 2e-2),
    }
    given = features, labels, shift
    with ncfast.use_backend("reference"):
        truth = class_scatter(*given, radii=True)
    for precision, (other, matmul, bound) in opponents.items():
        runs = backends("class_scatter", class_scatter, *given, scatter=True, precision=precision)
        check(runs, truth, bound)
        runs |= {f"eager, {other}": partial(scatter, *given, matmul), **read}
        compare(f'class_scatter "{precision}", N={options.rows} p={P} C={C}', runs, device, options.rounds)
    runs = backends("class_scatter", class_scatter, *given, scatter=False, radii=True)
    check(runs, truth, 1e-5)
    compare(
        f"class_scatter without the scatter, N={options.rows} p={P} C={C}",
        runs | read,
        device,
        options.rounds,
    )

    radii, gap = truth.radii.float(), shift.new_zeros(C, dtype=torch.float64)
    limits = [gap + radii.median(), gap + 2 * radii.median()]  # half of the rows are decided by both
    runs = backends("certify", certify, radii, labels, gap, limits)
    with ncfast.use_backend("reference"):
        rows = certify(radii, labels, gap, limits).undecided
    if not all(torch.equal(run().undecided, rows) for run in runs.values()):
        raise SystemExit("wrong rows are undecided")
    compare(f"certify, N={options.rows} C={C}", runs, device, options.rounds)

    runs = backends("affine_argmax", ncfast.nearest_class_center, features, shift)
    if not all(torch.equal(run(), labels) for run in runs.values()):
        raise SystemExit("wrong decisions")
    runs |= {"addmm + argmax": partial(decide, features, shift), **read}
    compare(f"nearest_class_center, N={options.rows} p={P} C={C}", runs, device, options.rounds)
    runs = backends("pair_geometry", ncfast.pair_geometry, shift) | {"full matrices": partial(pairs, shift)}
    compare(f"pair_geometry, C={C} p={P}", runs, device, options.rounds)


if __name__ == "__main__":
    main()
