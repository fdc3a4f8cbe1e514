"""Settings shared by all tests."""

import os

import hypothesis
import pytest
import torch

# The same examples everywhere and always: a failure found here is found again.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    """What the caller's environment forces must not decide what the tests test."""
    for name in ("NCFAST_BACKEND", "NCFAST_CPU_ISA"):
        if name in os.environ:
            monkeypatch.delenv(name)
    torch.manual_seed(0)
