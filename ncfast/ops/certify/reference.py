"""certify in PyTorch, as its contract says it."""

from collections.abc import Sequence

import torch

from ncfast.ops.certify import Certified


def refuses(_radii: torch.Tensor) -> None:
    """Nothing."""


def certify(
    radii: torch.Tensor,  # [N]
    labels: torch.Tensor,  # [N]
    gap: torch.Tensor,  # [C]
    limits: Sequence[torch.Tensor],  # [C] each
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Certified:
    """Compute `ncfast.ops.certify`."""
    used = ~radii.isnan() & (labels >= 0) & (labels < len(gap))
    y = torch.where(used, labels, 0).long()
    reach = radii.double() * scale + offset + gap[y]
    decided = [used & (reach < limit[y]) for limit in limits]
    undecided = (used & ~torch.stack(decided).all(0)).nonzero().squeeze(1)
    return Certified(used.sum(), tuple(mask.sum() for mask in decided), undecided)
