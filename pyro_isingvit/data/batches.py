"""Shuffled batches of an epoch."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_isingvit.data.split import Split


def _usable(count: int, size: int, parts: int) -> int:
    """Images of an epoch: the last short batch is cut to a multiple of ``parts``."""
    return count - count % size % parts


def count_steps(count: int, size: int, parts: int = 1) -> int:
    """Batches that ``batches`` gives of ``count`` images."""
    return math.ceil(_usable(count, size, parts) / size)


def batches(split: Split, size: int, seed: int, epoch: int, parts: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Shuffled batches of an epoch: images, labels, and their row numbers; the order depends on seed and epoch alone.

    The last short batch is kept, as far as it can be cut into ``parts`` equal parts; so can the others if ``size`` can.
    """
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    order = order[: _usable(len(order), size, parts)]
    for start in range(0, len(order), size):
        rows = order[start : start + size].to(split.images.device)
        yield split.images[rows], split.labels[rows], rows
