"""Parts of a data set, what a network must know of it, and how parts are cut.

Shapes: N images, C channels (1 or 3), H height, W width; images are (N, C, H, W) uint8, contiguous.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need, why

UNLABELLED = -1


@dataclass(frozen=True)
class Split:
    """One part of a data set."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64; UNLABELLED where not known
    names: tuple[str, ...] = ()  # (N,) file names, where there are files

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Split":
        """The images at ``index`` (n,), in that order."""
        rows, names = torch.from_numpy(index), tuple(self.names[i] for i in index if self.names)
        return Split(self.images[rows], self.labels[rows], names)


@dataclass(frozen=True)
class DataInfo:
    """What a network must know of its data: classes, image shape, statistics of the training part."""

    dataset: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]  # (C,), pixels in [0, 1]
    std: tuple[float, ...]  # (C,), at least 1e-3

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "DataInfo":
        """Reads what ``to_dict`` wrote.

        Raises:
            UserError: a field is missing, unknown or of another kind.
        """
        try:
            info = cls(**{**raw, **{key: tuple(raw[key]) for key in ("classes", "mean", "std")}})
            sizes = all(type(n) is int and 1 <= n <= 2**16 for n in (info.channels, info.height, info.width))
            texts = all(isinstance(name, str) for name in (info.dataset, *info.classes))
            pixels = [*info.mean, *info.std] if len(info.mean) == len(info.std) == info.channels else [math.nan]
            if not (sizes and texts and all(map(math.isfinite, pixels)) and min(info.std) > 0):
                raise TypeError("sizes, names or pixel statistics that cannot be")
            return info
        except (KeyError, TypeError) as error:
            raise UserError(f"the saved data description is damaged ({why(error)}); train again.") from error

    def normalise(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std, (N, C, H, W) uint8 -> float32, on the images' device.

        Raises:
            UserError: other channels, size or type than the training images.
        """
        expected = f"(N, {self.channels}, {self.height}, {self.width}) torch.uint8"
        got = f"{('N', *images.shape[1:])} {images.dtype}".replace("'", "")
        need(got == expected, f"expected images {expected}, as in training on {self.dataset}; got {got}.")
        mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class ImageData:
    """A data set, split and described."""

    train: Split
    val: Split
    test: Split
    info: DataInfo


def hold_out(
    labels: np.ndarray, count: int, rng: np.random.Generator, classes: tuple[str, ...], part: str
) -> tuple[np.ndarray, np.ndarray]:
    """Indices that remain and those held out, each with every class."""
    counts = np.bincount(labels)
    rare = f"class {classes[counts.argmin()]!r} has a single image left"
    need(counts.min() > 1, f"{rare}, which cannot be both for training and for {part}; add images.")
    held_out = stratified(labels, max(count, len(counts)), rng)  # up to half: a class is never taken whole
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly ``count`` indices, class proportions kept, at least one per class.

    scikit-learn's stratified splits can leave a rare class out altogether.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quota = counts * (count / len(labels))
    take = np.maximum(np.floor(quota), 1).astype(np.int64)
    while take.sum() != count:  # largest remainder: at most a few steps per class
        step = 1 if take.sum() < count else -1
        allowed = take + step >= 1
        take[np.where(allowed, (quota - take) * step, -np.inf).argmax()] += step
    order = rng.permutation(len(labels))
    groups = [order[labels[order] == name][:n] for name, n in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(groups))


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel, by histograms: no float copy of the images."""
    level = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.reshape(-1), minlength=256).double() for channel in images.unbind(1)]
    share = torch.stack(counts) / counts[0].sum()  # (C, 256)
    mean = (share * level).sum(1)
    std = (share * (level - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def copies(parts: Iterable[np.ndarray]) -> list[int]:
    """How many images of each part are, byte for byte, in a part before it.

    Args:
        parts: (N, ...) each, of one type and shape.
    """
    seen: set[int] = set()  # 64 bits: among 100,000 images a chance of 3e-10 that two share one
    found = []
    for images in parts:
        prints = [hash(image.tobytes()) for image in images]
        found.append(sum(each in seen for each in prints))
        seen.update(prints)
    return found
