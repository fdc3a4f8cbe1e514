"""certify: the samples that a decision radius decides, and the others, which need scores."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ncfast.ops import dispatch


class Certified(NamedTuple):
    """How many samples lie within the decision radius of their class's mean, and which do not."""

    total: torch.Tensor
    """[] int64: samples in use."""
    decided: tuple[torch.Tensor, ...]
    """[] int64 each: by each rule."""
    undecided: torch.Tensor
    """[K] int64, ascending: the samples in use that not every rule decides."""


def certify(
    radii: torch.Tensor,
    labels: torch.Tensor,
    gap: torch.Tensor,
    limits: Sequence[torch.Tensor],
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Certified:
    """Decide the samples with radii · scale + offset + gap_y < ρ_y, ρ being each rule's decision radius.

    With radii = ‖h − k_y‖ and gap_c = ‖k_c − μ_c‖ the left-hand side bounds ‖h − μ_y‖, and a sample nearer to
    μ_y than ρ_y (`decision_radius`) is one that the rule decides for y. Each operation rounds once, in the
    order written and on every backend alike; `scale` and `offset` make up for the rounding of the radii. It
    synchronises once, for K.

    Args:
        radii: [N] float32 or float64, as `class_scatter` returns them; NaN: the sample is not in use.
        labels: [N] int64 or int32; a sample whose label is outside [0, C) is not in use.
        gap: [C] float64.
        limits: one or two [C] float64, the decision radii of one or two rules; −inf decides nothing.
        scale: factor of every radius.
        offset: added to every radius.

    Returns:
        Certified, of int64 tensors on the device of the radii.
    """
    # Kernels are handed addresses, and measure() makes all of these.
    vectors = (gap, *limits)
    assert radii.dtype in (torch.float32, torch.float64)
    assert labels.dtype in (torch.int64, torch.int32)
    assert len(limits) in (1, 2)
    assert labels.shape == radii.shape == (len(radii),)
    assert all(v.dtype == torch.float64 and v.shape == (len(gap),) for v in vectors)
    assert all(tensor.device == radii.device for tensor in (labels, *vectors))
    run = dispatch.select("certify", radii)
    result: Certified = run(radii, labels, gap, limits, scale=scale, offset=offset)
    return result
