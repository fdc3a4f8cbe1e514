"""class_scatter in C++ (csrc/cpu/class_scatter.h): the features are read once, rows of a class together."""

import functools
from typing import Any

import torch

import ncfast._cpu as _cpu
from ncfast.ops.class_scatter import (
    ClassScatter,
    WaitingRows,
    accumulate_by_adding,
    check_label_range,
    raise_for_nonfinite,
    shift_dtype,
)

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def refuses(features: torch.Tensor) -> str | None:
    """Only tensors in the CPU's memory have addresses the kernels can read."""
    return None if features.is_cpu else f"the features are on {features.device}"


def class_scatter(
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p]
    *,
    scatter: bool = True,
    radii: bool = False,
    precision: str = "high",
    ignore_index: int = -100,
    nonfinite_raises: bool = False,
) -> ClassScatter:
    """Compute `ncfast.ops.class_scatter` on the fastest instruction set here, or NCFAST_CPU_ISA.

    Raises for a label outside [0, C), as `ncfast.ops.class_scatter` does.
    """
    N, p = features.shape
    C = shift.shape[0]
    real = functools.partial(features.new_empty, dtype=torch.float64)  # where the features are
    result = ClassScatter(
        counts=features.new_empty(C, dtype=torch.int64),
        sums=real(C, p),
        sumsq=real(C),
        scatter=real(p, p) if scatter else None,
        radii=features.new_empty(N, dtype=shift_dtype(features.dtype)) if radii else None,
    )
    refusal = _run(result, features, labels, shift, precision, ignore_index, "whole")
    if refusal != "nonfinite" or nonfinite_raises:
        _raise_for(refusal, features, labels, C, ignore_index, shift)
    return result


class_scatter_checked = functools.partial(class_scatter, nonfinite_raises=True)
"""`class_scatter` that raises for all that `ncfast.ops.class_scatter` does."""


def accumulate(
    state: ClassScatter,
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p]
    *,
    precision: str = "high",
    ignore_index: int = -100,
    waiting: WaitingRows | None = None,
) -> bool:
    """Add a batch to `state` in place; see `ncfast.ops.class_scatter.accumulate`."""
    # With temporaries the size of the state features are read once, and bad shifts of new classes are mended.
    # Batches that may wait are added in place, with the same bits whether they waited or not.
    least = 2 * max(shift.shape)
    if features.shape[0] > (least if state.radii is not None else max(least, WaitingRows.MOST_OF_BATCH)):
        accumulate_by_adding(class_scatter, state, features, labels, shift, precision, ignore_index, waiting)
        return True
    refusal = _run(state, features, labels, shift, precision, ignore_index, "update")
    _raise_for(refusal, features, labels, shift.shape[0], ignore_index)
    return False


def admit(
    waiting: WaitingRows,
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p]
    *,
    ignore_index: int = -100,
) -> bool:
    """Let the rows in use join those waiting, and say whether there was room for them.

    Raises as `accumulate` does, and then leaves all as it was.
    """
    features = _with_contiguous_rows(features)
    refusal: str = _cpu.class_scatter_admit(
        *_batch(features, labels),
        ignore_index,
        shift.data_ptr(),
        shift.shape[0],
        torch.get_num_threads(),
        waiting.residuals.data_ptr(),
        waiting.residuals.stride(0) * waiting.residuals.element_size(),
        waiting.labels.data_ptr(),
        waiting.filled.data_ptr(),
        waiting.ROOM,
    )
    _raise_for(refusal, features, labels, shift.shape[0], ignore_index)
    return refusal != "room"


def add_admitted(state: ClassScatter, waiting: WaitingRows, *, precision: str = "high") -> None:
    """Add the rows that wait to `state` in place, to its scatter from the diagonal up; none waits then."""
    _run(state, *waiting.rows(), None, precision, -1, "admitted", waiting.filled)


def _raise_for(
    refusal: str,
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    ignore_index: int,
    shift: torch.Tensor | None = None,  # where none was to be chosen
) -> None:
    if refusal == "label":
        check_label_range(labels, num_classes, ignore_index)
        raise ValueError("labels changed while they were read")
    if refusal == "nonfinite":
        raise_for_nonfinite(features, labels, ignore_index, shift)


def _with_contiguous_rows(features: torch.Tensor) -> torch.Tensor:
    return features if features.stride(1) == 1 or features.shape[1] == 1 else features.contiguous()


def _batch(features: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
    """Where a batch lies, as the first arguments of `_cpu`'s functions: keep the tensors meanwhile."""
    return (
        features.data_ptr(),
        _NAMES[features.dtype],
        *features.shape,
        features.stride(0) * features.element_size(),
        labels.data_ptr(),
        labels.element_size(),
        labels.stride(0) * labels.element_size(),
    )


def _run(
    result: ClassScatter,
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor | None,
    precision: str,
    ignore_index: int,
    mode: str,
    filled: torch.Tensor | None = None,
) -> str:
    features = _with_contiguous_rows(features)
    if shift is not None and mode == "whole":
        shift = shift.contiguous()
    refusal: str = _cpu.class_scatter(
        *_batch(features, labels),
        ignore_index=ignore_index,
        shift=0 if shift is None else shift.data_ptr(),
        C=result.counts.shape[0],
        precision=precision,
        counts=result.counts.data_ptr(),
        sums=result.sums.data_ptr(),
        sumsq=result.sumsq.data_ptr(),
        scatter=0 if result.scatter is None else result.scatter.data_ptr(),
        radii=0 if result.radii is None else result.radii.data_ptr(),
        threads=torch.get_num_threads(),
        mode=mode,
        filled=0 if filled is None else filled.data_ptr(),
    )
    return refusal
