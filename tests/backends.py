"""The backends that this machine can run: tests loop over them, new ones join by themselves."""

import contextlib

import torch

import ncfast
from ncfast.ops import dispatch


def available(operation):
    """The backends that would take plain float32 CPU features, the reference among them."""
    probe = torch.zeros(1, 1)
    reasons = {name: dispatch.refusal(operation, name, probe) for name in dispatch.BACKENDS}
    return [name for name, reason in reasons.items() if reason is None]


@contextlib.contextmanager
def forced(operation, backend):
    """Force a backend, and fail unless `operation` ran, and on nothing else."""
    with ncfast.use_backend(backend), dispatch.record() as ran:
        yield
    assert {name for operation_run, name in ran if operation_run == operation} == {backend}
