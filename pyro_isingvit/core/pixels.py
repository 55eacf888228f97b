"""Pixels of 8, 16 or 32 bits as numbers for a network.

    scaled = clip((x - low) / (high - low), 0, 1)      per channel; normalised = (scaled - mean) / std

Shapes: B batch, C channels, H height, W width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need

Kind = Literal["uint8", "uint16", "float32"]
KINDS: tuple[Kind, ...] = ("uint8", "uint16", "float32")
TOP = {"uint8": 255.0, "uint16": 65535.0}


@dataclass(frozen=True)
class Scale:
    """Which pixel values become 0 and 1, and how the result is normalised.

    Attributes:
        kind: type of the pixels; None: not known, as of a start from before version 0.12.
        low: (C,) become 0; empty: 0 for whole numbers, no change for floats.
        high: (C,) become 1; empty: the largest whole number.
        mean: (C,) of the scaled training pixels.
        std: (C,), at least 1e-3.
    """

    kind: Kind | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the images as they are read: those of more than 8 bits come as float32."""
        return torch.uint8 if self.kind == "uint8" else torch.float32

    def check(self, images: Tensor, told: str) -> None:
        """Raises UserError where images as they are read hold no pixels of this kind.

        Args:
            images: (B, C, H, W).
            told: how the message begins.
        """
        if self.kind == "uint8" or not images.numel():
            return
        low, high = (float(end) for end in images.aminmax())  # nan where there is any
        need(math.isfinite(low) and math.isfinite(high), f"{told}: they hold nan or infinite values.")
        if self.kind == "uint16":
            between = high <= 1 and bool(((images > 0) & (images < 1)).any())
            need(not between, f"{told}: whole numbers to 65535, not floats to 1.")
            need(low >= 0 and high <= 65535, f"{told}: numbers from 0 to 65535, not from {low:g} to {high:g}.")

    def scaled(self, images: Tensor) -> Tensor:
        """(B, C, H, W) as they are read to float32 in [0, 1], or any floats where nothing is scaled."""
        x = images.float()
        if not self.low:
            return x / TOP[self.kind] if self.kind in TOP else x
        low, high = (torch.tensor(v, device=x.device, dtype=x.dtype).view(-1, 1, 1) for v in (self.low, self.high))
        return ((x - low) / (high - low)).clamp_(0, 1)

    def standardised(self, x: Tensor) -> Tensor:
        """(x - mean) / std of scaled images (B, C, H, W)."""
        mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def shown(self, images: Tensor) -> Tensor:
        """Images as a screen shows them, (B, 1 or 3, H, W) uint8.

        Two channels become magenta and green, of more than three the first three are red, green and blue. Floats that
        are not scaled are stretched between their own lowest and highest value, image by image.
        """
        if self.kind == "uint8" and not self.low and images.shape[1] in (1, 3):
            return images
        return self.on_screen(self.scaled(images))

    def on_screen(self, x: Tensor) -> Tensor:
        """``shown`` of images that are scaled already, (B, C, H, W) to (B, 1 or 3, H, W) uint8."""
        if self.kind == "float32" and not self.low:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
        x = x[:, [0, 1, 0]] if x.shape[1] == 2 else x[:, :3]
        return (255 * x.clamp(0, 1)).round().to(torch.uint8)

    def fits(self, channels: int) -> bool:
        """Whether the numbers can be: as many of each as ``channels``, finite, high above low."""
        same = channels == len(self.mean) == len(self.std) and len(self.low) == len(self.high) in (0, len(self.mean))
        numbers = [*self.mean, *self.std, *self.low, *self.high]
        ordered = same and all(a < b for a, b in zip(self.low, self.high, strict=True))
        return ordered and self.kind in (*TOP, "float32") and all(map(math.isfinite, numbers)) and min(self.std) > 0
