"""measure() and measure_model(): the one-call entry points."""

import contextlib
import dataclasses
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ncfast.collapse import CollapseReport, check_classifier, check_global_mean, collapse_and_distances
from ncfast.ops import dispatch
from ncfast.ops.affine_argmax import affine_argmax, center_rule
from ncfast.ops.certify import certify
from ncfast.ops.class_scatter import (
    check_features,
    check_ignore_index,
    check_label_range,
    check_labels,
    class_scatter,
    nonfinite_rows,
    raise_for_nonfinite,
    rows_from,
    shift_dtype,
)
from ncfast.ops.pair_geometry import decision_radius, radius_bound
from ncfast.statistics import ClassStatistics

Array = torch.Tensor | np.ndarray
T = TypeVar("T")

_CHUNK = 1 << 28  # elements of the features handled at once
_REFERENCE_CHUNK = 1 << 26  # the same where float64 copies of them are held
_GATHERED = 1 << 26  # elements of rows without a certificate copied at once
# Rows per class behind the shift: its distance from the mean, and what it adds to the radii, is then σ/4.
_SHIFT_ROWS = 16


def measure(
    features: Array,
    labels: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    test: tuple[Array, Array] | None = None,
    global_mean: str = "samples",
    precision: str = "high",
    ignore_index: int = -100,
    nonfinite: str = "error",
    progress: bool = False,
    num_classes: int | None = None,
    certificates: bool = True,
) -> CollapseReport:
    """Measure NC1–NC4 and their kin of a set of features held in memory, or memory-mapped.

    The features are read once for the statistics. Samples whose distance to their class mean is below the
    decision radius of both rules are decided by that alone; only the others are read again for NC4.

    A GPU is waited for to read the numbers of NC1–NC3, to gather the samples to read again, and to read those
    of NC4; before that only for C itself, where neither `weight` nor `num_classes` gives it. See `collapse`
    for what else waits where classes are absent.

    Args:
        features: [N, p] last-layer training features, float32, float64, bfloat16 or float16; torch.Tensor or
            numpy array.
        labels: [N] integers in [0, C), or `ignore_index`.
        weight: [C, p] the classifier W; None leaves its numbers, NC4 among them, None.
        bias: [C] the classifier's b; None means zeros.
        test: (features [M, p], labels [M]) on which to measure NC4 and the test accuracy, with `weight` only;
            None measures NC4 on the training data. Class means are always those of the training data.
        global_mean: what μ_G averages over: "samples" (the paper's) or "classes".
        precision: of the scatter's products: "highest", "high" or "medium"; see `ncfast.class_scatter`.
        ignore_index: label of the rows to leave out.
        nonfinite: "error" raises for a row with a NaN or an infinity, naming it; "skip" leaves it out.
        progress: show a progress bar (needs tqdm).
        num_classes: C; by default the rows of `weight`, else the largest label + 1.
        certificates: False scores every sample; the numbers are the same.

    Returns:
        CollapseReport.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, labels or options that do not agree, no samples.

    Source: Papyan, Han & Donoho (PNAS 2020), Figs. 2–7; see `CollapseReport` for every number.
    """
    check_global_mean(global_mean)
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    ignore_index = check_ignore_index(ignore_index)
    if test is not None and weight is None:
        raise ValueError("test data were given without weight: nothing is measured on them")
    if test is not None and (not isinstance(test, Sequence) or len(test) != 2):
        raise TypeError("test must be a pair (features, labels)")
    h, y = _labelled(features, labels, "features", "labels")
    W = None if weight is None else as_tensor(weight, "weight")
    b = None if bias is None else as_tensor(bias, "bias")
    if W is not None and W.ndim != 2:
        raise ValueError(f"weight must have shape [C, {h.shape[1]}], got {list(W.shape)}")
    if num_classes is None:
        num_classes = _inferred_classes(y, ignore_index) if W is None else len(W)
    check_classifier(W, b, num_classes, h.shape[1], h.device)
    here = h.device.type == "cpu"  # on a GPU rows are checked on the device, and complained about later
    if here:
        check_label_range(y, num_classes, ignore_index)
    if test is not None:
        test_h, test_y = _labelled(*test, "test features", "test labels")
        if test_h.shape[1] != h.shape[1] or test_h.device != h.device:
            raise ValueError(f"test features must have shape [M, {h.shape[1]}] and be on {h.device}")
        if here:
            check_label_range(test_y, num_classes, ignore_index)
    stats = ClassStatistics(
        num_classes,
        h.shape[1],
        precision=precision,
        ignore_index=ignore_index,
        nonfinite=nonfinite,
        device=h.device,
        shift=_sampled_shift(h, y, num_classes, ignore_index),
    )
    seen = []
    for rows in _chunks(h, progress, "statistics"):
        with rows_from(rows.start):
            seen.append(stats.accumulate(h[rows], y[rows]))
    radii = torch.cat(seen)
    try:
        report, present, distances = collapse_and_distances(stats, W, b, global_mean=global_mean)
    except ValueError:
        if stats.num_refused:
            _raise_for_refused(h, y, num_classes, ignore_index)
        raise
    if W is None:
        return report
    means = stats.means
    gap = (stats.shift - means).norm(dim=1)
    rules = W, b, means, present, distances, certificates
    on_train = _Decisions(*rules, nearest_center=test is None)
    counts = [
        on_train.count(h[rows], y[rows], radii[rows], gap) for rows in _chunks(h, progress, "train decisions")
    ]
    train = _Tally.of(counts)
    if test is None:
        return dataclasses.replace(report, nc4_data="train", train_accuracy=train.accuracy, **train.nc4())
    on_test = _Decisions(*rules)
    counts = []
    for rows in _chunks(test_h, progress, "test decisions"):
        with rows_from(rows.start):
            counts.append(on_test.count_new(test_h[rows], test_y[rows], ignore_index, nonfinite))
    held_out = _Tally.of(counts)
    if held_out.refused:
        _raise_for_refused(test_h, test_y, num_classes, ignore_index)
    return dataclasses.replace(
        report,
        nc4_data="test",
        train_accuracy=train.accuracy,
        test_accuracy=held_out.accuracy,
        **held_out.nc4(),
    )


