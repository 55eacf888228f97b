"""Pixels of 8, 16 or 32 bits as numbers for a network: which values become 0 and which 1.

    scaled = clip((x - low) / (high - low), 0, 1)      per channel; normalised = (scaled - mean) / std

``full``: low and high are the ends of what 8 or 16 bits can hold, and of floats the lowest and highest training pixel.
``percentile``: percentiles of the training pixels. ``none``: floats are taken as they are; whole numbers have a range,
and ``full`` and ``none`` are the same for them.

Shapes: N images, B batch, C channels, H height, W width.
"""

import math
import re

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.data.images import Images

MOST = 2**25  # values of a channel that percentiles are taken of; of more, evenly spaced images are looked at
USUAL = (1.0, 99.0)  # percentiles, where none are named


def percentiles(intensity: str) -> tuple[float, float] | None:
    """LOW and HIGH of "percentile LOW HIGH"; None for "full" and "none".

    Raises:
        UserError: none of these.
    """
    name, *ends = re.split(r"[\s:]+", intensity.strip())
    wrong = f"`intensity` must be full, none or 'percentile LOW HIGH' such as 'percentile 1 99', not {intensity!r}."
    need(name in ("full", "none", "percentile") and len(ends) in ((0, 2) if name == "percentile" else (0,)), wrong)
    if name != "percentile":
        return None
    try:
        low, high = map(float, ends) if ends else USUAL
    except ValueError:
        low = high = math.nan
    need(0 <= low < high <= 100, wrong)
    return low, high


def fit_scale(images: Images, intensity: str = "full") -> Scale:
    """The scale of training images.

    Args:
        images: N of them.
        intensity: full, none or "percentile LOW HIGH".

    Raises:
        UserError: another ``intensity``, NaN or infinite pixels, or a channel that is one colour where a range is
            needed.
    """
    ends = percentiles(intensity)
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    if images.kind == "float32" or ends:
        low, high = _range(images, ends, needed=intensity != "none")
    if intensity == "none":
        low = high = ()
    scale = Scale(images.kind, low, high, (0.0,), (1.0,))
    mean, std = _moments8(images, scale) if images.kind == "uint8" else _moments(images, scale)
    return Scale(images.kind, low, high, mean, std)


def _range(
    images: Images, ends: tuple[float, float] | None, needed: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest value of each channel, or its percentiles."""
    channels = images.shape[1]
    low, high = torch.full((channels,), math.inf), torch.full((channels,), -math.inf)
    for start in range(0, len(images), images.chunk):
        x = images[start : start + images.chunk].float().cpu()
        bad = int((~torch.isfinite(x)).sum())
        need(not bad, f"images have {bad} NaN or infinite pixels; repair or remove those images.")
        low, high = torch.minimum(low, x.amin((0, 2, 3))), torch.maximum(high, x.amax((0, 2, 3)))
    if ends:
        step = math.ceil(len(images) * images.shape[2] * images.shape[3] / MOST)
        looked = torch.cat([images[i : i + 1].cpu() for i in range(0, len(images), step)]) if step > 1 else images[:]
        values = np.percentile(looked.cpu().numpy().astype(np.float32), ends, axis=(0, 2, 3))  # (2, C)
        low, high = torch.from_numpy(values)
    flat = [i for i, (a, b) in enumerate(zip(low, high, strict=True)) if not a < b]
    need(
        not (needed and flat),
        f"channel {flat[0] if flat else 0} of the training images has one value between the ends of `intensity`; "
        "take percentiles further apart, or leave the channel out.",
    )
    return tuple(low.tolist()), tuple(high.tolist())


def _moments8(images: Images, scale: Scale) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of 8-bit images: the pixels' histogram, without a float copy of the images."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64, device=images.device)
    for start in range(0, len(images), images.chunk):
        for row, channel in zip(counts, images[start : start + images.chunk].unbind(1), strict=True):
            row += torch.bincount(channel.reshape(-1), minlength=256)
    level = torch.arange(256, dtype=torch.float64) / 255
    if scale.low:
        low, high = (torch.tensor(v, dtype=torch.float64)[:, None] / 255 for v in (scale.low, scale.high))
        level = ((level - low) / (high - low)).clamp(0, 1)
    share = (counts.double() / counts[0].sum()).cpu()  # (C, 256)
    mean = (share * level).sum(1)
    std = (share * (level - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def _moments(images: Images, scale: Scale) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The same of other images, by sums in float64: of the pixels, then of the squared distances from their mean."""
    pixels = len(images) * images.shape[2] * images.shape[3]

    def total(centre: Tensor | float, power: int) -> Tensor:
        parts = (scale.scaled(images[i : i + images.chunk]).double() for i in range(0, len(images), images.chunk))
        return sum((((x - centre) ** power).sum((0, 2, 3)).cpu() for x in parts), torch.zeros(()).double()) / pixels

    mean = total(0.0, 1)
    std = total(mean.view(-1, 1, 1).to(images.device), 2).sqrt().clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())
