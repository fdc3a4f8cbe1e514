"""One of the two processes of tests/test_torchmetrics.py."""

import torch
import torch.distributed as dist
from ranks import leave
from test_torchmetrics import BATCHES, C, P, assert_agree, batches, expected

from ncfast.integrations.torchmetrics import NeuralCollapse


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, parts = dist.get_rank(), batches()
    for on_step in (False, True):
        metric = NeuralCollapse(C, P, dist_sync_on_step=on_step)
        for i in range(0, BATCHES, 2):
            value = metric(*parts[i + rank])
            assert_agree(value, expected(parts[i : i + 2] if on_step else [parts[i + rank]]))
        assert_agree(metric.compute(), expected(parts))
        assert metric.counts.sum() == sum(len(labels) for _, labels in parts[rank::2])
        metric.update(*parts[rank])
        assert_agree(metric.compute(), expected([*parts, *parts[:2]]))


if __name__ == "__main__":
    main()
    leave()
