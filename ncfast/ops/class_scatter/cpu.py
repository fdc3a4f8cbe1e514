"""class_scatter in C++ (csrc/cpu/class_scatter.h): the features are read once, rows of a class together."""

import torch

from ncfast.ops.class_scatter import ClassScatter, shift_dtype


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
    result = ClassScatter(
        counts=torch.zeros(C, dtype=torch.int64),
        sums=torch.zeros(C, p, dtype=torch.float64),
        sumsq=torch.zeros(C, dtype=torch.float64),
        scatter=torch.zeros(p, p, dtype=torch.float64) if scatter else None,
        radii=torch.empty(N, dtype=shift_dtype(features.dtype)) if radii else None,
    )
    add(result, features, labels, shift, precision=precision, ignore_index=ignore_index)
    return result


def add(
    result: ClassScatter,
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    *,
    precision: str,
    ignore_index: int,
    symmetric: bool = True,
) -> None:
    """Add to `result` in place; without `symmetric` what is below the scatter's diagonal is left as it is."""
    import ncfast._cpu as _cpu

    if features.shape[1] > 1 and features.stride(1) != 1:
        features = features.contiguous()
    shift = shift.contiguous()
    N, p = features.shape
    _cpu.class_scatter(
        features=features.data_ptr(),
        dtype=_name(features.dtype),
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
        symmetric=symmetric,
        threads=torch.get_num_threads(),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
