"""class_scatter: counts, sums, sums of squares and the scatter matrix of every class, in one pass."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, SupportsIndex, cast

import torch

from ncfast.ops import dispatch

PRECISIONS = ("highest", "high", "medium")
FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ClassScatter(NamedTuple):
    """What one pass over N features of C classes in p dimensions leaves, about a shift k_c per class."""

    counts: torch.Tensor
    """[C] int64: n_c, the samples of class c."""
    sums: torch.Tensor
    """[C, p] float64: Σ_i (h_i − k_c) over the samples of class c."""
    sumsq: torch.Tensor
    """[C] float64: Σ_i ‖h_i − k_c‖² over the samples of class c."""
    scatter: torch.Tensor | None
    """[p, p] float64, symmetric: Σ_i (h_i − k_{y_i})(h_i − k_{y_i})ᵀ over all samples."""
    radii: torch.Tensor | None
    """[N] float32 or float64: ‖h_i − k_{y_i}‖, NaN for an ignored row."""


class WaitingRows:
    """Rows of small batches that are checked, less their shifts, and yet to be added, together.

    One visit to the p×p scatter, which is larger than a small batch, then serves many of them.
    """

    MOST = 1024
    """As many rows are added; with ROOM, below kMostWaiting of csrc/cpu/class_scatter.h."""
    MOST_OF_BATCH = 256
    """Rows of the largest batch that waits; what is larger gains less than that costs."""
    ROOM = MOST + MOST_OF_BATCH
    """A batch finds room."""

    def __init__(self, like: torch.Tensor) -> None:
        numbers = 64 // like.element_size()  # of a cache line
        # An odd number of lines: csrc/cpu/class_rows.h says why.
        row = numbers * ((like.shape[1] + numbers - 1) // numbers | 1)
        with torch.inference_mode(False):
            self._lines = like.new_empty(self.ROOM, row)
            self.residuals = self._lines[:, : like.shape[1]]
            """[ROOM, p], the first `filled` of which wait: h − k_y, of the shift's dtype."""
            self.labels = like.new_empty(self.ROOM, dtype=torch.int64)
            """[ROOM], each in [0, C)."""
            self.filled = like.new_zeros((), dtype=torch.int64)
            """[]: changed in the same call as the rows or the sums, which no signal can interrupt."""
        self.add: Callable[..., None] | None = None
        """`add_admitted` of the backend that admitted them; None where that was elsewhere."""

    @classmethod
    def of(cls, residuals: torch.Tensor, labels: torch.Tensor) -> "WaitingRows":
        """Let rows [R, p] wait, R ≤ ROOM, that have been checked."""
        waiting, rows = cls(residuals), len(residuals)
        waiting._lines[:rows] = 0  # what follows a row is multiplied, too, though to no end
        waiting.residuals[:rows] = residuals
        waiting.labels[:rows] = labels
        waiting.filled.fill_(rows)
        return waiting

    def __len__(self) -> int:
        return int(self.filled)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those waiting: residuals [filled, p] and labels [filled]."""
        rows = len(self)
        return self.residuals[:rows], self.labels[:rows]

    def __reduce__(self) -> tuple[Any, ...]:
        residuals, labels = self.rows()
        return WaitingRows.of, (residuals.clone(), labels.clone())


class RowError(ValueError):
    """A complaint about one row, which knows where that row is."""

    def __init__(self, template: str, row: int, values: dict[str, int]) -> None:
        super().__init__(template.format(row=row, **values))
        self.template, self.row, self.values = template, row, values

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError, (self.template, self.row, self.values)


@contextlib.contextmanager
def rows_from(start: int) -> Iterator[None]:
    """Number the rows complained about inside the `with` block from `start`: for callers that chunk."""
    try:
        yield
    except RowError as error:
        raise RowError(error.template, start + error.row, error.values) from None


def class_scatter(
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    *,
    scatter: bool = True,
    radii: bool = False,
    precision: str = "high",
    ignore_index: int = -100,
) -> ClassScatter:
    """Sum (h − k_y), ‖h − k_y‖² and (h − k_y)(h − k_y)ᵀ per class while reading the features once.

    The shift k_c is subtracted before anything is squared or rounded, so that rounding is relative to the
    within-class scale and not to ‖h‖: choose it within about a standard deviation of the class mean (the
    first feature seen will do).

    Args:
        features: [N, p] float32, float64, bfloat16 or float16; any strides.
        labels: [N] integer, each in [0, C) or equal to `ignore_index`. Ignored rows are never read.
        shift: [C, p]; rounded to float32, or to float64 when the features are float64, before it is used.
        scatter: also return the p×p scatter.
        radii: also return every sample's distance to its class's shift.
        precision: of the products in `scatter`, in the words of `torch.set_float32_matmul_precision`:
            "highest" is float32, "high" two bfloat16 per float32 (relative error about 2⁻¹⁶), "medium" one
            bfloat16. A backend may do better. float64 features are multiplied in float64. Counts, sums and
            sums of squares do not depend on it.
        ignore_index: the label of the rows to leave out.

    Returns:
        ClassScatter, in float64 whatever the features' dtype. A class without samples has zeros.

    Raises:
        TypeError: a dtype that is not listed above. ValueError: shapes or devices that do not agree, an
            unknown precision; on the CPU also a label outside [0, C), or a NaN or infinity in the features,
            naming the first such row. On other devices these two are the caller's duty: finding them would
            synchronise.
    """
    if torch.compiler.is_compiling():
        options = scatter, radii, precision, ignore_index
        counts, sums, sumsq, square, distances = torch.ops.ncfast.class_scatter(
            features.detach(), labels, shift.detach(), *options
        )
        return ClassScatter(counts, sums, sumsq, square if scatter else None, distances if radii else None)
    check_features(features)
    check_labels(labels, features)
    ignore_index = check_ignore_index(ignore_index)
    if labels.dtype != torch.int64 and (labels.dtype != torch.int32 or not -(2**31) <= ignore_index < 2**31):
        labels = labels.long()  # a uint8 cannot be compared with −100, nor an int32 with 2⁴⁰
    if shift.ndim != 2 or shift.shape[1] != features.shape[1]:
        raise ValueError(f"shift must have shape [C, {features.shape[1]}], got {list(shift.shape)}")
    if not shift.is_floating_point():
        raise TypeError(f"shift must be floating point, got {shift.dtype}")
    if shift.device != features.device:
        raise ValueError(f"shift is on {shift.device} but features are on {features.device}")
    check_in_memory(shift, "shift")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    run = dispatch.select("class_scatter", features, scatter=scatter, num_classes=shift.shape[0])
    return _checked(
        run,
        as_stored(features),
        labels,
        as_stored(shift, shift_dtype(features.dtype)),
        scatter=scatter,
        radii=radii,
        precision=precision,
        ignore_index=ignore_index,
    )


def _checked(
    run: Callable[..., ClassScatter],
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    *,
    ignore_index: int,
    **options: Any,
) -> ClassScatter:
    """`run` a backend's operation, and on the CPU raise for labels out of range and numbers not finite."""
    on_cpu = features.is_cpu
    checked = dispatch.beside(run, "class_scatter_checked") if on_cpu else None
    if on_cpu and checked is None:
        check_label_range(labels, shift.shape[0], ignore_index)
    result: ClassScatter = (checked or run)(features, labels, shift, ignore_index=ignore_index, **options)
    if on_cpu and checked is None and not result.sumsq.isfinite().all():
        raise_for_nonfinite(features, labels, ignore_index, shift)
    return result


