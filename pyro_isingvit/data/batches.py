"""Shuffled batches of an epoch."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pyro_isingvit.data.balance import balanced_order
from pyro_isingvit.data.images import InMemory
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

    Images that do not lie in memory are read while the step before computes.

    Args:
        split: the training part.
        size: B, images of a batch.
        seed: of the order.
        epoch: counted from 0.
        parts: the last short batch is cut to a multiple of this, so that it can be shared out equally.
        balanced: every class is drawn alike often, in as many steps (``balanced_order``).

    Yields:
        images (B, C, H, W) as they are read, labels (B,) and the row numbers (B,) of the images in ``split``, all on
        the device of the labels.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = balanced_order(split.labels, generator) if balanced else torch.randperm(len(split), generator=generator)
    order = order[: _usable(len(order), size, parts)]
    images, device = split.images, split.labels.device
    pinned = device.type == "cuda" and images.device.type == "cpu"  # so that the copy runs beside the step

    def made() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(order), size):
            index = order[start : start + size]
            pixels = images.rows(index.to(images.device))
            yield (pixels.pin_memory() if pinned else pixels), index

    for pixels, index in made() if isinstance(images, InMemory) else ahead(made()):
        rows = index.to(device)
        yield pixels.to(device, non_blocking=pinned), split.labels[rows], rows


def ahead[Item](items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, ``depth`` of them made in a thread before they are asked for."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
