"""What a network must know of its data: classes, shape and scale of the images.

Shapes: N images, C channels, H height, W width.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.pixels import Kind, Scale
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.data.intensity import fit_scale

log = logging.getLogger(__name__)
FAR = 4.0  # standard deviations between two data sets, beyond which their pixels hardly mean the same


@dataclass(frozen=True)
class DataInfo:
    """What a network must know of its data: classes, image shape, statistics of the training part."""

    dataset: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]  # (C,), of pixels scaled to [0, 1]
    std: tuple[float, ...]  # (C,), at least 1e-3
    kind: Kind = "uint8"  # of the pixels
    low: tuple[float, ...] = ()  # (C,), pixels that become 0; empty: 0, or no change for floats
    high: tuple[float, ...] = ()  # (C,), pixels that become 1; empty: the largest whole number
    counts: tuple[int, ...] = ()  # training images of each class; () where they are not known, as before version 0.7
    weighted: tuple[float, ...] = ()  # sum of the training images' weights in each class; () where all count alike
    pool: str = ""  # digest of what training images are drawn from (``digest``); "" where not known: before 0.18

    @classmethod
    def of(cls, dataset: str, classes: tuple[str, ...], images: Images, intensity: str = "full") -> "DataInfo":
        """Describes training images.

        Args:
            dataset: its name.
            classes: their names.
            images: of the training part.
            intensity: which pixel values become 0 and 1 (data/intensity.py).

        Raises:
            UserError: as ``fit_scale``.
        """
        scale, (_, channels, height, width) = fit_scale(images, intensity), images.shape
        return cls(dataset, classes, channels, height, width, scale.mean, scale.std, images.kind, scale.low, scale.high)

    def scaled_as(self, other: Scale) -> "DataInfo":
        """The same images, normalised as those that a network was trained on before.

        The same pixel becomes the same number for the network where both are of one type; where they are not, 0 and 1
        stay what they are here, and mean and standard deviation are the network's.

        Args:
            other: the scale of the network's images, of as many channels.
        """
        if other.kind == self.kind:
            if (other.low, other.high) != (self.low, self.high):
                log.warning("the pixels that become 0 and 1 are those of the start: %s and %s", other.low, other.high)
            return self.with_scale_of(other)
        far = max(abs(own - m) / s for own, m, s in zip(self.mean, other.mean, other.std, strict=True))
        if far > FAR:
            log.warning(
                "on average the pixels are %.0f standard deviations from those that the start was trained on: look at "
                "`intensity`", far,
            )  # fmt: skip
        return replace(self, mean=other.mean, std=other.std)

    def with_scale_of(self, other: "DataInfo | Scale") -> "DataInfo":
        """The same images, scaled and normalised as others: those of a run that took this over from its start."""
        return replace(self, mean=other.mean, std=other.std, low=other.low, high=other.high)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Share of each class in the training loss; None where ``counts`` is not known."""
        return _shares(self.sizes)

    @property
    def image_shares(self) -> tuple[float, ...] | None:
        """Share of each class among the training images, whatever they weigh; None where ``counts`` is not known."""
        return _shares(self.counts)

    @property
    def sizes(self) -> tuple[float, ...]:
        """Training images of each class, each as often as its weight says; () where they are not known."""
        return self.weighted or self.counts

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @cached_property
    def scale(self) -> Scale:
        """Which pixel values become 0 and 1, and how the result is normalised."""
        return Scale(self.kind, self.low, self.high, self.mean, self.std)

    @property
    def visible(self) -> bool:
        """Whether images can be shown as they are: 8 bits, grey or colour."""
        return self.kind == "uint8" and not self.low and self.channels in (1, 3)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def has_images_of(self, other: "DataInfo") -> bool:
        """Whether training images are as many and called as another's, as far as those are known."""
        return other.counts in ((), self.counts) and other.pool in ("", self.pool)

    def is_that_of(self, raw: Any) -> bool:
        """Whether ``raw``, which ``to_dict`` wrote, describes these data; before version 0.7 it had fewer fields."""
        before = {"kind": "uint8", "low": [], "high": [], "counts": list(self.counts), "weighted": list(self.weighted)}
        if not isinstance(raw, dict):
            return False
        return before | raw | {"pool": raw.get("pool") or self.pool} == self.to_dict()

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "DataInfo":
        """Reads what ``to_dict`` wrote.

        Raises:
            UserError: a field is missing, unknown or of another kind.
        """
        try:
            lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
            info = cls(**{**raw, **lists})
            sizes = all(type(n) is int and 1 <= n <= 2**16 for n in (info.channels, info.height, info.width))
            texts = all(isinstance(name, str) for name in (info.dataset, *info.classes, info.pool))
            counted = not info.counts or len(info.counts) == len(info.classes)
            counted = counted and all(type(n) is int and 0 <= n < 2**53 for n in info.counts)
            counted = counted and (not info.weighted or len(info.weighted) == len(info.classes))
            counted = counted and all(type(w) is float and 0 <= w < 2**53 for w in info.weighted)
            if not (sizes and texts and counted and info.scale.fits(info.channels)):
                raise TypeError("sizes, names, counts or pixel statistics that cannot be")
            return info
        except (KeyError, TypeError) as error:
            raise UserError(f"the saved data description is damaged ({why(error)}); train again.") from error

    def normalise(self, images: Tensor | Images) -> Tensor:
        """(scaled - mean) / std, (N, C, H, W) -> float32, on the images' device; scaled = images / 255 for 8 bits.

        Args:
            images: all of them become floats at once; ``Split.batches`` takes them in turn.

        Raises:
            UserError: other channels, size or type than the training images.
        """
        return self.scale.standardised(self.scale.scaled(self.checked(images)))

    def checked(self, images: Tensor | Images) -> Tensor:
        """The images as a tensor.

        Raises:
            UserError: other channels, size or type than the training images.
        """
        images = images if isinstance(images, Tensor) else as_images(images)[:]
        expected = f"(N, {self.channels}, {self.height}, {self.width}) {self.scale.dtype}"
        got = f"{('N', *images.shape[1:])} {images.dtype}".replace("'", "")
        need(got == expected, f"expected images {expected}, as in training on {self.dataset}; got {got}.")
        return images


def digest(labels: Tensor, names: Sequence[str] = (), groups: Sequence[str] = ()) -> str:
    """16 hexadecimal digits that differ where images, in their order, are called, labelled or grouped otherwise.

    Args:
        labels: (N,) class numbers.
        names: (N,) of the files, or () where there are none.
        groups: (N,) of the images, or ().

    Examples:
        >>> import torch
        >>> labels = torch.tensor([0, 1])
        >>> digest(labels, ("a.png", "b.png")) == digest(labels, ("a.png", "c.png"))
        False
    """
    found = hashlib.sha256(labels.cpu().numpy().astype("<i8").tobytes())
    for texts in (names, groups):
        found.update(json.dumps([*texts]).encode())
    return found.hexdigest()[:16]


def _shares(sizes: tuple[float, ...]) -> tuple[float, ...] | None:
    total = sum(sizes)
    return tuple(size / total for size in sizes) if total else None