# What torch.compile sees: one node, which it neither looks into nor breaks its graph at. What was not asked
# for is an empty tensor.
@torch.library.custom_op("ncfast::class_scatter", mutates_args=())
def _class_scatter_op(
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    scatter: bool,
    radii: bool,
    precision: str,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    result = class_scatter(
        features,
        labels,
        shift,
        scatter=scatter,
        radii=radii,
        precision=precision,
        ignore_index=ignore_index,
    )
    square = result.sums.new_empty(0, 0) if result.scatter is None else result.scatter
    distances = features.new_empty(0) if result.radii is None else result.radii
    return *result[:3], square, distances.to(shift_dtype(features.dtype))


@_class_scatter_op.register_fake
def _(
    features: torch.Tensor,
    labels: torch.Tensor,  # noqa: ARG001 (the operator's signature)
    shift: torch.Tensor,
    scatter: bool,
    radii: bool,
    precision: str,  # noqa: ARG001 (the operator's signature)
    ignore_index: int,  # noqa: ARG001 (the operator's signature)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    C, p = shift.shape
    side = p if scatter else 0
    return (
        shift.new_empty(C, dtype=torch.int64),
        shift.new_empty(C, p, dtype=torch.float64),
        shift.new_empty(C, dtype=torch.float64),
        shift.new_empty(side, side, dtype=torch.float64),
        features.new_empty(features.shape[0] if radii else 0, dtype=shift_dtype(features.dtype)),
    )


def accumulate(
    state: ClassScatter,
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    *,
    precision: str = "high",
    ignore_index: int = -100,
    waiting: WaitingRows | None = None,
) -> bool:
    """Add a checked batch to `state` in place; a class whose shift begins with a NaN gets its first feature.

    `waiting` are rows that are yet to be added about the same shifts.

    What raises leaves `state` and `shift` bit for bit as they were, `state.radii` apart: it belongs to the
    batch and is overwritten. `state.scatter` need hold no more than the diagonal and what is above it;
    returned is whether what is below is as right as it was. int64 or int32 labels, a contiguous `shift` of
    dtype `shift_dtype(features.dtype)`.

    Raises:
        ValueError: on the CPU, as `class_scatter` does for labels and features.

    """
    scatter = state.scatter is not None
    backend = dispatch.select("class_scatter", features, scatter=scatter, num_classes=len(shift))
    in_place = dispatch.beside(backend, "accumulate")
    # The first batch chooses most shifts: it goes where a bad choice can be mended.
    if in_place is None or not (waiting or state.counts.any()):
        accumulate_by_adding(backend, state, features, labels, shift, precision, ignore_index, waiting)
        return True
    options = {"precision": precision, "ignore_index": ignore_index, "waiting": waiting}
    return cast(bool, in_place(state, features, labels, shift, **options))


def admit(
    waiting: WaitingRows,
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    *,
    ignore_index: int = -100,
) -> bool:
    """Let a checked batch join those that wait; `accumulate` does the rest.

    Returns whether it did: not every backend does that. Chooses shifts and raises as `accumulate` does, and
    what raises leaves all as it was.
    """
    run = dispatch.select("class_scatter", features, "admit", num_classes=len(shift))
    if run is None:
        return False
    waiting.add = dispatch.beside(run, "add_admitted")
    return cast(bool, run(waiting, features, labels, shift, ignore_index=ignore_index))


def accumulate_waiting(state: ClassScatter, waiting: WaitingRows, *, precision: str = "high") -> None:
    """Add the rows that wait to `state` in place, to its scatter at least from the diagonal up."""
    add = waiting.add
    if add is None:
        scatter, C = state.scatter is not None, len(state.counts)
        backend = dispatch.select("class_scatter", waiting.residuals, scatter=scatter, num_classes=C)
        add = dispatch.beside(backend, "add_admitted")
    if add is not None:
        add(state, waiting, precision=precision)
    else:
        residuals, labels = waiting.rows()
        about_zero = torch.zeros_like(state.sums, dtype=residuals.dtype)
        accumulate_by_adding(
            backend, state, residuals, labels, about_zero, precision, -1, waiting, filled=waiting.filled
        )


def accumulate_by_adding(
    run: Callable[..., ClassScatter],
    state: ClassScatter,
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    precision: str,
    ignore_index: int,
    waiting: WaitingRows | None = None,
    filled: torch.Tensor | None = None,
) -> None:
    """Do what `accumulate` does through temporaries: `run` a backend's operation, then add its result.

    `filled` [] becomes zero when these are the waiting rows themselves.
    """
    sums_about = functools.partial(
        _checked,
        run,
        features,
        labels,
        scatter=state.scatter is not None,
        radii=state.radii is not None,
        precision=precision,
        ignore_index=ignore_index,
    )
    if features.is_cpu:
        check_label_range(labels, shift.shape[0], ignore_index)
    classes, overwritten = _choose_shift(shift, features, labels, ignore_index)
    try:
        batch = sums_about(shift)
        if features.is_cpu and len(classes):
            far = far_shifts(batch.counts, batch.sums, batch.sumsq) & (state.counts == 0)
            if waiting is not None:
                far[waiting.rows()[1]] = False
            if far.any():
                means = shift.double() + batch.sums / batch.counts[:, None]
                chosen = torch.where(far[:, None], means.to(shift.dtype), shift)
                batch = sums_about(chosen)
                shift.copy_(chosen)
    except BaseException:
        shift[classes] = overwritten
        raise
    if state.radii is not None and batch.radii is not None:
        state.radii.copy_(batch.radii)
    changes = [(state.counts, batch.counts), (state.sums, batch.sums), (state.sumsq, batch.sumsq)]
    if state.scatter is not None and batch.scatter is not None:
        changes.append((state.scatter, batch.scatter))
    if filled is not None:
        changes.append((filled, -filled))
    # All in one call: a signal is handled before it or after it.
    torch._foreach_add_(*zip(*changes, strict=True))


def _choose_shift(
    shift: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the first feature of every class without a shift into `shift`.

    Returns classes [K] and what stood in their rows: those written, or on a GPU, where finding them would
    synchronise, as many as may have been. The same class may be among them twice, with the same row.
    """
    N, C = features.shape[0], shift.shape[0]
    kept = labels != ignore_index
    y = torch.where(kept, labels, 0).long()
    rows = torch.where(kept, torch.arange(N, device=y.device), N)
    first = torch.full((C,), N, device=y.device).scatter_reduce_(0, y, rows, "amin")
    chosen = (first < N) & shift[:, 0].isnan()
    if features.is_cpu:
        classes = chosen.nonzero().squeeze(1)
    else:
        classes = y if N < C else torch.arange(C, device=y.device)
    overwritten = shift[classes]
    source = features[first[classes].clamp_(max=N - 1)].to(shift.dtype)
    shift[classes] = torch.where(chosen[classes][:, None], source, overwritten)
    return classes, overwritten


def far_shifts(counts: torch.Tensor, sums: torch.Tensor, sumsq: torch.Tensor) -> torch.Tensor:
    """[C] bool: the classes whose shift is more than two standard deviations from their mean.

    One sample has no deviation: its class is held to that of all classes together.
    """
    n = counts.clamp(min=1)
    drift = (sums / n[:, None]).square().sum(1)  # ‖μ_c − k_c‖²
    about_mean = torch.where(counts > 1, sumsq - n * drift, 0.0).clamp_(min=0.0)  # Σ‖h − μ_c‖²
    pooled = about_mean.sum() / (n - 1).sum().clamp(min=1)
    return drift > 4 * torch.where(counts == 1, pooled, about_mean / n)


def as_stored(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers as kernels find them at the tensor's address: no graph, and no negation still to come.

    Of `dtype` if one is given. Runs no operator that has nothing to do: when features have filled the caches,
    fetching the code of one again takes 10 to 20 µs (Zen 4).
    """
    if tensor.requires_grad or tensor.is_neg():
        tensor = tensor.detach().resolve_neg()
    return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)


def shift_dtype(features_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the shift is subtracted: float64 for float64 features, else float32."""
    return torch.float64 if features_dtype == torch.float64 else torch.float32


def check_in_memory(tensor: torch.Tensor, name: str) -> None:
    """Raise for a tensor whose numbers are not at its address: sparse, distributed, fake, freed."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
    if torch.compiler.is_compiling() or tensor.is_meta or tensor.numel() == 0:
        return
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # under vmap, which the reference takes
        return
    if address == 0:
        remedy = "its full_tensor()" if hasattr(tensor, "full_tensor") else "a plain tensor"
        kind = type(tensor).__name__
        raise TypeError(f"{name} must be in memory, but this {kind} has no address; pass {remedy}")


def check_features(features: torch.Tensor, name: str = "features") -> None:
    """Raise unless `features` is a [N, p] tensor of a dtype that the kernels read."""
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(features).__name__}")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, p] with p ≥ 1, got {list(features.shape)}")
    if features.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {features.dtype}")
    check_in_memory(features, name)


def check_labels(labels: torch.Tensor, features: torch.Tensor, name: str = "labels") -> None:
    """Raise unless `labels` is an integer tensor with one entry per row of `features`, on the same device."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name} must be integers (int64, int32, …), got {labels.dtype}")
    if labels.ndim != 1 or labels.shape[0] != features.shape[0]:
        raise ValueError(f"{name} must have shape [{features.shape[0]}], got {list(labels.shape)}")
    if labels.device != features.device:
        raise ValueError(f"{name} are on {labels.device} but features are on {features.device}")
    check_in_memory(labels, name)


def check_ignore_index(ignore_index: object) -> int:
    """Return it as an int, or raise if it is no integer of 64 bits."""
    try:
        index = operator.index(cast(SupportsIndex, ignore_index))
    except TypeError:
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}") from None
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, got {ignore_index}")
    return index


def check_label_range(labels: torch.Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise for the first label that is neither in [0, C) nor `ignore_index`. Synchronises on a GPU."""
    if len(labels) == 0:
        return
    least, most = labels.aminmax()
    if (least >= 0) & (most < num_classes):
        return  # the common case takes one pass
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise RowError(
            "label {label} in row {row} is outside [0, {C})",
            row,
            {"label": int(labels[row]), "C": num_classes},
        )


def nonfinite_rows(features: torch.Tensor) -> torch.Tensor:
    """[N] bool: the rows that hold a NaN or an infinity."""
    if not features.is_cpu:
        return ~features.isfinite().all(1)
    # One number per row first: a sum that is finite has finite terms. One that is not may have overflowed.
    bad = ~features.sum(1, dtype=shift_dtype(features.dtype)).isfinite()
    bad[bad.clone()] = ~features[bad].isfinite().all(1)
    return bad


def raise_for_nonfinite(
    features: torch.Tensor, labels: torch.Tensor, ignore_index: int, shift: torch.Tensor | None = None
) -> None:
    """Raise naming the first row in use, or shift, with a NaN or infinity; or for squares that overflow."""
    used = labels != ignore_index
    bad = nonfinite_rows(features) & used
    if bad.any():
        raise RowError("features hold a NaN or an infinity in row {row}", int(bad.nonzero()[0]), {})
    if shift is not None:
        classes = labels[used].long().unique()
        bad = nonfinite_rows(shift[classes])
        if bad.any():
            raise ValueError(f"the shift of class {int(classes[bad][0])} holds a NaN or an infinity")
    remedy = "scale them down" if features.dtype == torch.float64 else "pass them as float64"
    raise ValueError(f"features are so large that their squares overflow; {remedy}")