def measure_model(
    model: torch.nn.Module,
    train_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    head: torch.nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    global_mean: str = "samples",
    precision: str = "high",
    ignore_index: int = -100,
    nonfinite: str = "error",
    progress: bool = False,
) -> CollapseReport:
    """Measure a model as the paper does: frozen weights, eval mode, the features that enter its last layer.

    The features are captured by a forward pre-hook and streamed: no more than a batch is held. NC4 needs the
    final class means, so it takes a second read: of `test_loader`, or without one of `train_loader`. A
    `train_loader` that can be read only once (an iterator) has its features kept for that instead. Training
    mode, grad mode and hooks are left as found.

    Args:
        model: any module; its other outputs are ignored.
        train_loader: any iterable of (inputs, labels). Inputs are a tensor, a tuple or list of positional
            arguments, or a dict of keyword arguments of the model; labels are integers in [0, C) or
            `ignore_index`. Features [..., p] are flattened to [N, p], and labels with them.
        test_loader: the same, for NC4 and the test accuracy.
        head: the classifier, a module with a `weight` [C, p] and optionally a `bias` [C] that is called once
            per forward pass; by default the last torch.nn.Linear among `model.modules()`.
        device: where to run; by default where the head's weight is.
        global_mean: as in `measure`.
        precision: as in `measure`.
        ignore_index: as in `measure`.
        nonfinite: as in `measure`.
        progress: as in `measure`.

    Returns:
        CollapseReport.

    Raises:
        TypeError, ValueError: no linear layer, a batch that is no (inputs, labels) pair, labels that do not
            fit, no samples. What the model itself raises passes through.

    Source: Papyan, Han & Donoho (PNAS 2020), §3.
    """
    check_global_mean(global_mean)
    head = find_head(model, head)
    W, b = classifier_of(head)
    place = W.device if device is None else torch.device(device)
    W, b = W.to(place), None if b is None else b.to(place)
    num_classes, dim = W.shape
    check_classifier(W, b, num_classes, dim, place)
    stats = ClassStatistics(
        num_classes,
        dim,
        precision=precision,
        ignore_index=ignore_index,
        nonfinite=nonfinite,
        device=place,
    )
    once = isinstance(train_loader, Iterator)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    seen = correct = 0
    with _frozen(model), _captured(_local(model), head, place) as features_of:
        for batch in progress_bar(train_loader, progress, "train"):
            h, y = features_of(batch)
            with rows_from(seen):
                stats.update(h, y)
            seen += len(h)
            used = y != ignore_index
            if nonfinite == "skip":
                used &= ~nonfinite_rows(h)
            decided = cast(torch.Tensor, affine_argmax(h[used], W, b))
            correct += int((decided == y[used]).sum())
            if once and test_loader is None:
                held.append((h, y))
        report, present, distances = collapse_and_distances(stats, W, b, global_mean=global_mean)
        decisions = _Decisions(W, b, stats.means, present, distances)
        counts = []
        if held:
            second: Iterable[tuple[torch.Tensor, torch.Tensor]] = held
        else:
            loader = train_loader if test_loader is None else test_loader
            second = map(features_of, progress_bar(loader, progress, "NC4"))
        seen = 0
        for h, y in second:
            with rows_from(seen):
                counts.append(decisions.count_new(h, y, ignore_index, nonfinite))
                if _Tally.of(counts[-1:]).refused:
                    _raise_for_refused(h, y, num_classes, ignore_index)
            seen += len(h)
    tally = _Tally.of(counts)
    return dataclasses.replace(
        report,
        nc4_data="train" if test_loader is None else "test",
        train_accuracy=correct / report.num_samples,
        test_accuracy=None if test_loader is None else tally.accuracy,
        **tally.nc4(),
    )


