"""certify in CUDA C++ (csrc/cuda/certify.h): the undecided rows are compacted on the device."""

from collections.abc import Sequence
from typing import Any

import torch

from ncfast.ops.certify import Certified
from ncfast.ops.launch import refuses_device as refuses
from ncfast.ops.launch import run

__all__ = ["certify", "refuses"]


def certify(
    radii: torch.Tensor,  # [N]
    labels: torch.Tensor,  # [N]
    gap: torch.Tensor,  # [C]
    limits: Sequence[torch.Tensor],  # [C] each, one or two
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Certified:
    """Compute `ncfast.ops.certify`; the host waits for their number."""
    (undecided, counts), call, _ = describe(radii, labels, gap, limits, scale, offset)
    run(call, radii.device)
    return Certified(counts[0], tuple(counts[1 : 1 + len(limits)]), undecided[: int(counts[3])])


def describe(
    radii: torch.Tensor,
    labels: torch.Tensor,
    gap: torch.Tensor,
    limits: Sequence[torch.Tensor],
    scale: float,
    offset: float,
) -> tuple[tuple[torch.Tensor, torch.Tensor], Any, tuple[torch.Tensor, ...]]:
    """Allocate the results: them, the call that fills them, and the tensors that it reads."""
    import ncfast._cuda as _cuda

    radii, gap, *limits = (tensor.contiguous() for tensor in (radii, gap, *limits))
    undecided = labels.new_empty(len(radii), dtype=torch.int64)
    counts = undecided.new_empty(4)
    call = _cuda.certify(
        N=len(radii),
        C=len(gap),
        radii=radii.data_ptr(),
        radius_size=radii.element_size(),
        labels=labels.data_ptr(),
        label_size=labels.element_size(),
        label_bytes=labels.stride(0) * labels.element_size(),
        gap=gap.data_ptr(),
        first=limits[0].data_ptr(),
        second=limits[1].data_ptr() if len(limits) == 2 else 0,
        scale=scale,
        offset=offset,
        undecided=undecided.data_ptr(),
        counts=counts.data_ptr(),
    )
    return (undecided, counts), call, (radii, labels, gap, *limits)
