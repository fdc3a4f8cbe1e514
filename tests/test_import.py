"""`import ncfast` needs nothing optional and changes nothing global."""

import subprocess
import sys

import pytest


def python(code):
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_nothing_optional():
    loaded = python(
        "import torch, sys; before = set(sys.modules); import ncfast; print(*set(sys.modules) - before)"
    )
    top = {name.split(".")[0] for name in loaded.split()}
    optional = {"triton", "matplotlib", "rich", "tqdm", "safetensors", "mlxtend", "sklearn", "scipy"}
    assert not top & optional


STATE = """
import os, random, threading, warnings, numpy, torch
def state():
    return (
        dict(os.environ), threading.active_count(), list(warnings.filters), random.getstate(), os.getcwd(),
        numpy.random.get_state()[1].tolist(), numpy.geterr(), torch.get_rng_state().tolist(),
        torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.get_flush_denormal() if hasattr(torch,
        "get_flush_denormal") else None,
    )
"""


def test_changes_no_global_state():
    assert python(STATE + "before = state(); import ncfast; print(state() == before)") == "True\n"


def test_measuring_changes_no_global_state():
    code = """
h, y = torch.randn(300, 8), torch.arange(300) % 3
before = state()
import ncfast
ncfast.measure(h, y, torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
after = state()
# Worker threads may be waiting for the next call; everything else is as it was.
print(before[:1] + before[2:] == after[:1] + after[2:])
"""
    assert python(STATE + code) == "True\n"


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_depends_only_on(name):
    """The two hard dependencies are really used, so the list in pyproject.toml is not longer than needed."""
    assert python(f"import ncfast, sys; print('{name}' in sys.modules)") == "True\n"


def test_everything_public_exists():
    code = "import ncfast; print(all(hasattr(ncfast, name) for name in ncfast.__all__), ncfast.__version__)"
    assert python(code).split()[0] == "True"