@dataclasses.dataclass(frozen=True)
class _Tally:
    """How many samples were decided, and how."""

    total: int = 0
    certified: int = 0
    correct: int = 0
    disagreeing: int = 0
    refused: int = 0  # of rows not seen before, on a GPU: zero unless some should have been complained about

    @classmethod
    def of(cls, counts: list[torch.Tensor]) -> "_Tally":
        """Add up what `_Decisions.count` or `count_new` returned and wait for it."""
        return cls(*torch.stack(counts).sum(0).tolist()) if counts else cls()

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.total if self.total else None

    def nc4(self) -> dict[str, Any]:
        """The report's fields; None without samples."""
        share = {"nc4_disagreement": self.disagreeing, "certified_share": self.certified}
        return {name: count / self.total if self.total else None for name, count in share.items()}


class _Decisions:
    """The classifier's decisions, and those of the nearest class centre, with certificates where they hold.

    A sample of class a within the decision radius ρ_a of μ_a (`decision_radius`) is decided a by every rule:
    no scores are needed. Its distance is bounded from what the one pass returned, ‖h − μ_a‖ ≤ ‖h − k_a‖ +
    ‖k_a − μ_a‖, each rounded up, and ρ_a is rounded down, so that a certified sample is one that exact
    arithmetic would decide the same way.

    Where a bound of ρ_a from below is cheaper, that is tried first: it decides every sample once training has
    collapsed.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        means: torch.Tensor,
        present: torch.Tensor,  # the classes with a mean
        distances: torch.Tensor,  # from each of these means to the nearest other
        certificates: bool = True,
        nearest_center: bool = True,
    ) -> None:
        self.weight, self.means, self.nearest_center, self.present = weight, means, nearest_center, present
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.anchors = means if len(present) == len(means) else means[present]
        self.distances = distances
        self.limits = [means.new_full((len(means),), -torch.inf)]
        """[C] for each rule: a sample nearer to its class's mean than that is decided for its class."""
        self.bounded = False
        """Whether they come from lower bounds of the radii, which do as long as every sample is decided."""
        if certificates:
            bound = radius_bound(weight, self.bias, self.anchors, present)
            self.bounded = bound is not None
            self._limit(self._radius() if bound is None else bound)

    def _radius(self) -> torch.Tensor:
        return decision_radius(self.weight, self.bias, self.anchors, self.present)

    def _limit(self, radius: torch.Tensor) -> None:
        """Set the limits from the classifier's radii [C present], or lower bounds of them."""
        radii = [radius, 0.5 * self.distances] if self.nearest_center else [radius]
        norms = self.anchors.norm(dim=1)
        # The distances are of means less μ_G, which is no larger than the largest of them.
        unit, reach = (self.means.shape[1] + 4) * 2.0**-52, norms + norms.max()
        lower = [own.where(own.isinf(), own - unit * (reach + own.abs())) for own in radii]
        nothing = self.means.new_full((len(self.means),), -torch.inf)  # is what an absent class certifies
        self.limits = [nothing.index_copy(0, self.present, own) for own in lower]

    @functools.cached_property
    def rules(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What decides the samples without a certificate."""
        classifier = (self.weight, self.bias)
        return [classifier, center_rule(self.anchors)] if self.nearest_center else [classifier]

    @functools.cached_property
    def centers(self) -> torch.Tensor:
        """[C, p]: the means, zeros for an absent class."""
        return self.means.nan_to_num()

    def count(
        self, features: torch.Tensor, labels: torch.Tensor, radii: torch.Tensor, gap: torch.Tensor
    ) -> torch.Tensor:
        """Decide the rows whose `radii` [N], ‖h − k_y‖, are no NaN; `gap` [C] is ‖k_c − μ_c‖.

        Returns [4] int64, the fields of a `_Tally` but the last.
        """
        p = features.shape[1]
        # p float32 squares were added, of differences rounded once; squares below 2⁻¹⁴⁹ were lost.
        samples = radii, labels, gap * (1 + (p + 8) * 2.0**-52)
        rounding = {"scale": 1 + (p + 8) * 2.0**-24, "offset": p**0.5 * 2.0**-62}
        total, _, rows = certify(*samples, self.limits, **rounding)
        if self.bounded and len(rows):
            self.bounded = False
            self._limit(self._radius())
            total, _, rows = certify(*samples, self.limits, **rounding)
        correct, disagreeing = total - len(rows), torch.zeros_like(total)
        everyone = len(rows) == len(features)
        parts = [rows] if everyone else rows.split(max(1, _GATHERED // p))
        for part in parts if len(rows) else ():
            scored = features if everyone else features[part]
            weights, biases = zip(*self.rules, strict=True)
            by_classifier, *by_center = affine_argmax(scored, weights, biases)
            correct = correct + (by_classifier == labels[part]).sum()
            if by_center:
                disagreeing = disagreeing + (by_classifier != self.present[by_center[0]]).sum()
        return torch.stack([total, total - len(rows), correct, disagreeing])

    def count_new(
        self, features: torch.Tensor, labels: torch.Tensor, ignore_index: int, nonfinite: str
    ) -> torch.Tensor:
        """Decide rows that the statistics have not seen: check them and get their distance to μ_y first.

        Returns [5] int64, the fields of a `_Tally`.
        """
        if nonfinite == "skip":
            labels = torch.where(nonfinite_rows(features), ignore_index, labels)
        if features.device.type == "cpu":
            check_label_range(labels, len(self.means), ignore_index)
        known = (labels >= 0) & (labels < len(self.means)) | (labels == ignore_index)
        y = torch.where(known, labels, ignore_index)
        shift = self.centers.to(shift_dtype(features.dtype))
        seen = class_scatter(features, y, shift, scatter=False, radii=True, ignore_index=ignore_index)
        gap = (shift - self.centers).norm(dim=1)
        counts = self.count(features, labels, cast(torch.Tensor, seen.radii), gap)
        refused = (~known).sum() + (~seen.sumsq.isfinite()).sum()
        return torch.cat([counts, refused[None]])


def _raise_for_refused(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, ignore_index: int
) -> None:
    """Raise naming the first row that was refused on a GPU."""
    check_label_range(labels, num_classes, ignore_index)
    raise_for_nonfinite(features, labels, ignore_index)


def _sampled_shift(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, ignore_index: int
) -> torch.Tensor:
    """[C, p]: the mean of the first rows of every class, NaN where one is not finite, or none is there."""
    dtype = shift_dtype(features.dtype)
    if len(labels) == 0:
        return features.new_full((num_classes, features.shape[1]), torch.nan, dtype=dtype)
    kept = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    y, order = torch.where(kept, labels, num_classes).sort(stable=True)
    starts = torch.searchsorted(y, torch.arange(num_classes + 1, device=y.device))
    rank = torch.arange(len(y), device=y.device) - starts[y]
    sampled = torch.empty_like(labels)
    sampled[order] = torch.where((rank < _SHIFT_ROWS) & (y < num_classes), y, ignore_index)
    first = features[order[starts[:-1].clamp(max=len(y) - 1)]].to(dtype)  # another class's for an absent one
    run = dispatch.select("class_scatter", features, scatter=False)
    counts, sums = y.new_zeros(num_classes), first.new_zeros(first.shape, dtype=torch.float64)
    for chunk in _chunks(features):
        seen = run(features[chunk], sampled[chunk], first, scatter=False, ignore_index=ignore_index)
        counts += seen.counts
        sums += seen.sums
    means = first + sums / counts[:, None]
    return means.masked_fill_(~means.sum(1, keepdim=True).isfinite(), torch.nan).to(dtype)


def _labelled(
    features: Array, labels: Array, features_name: str, labels_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    h, y = as_tensor(features, features_name), as_tensor(labels, labels_name)
    check_features(h, features_name)
    check_labels(y, h, labels_name)
    return h, y.long()


def as_tensor(array: Array, name: str) -> torch.Tensor:
    """A detached tensor that shares the array's memory, memory-mapped and read-only arrays included."""
    if isinstance(array, torch.Tensor):
        return array.detach()
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a torch.Tensor or a numpy array, got {type(array).__name__}")
    if not array.dtype.isnative:
        raise TypeError(f"{name} must be in native byte order, got {array.dtype}")
    if any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has no negative strides
    with warnings.catch_warnings():
        # torch warns that it could write to a read-only array; nothing here does.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _inferred_classes(labels: torch.Tensor, ignore_index: int) -> int:
    """The largest label + 1, unless that looks like one corrupt label that would ask for a huge [C, p]."""
    none = torch.iinfo(torch.int64).min
    largest = int(torch.where(labels != ignore_index, labels, none).max()) if len(labels) else none
    if largest == none:
        raise ValueError("there are no labelled samples; pass num_classes or weight to measure an empty set")
    num_classes = max(0, largest) + 1
    if num_classes > 1000 + 10 * len(labels):
        raise ValueError(
            f"the largest label is {num_classes - 1} among {len(labels)} samples; "
            "pass num_classes if that is right"
        )
    return num_classes


def _chunks(features: torch.Tensor, progress: bool = False, title: str = "") -> Iterable[slice]:
    """Slices of rows that together cover the features; at least one."""
    elements = _REFERENCE_CHUNK if dispatch.pick("class_scatter", features) == "reference" else _CHUNK
    size = max(1, (_REFERENCE_CHUNK >> 4 if progress else elements) // features.shape[1])
    starts = range(0, max(1, len(features)), size)
    return progress_bar([slice(start, start + size) for start in starts], progress, title)


def progress_bar(iterable: Iterable[T], progress: bool, title: str) -> Iterable[T]:
    """The iterable itself, under a progress bar where one was asked for."""
    if not progress:
        return iterable
    if importlib.util.find_spec("tqdm") is None:
        raise ImportError("progress=True needs tqdm (pip install tqdm)")
    from tqdm.auto import tqdm

    return tqdm(iterable, desc=title)


def find_head(model: torch.nn.Module, head: torch.nn.Module | None = None) -> torch.nn.Module:
    """The classifier of a model: `head`, or the last torch.nn.Linear among `model.modules()`."""
    if head is None:
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        if not linear:
            raise ValueError("the model has no torch.nn.Linear; pass head=")
        return linear[-1]
    with _marked_eval(head):
        weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise TypeError(f"head must be a module with a weight [C, p], got {type(head).__name__}")
    return head


def classifier_of(head: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weight [C, p] and, if it has one, its bias [C], detached, and whole where they are DTensors.

    As of now, also where a hook makes them before every forward pass (weight_norm, spectral_norm, pruning).
    The head is left as it was.
    """
    made = {name: value for name, value in vars(head).items() if name in ("weight", "bias")}
    try:
        with _marked_eval(head):
            for hook in head._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                    hook(head, ())
            weight, bias = cast(torch.Tensor, head.weight), getattr(head, "bias", None)
            return _whole(weight), None if bias is None else _whole(bias)
    finally:
        vars(head).update(made)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Detached; of a DTensor all of it, for which the ranks that share it have to meet."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()


def _local(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel, whose forward pass waits for the other ranks."""
    while isinstance(
        parallel := getattr(model, "_orig_mod", model), torch.nn.parallel.DistributedDataParallel
    ):
        model = parallel.module
    return model


def flattened(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [..., p] as [N, p] and labels [...] as [N]; one of them may be flat already."""
    ours, theirs = ([n for n in shape if n != 1] for shape in (features.shape[:-1], labels.shape))
    if len(ours) > 1 and len(theirs) > 1 and ours != theirs:
        raise ValueError(f"labels must have shape {list(features.shape[:-1])}, got {list(labels.shape)}")
    return features.reshape(-1, features.shape[-1]), labels.reshape(-1)


def entered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What a head was called with: its one argument, by position or by name."""
    return next(iter((*args, *kwargs.values())))


@contextlib.contextmanager
def _marked_eval(head: torch.nn.Module) -> Iterator[None]:
    """Training flags off, with nothing that a module's own `eval` may do to its weight."""
    training = {module: module.training for module in head.modules()}
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, nothing compiled; every module then goes back to its own mode."""
    # What torch.compile made earlier does not see a hook added since. Where nothing was compiled, Dynamo is
    # not imported for it: that takes seconds.
    compiled = "torch._dynamo" in sys.modules
    eagerly = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    training = {module: module.training for module in model.modules()}  # parents first
    try:
        model.eval()
        with torch.no_grad(), eagerly:
            yield
    finally:
        for module, flag in training.items():
            if module.training != flag:
                module.train(flag)  # which may do more than that, or less
                module.training = flag


@contextlib.contextmanager
def _captured(
    model: torch.nn.Module, head: torch.nn.Module, device: torch.device
) -> Iterator[Callable[[Any], tuple[torch.Tensor, torch.Tensor]]]:
    """Yield a function from a batch to (features [N, p], labels [N]), the features entering `head`."""
    captured: list[torch.Tensor] = []

    def capture(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy: what follows may write to it.
        captured.append(entered(args, kwargs).detach().clone())

    hook = head.register_forward_pre_hook(capture, with_kwargs=True)

    def features_of(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise TypeError(f"the loader must yield (inputs, labels) pairs, got {type(batch).__name__}")
        inputs, labels = _moved(batch[0], device), torch.as_tensor(batch[1]).to(device)
        captured.clear()
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, Sequence):
            model(*inputs)
        else:
            model(inputs)
        if len(captured) != 1:
            raise ValueError(
                f"head must be called once per forward pass, but was called {len(captured)} times"
            )
        features, labels = flattened(captured[0], labels)
        check_labels(labels, features)
        return features, labels.long()

    try:
        yield features_of
    finally:
        hook.remove()


def _moved(inputs: Any, device: torch.device) -> Any:
    """Inputs with every tensor in them on `device`."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: _moved(value, device) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_moved(value, device) for value in inputs]
    return inputs
