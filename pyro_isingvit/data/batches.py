"""Shuffled batches of an epoch."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_isingvit.data.balance import balanced_order
from pyro_isingvit.data.split import Split


def _usable(count: int, size: int, parts: int) -> int:
    """Images of an epoch: the last short batch is cut to a multiple of ``parts``."""
    return count - count % size % parts


def count_steps(count: int, size: int, parts: int = 1) -> int:
    """Batches that ``batches`` gives of ``count`` images."""
    return math.ceil(_usable(count, size, parts) / size)


def batches(
    split: Split, size: int, seed: int, epoch: int, parts: int = 1, balanced: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Shuffled batches of an epoch; the order depends on ``seed`` and ``epoch`` alone.

    Args:
        split: the training part.
        size: B, images of a batch.
        seed: of the order.
        epoch: counted from 0.
        parts: the last short batch is cut to a multiple of this, so that it can be shared out equally.
        balanced: every class is drawn alike often, in as many steps (``balanced_order``).

    Yields:
        images (B, C, H, W) uint8, labels (B,) and the row numbers (B,) of the images in ``split``, all on the device
        of the labels.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = balanced_order(split.labels, generator) if balanced else torch.randperm(len(split), generator=generator)
    order = order[: _usable(len(order), size, parts)]
    images, device = split.images, split.labels.device
    for start in range(0, len(order), size):
        index = order[start : start + size]
        rows = index.to(device)
        # Rows that are made on demand are made on the CPU, which must then hold their numbers too.
        pixels = images.rows(rows if images.device == device else index.to(images.device))
        yield pixels.to(device), split.labels[rows], rows
