"""class_scatter without the scatter, in CUDA C++ (csrc/cuda/class_moments.h): rows in class order."""

from typing import Any

import torch

from ncfast.ops.class_scatter import ClassScatter, shift_dtype


def refuses(features: torch.Tensor) -> str | None:
    """Only tensors in a CUDA device's memory have addresses the kernels can read."""
    if features.device.type != "cuda" or torch.version.cuda is None:
        return f"the features are on {features.device}"
    return None if features.shape[0] < 2**31 else "there are 2³¹ rows or more"


def lacks(*, scatter: bool = True) -> str | None:
    """The multiply stage is not written."""
    return "it has no scatter" if scatter else None


def class_scatter(
    features: torch.Tensor,  # [N, p]
    labels: torch.Tensor,  # [N]
    shift: torch.Tensor,  # [C, p]
    *,
    scatter: bool = True,
    radii: bool = False,
    precision: str = "high",  # noqa: ARG001 (of products there are none)
    ignore_index: int = -100,
) -> ClassScatter:
    """Compute `ncfast.ops.class_scatter` with scatter=False, without waiting for the device."""
    import ncfast._cuda as _cuda

    assert not scatter
    result, call, _ = describe(features, labels, shift, radii, ignore_index)
    workspace = torch.empty(_cuda.workspace(call), dtype=torch.uint8, device=features.device)
    with torch.cuda.device(features.device):
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.run(_cuda.plan(call, workspace.data_ptr()), features.device.index, stream)
    return result


def describe(
    features: torch.Tensor, labels: torch.Tensor, shift: torch.Tensor, radii: bool, ignore_index: int
) -> tuple[ClassScatter, Any, tuple[torch.Tensor, ...]]:
    """Allocate the results: them, the call that fills them, and the tensors that it reads.

    On CUDA the caching allocator keeps for the stream what was freed after the launch.
    """
    import ncfast._cuda as _cuda

    if features.shape[1] > 1 and features.stride(1) != 1:
        features = features.contiguous()
    shift = shift.contiguous()
    (N, p), C, device = features.shape, shift.shape[0], features.device
    result = ClassScatter(
        counts=torch.empty(C, dtype=torch.int64, device=device),
        sums=torch.empty(C, p, dtype=torch.float64, device=device),
        sumsq=torch.empty(C, dtype=torch.float64, device=device),
        scatter=None,
        radii=torch.empty(N, dtype=shift_dtype(features.dtype), device=device) if radii else None,
    )
    call = _cuda.class_moments(
        N=N,
        p=p,
        C=C,
        dtype=str(features.dtype).removeprefix("torch."),
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
    return result, call, (features, labels, shift)
