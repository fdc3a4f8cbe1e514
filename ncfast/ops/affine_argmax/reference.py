"""affine_argmax, straight from the formula in float64: slow and obvious."""

from collections.abc import Sequence

import torch


def refuses(features: torch.Tensor) -> None:  # noqa: ARG001 (one signature for every backend)
    """The reference takes every device and dtype."""
    return None


def affine_argmax(
    features: torch.Tensor,  # [N, p]
    rules: Sequence[tuple[torch.Tensor, torch.Tensor]],  # (V [C, p], b [C]) each
) -> tuple[torch.Tensor, ...]:  # [N] int64 each
    """Score one class after the other in float64 and keep the best."""
    h = features.double()
    return tuple(_argmax(h, weight.double(), bias.double()) for weight, bias in rules)


def _argmax(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    best = h.new_full((h.shape[0],), -torch.inf)
    index = torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)
    for c in range(weight.shape[0]):
        # One matrix-vector product per class: equal rows of the weight get bitwise equal scores, so that ties
        # are ties.
        score = torch.mv(h, weight[c].clone()) + bias[c]
        better = score > best
        best = torch.where(better, score, best)
        index = torch.where(better, c, index)
    return index
