"""What Triton compiles for, and on which tensors it can run: all that the `triton.py` of every room share."""

import contextlib
from typing import Any

import torch
import triton

SHARED_LIMIT = {  # bytes of shared memory (LDS) that one program may use
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}

OPERANDS_IN_REGISTERS = ("sm_80", "sm_86", "sm_89", "sm_120")  # of the matrix units; elsewhere shared memory

OPTIONS = {"enable_fp_fusion": True}  # of every launch: a·b + c is one rounding wherever the machine has it


def refuses(features: torch.Tensor) -> str | None:
    """Why Triton cannot take these features: all but float64 on its device are taken (None)."""
    if features.dtype == torch.float64:
        return "float64 features are left to the float64 reference, whose products are the vendor's GEMM"
    return refuses_device(features)


def refuses_device(features: torch.Tensor) -> str | None:
    """Why Triton does not run on the device of these features, or None.

    CPU tensors are taken wherever Triton itself runs on them: in its interpreter, or when the active driver's
    device is the CPU.
    """
    if features.is_cuda:
        return None
    if features.device.type == "cpu" and (interpreted() or _driver_is_cpu()):
        return None
    return f"Triton does not run on {features.device} here"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def architecture() -> str:
    """What Triton compiles for now: a key of `SHARED_LIMIT`, the nearest older one for an unlisted device."""
    if interpreted():
        return "sm_80"
    return listed(triton.runtime.driver.active.get_current_target())


def all_registers() -> dict[str, int]:
    """Launch options against ptxas, which spills to fit a third program where 168 registers nearly do."""
    return {} if architecture().startswith("gfx") else {"maxnreg": 255}


def aligned(features: torch.Tensor) -> bool:
    """Whether Triton reads 128 bits at a time: it must know that every row begins at a multiple of 16."""
    multiples = features.storage_offset(), features.stride(0), features.shape[1]
    return features.stride(1) == 1 and all(number % 16 == 0 for number in multiples)


def listed(target: Any) -> str:
    """The key of `SHARED_LIMIT` whose limits and matrix instructions hold on `target`."""
    if target.backend == "hip":
        name = str(target.arch).split(":")[0]
        return name if name in SHARED_LIMIT else "gfx942"
    older = [int(name[3:]) for name in SHARED_LIMIT if name[:3] == "sm_" and int(name[3:]) <= target.arch]
    return f"sm_{max(older, default=86)}"


def active(features: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the features' device current: Triton launches there."""
    return torch.cuda.device_of(features) if features.is_cuda else contextlib.nullcontext()


def _driver_is_cpu() -> bool:
    # Asking for the active driver raises when there is none; a driver that was set is kept in `_active`.
    runtime = triton.runtime.driver
    if runtime._active is None and not any(b.driver.is_active() for b in triton.backends.backends.values()):
        return False
    return runtime.active.get_active_torch_device().type == "cpu"
