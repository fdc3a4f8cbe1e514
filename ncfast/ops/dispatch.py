"""The only place that knows which backends exist, and picks one.

A backend of an operation is a module `ncfast.ops.<operation>.<backend>` with two functions: the operation
itself, and `refuses(features) -> str | None`, which says why it cannot take these features (None: it can).
One that does less than the operation also has `lacks(features, **options) -> str | None`, about the options
of a call.
Nothing is picked by trying and catching: a backend runs when the machine has it and it does not refuse.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

GPU_BACKENDS, CPU_BACKENDS = ("cuda", "triton"), ("cpu", "reference")
BACKENDS = GPU_BACKENDS + CPU_BACKENDS  # in order of preference, but see `preference`

_forced: ContextVar[str | None] = ContextVar("ncfast_forced_backend", default=None)
_recording: ContextVar[list[tuple[str, str]] | None] = ContextVar("ncfast_recording", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend ("reference", "cpu", "triton" or "cuda") for every operation inside the `with` block.

    A forced backend runs or raises RuntimeError; it never falls back. Takes precedence over the environment
    variable `NCFAST_BACKEND`. Local to the current thread and async task.
    """
    token = _forced.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Collect the (operation, backend) pairs that run inside the `with` block, in order."""
    calls: list[tuple[str, str]] = []
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)


def select(operation: str, features: torch.Tensor, function: str | None = None, **options: Any) -> Any:
    """Return the function of the backend that runs `operation` for these features, and record the choice.

    `function` names a further function of the same room, None if there is no such; by default it is the one
    named after the operation.
    """
    backend, module = _pick(operation, features, options)
    found = getattr(module, function or operation, None)
    calls = _recording.get()
    if calls is not None and found is not None:
        calls.append((operation, backend))
    return found


def beside(run: Callable[..., Any], name: str) -> Any:
    """Return what the backend of `run`, a result of `select`, has as `name`, or None if it has no such."""
    return getattr(sys.modules[run.__module__], name, None)


def pick(operation: str, features: torch.Tensor, **options: Any) -> str:
    """Return the name of the backend that `select` would pick."""
    return _pick(operation, features, options)[0]


def _pick(operation: str, features: torch.Tensor, options: dict[str, Any]) -> tuple[str, ModuleType]:
    forced = forced_backend()
    if forced:
        candidates: tuple[str, ...] = (forced,)
    else:
        candidates = CPU_BACKENDS if features.is_cpu else preference(operation, features, **options)
    for backend in candidates:
        found = _usable(operation, backend, features, forced, options)
        if not isinstance(found, str):
            return backend, found
        if forced:
            raise RuntimeError(f"backend {backend!r} was forced but cannot run {operation}: {found}")
    raise AssertionError("the reference never refuses")


def preference(
    operation: str, features: torch.Tensor, *, scatter: bool = True, num_classes: int = 1
) -> tuple[str, ...]:
    """Return all backends, the preferred one first.

    Between the two on GPUs an estimate decides (csrc/cuda/README.md) until a GPU has: with the scatter Triton
    reads the features once and CUDA C++ twice, except where classes are too small to be padded to row tiles:
    below 128 rows on average with tiles of 32 rows, as on an H100, and 64 with its tiles of 16 for others.
    """
    N = features.shape[0]
    if operation == "class_scatter" and scatter and (N <= 1024 or 128 * num_classes <= N):
        return ("triton", "cuda", "cpu", "reference")
    return BACKENDS


def explain(operation: str, features: torch.Tensor, **options: Any) -> list[tuple[str, str]]:
    """Say of every backend, in order of preference, why it would or would not run `operation` here."""
    forced, picked, lines = forced_backend(), False, []
    for backend in preference(operation, features, **options):
        reason = refusal(operation, backend, features, **options)
        if forced and backend != forced:
            reason = f"backend {forced!r} is forced"
        elif reason is None and picked:
            reason = "available; a faster backend comes first"
        elif reason is None:
            reason, picked = "runs", True
        lines.append((backend, reason))
    return lines


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or `NCFAST_BACKEND`, or None."""
    environment = os.environ.get("NCFAST_BACKEND") or None
    return _forced.get() or (_known(environment, "NCFAST_BACKEND") if environment else None)


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why this installation cannot run `backend` at all, or None when it can."""
    module, remedy = {
        "cuda": ("ncfast._cuda", "ncfast was built without CUDA"),
        "triton": ("triton", "Triton is not installed"),
        "cpu": ("ncfast._cpu", "ncfast was built without its C++ extension"),
        "reference": ("torch", ""),
    }[backend]
    return None if importlib.util.find_spec(module) else remedy


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(sorted(BACKENDS))}")
    return name


def refusal(operation: str, backend: str, features: torch.Tensor, **options: Any) -> str | None:
    """Why `backend` cannot run `operation` on these features with these options, or None when it can."""
    found = _usable(operation, backend, features, forced_backend(), options)
    return found if isinstance(found, str) else None


def _usable(
    operation: str, backend: str, features: torch.Tensor, forced: str | None, options: dict[str, Any]
) -> ModuleType | str:
    """The module of `backend`, or why it cannot run."""
    if backend in GPU_BACKENDS and forced != backend and features.is_cpu:
        return "takes CPU tensors only when forced, for tests"
    module = _module(operation, backend)
    if isinstance(module, str):
        return module
    reason = module.refuses(features)
    if reason is None and "lacks" in vars(module):
        reason = module.lacks(features, **options)
    return reason or module


@functools.cache
def _module(operation: str, backend: str) -> ModuleType | str:
    """The module of `backend` on this installation, or why there is none."""
    name = f"ncfast.ops.{operation}.{backend}"
    if importlib.util.find_spec(name) is None:
        return f"{operation} has no {backend} implementation"
    return unavailable(backend) or importlib.import_module(name)
