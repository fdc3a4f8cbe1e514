"""The gate on generated code: no spills, matrix instructions and 128-bit loads in loops, shared memory."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import codegen
from ncfast.ops.affine_argmax import triton as affine_argmax
from ncfast.ops.class_scatter import triton as class_scatter
from ncfast.ops.target import SHARED_LIMIT

pytestmark = pytest.mark.skipif(
    class_scatter.target.interpreted(), reason="Triton interprets kernels in this process"
)


@pytest.mark.parametrize("target", codegen.TARGETS)
def test_every_tile_passes_the_gate(target):
    rows = codegen.compiled(target, (torch.float32, torch.bfloat16, torch.float16))
    assert {row.kernel for row in rows} >= {*codegen.MATRIX, "_class_sums", "_recheck", "_pairs", "_radii"}
    assert [fault for row in rows for fault in row.faults()] == []


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
def test_stated_bounds_are_within_the_limit(architecture):
    limit = SHARED_LIMIT[architecture]
    for aligned in (True, False):
        for N, C in ((4096, 1), (4096, 4096), (4097, 1), (4097, 4096)):
            for precision in ("highest", "high", "medium"):
                for size in (2, 4):
                    tile = class_scatter.choose_tile(architecture, precision, size, N, 512, C, aligned)
                    assert tile.shared_bytes(architecture, precision, size) <= limit
        for C in (1, 16, 17, 128, 10_000):
            assert (
                affine_argmax.choose_tile(architecture, C, aligned).shared_bytes(architecture, 2, 4) <= limit
            )


def test_the_gate_closes():
    good = codegen.Row("sm_90", "_top_two", "", 4, 100, 0, 0, 1000, 8, 8, 4)
    assert good.faults() == []
    for change in ({"spills": 1}, {"local": 8}, {"shared": 1 << 20}, {"matrix": 0}, {"wide_loads": 0}):
        assert len(good._replace(**change).faults()) == 1
    assert good._replace(wide_loads=0, aligned=False).faults() == []
