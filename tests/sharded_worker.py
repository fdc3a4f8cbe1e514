"""A model under fully_shard on one rank: the same reports as without, and no DTensor where none is taken."""

import pytest
import torch
import torch.distributed as dist
from ranks import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import ncfast

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
features, labels = torch.randn(60, 4), torch.arange(60) % 3


def reports(sharded):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    if sharded:
        fully_shard(model, mesh=mesh)
    tracker = ncfast.Tracker(model)
    loss = torch.nn.functional.cross_entropy(model(features), labels)
    tracker.update(labels)
    loss.backward()
    return [tracker.end_epoch(), ncfast.measure_model(model, [(features, labels)])]


assert reports(sharded=True) == reports(sharded=False)
weight = distribute_tensor(torch.randn(3, 4), mesh, [Shard(0)])
for call in (
    lambda: ncfast.measure(features, labels, weight),
    lambda: ncfast.affine_argmax(features, weight),
    lambda: ncfast.pair_geometry(weight),
):
    with pytest.raises(TypeError, match=r"DTensor has no address; pass its full_tensor\(\)"):
        call()
print("as without")
leave()
