"""class_scatter in CUDA C++ (csrc/cuda/class_moments.h and class_scatter.h): rows in class order."""

from typing import Any

import torch

from ncfast.ops.class_scatter import ClassScatter, shift_dtype
from ncfast.ops.launch import refuses_device as refuses
from ncfast.ops.launch import run

__all__ = ["class_scatter", "lacks", "refuses"]

_PLANES = {"highest": 3, "high": 2, "medium": 1}  # bfloat16 for a float32


def lacks(features: torch.Tensor, *, scatter: bool = True, **_: int) -> str | None:
    """Columns are counted in 32 bits; the products are of bfloat16, their operands wait in shared memory."""
    if features.shape[1] >= 2**30:
        return "there are 2³⁰ dimensions or more"
    if not scatter:
        return None
    if features.dtype == torch.float64:
        return "float64 features are left to the float64 reference, whose products are the vendor's GEMM"
    if features.is_cuda:
        import ncfast._cuda as _cuda

        needed = _cuda.class_scatter_shared(_name(features.dtype), max(_PLANES.values()))
        properties = torch.cuda.get_device_properties(features.device)
        limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        if needed > limit:
            return f"it needs {needed} bytes of shared memory, of which this device has {limit}"
    return None


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
    """Compute `ncfast.ops.class_scatter`; a label outside [0, C) is left out. Never synchronises."""
    result, call, _ = describe(features, labels, shift, scatter, radii, precision, ignore_index)
    run(call, features.device)
    return result


def describe(
    features: torch.Tensor,
    labels: torch.Tensor,
    shift: torch.Tensor,
    scatter: bool,
    radii: bool,
    precision: str,
    ignore_index: int,
) -> tuple[ClassScatter, Any, tuple[torch.Tensor, ...]]:
    """Allocate the results: them, the call that fills them, and the tensors that it reads."""
    import ncfast._cuda as _cuda

    if features.shape[1] > 1 and features.stride(1) != 1:
        features = features.contiguous()
    shift = shift.contiguous()
    (N, p), C, device = features.shape, shift.shape[0], features.device
    result = ClassScatter(
        counts=torch.empty(C, dtype=torch.int64, device=device),
        sums=torch.empty(C, p, dtype=torch.float64, device=device),
        sumsq=torch.empty(C, dtype=torch.float64, device=device),
        scatter=torch.empty(p, p, dtype=torch.float64, device=device) if scatter else None,
        radii=torch.empty(N, dtype=shift_dtype(features.dtype), device=device) if radii else None,
    )
    call = _cuda.class_moments(
        N=N,
        p=p,
        C=C,
        dtype=_name(features.dtype),
        features=features.data_ptr(),
        row_bytes=features.stride(0) * features.element_size(),
        labels=labels.data_ptr(),
        label_size=labels.element_size(),
        label_bytes=labels.stride(0) * labels.element_size(),
        ignore_index=ignore_index,
        shift=shift.data_ptr(),
        counts=result.counts.data_ptr(),
        sums=result.sums.data_ptr(),
        sumsq=result.sumsq.data_ptr(),
        radii=0 if result.radii is None else result.radii.data_ptr(),
    )
    if result.scatter is not None:
        call = _cuda.class_scatter(call, planes=_PLANES[precision], scatter=result.scatter.data_ptr())
    return result, call, (features, labels, shift)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
