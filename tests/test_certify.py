"""certify decides what its contract says, one sample at a time.

The CPU's and Triton's are the reference; CUDA's kernels are held to it in test_cuda_emulated.py.
"""

import math

import pytest
import torch
from backends import available, forced

from ncfast.ops.certify import certify


@pytest.mark.parametrize("backend", available("certify"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rules", [1, 2])
def test_decides_sample_by_sample(backend, dtype, rules):
    C, N = 4, 200
    radii = torch.rand(N).to(dtype)
    radii[::7] = torch.nan
    labels = torch.randint(-1, C + 1, (N,))  # -1 and C are not in use
    gap = 0.1 * torch.rand(C, dtype=torch.float64)
    limits = list(torch.rand(rules, C, dtype=torch.float64) + 0.2)
    limits[0][1], limits[0][2] = math.inf, -math.inf
    with forced("certify", backend):
        total, decided, undecided = certify(radii, labels, gap, limits, scale=1.25, offset=0.01)
    used = [i for i in range(N) if not math.isnan(radii[i]) and 0 <= labels[i] < C]
    by_rule = [
        {i for i in used if float(radii[i]) * 1.25 + 0.01 + float(gap[labels[i]]) < float(limit[labels[i]])}
        for limit in limits
    ]
    assert total == len(used)
    assert decided == tuple(map(len, by_rule))
    assert undecided.tolist() == [i for i in used if not all(i in own for own in by_rule)]
    assert 0 < len(undecided) < total


@pytest.mark.parametrize("backend", available("certify"))
def test_edges(backend):
    """No samples; none in use; a NaN among the limits, and a radius equal to the limit, decide nothing."""
    gap, limit = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    with forced("certify", backend):
        for radii in (torch.zeros(0), torch.full((3,), torch.nan)):
            total, decided, undecided = certify(radii, torch.zeros(len(radii)).long(), gap, [limit])
            assert (total, decided, len(undecided)) == (0, (0,), 0)
        assert certify(torch.ones(2), torch.zeros(2).int(), gap, [limit]).undecided.tolist() == [0, 1]
        assert certify(torch.zeros(1), torch.zeros(1).long(), gap, [limit * torch.nan]).decided == (0,)


def test_what_kernels_would_read_out_of_bounds_is_no_call():
    radii, labels = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    gap = limit = torch.ones(2, dtype=torch.float64)
    certify(radii, labels, gap, [limit])
    for wrong in (
        (radii.half(), labels, gap, [limit]),
        (radii, labels.short(), gap, [limit]),
        (radii, labels[:2], gap, [limit]),
        (radii, labels, gap.float(), [limit]),
        (radii, labels, gap, [limit, limit.float()]),
        (radii, labels, gap, [limit[:1]]),
        (radii, labels, gap, []),
        (radii, labels, gap, [limit.to("meta")]),
    ):
        with pytest.raises(AssertionError):
            certify(*wrong)
