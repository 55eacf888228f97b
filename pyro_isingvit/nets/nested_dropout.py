"""Nested dropout: an image keeps the first units of an MLP alone, so that units are ordered by what they are worth.

    h'_j = h_j if j < k else 0,   k uniform on 1, ..., F, for a share of the images; the others keep all F

Each image has a k of its own in each block, for all its tokens (Rippel, Gelbart & Adams 2014, who draw k from a
geometric distribution for one code layer). A unit serves with all units before it and never without them: what is cut
from the end costs least. Nothing is rescaled, so that the first k units are the network that was trained. Prediction
keeps all units.

Shapes: B batch, L depth, T tokens, F hidden units.
"""

import torch
from torch import Tensor


def draw_kept(share: float, images: int, depth: int, device: torch.device) -> Tensor:
    """Share of the units that each image keeps in each block, (images, L): 1, or uniform on [0, 1) for ``share``."""
    chosen, kept = torch.rand(images, 1, device=device), torch.rand(images, depth, device=device)
    return torch.where(chosen < share, kept, 1.0)


def first_units(units: Tensor, kept: Tensor) -> Tensor:
    """Units (..., B, T, F), of which each image keeps the first 1 + floor(kept F), at most F: kept (..., B)."""
    count = units.shape[-1]
    return units * (torch.arange(count, device=units.device) <= (kept * count).floor()[..., None, None])
