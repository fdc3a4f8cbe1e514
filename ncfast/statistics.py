"""ClassStatistics: what a stream of labelled features leaves behind, mergeable and exact in deep collapse."""

import contextlib
import hashlib
import io
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from ncfast.ops.class_scatter import (
    PRECISIONS,
    ClassScatter,
    WaitingRows,
    accumulate,
    accumulate_waiting,
    admit,
    as_stored,
    check_features,
    check_ignore_index,
    check_in_memory,
    check_label_range,
    check_labels,
    far_shifts,
    nonfinite_rows,
    shift_dtype,
)

_FORMAT = 3  # of state_dict(): raise it when the meaning of an entry changes
# Of a row about its shift: a sum of 2²⁰ of twice that stays finite, and no kernel takes it for an overflow.
_MOST_SQUARE = {dtype: torch.finfo(dtype).max * 2.0**-21 for dtype in (torch.float32, torch.float64)}
_MAGIC = b"ncfast ClassStatistics\n"  # begins a file of `save`; the SHA-256 of the rest follows


class ClassStatistics:
    """Counts, means and within-class scatter of C classes in p dimensions, from any number of batches.

    The state is counts n_c, a shift k_c per class and three sums about that shift, all in float64:
    Σ(h − k_y) [C, p], Σ‖h − k_y‖² [C] and Σ(h − k_y)(h − k_y)ᵀ [p, p]. They add up over batches. The shift,
    the first feature seen of a class, keeps every term at the within-class scale, so that nothing cancels
    however far training has collapsed; where that feature was an outlier, `update` moves it to the mean.
    `merge` is the exact pairwise formula of Chan, Golub & LeVeque (1983), written about the shift.

    Averages are the paper's `Ave` operators (Papyan, Han & Donoho, PNAS 2020): Σ_W, Σ_T and μ_G average over
    samples, Σ_B over classes, also when the classes are unbalanced. Classes without a sample are left out.

    On the CPU the rows of small batches, less their shifts, wait until there are a thousand or a number is
    read: with larger batches the products come nearer to what the machine can do. The last bits of the sums
    then depend on when numbers were read; saving a state leaves the rows waiting, and keeps them.

    Args:
        num_classes: C.
        dim: p.
        scatter: keep the p×p scatter; without it Σ_W, Σ_T and NC1 are not available, and a batch costs O(p)
            per row.
        precision: "highest", "high" or "medium", of the products in the scatter: see
            `ncfast.ops.class_scatter`.
        ignore_index: label of the rows to leave out.
        nonfinite: "error" raises for a row with a NaN or an infinity; "skip" leaves it out and counts it.
        device: where the state lives; the features must be there too.
        shift: [C, p] floating point, to start from instead of the first features; a row of NaN is still to be
            chosen, any other must be finite.

    `counts`, `shift`, `sums`, `sumsq` and `scatter` are the state itself: clone what is to be kept, or sent
    to another process by torch.multiprocessing, which shares tensors. All other properties are new.
    Threads may update one object at once; one that reads meanwhile gets a `scatter` and a `state_dict` of one
    moment, but of other numbers parts may be of different moments.

    Raises:
        TypeError, ValueError: for a number below 1, an unknown option, a shift that does not fit.

    """

    _lock: "_Lock | None" = None  # not made by __init__, which torch.compile traces

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        scatter: bool = True,
        precision: str = "high",
        ignore_index: int = -100,
        nonfinite: str = "error",
        device: torch.device | str | None = None,
        shift: torch.Tensor | None = None,
    ) -> None:
        if num_classes < 1 or dim < 1:
            raise ValueError(f"num_classes and dim must be at least 1, got {num_classes} and {dim}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if nonfinite not in ("error", "skip"):
            raise ValueError(f'nonfinite must be "error" or "skip", got {nonfinite!r}')
        if shift is not None:
            _check_shift(shift, num_classes, dim)
        self.num_classes, self.dim = num_classes, dim
        self.precision, self.nonfinite = precision, nonfinite
        self.ignore_index = check_ignore_index(ignore_index)
        zeros = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._counts = torch.zeros_like(zeros, dtype=torch.int64)
        # A row of NaN is a shift not chosen yet. float32, until the first float64 batch needs float64.
        self._shift = zeros.new_full((num_classes, dim), torch.nan, dtype=torch.float32)
        if shift is not None:
            self._shift = shift.detach().to(zeros.device, shift_dtype(shift.dtype), copy=True).contiguous()
        self._sums = zeros.new_zeros(num_classes, dim)
        self._sumsq = zeros
        self._scatter = zeros.new_zeros(dim, dim) if scatter else None
        self._upper_only = False  # what is below the diagonal of _scatter is out of date
        self._waiting: WaitingRows | None = None  # rows that are not yet in any of the sums
        self._rows_may_wait = True  # not where the tensors are all that is kept
        # The samples there were when shifts were last looked at, and the rows since then.
        self._rows_then = self._rows_since = 0
        # Rows left out by nonfinite="skip"; and, on a GPU, rows to complain about at the next
        # synchronisation.
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._refused = torch.zeros((), dtype=torch.int64, device=device)
        self._none_refused = False  # whether _refused is known to be zero: reading it waits for a GPU
        self._questioned = True  # whether properties ask for it

    @property
    def counts(self) -> torch.Tensor:
        """[C] int64: n_c."""
        self._add_waiting()
        return self._counts

    @property
    def shift(self) -> torch.Tensor:
        """[C, p] float32 or float64: k_c, NaN until a sample of class c is seen."""
        return self._shift

    @property
    def sums(self) -> torch.Tensor:
        """[C, p] float64: Σ(h − k_c)."""
        self._add_waiting()
        return self._sums

    @property
    def sumsq(self) -> torch.Tensor:
        """[C] float64: Σ‖h − k_c‖²."""
        self._add_waiting()
        return self._sumsq

    @property
    def scatter(self) -> torch.Tensor | None:
        """[p, p] float64: Σ(h − k_y)(h − k_y)ᵀ; None without scatter."""
        self._add_waiting()
        with self._locked():
            self._mirror()
            return self._scatter

    def _locked(self) -> contextlib.AbstractContextManager[Any]:
        """To be held by who writes to the state: reading it may do that, in any thread."""
        if torch.compiler.is_compiling():
            return contextlib.nullcontext()
        if self._lock is None:
            vars(self).setdefault("_lock", _Lock())  # one, whoever else comes here
        return cast(_Lock, self._lock).held

    def _mirror(self) -> None:
        if self._scatter is not None and self._upper_only:
            self._scatter = self._scatter.triu() + self._scatter.triu(1).T
        self._upper_only = False

    # ---- accumulation ----

    def update(self, features: torch.Tensor, labels: torch.Tensor) -> "ClassStatistics":
        """Add a batch: features [N, p] and their integer labels [N]. Returns self.

        A batch that raises leaves the state bit for bit as it was. On a GPU nothing is copied to the host:
        rows with a label outside [0, C) or (nonfinite="error") a NaN or infinity are left out and reported by
        the next property, `merge` or `state_dict`, which synchronises anyway.

        torch.compile keeps it in the graph (fullgraph=True included); shifts then stay where they are chosen,
        as on a GPU.

        Raises:
            TypeError, ValueError: dtypes, shapes or devices that do not agree; on the CPU also a label
                outside [0, C) that is not `ignore_index`, or a NaN or infinity in the features, naming the
                row.

        """
        if torch.compiler.is_compiling():
            return self._update_in_graph(features, labels)
        with self._locked():
            self._add(features, labels, radii=False, may_wait=self._rows_may_wait)
            self._rows_since += len(features)
            if not self._defers and self._rows_since >= self._rows_then:
                self._recentre()
                self._rows_then, self._rows_since = int(self.counts.sum()), 0
        return self

    def _recentre(self) -> None:
        """Move far shifts to their class's mean.

        A first feature that is an outlier, a mislabelled one say, would keep every later residual at its
        distance, and float32 rounding with it.
        """
        far = far_shifts(self.counts, self.sums, self.sumsq)
        if far.any():
            shift = torch.where(far[:, None], self.means.to(self.shift.dtype), self.shift)
            self._replace(*self._about(shift), shift=shift)

    def accumulate(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Add a batch and return ‖h_i − k_{y_i}‖ [N], NaN for a row that was left out.

        As `update`, but a shift once chosen stays, so that the distances of all batches are about the same.
        """
        with self._locked():
            return cast(torch.Tensor, self._add(features, labels, radii=True))

    def _update_in_graph(self, features: torch.Tensor, labels: torch.Tensor) -> "ClassStatistics":
        self._add_waiting()
        if features.dtype == torch.float64:
            self._shift = self._shift.double()
        sums = self._counts, self._shift, self._sums, self._sumsq, self._scatter
        state = *sums, self._skipped, self._refused
        options = self.precision, self.ignore_index, self.nonfinite
        torch.ops.ncfast.update_statistics(features.detach(), labels, *state, *options)
        self._upper_only, self._none_refused = self._scatter is not None, False
        return self

    def _add(
        self, features: torch.Tensor, labels: torch.Tensor, radii: bool, may_wait: bool = False
    ) -> torch.Tensor | None:
        features, labels = self._checked(features, labels)
        if features.shape[0] == 0:
            return features.new_empty(0, dtype=torch.float32) if radii else None
        if self._shift.dtype == torch.float64:
            # Rounding a float64 shift would move the origin of the earlier batches.
            features = features.double()
        labels, skipped, refused = self._screened(features, labels)
        distances = None
        if radii:
            distances = features.new_empty(features.shape[0], dtype=shift_dtype(features.dtype))
        waiting = self._waiting_for(features) if may_wait else None
        if waiting is not None and admit(
            waiting, features, labels, self._shift, ignore_index=self.ignore_index
        ):
            if len(waiting) >= WaitingRows.MOST:
                self._add_waiting()
        else:
            self._add_now(features, labels, distances)
        if refused is not None:
            self._thaw()
            self._refused += refused
            self._none_refused = False
        if skipped is not None:
            self._skipped += skipped
        return distances

    def _add_now(self, features: torch.Tensor, labels: torch.Tensor, radii: torch.Tensor | None) -> None:
        self._thaw()
        shift, upper_only = self._shift, self._upper_only
        # Set first: an interruption leaves shifts that fit the sums, and a scatter known by its upper half.
        self._shift, self._upper_only = shift.to(shift_dtype(features.dtype)), True
        state = self._state(radii)
        try:
            whole = accumulate(
                state,
                features,
                labels,
                self._shift,
                precision=self.precision,
                ignore_index=self.ignore_index,
                waiting=self._waiting,
            )
        except Exception:  # nothing was added
            self._shift, self._upper_only = shift, upper_only
            raise
        # Also the scatter, in case a signal handler has read the state and put a mirrored one there.
        upper_only |= not whole or self._scatter is not state.scatter
        vars(self).update(_scatter=state.scatter, _upper_only=upper_only)

    def _state(self, radii: torch.Tensor | None = None) -> ClassScatter:
        return ClassScatter(self._counts, self._sums, self._sumsq, self._scatter, radii)

    def _waiting_for(self, features: torch.Tensor) -> WaitingRows | None:
        """The waiting rows that a batch may join, if it may: a small one of their dtype, but not the first.

        That chooses most shifts and goes where a bad choice can be mended.
        """
        if self._scatter is None or self._defers or features.shape[0] > WaitingRows.MOST_OF_BATCH:
            return None
        if self._shift.dtype != shift_dtype(features.dtype):
            return None
        waiting = self._waiting
        rows = 0 if waiting is None else len(waiting)
        if rows >= WaitingRows.MOST:
            self._add_waiting()  # what a signal has kept the last batch from
            rows = 0
        if waiting is None or not rows:
            if not self._counts.any():
                return None
            if waiting is None or waiting.residuals.dtype != self._shift.dtype:
                waiting = self._waiting = WaitingRows(self._shift)
        return waiting if waiting.residuals.dtype == self._shift.dtype else None

    def _add_waiting(self) -> None:
        waiting = self._waiting
        if waiting is None:
            return
        if torch.compiler.is_compiling():
            sums = self._counts, self._sums, self._sumsq, self._scatter
            rows = waiting.residuals, waiting.labels, waiting.filled
            torch.ops.ncfast.add_waiting_rows(*rows, *sums, self.precision)
            self._upper_only = True
            return
        with self._locked():
            if len(waiting):
                self._thaw()
                self._upper_only = True
                state = self._state()
                accumulate_waiting(state, waiting, precision=self.precision)
                vars(self).update(_scatter=state.scatter, _upper_only=True)  # as `_add_now` does

    def merge(self, other: "ClassStatistics") -> "ClassStatistics":
        """Add the samples that `other` has seen, exactly as if both had seen all; returns self.

        With d_c the distance between the two shifts, other's sums are moved to this state's shift:
        Σ(h − k)(h − k)ᵀ = Σ(h − k′)(h − k′)ᵀ + s dᵀ + d sᵀ + n d dᵀ per class. Associative to float64
        rounding.

        Raises:
            ValueError: the two differ in num_classes, dim, device or in keeping the scatter.

        """
        ours = (self.num_classes, self.dim, self._scatter is not None, self._counts.device)
        theirs = (other.num_classes, other.dim, other._scatter is not None, other._counts.device)
        if ours != theirs:
            raise ValueError(f"cannot merge (num_classes, dim, scatter, device) {theirs} into {ours}")
        other._raise_refused()
        self._add_waiting()
        self._thaw()
        shift = self.shift.to(torch.promote_types(self.shift.dtype, other.shift.dtype))
        # A shift that was given and not used yet may be far from what `other` has seen.
        unseen, chosen = (self._counts == 0)[:, None], (other.counts > 0)[:, None]
        shift = torch.where(unseen & (chosen | shift.isnan()), other.shift, shift).contiguous()
        sums, sumsq, scatter = other._about(shift)
        self._replace(
            self._sums + sums,
            self._sumsq + sumsq,
            self._scatter + scatter if self._scatter is not None and scatter is not None else None,
            shift=shift,
            counts=self._counts + other._counts,
            skipped=self._skipped + other._skipped,
        )
        return self

    def all_reduce(self, group: "dist.ProcessGroup | None" = None) -> "ClassStatistics":
        """Replace the state of every rank by the merge of all of them; returns self.

        Two collectives, sums of Cp + C + 5 and of p² + Cp + C float64 numbers: the first agrees on a shift
        per class, the mean over all ranks; every rank moves its own sums there by the formula of `merge`, and
        the second adds them up. Ranks may hold any number of samples, none included, of any classes, about
        any shifts. Reduce once: every rank then holds the whole, and to reduce that again would count it
        once per rank.

        Every rank of `group` (the default group if None) has to call it, with the same num_classes and dim,
        and a state on a device that the group's backend takes. When a rank has died, the others fail with
        torch.distributed's error, at the latest after the `timeout` of `init_process_group`.

        Raises:
            ValueError: on every rank, when a rank has refused rows (see `update`), or when some ranks keep
                the scatter and some do not. Whatever is raised, the state is as it was.

        """
        n = self.counts.double()
        weighted = n[:, None] * self.shift.double().nan_to_num() + self.sums  # Σh = n_c μ_c
        kinds = n.new_tensor([self.shift.dtype == torch.float64, self._scatter is not None, 1])
        rows_left_out = torch.stack([self._skipped, self._refused]).double()
        outline = torch.cat([weighted.flatten(), n, rows_left_out, kinds])  # counts are exact up to 2⁵³
        dist.all_reduce(outline, group=group)
        weighted, n, rest = outline.split([weighted.numel(), self.num_classes, 5])
        skipped, refused, wide, with_scatter, ranks = rest.long().tolist()
        if refused:
            raise ValueError(self._complaint(refused, f" of all {ranks} ranks"))
        if with_scatter not in (0, ranks):
            raise ValueError(f"all ranks must keep the scatter or none; {with_scatter} of {ranks} do")
        # Any common shift near the means will do, and rounding it is no error: the move below is about what
        # it became. float32 where it can be, for the kernels' sake.
        common = (weighted.view_as(self.sums) / n[:, None]).to(torch.float64 if wide else torch.float32)
        shift = torch.where(n[:, None] > 0, common, self.shift.to(common.dtype))
        parts = [part for part in self._about(shift) if part is not None]
        total = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(total, group=group)
        sums, sumsq, *scatter = total.split([part.numel() for part in parts])
        self._replace(
            sums.view_as(self._sums).clone(),
            sumsq.clone(),
            None if self._scatter is None else scatter[0].view_as(self._scatter).clone(),
            shift=shift,
            counts=n.long(),
            skipped=torch.full_like(self._skipped, skipped),
        )
        return self

    def _thaw(self) -> None:
        """Replace what was made in inference mode: it cannot be written to outside of it."""
        if not torch.is_inference_mode_enabled():
            for name, value in vars(self).items():
                if isinstance(value, torch.Tensor) and value.is_inference():
                    setattr(self, name, value.clone())

    def _replace(
        self, sums: torch.Tensor, sumsq: torch.Tensor, scatter: torch.Tensor | None, **others: torch.Tensor
    ) -> None:
        """Put other tensors in place of the state's, all at once whatever signals come.

        The scatter from the diagonal up; no rows wait.
        """
        replaced = {"sums": sums, "sumsq": sumsq, "scatter": scatter, "upper_only": scatter is not None}
        vars(self).update({f"_{name}": value for name, value in (replaced | others).items()})

    def _about(self, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The sums, sums of squares and scatter of the same samples about another shift [C, p].

        The scatter from the diagonal up.
        """
        self._add_waiting()
        n = self._counts.double()
        d = torch.where(n[:, None] > 0, self._shift.double() - shift.double(), 0.0)
        half = self._sums + 0.5 * n[:, None] * d  # s dᵀ + d sᵀ + n d dᵀ = half dᵀ + d halfᵀ
        scatter = self._scatter
        if scatter is not None:
            moved = d.any(1)
            left, right = half[moved], d[moved]
            scatter = torch.addmm(scatter, left.T, right).addmm_(right.T, left)
        sumsq = (self._sumsq + 2.0 * (half * d).sum(1)).clamp_(min=0.0)
        return self._sums + n[:, None] * d, sumsq, scatter

    def _checked(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_features(features)
        check_labels(labels, features)
        if labels.dtype != torch.int64:
            labels = labels.long()
        if features.shape[1] != self.dim:
            raise ValueError(f"features must have shape [N, {self.dim}], got {list(features.shape)}")
        if features.device != self._counts.device:
            raise ValueError(f"features are on {features.device} but the state is on {self._counts.device}")
        return as_stored(features), labels

    def _screened(
        self, features: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Relabel the rows to leave out as ignored; count the skipped and the refused on the device."""
        if self.nonfinite == "error" and not self._defers:
            return labels, None, None  # accumulate raises, at no further cost
        if not self._defers:
            check_label_range(labels, self.num_classes, self.ignore_index)
        kept = labels != self.ignore_index
        outside = kept & ((labels < 0) | (labels >= self.num_classes))
        nonfinite = kept & ~outside & nonfinite_rows(features)
        labels = torch.where(outside | nonfinite, self.ignore_index, labels)
        if self.nonfinite == "skip":
            return labels, nonfinite.sum(), outside.sum()
        return labels, None, (outside | nonfinite).sum()

    @property
    def _defers(self) -> bool:
        """Whether complaints wait for the next synchronisation."""
        return not self._counts.is_cpu

    def _raise_refused(self) -> None:
        if self._questioned and (refused := self.num_refused):
            raise ValueError(self._complaint(refused))

    @contextlib.contextmanager
    def _unquestioned(self) -> Iterator[None]:
        """Have properties computed without waiting for whether rows were refused; `_read` asks that then."""
        self._questioned = False
        try:
            yield
        finally:
            self._questioned = True

    def _read(self, numbers: Iterable[torch.Tensor]) -> list[float]:
        """Copy numbers [] to the host, together with whether rows were refused: a GPU is waited for once."""
        *values, refused = torch.stack([number.double() for number in (*numbers, self._refused)]).tolist()
        self._none_refused = self._defers and not refused
        self._raise_refused()
        return values

    def _complaint(self, refused: int, whose: str = "") -> str:
        return (
            f"{refused} rows{whose} were left out: they had a label outside [0, {self.num_classes}) "
            "or a NaN or infinity"
        )

    # ---- derived statistics ----

    @property
    def num_samples(self) -> int:
        """N, the samples accumulated."""
        self._raise_refused()
        return int(self.counts.sum())

    @property
    def num_skipped(self) -> int:
        """Rows left out because of nonfinite="skip"."""
        return int(self._skipped)

    @property
    def num_refused(self) -> int:
        """Rows left out on a GPU which the CPU would have raised for: what `update` defers."""
        refused = 0 if self._none_refused else int(self._refused)
        self._none_refused = self._defers and not refused
        return refused

    @property
    def present(self) -> torch.Tensor:
        """[C] bool: the classes with at least one sample."""
        self._raise_refused()
        return self.counts > 0

    @property
    def means(self) -> torch.Tensor:
        """[C, p] float64: μ_c = k_c + Σ(h − k_c)/n_c, a row of NaN for a class without samples."""
        self._raise_refused()
        absent = (self.counts == 0)[:, None]
        means = torch.addcdiv(self.shift.double(), self.sums, self.counts[:, None])
        return means.masked_fill_(absent, torch.nan)

    @property
    def global_mean(self) -> torch.Tensor:
        """[p] float64: μ_G, the average over all samples; NaN without samples."""
        present = self.present
        if not present.any():
            return self.means[0]
        return weighted_mean(self.means[present], self.counts[present])

    @property
    def class_variances(self) -> torch.Tensor:
        """[C] float64: Ave_i ‖h_i − μ_c‖² of each class, NaN for a class without samples."""
        self._raise_refused()
        centred = self.sumsq - self.sums.square().sum(1) / self.counts
        return (centred / self.counts).clamp_(min=0.0)

    @property
    def within_covariance(self) -> torch.Tensor:
        """[p, p] float64: Σ_W = Ave over samples of (h − μ_y)(h − μ_y)ᵀ."""
        self._raise_refused()
        return self._scatter_kept() / self.counts.sum() - self._shift_correction()

    @property
    def between_covariance(self) -> torch.Tensor:
        """[p, p] float64: Σ_B = Ave over the classes present of (μ_c − μ_G)(μ_c − μ_G)ᵀ."""
        centred = self.means[self.present] - self.global_mean
        return centred.T @ centred / centred.shape[0]

    @property
    def total_covariance(self) -> torch.Tensor:
        """[p, p] float64: Σ_T = Ave over samples of (h − μ_G)(h − μ_G)ᵀ."""
        present = self.present
        centred = self.means[present] - self.global_mean
        share = self.counts[present].double() / self.counts.sum()
        return self.within_covariance + (centred * share[:, None]).T @ centred

    @property
    def trace_within(self) -> torch.Tensor:
        """[] float64: Tr Σ_W, from the sums of squares alone: it needs no scatter."""
        share = self.counts.double() / self.counts.sum()
        return torch.where(self.counts > 0, share * self.class_variances, 0.0).sum()

    def within_quadratic(self, directions: torch.Tensor) -> torch.Tensor:
        """[r] float64: v_kᵀ Σ_W v_k for the columns v_k of `directions` [p, r], without forming Σ_W."""
        self._raise_refused()
        scatter, about_shift = self._scatter_kept(), directions.new_zeros(directions.shape[1])
        for start in range(0, len(scatter), 512):  # symmetric: what is left of the diagonal squares, twice
            own = slice(start, start + 512)
            left = scatter[own, :start] @ directions[:start]
            about_shift += (directions[own] * (2 * left + scatter[own, own] @ directions[own])).sum(0)
        drift = self.sums @ directions  # [C, r], zeros for a class without samples
        about_mean = about_shift - (drift.square() / self.counts.clamp(min=1)[:, None]).sum(0)
        return about_mean.clamp_(min=0.0) / self.counts.sum()

    def _shift_correction(self) -> torch.Tensor:
        """[p, p]: Σ_c (n_c/N) δ_c δ_cᵀ with δ_c = μ_c − k_c, what Σ_W about the shift has too much."""
        present = self.present
        sums = self.sums[present]
        return (sums / self.counts[present][:, None]).T @ sums / self.counts.sum()

    def _scatter_kept(self) -> torch.Tensor:
        if self.scatter is None:
            raise ValueError("this ClassStatistics was made with scatter=False")
        return self.scatter

    # ---- housekeeping ----

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, safe for `torch.save` and `torch.load(weights_only=True)`.

        Rows that wait to be added are in it, less their shifts, as `waiting_residuals` [R, p] and
        `waiting_labels` [R], and not in its sums: whoever goes on from it adds the same rows together, with
        the same bits.
        """
        self._raise_refused()
        with self._locked():
            self._mirror()
            rows = len(self._waiting or ())
            residuals, labels = self._waiting.rows() if self._waiting else (None, None)
            tensors = self._tensors() | {"waiting_residuals": residuals, "waiting_labels": labels}
            state: dict[str, Any] = {name: None if t is None else t.clone() for name, t in tensors.items()}
            state |= {"num_skipped": self.num_skipped, "recentring": [self._rows_then, self._rows_since]}
            if rows != len(self._waiting or ()):
                return self.state_dict()  # a signal handler has added them meanwhile: they may be there twice
        return state | {"format": _FORMAT}

    def _tensors(self) -> dict[str, torch.Tensor | None]:
        """What has been added, without the rows that wait."""
        sums = self._state()._asdict()
        del sums["radii"]
        return sums | {"shift": self._shift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace this state by a saved one of the same num_classes, dim and scatter; keeps the device.

        Raises:
            ValueError: the dictionary is of another format, lacks an entry or does not fit; this state is
                then unchanged.

        """
        if "format" in state and state["format"] != _FORMAT:
            raise ValueError(f"unknown state format {state['format']!r}; this version reads {_FORMAT}")
        tensors = self._tensors()
        waiting = {"waiting_residuals", "waiting_labels"}
        missing = {*tensors, *waiting, "num_skipped", "recentring", "format"} - set(state)
        if missing:
            raise ValueError(f"not a ClassStatistics state: it lacks {', '.join(sorted(missing))}")
        if not isinstance(state["num_skipped"], int) or state["num_skipped"] < 0:
            raise ValueError(f"num_skipped must be a count, got {state['num_skipped']!r}")
        if not _two_counts(state["recentring"]):
            raise ValueError(f"recentring must be two counts, got {state['recentring']!r}")
        loaded = {}
        for name in tensors:
            ours, theirs = tensors[name], state[name]
            if (ours is None) != (theirs is None):
                raise ValueError("one of the two states keeps the scatter and the other does not")
            if ours is None:
                continue
            if not isinstance(theirs, torch.Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(theirs).__name__}")
            if theirs.shape != ours.shape:
                raise ValueError(f"{name} must have shape {list(ours.shape)}, got {list(theirs.shape)}")
            if name == "shift":
                if theirs.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"shift must be float32 or float64, got {theirs.dtype}")
            elif theirs.dtype != ours.dtype:
                raise ValueError(f"{name} must be {ours.dtype}, got {theirs.dtype}")
            elif not theirs.isfinite().all() or (name in ("counts", "sumsq") and (theirs < 0).any()):
                raise ValueError(f"{name} holds a number that no samples can leave")
            loaded[name] = theirs.to(ours.device, copy=True).contiguous()
        if not loaded["shift"][loaded["counts"] > 0].isfinite().all():
            raise ValueError("a class that has samples has no shift")
        rows_then, rows_since = state["recentring"]
        others = {
            "waiting": self._as_waiting(state["waiting_residuals"], state["waiting_labels"], loaded["shift"]),
            "upper_only": False,
            "rows_then": rows_then,
            "rows_since": rows_since,
            "skipped": torch.full_like(self._skipped, state["num_skipped"]),
            "refused": torch.zeros_like(self._refused),
        }
        # All at once, whatever signals come.
        vars(self).update({f"_{name}": value for name, value in (loaded | others).items()})
        if self._defers:
            self._add_waiting()  # there it would never be full

    def _as_waiting(self, residuals: Any, labels: Any, shift: torch.Tensor) -> WaitingRows | None:
        """The rows that wait in a saved state, whose shifts are `shift`."""
        if residuals is None and labels is None:
            return None
        if not _is_plain(residuals) or not _is_plain(labels):
            raise ValueError("waiting_residuals and waiting_labels must be two tensors or None")
        if self._scatter is None:
            raise ValueError("no rows wait where the scatter is not kept")
        rows = len(residuals) if residuals.ndim else 0
        if residuals.shape != (rows, self.dim) or labels.shape != (rows,) or rows > WaitingRows.ROOM:
            raise ValueError(
                f"waiting_residuals and waiting_labels must have shapes [R, {self.dim}] and [R] with "
                f"R ≤ {WaitingRows.ROOM}, got {list(residuals.shape)} and {list(labels.shape)}"
            )
        # float32 rows may have waited when a float64 batch came.
        if residuals.dtype not in (torch.float32, shift.dtype) or labels.dtype != torch.int64:
            raise ValueError(
                f"no rows of {residuals.dtype} with labels of {labels.dtype} wait about {shift.dtype}"
            )
        labels = labels.to(shift.device)
        if ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError("waiting rows hold a label that no samples can leave")
        if not shift[labels].isfinite().all():
            raise ValueError("a class that has samples has no shift")
        residuals = residuals.detach().to(shift.device)
        if not (residuals.square().sum(1) <= _MOST_SQUARE[residuals.dtype]).all():
            raise ValueError("waiting rows hold a number that no samples can leave")
        return WaitingRows.of(residuals, labels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict()` to a file for `load`; a process killed meanwhile leaves the old file."""
        content = io.BytesIO()
        torch.save(self.state_dict(), content)
        digest = hashlib.sha256(content.getbuffer()).digest()
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with open(unfinished, "wb") as file:
            file.writelines([_MAGIC, digest, content.getbuffer()])
        os.replace(unfinished, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None, **options: Any
    ) -> "ClassStatistics":
        """Read a file that `save` wrote, to merge it or to go on updating it.

        `options` are those of the constructor that concern later updates: precision, ignore_index, nonfinite.

        Raises:
            OSError: the file cannot be read. ValueError: it was cut short or damaged, or is something else.

        """
        content = Path(path).read_bytes()
        start = len(_MAGIC) + hashlib.sha256().digest_size
        if not content.startswith(_MAGIC):
            raise ValueError(f"{path} is not a ClassStatistics file")
        if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
            raise ValueError(f"{path} is damaged or was cut short: its checksum does not agree")
        # Wherever it was saved from: a GPU's state can be merged on a machine without one.
        state = torch.load(io.BytesIO(content[start:]), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"sums", "scatter"} <= set(state):
            raise ValueError(f"{path} is not a ClassStatistics file")
        num_classes, dim = state["sums"].shape
        stats = cls(num_classes, dim, scatter=state["scatter"] is not None, device=device, **options)
        stats.load_state_dict(state)
        return stats

    def to(self, device: torch.device | str) -> "ClassStatistics":
        """Move the state to `device`, in place; returns self."""
        self._add_waiting()
        self._waiting = None
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    def __repr__(self) -> str:
        return (
            f"ClassStatistics(num_classes={self.num_classes}, dim={self.dim}, "
            f"num_samples={self.num_samples}, scatter={self._scatter is not None}, "
            f"device='{self._counts.device}')"
        )


# What torch.compile sees of reading a state: one node that adds the rows that wait, if any.
@torch.library.custom_op(
    "ncfast::add_waiting_rows", mutates_args=("filled", "counts", "sums", "sumsq", "scatter")
)
def _add_waiting_op(
    residuals: torch.Tensor,
    labels: torch.Tensor,
    filled: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    sumsq: torch.Tensor,
    scatter: torch.Tensor | None,
    precision: str,
) -> None:
    rows = int(filled)
    if rows:
        state = ClassScatter(counts, sums, sumsq, scatter, None)
        waiting = WaitingRows.of(residuals[:rows], labels[:rows])
        waiting.filled = filled
        accumulate_waiting(state, waiting, precision=precision)


@_add_waiting_op.register_fake
def _(*_: Any) -> None:
    return None


# What torch.compile sees of `update`: one node that writes to the state.
@torch.library.custom_op(
    "ncfast::update_statistics",
    mutates_args=("counts", "shift", "sums", "sumsq", "scatter", "skipped", "refused"),
)
def _update_op(
    features: torch.Tensor,
    labels: torch.Tensor,
    counts: torch.Tensor,
    shift: torch.Tensor,
    sums: torch.Tensor,
    sumsq: torch.Tensor,
    scatter: torch.Tensor | None,
    skipped: torch.Tensor,
    refused: torch.Tensor,
    precision: str,
    ignore_index: int,
    nonfinite: str,
) -> None:
    stats = ClassStatistics(
        *sums.shape,
        scatter=False,
        precision=precision,
        ignore_index=ignore_index,
        nonfinite=nonfinite,
        device=sums.device,
    )
    stats._replace(sums, sumsq, scatter, counts=counts, shift=shift, skipped=skipped, refused=refused)
    with torch.inference_mode():  # in which these very tensors are written to, wherever they come from
        stats._add(features, labels, radii=False)


@_update_op.register_fake
def _(*_: Any) -> None:
    return None


class _Lock:
    """`held` in a `with` statement. A shallow copy of a state shares it, another has its own."""

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Lock, ()


def _check_shift(shift: torch.Tensor, num_classes: int, dim: int) -> None:
    """Raise unless it has that shape and (looked at on the CPU only) rows finite or NaN throughout."""
    if not isinstance(shift, torch.Tensor):
        raise TypeError(f"shift must be a torch.Tensor, got {type(shift).__name__}")
    if shift.shape != (num_classes, dim) or not shift.is_floating_point():
        raise ValueError(f"shift must be floating point of shape [{num_classes}, {dim}]")
    check_in_memory(shift, "shift")
    if torch.compiler.is_compiling():
        return
    if shift.is_cpu and not (shift.isfinite().all(1) | shift.isnan().all(1)).all():
        raise ValueError("every row of shift must be finite, or NaN throughout")


def _two_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


def weighted_mean(rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """[p]: the average of rows [C, p], about the first one: equal rows give that row bit for bit."""
    weights = torch.ones(len(rows), device=rows.device) if weights is None else weights
    share = (weights.double() / weights.sum())[:, None]
    return rows[0] + (share * (rows - rows[0])).sum(0)
