"""class_scatter in C++ (csrc/cpu/class_scatter.h): the features are read once, rows of a class together."""

import torch

from ncfast.ops.class_scatter import (
    ClassScatter,
    accumulate_by_adding,
    check_label_range,
    raise_for_nonfinite,
    shift_dtype,
)


def refuses(features: torch.Tensor) -> str | None:
    """Only tensors in the CPU's memory have addresses the kernels can read."""
    return None if features.device.type == "cpu" else f"the features are on {features.device}"


def class_scatter(
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p]
    *,
    scatter: bool = True,
    radii: bool = False,
    precision: str = "high",
    ignore_index: int = -100,
) -> ClassScatter:
    """Compute `ncfast.ops.class_scatter` on the fastest instruction set here, or NCFAST_CPU_ISA."""
    N, p = features.shape
    C = shift.shape[0]
    zeros = features.new_zeros(C, dtype=torch.float64)  # where the features are, not on the default device
    result = ClassScatter(
        counts=torch.zeros_like(zeros, dtype=torch.int64),
        sums=zeros.new_zeros(C, p),
        sumsq=zeros,
        scatter=zeros.new_zeros(p, p) if scatter else None,
        radii=features.new_empty(N, dtype=shift_dtype(features.dtype)) if radii else None,
    )
    _run(result, features, labels, shift, precision, ignore_index, update=False)
    return result


def accumulate(
    state: ClassScatter,
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p]
    *,
    precision: str = "high",
    ignore_index: int = -100,
) -> bool:
    """Add a batch to `state` in place; see `ncfast.ops.class_scatter.accumulate`."""
    if features.shape[0] > 2 * max(shift.shape):
        # Temporaries the size of the state now cost less than reading the features twice.
        accumulate_by_adding(class_scatter, state, features, labels, shift, precision, ignore_index)
        return True
    refusal = _run(state, features, labels, shift, precision, ignore_index, update=True)
    if refusal == "label":
        check_label_range(labels, shift.shape[0], ignore_index)
    if refusal == "nonfinite":
        raise_for_nonfinite(features, labels, ignore_index)
    return False


def _run(
    result: ClassScatter,
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    precision: str,
    ignore_index: int,
    update: bool,
) -> str:
    import ncfast._cpu as _cpu

    if features.shape[1] > 1 and features.stride(1) != 1:
        features = features.contiguous()
    if not update:
        shift = shift.contiguous()
    N, p = features.shape
    refusal: str = _cpu.class_scatter(
        features=features.data_ptr(),
        dtype=str(features.dtype).removeprefix("torch."),
        N=N,
        p=p,
        row_bytes=features.stride(0) * features.element_size(),
        labels=labels.data_ptr(),
        label_size=labels.element_size(),
        label_bytes=labels.stride(0) * labels.element_size(),
        ignore_index=ignore_index,
        shift=shift.data_ptr(),
        C=shift.shape[0],
        precision=precision,
        counts=result.counts.data_ptr(),
        sums=result.sums.data_ptr(),
        sumsq=result.sumsq.data_ptr(),
        scatter=0 if result.scatter is None else result.scatter.data_ptr(),
        radii=0 if result.radii is None else result.radii.data_ptr(),
        threads=torch.get_num_threads(),
        update=update,
    )
    return refusal
