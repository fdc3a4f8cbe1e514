"""NeuralCollapseCallback: a Tracker for lightning.Trainer."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ncfast.tracker import Tracker


class NeuralCollapseCallback(Callback):
    """Measure the training features of every epoch and log every number that is measurable.

    A `ncfast.Tracker` on the LightningModule, summed over all processes: the features of the training steps
    are captured where they enter the classifier, and the report of an epoch, numbered as Lightning does, is
    logged when it ends: `collapse/nc1` and so on. Checkpoints carry its state, an epoch in progress included.

    Args:
        head: the classifier, as the name of a submodule ("model.fc"); by default the last torch.nn.Linear.
        labels: takes a batch and returns its labels; by default `batch[1]`.
        train_accuracy: name of a logged metric, the training accuracy of the epoch in [0, 1]; it tells the
            terminal phase.
        prefix: of the names that are logged.
        options: those of `ncfast.Tracker`.

    Attributes:
        tracker: the `ncfast.Tracker`, from the start of training; its `history` has every epoch.

    """

    def __init__(
        self,
        head: str | None = None,
        *,
        labels: Callable[[Any], torch.Tensor] | None = None,
        train_accuracy: str | None = None,
        prefix: str = "collapse/",
        **options: Any,
    ) -> None:
        self.head, self.labels, self.train_accuracy, self.prefix = head, labels, train_accuracy, prefix
        self.options = options
        self.tracker: Tracker | None = None
        self._resumed: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the tracker, now that the model is on its device."""
        head = None if self.head is None else pl_module.get_submodule(self.head)
        self.tracker = Tracker(pl_module, head, **self.options)
        if self._resumed is not None:
            resumed = self._resumed["statistics"]
            if trainer.global_rank:  # rank 0 goes on from what all have seen, the others from nothing
                seen = {name: value for name, value in resumed.items() if isinstance(value, torch.Tensor)}
                nothing: dict[str, Any] = {
                    name: torch.zeros_like(t) for name, t in seen.items() if name != "shift"
                }
                nothing |= {"waiting_residuals": None, "waiting_labels": None, "recentring": [0, 0]}
                resumed = resumed | nothing | {"num_skipped": 0}
            self.tracker.load_state_dict(self._resumed | {"statistics": resumed})
            self._resumed = None

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 (the hook's signature)
        pl_module: LightningModule,  # noqa: ARG002 (the hook's signature)
        outputs: Any,  # noqa: ARG002 (the hook's signature)
        batch: Any,
        batch_idx: int,  # noqa: ARG002 (the hook's signature)
    ) -> None:
        """Add the features of the step."""
        self._tracker.update(batch[1] if self.labels is None else self.labels(batch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the epoch and log the report."""
        accuracy = None
        if self.train_accuracy is not None:
            logged = trainer.callback_metrics
            if self.train_accuracy not in logged:
                raise ValueError(
                    f"no metric {self.train_accuracy!r} was logged; there are: {', '.join(sorted(logged))}"
                )
            # Logged without sync_dist it is that of this process.
            accuracy = float(trainer.strategy.reduce(logged[self.train_accuracy].clone(), reduce_op="mean"))
        self._tracker.end_epoch(accuracy, epoch=trainer.current_epoch)
        # Every process has the same numbers: the mean over them, which Lightning asks for, changes nothing.
        self._tracker.log(
            lambda numbers: pl_module.log_dict(
                {name: value for name, value in numbers.items() if name != "epoch"}, sync_dist=True
            ),
            self.prefix,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 (the hook's signature)
        """Leave the model as it was."""
        self._tracker.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002 (the hook's signature)
        """Leave the model as it was when training ends early, too."""
        if self.tracker is not None:
            self.tracker.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state of the tracker, for the checkpoint: of all processes, for only one of them is saved."""
        if self.tracker is None:
            return self._resumed or {}
        state = self.tracker.state_dict()
        if dist.is_available() and dist.is_initialized():
            whole = copy.deepcopy(self.tracker.statistics).all_reduce(self.tracker.group)
            state["statistics"] = whole.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a state until training starts."""
        self._resumed = state_dict or None

    @property
    def _tracker(self) -> Tracker:
        assert self.tracker is not None, "Lightning calls on_train_start first"
        return self.tracker
