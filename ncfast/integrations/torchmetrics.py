"""NeuralCollapse: the numbers of a `CollapseReport` as a torchmetrics Metric."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from ncfast.collapse import check_global_mean, collapse
from ncfast.measure import classifier_of, flattened
from ncfast.statistics import ClassStatistics

MEANS_FIELDS: tuple[str, ...] = (
    "nc1",
    "nc2_equinorm_means",
    "nc2_equiangular_means",
    "nc2_max_angle_means",
    "trace_within",
    "trace_between",
    "trace_ratio",
    "cdnv",
    "etf_error_means",
    "gnc2",
)
CLASSIFIER_FIELDS = (
    "nc2_equinorm_classifier",
    "nc2_equiangular_classifier",
    "nc2_max_angle_classifier",
    "nc3_self_duality",
    "etf_error_classifier",
    "etf_error_product",
    "unc3",
)

# The state of the metric: tensors that a ClassStatistics keeps as _counts, _shift and so on.
_STATES = ("counts", "shift", "sums", "sumsq", "scatter", "skipped", "refused")


class NeuralCollapse(Metric):
    """NC1–NC3 and their kin of all features seen, as a dict of float64 scalars.

    As input `update` and `forward` take features [..., p] and their integer labels [...]; the fields are
    those of `ncfast.CollapseReport`, NaN where not measurable. NC4 needs the features a second time: it is
    not among them.

    The state is that of `ncfast.ClassStatistics`. Its moments are about shifts that every process chose for
    itself, so that they cannot be summed state by state: processes are merged by
    `ClassStatistics.all_reduce`, and two states of one process, as in `forward` or `merge_state`, by its
    `merge`. The state stays float64 under `half`, `set_dtype` and `to(dtype)`.

    Args:
        num_classes: C.
        dim: p.
        head: a module with a weight [C, p], read whenever the metric is computed; without it the classifier's
            fields are absent. Not a submodule of the metric, and shared by copies of it.
        scatter: False leaves out NC1 and makes a batch cost O(p) per sample.
        precision: as in `ncfast.class_scatter`.
        global_mean: "samples" or "classes".
        ignore_index: label of the samples to leave out.
        nonfinite: "error" or "skip".
        kwargs: those of torchmetrics.Metric.

    Its states are those of `ClassStatistics`; below the diagonal, `scatter` is out of date.

    Raises:
        ValueError: an option that is not known; and what `ClassStatistics` and `collapse` raise.

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    shift: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        head: torch.nn.Module | None = None,
        *,
        scatter: bool = True,
        precision: str = "high",
        global_mean: str = "samples",
        ignore_index: int = -100,
        nonfinite: str = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_global_mean(global_mean)
        self.global_mean = global_mean
        self._head = None if head is None else _Shared(head)
        self.fields = MEANS_FIELDS if head is None else MEANS_FIELDS + CLASSIFIER_FIELDS
        if not scatter:
            self.fields = tuple(name for name in self.fields if name != "nc1")
        empty = ClassStatistics(
            num_classes,
            dim,
            scatter=scatter,
            precision=precision,
            ignore_index=ignore_index,
            nonfinite=nonfinite,
        )
        for state in _STATES:
            tensor = vars(empty)[f"_{state}"]
            if tensor is not None:
                # Never reduced on its own, but by `_sync_dist` and `_reduce_states` together.
                self.add_state(state, tensor, dist_reduce_fx=None)
        self._options = empty.to("meta")  # the states live in the metric
        self._options._rows_may_wait = False

    def update(self, features: torch.Tensor, target: torch.Tensor) -> None:
        """Add features [..., p] and their labels [...]: see `ncfast.ClassStatistics.update`."""
        if features.dtype == torch.float64:  # then all is added in place, and nothing can be lost on the way
            self.shift = self.shift.double()
        stats = self._statistics(self.metric_state)
        stats.update(*flattened(features.detach(), target))
        self._keep(stats)

    def compute(self) -> dict[str, torch.Tensor]:
        """The fields by name; all NaN without samples, as of a batch whose labels are all ignored."""
        classifier = (None, None) if self._head is None else classifier_of(self._head.module)
        stats = self._statistics(self.metric_state)
        report = collapse(stats, *classifier, global_mean=self.global_mean) if stats.num_samples else None
        values = ((name, getattr(report, name, None)) for name in self.fields)
        return {
            name: torch.tensor(torch.nan if value is None else value, dtype=torch.float64, device=self.device)
            for name, value in values
        }

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one computed dict, or a sequence of them, by torchmetrics' own plotting."""
        return self._plot(val, ax)

    def _statistics(self, states: dict[str, Any]) -> ClassStatistics:
        """A ClassStatistics over these very tensors, or copies of those that it could not write to."""
        stats = copy.copy(self._options)
        tensors: dict[str, Any] = dict.fromkeys(_STATES)
        for state in self._defaults:
            ours, given = vars(self._options)[f"_{state}"], states[state]
            if given.shape != ours.shape:
                raise ValueError(f"{state} must have shape {list(ours.shape)}, got {list(given.shape)}")
            wide = state == "shift" and given.dtype == torch.float64
            tensors[state] = given.to(torch.float64 if wide else ours.dtype).contiguous()
        stats._replace(**tensors)
        return stats

    def _keep(self, stats: ClassStatistics) -> None:
        # All at once, whatever signals come.
        vars(self).update({state: vars(stats)[f"_{state}"] for state in self._defaults})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for state in self._defaults:  # which are now the tensors in the dictionary, not to be written to
            setattr(self, state, getattr(self, state).clone())

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        missing = set(self._defaults) - set(incoming_state)
        if missing:
            raise ValueError(f"the incoming state lacks {', '.join(sorted(missing))}")
        incoming = {name: incoming_state[name].clone() for name in self._defaults}
        self._keep(self._statistics(incoming).merge(self._statistics(self.metric_state)))

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        group = process_group or self.process_group
        stats = self._statistics(self.metric_state)
        if dist_sync_fn is gather_all_tensors:
            self._keep(stats.all_reduce(group))
            return
        gathered = {name: dist_sync_fn(getattr(self, name), group=group) for name in self._defaults}
        for rank, tensors in enumerate(zip(*gathered.values(), strict=True)):
            other = self._statistics(dict(zip(gathered, tensors, strict=True)))
            stats = copy.deepcopy(other) if rank == 0 else stats.merge(other)
        self._keep(stats)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(tensor).device)  # and nothing else

        return super()._apply(moved, exclude_state)


class _Shared:
    """A module that belongs to someone else: copies of the metric go on reading the same one."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self
