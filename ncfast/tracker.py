"""Tracker: neural collapse epoch by epoch, from the features of the training steps themselves."""

import contextlib
import dataclasses
import operator
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ncfast.collapse import CollapseReport, check_global_mean, collapse
from ncfast.history import COLUMNS, Record, check_record, read_history, write_history, zero_error_epochs
from ncfast.measure import classifier_of, entered, find_head, flattened, measure_model
from ncfast.statistics import ClassStatistics

_FORMAT = 1  # of state_dict()


class Tracker:
    """Follow a training run: capture the features that enter the classifier, report once per epoch.

        tracker = Tracker(model)
        for epoch in range(epochs):
            for inputs, labels in loader:
                loss = criterion(model(inputs), labels)
                tracker.update(labels)  # or: with tracker.step(labels): around the forward pass
                ...
            report = tracker.end_epoch(train_accuracy=…)

    A forward pre-hook on the head keeps the detached features of the latest forward pass in training mode
    with gradients enabled, so that passes for validation do not count. `update` adds them to a
    `ClassStatistics` about the class means of the previous epoch; nothing is synchronised with a GPU before
    `end_epoch`. The weights move while an epoch is measured, and NC4 needs the features a second time:
    `evaluate` measures as the paper does.

    Args:
        model: plain, or wrapped by torch.compile or DistributedDataParallel. Code that was compiled and run
            before the tracker was made does not see the hook: make the tracker first.
        head: the classifier, a module with a `weight` [C, p]; by default the last torch.nn.Linear. Of
            several calls in a forward pass the last counts, and its input is not to be overwritten.
        scatter: keep Σ_W; without it NC1 is None and a step costs O(p) per sample.
        precision: of the scatter's products, as in `ncfast.class_scatter`.
        global_mean: what μ_G averages over, "samples" or "classes".
        ignore_index: label of the samples to leave out.
        nonfinite: "error" or "skip", as in `ClassStatistics`.
        group: the processes to sum over in `end_epoch` where torch.distributed is initialised; by default
            those of the DistributedDataParallel wrapper, or else all.

    Attributes:
        history: a list of records, one dict per measured epoch: `epoch`, `terminal_phase` (training error has
            been zero at or before this epoch; None while unknown) and the fields of `CollapseReport`.
        statistics: the `ClassStatistics` of the epoch in progress.

    Raises:
        TypeError, ValueError: no linear layer, a head without a weight [C, p], an unknown option.

    """

    def __init__(
        self,
        model: torch.nn.Module,
        head: torch.nn.Module | None = None,
        *,
        scatter: bool = True,
        precision: str = "high",
        global_mean: str = "samples",
        ignore_index: int = -100,
        nonfinite: str = "error",
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        check_global_mean(global_mean)
        self.model, self.head = model, find_head(model, head)
        self.global_mean = global_mean
        self.group = _process_group(model) if group is None else group
        self.history: list[Record] = []
        self._options: dict[str, Any] = {
            "precision": precision,
            "ignore_index": ignore_index,
            "nonfinite": nonfinite,
        }
        weight, _ = classifier_of(self.head)
        C, p = weight.shape
        self.statistics = ClassStatistics(C, p, scatter=scatter, device=weight.device, **self._options)
        self._capture = _Capture()
        self._hook = self.head.register_forward_pre_hook(self._capture, with_kwargs=True)

    # ---- one step ----

    def update(self, labels: torch.Tensor) -> None:
        """Add the features of the latest forward pass, [..., p], with their labels [...].

        Call it once per forward pass, also when gradients are accumulated over several; before or after
        `backward` does not matter. What raises leaves the statistics as they were.

        Raises:
            ValueError: no forward pass since the last update, labels that do not fit, and what
                `ClassStatistics.update` raises.

        """
        features, self._capture.features = self._capture.features, None
        if features is None:
            raise ValueError(
                "no features were captured: since the last update nothing entered the head in training mode "
                "with gradients (or the model was compiled and run before the tracker was made: then call "
                "torch.compiler.reset())"
            )
        labels = torch.as_tensor(labels).to(features.device, non_blocking=True)
        self.statistics.update(*flattened(features, labels))

    @contextlib.contextmanager
    def step(self, labels: torch.Tensor) -> Iterator[None]:
        """Capture the forward pass inside the `with` block, in whatever mode, and `update(labels)` after.

        If the block raises, its features are dropped.
        """
        self._capture.features, self._capture.always = None, True
        try:
            yield
            self.update(labels)
        finally:
            self._capture.features, self._capture.always = None, False

    # ---- one epoch ----

    def end_epoch(
        self,
        train_accuracy: float | None = None,
        test_accuracy: float | None = None,
        *,
        epoch: int | None = None,
    ) -> CollapseReport:
        """Report on the samples since the last call, append the report to `history`, and begin anew.

        With torch.distributed every rank must call it, and all get the report on the samples of all. What
        raises leaves the epoch as it was, in one process.

        Args:
            train_accuracy: in [0, 1], as you measure it; 1 begins the terminal phase.
            test_accuracy: in [0, 1]; only recorded.
            epoch: its number; by default one more than the last, from 1.

        Raises:
            ValueError: no samples, an accuracy outside [0, 1], rows refused by a GPU's update.

        """
        accuracies = {"train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
        for name, accuracy in accuracies.items():
            if accuracy is not None and not 0 <= accuracy <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {accuracy}")
        epoch = self._following(epoch)
        stats, classifier = self.statistics, classifier_of(self.head)
        if dist.is_available() and dist.is_initialized():
            stats.all_reduce(self.group)
        report = collapse(stats, *classifier, global_mean=self.global_mean)
        shift = stats.means.to(stats.shift.dtype)  # near the means of the next epoch too
        self.statistics = ClassStatistics(
            stats.num_classes,
            stats.dim,
            scatter=stats.scatter is not None,
            device=shift.device,
            shift=shift,
            **self._options,
        )
        train, test = (None if value is None else float(value) for value in accuracies.values())
        return self._record(dataclasses.replace(report, train_accuracy=train, test_accuracy=test), epoch)

    def evaluate(
        self,
        train_loader: Iterable[Any],
        test_loader: Iterable[Any] | None = None,
        *,
        epoch: int | None = None,
        **options: Any,
    ) -> CollapseReport:
        """Measure with frozen weights in eval mode, by `ncfast.measure_model`, and append to `history`.

        As the paper measures: all of NC1–NC4, and the accuracies. Further `options` are those of
        `measure_model`. The statistics of the epoch in progress are untouched. With torch.distributed it
        measures what this rank's loaders yield, without the other ranks: one may do it alone.
        """
        options = {"global_mean": self.global_mean, **self._options, **options}
        epoch = self._following(epoch)
        return self._record(measure_model(self.model, train_loader, test_loader, self.head, **options), epoch)

    def _following(self, epoch: int | None) -> int:
        if epoch is not None:
            return operator.index(epoch)  # NumPy's integers too
        return self.history[-1]["epoch"] + 1 if self.history else 1

    def _record(self, report: CollapseReport, epoch: int) -> CollapseReport:
        terminal = self.history[-1]["terminal_phase"] if self.history else None
        if not terminal and report.train_accuracy is not None:
            terminal = report.train_accuracy == 1
        self.history.append({"epoch": epoch, "terminal_phase": terminal, **report.as_dict()})
        return report

    # ---- the run ----

    @property
    def first_zero_error(self) -> int | None:
        """The first epoch of zero training error, where the terminal phase begins; None before it."""
        return zero_error_epochs(self.history)[0]

    @property
    def lasting_zero_error(self) -> int | None:
        """The first epoch from which the training error stays zero up to the last one known; None if not."""
        return zero_error_epochs(self.history)[1]

    def to_pandas(self) -> Any:
        """The history as a pandas.DataFrame, indexed by epoch (needs pandas)."""
        import pandas

        return pandas.DataFrame.from_records(self.history, columns=list(COLUMNS)).set_index("epoch")

    def plot(self, **options: Any) -> Any:
        """The paper's Figs. 2–7 over the epochs, zero error marked: `ncfast.plotting.plot_history`."""
        from ncfast.plotting import plot_history

        return plot_history(self.history, **options)

    def log(self, writer: Any, prefix: str = "collapse/") -> None:
        """Write the numbers of the last epoch to a TensorBoard `SummaryWriter` or anything taking a dict.

        A writer with `add_scalar` gets `add_scalar(name, value, epoch)` per number; any other is called once
        with a dict of them and the epoch, as `wandb.log` wants it. What was not measurable is left out.

        Raises:
            ValueError: there is no epoch yet. TypeError: a writer of neither kind.

        """
        if not self.history:
            raise ValueError("there is no epoch to log yet: call end_epoch or evaluate first")
        record = self.history[-1]
        numbers = {
            prefix + name: float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and name != "epoch"
        }
        if hasattr(writer, "add_scalar"):
            for name, value in numbers.items():
                writer.add_scalar(name, value, record["epoch"])
        elif callable(writer):
            writer({**numbers, "epoch": record["epoch"]})
        else:
            raise TypeError(f"writer must have add_scalar or be callable, got {type(writer).__name__}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history to a .csv or .json file; `load` reads it back exactly."""
        write_history(self.history, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the history by that of a .csv or .json file; the next epoch continues it.

        Raises:
            OSError: the file cannot be read. ValueError: it is not a history, or was cut short.

        """
        self.history = read_history(path)

    def state_dict(self) -> dict[str, Any]:
        """The epoch in progress and the history, safe for `torch.load(weights_only=True)`.

        A run resumed from it gives the same numbers bit for bit. With torch.distributed every rank has its
        own.
        """
        return {
            "format": _FORMAT,
            "statistics": self.statistics.state_dict(),
            "history": [dict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of a tracker of the same C, p and scatter.

        Raises:
            ValueError: the dictionary is of another format, lacks an entry or does not fit; this tracker is
                then unchanged.

        """
        missing = {"format", "statistics", "history"} - set(state)
        if missing:
            raise ValueError(f"not a Tracker state: it lacks {', '.join(sorted(missing))}")
        if state["format"] != _FORMAT:
            raise ValueError(f"unknown state format {state['format']!r}; this version reads {_FORMAT}")
        if not isinstance(state["history"], list):
            raise ValueError(f"history must be a list of records, got {type(state['history']).__name__}")
        history = [check_record(record, "history") for record in state["history"]]
        self.statistics.load_state_dict(state["statistics"])
        self.history = history
        self._capture.features = None

    def remove(self) -> None:
        """Take the hook off the head: the model is then exactly as it was. The history stays."""
        self._hook.remove()
        self._capture.features = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Capture:
    """The hook: keeps what last entered the head.

    One slot that is only ever stored to: torch.compile traces that into its graph and need not guard on it,
    where a list would be recompiled for every length. Independent of the tracker, so that a copied or pickled
    model does not take the tracker with it.
    """

    def __init__(self) -> None:
        self.features: torch.Tensor | None = None
        self.always = False

    def __call__(self, head: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.always or (head.training and torch.is_grad_enabled()):
            self.features = entered(args, kwargs).detach()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Capture, ()


def _process_group(model: torch.nn.Module) -> "dist.ProcessGroup | None":
    """That of the DistributedDataParallel wrapper, which torch.compile may have wrapped again."""
    parallel = torch.nn.parallel.DistributedDataParallel
    return next((module.process_group for module in model.modules() if isinstance(module, parallel)), None)
