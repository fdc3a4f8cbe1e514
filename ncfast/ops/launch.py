"""Where CUDA C++ kernels can run, and how they are launched: all that the `cuda.py` of every room share."""

import functools
from typing import Any

import torch


def refuses_device(tensor: torch.Tensor) -> str | None:
    """Only tensors in a CUDA device's memory have addresses the kernels can read."""
    if tensor.device.type != "cuda" or torch.version.cuda is None:
        return f"the features are on {tensor.device}"
    if tensor.shape[0] >= 2**31:
        return "there are 2³¹ rows or more"
    return _refuses(tensor.device.index)


@functools.cache
def _refuses(device: int) -> str | None:
    """Why a device cannot run what was built: the answer stays the same, and asking takes CUDA a while."""
    import ncfast._cuda as _cuda

    with torch.cuda.device(device):
        return _cuda.refuses(device)


def run(call: Any, device: torch.device) -> None:
    """Enqueue the kernels of a call on the current stream of its device.

    What is freed after the launch, the workspace too, the caching allocator keeps for the stream.
    """
    import ncfast._cuda as _cuda

    with torch.cuda.device(device):
        workspace = torch.empty(_cuda.workspace(call), dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream()
        _cuda.run(_cuda.plan(call, workspace.data_ptr()), stream.device.index, stream.cuda_stream)
