"""What a Tracker costs: a training step with and without it, and memory over 10,000 updates.

    python benchmarks/bench_tracker.py

ResNet-18 for 32×32 images (p=512), C=100, batch 128, SGD with momentum. Steps with and without alternate in
turn, so that what else the machine does falls on both; the overhead is the median of the paired differences
over the median step.
"""

import resource
import statistics
import time

import torch
from torch import nn

import ncfast
from ncfast.ops import dispatch

C, P, BATCH, PAIRS, UPDATES = 100, 512, 128, 9, 10_000


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        shrinks = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else shrinks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    blocks, inputs = [], 64
    for outputs in (64, 128, 256, P):
        blocks += [Block(inputs, outputs, 1 if outputs == 64 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(P, C))


def check(tracker: ncfast.Tracker, features: torch.Tensor, labels: torch.Tensor) -> None:
    """What the tracker holds is what entered the head, or no time is printed."""
    truth = ncfast.ClassStatistics(C, P)
    with ncfast.use_backend("reference"):
        truth.update(features, labels)
    assert torch.equal(tracker.statistics.counts, truth.counts)
    error = (tracker.statistics.within_covariance - truth.within_covariance).norm()
    assert error <= 2**-14 * truth.within_covariance.norm(), "precision high: two bfloat16"


def bench_step() -> None:
    torch.manual_seed(0)
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, C, (BATCH,))
    entered: list[torch.Tensor] = []
    witness = model[-1].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].detach()))

    def step(tracker: ncfast.Tracker | None) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        if tracker is not None:
            tracker.update(labels)
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    with ncfast.Tracker(model) as tracker, dispatch.record() as ran:
        step(tracker)
    check(tracker, entered[0], labels)
    witness.remove()
    without, differences, update = [], [], []
    for _ in range(PAIRS):
        without.append(step(None))
        with ncfast.Tracker(model) as tracker:
            differences.append(step(tracker) - without[-1])
            model(images)
            start = time.perf_counter()
            tracker.update(labels)
            update.append(time.perf_counter() - start)
    plain = statistics.median(without)
    print(f"backend {ran[0][1]}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"step without the tracker: median {plain * 1e3:.0f} ms of {PAIRS}")
    print(f"with it: {statistics.median(differences) / plain:+.2%} (median of paired differences)")
    alone = statistics.median(update)
    print(f"update alone: median {alone * 1e3:.2f} ms = {alone / plain:.2%} of a step")


def bench_memory() -> None:
    torch.manual_seed(0)
    head = nn.Linear(P, C)
    features = torch.randn(BATCH, P, requires_grad=True)
    labels = torch.randint(0, C, (BATCH,))
    tracker = ncfast.Tracker(nn.Sequential(head))
    for done in range(1, UPDATES + 1):
        head(features)
        tracker.update(labels)
        if done in (UPDATES // 10, UPDATES):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"peak memory after {done:,} updates: {peak:.1f} MiB")


if __name__ == "__main__":
    bench_memory()
    bench_step()
