"""Where Triton kernels can run in tests: its interpreter, real PTX in an emulator, or a GPU.

The interpreter is chosen when Triton is first imported, so one process has either it (TRITON_INTERPRET=1)
or the emulator; `test_triton.py` starts a second process for the other.
"""

import importlib.util
import os
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
EMULATOR = os.environ.get("NCFAST_PTX_EMULATOR", "")
MACHINES = ["interpreter", "sm_80", "sm_90", pytest.param("gpu", marks=pytest.mark.gpu)]

if EMULATOR and os.path.isdir(EMULATOR) and EMULATOR not in sys.path:
    sys.path.append(EMULATOR)


def missing(machine):
    """Why this process cannot run kernels on `machine`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if machine == "gpu":
        return None if torch.cuda.is_available() else "there is no GPU"
    if machine == "interpreter":
        return None if INTERPRETED else "runs in the process with TRITON_INTERPRET=1"
    if INTERPRETED:
        return "this process interprets kernels"
    return None if importlib.util.find_spec("triton_emu") else "NCFAST_PTX_EMULATOR names no emulator"


def start(machine, races=False):
    """Make `machine` what Triton runs on; return the device of its tensors."""
    if reason := missing(machine):
        pytest.skip(reason)
    if machine == "gpu":
        return "cuda"
    if machine == "interpreter":
        if importlib.util.find_spec("interpreter_fixes"):
            import interpreter_fixes  # noqa: F401 (bfloat16 products; on import)
        else:
            pytest.skip("Triton's interpreter multiplies bfloat16 as bits; NCFAST_PTX_EMULATOR has the fix")
        return "cpu"
    import triton_emu

    triton_emu.install(int(machine[3:]))
    triton_emu.race = races
    return "cpu"
