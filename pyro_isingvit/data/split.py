"""Parts of a data set, what a network must know of it, and the rule that cuts the parts.

Shapes: N images, B batch, C channels (1 or 3), H height, W width; images are (N, C, H, W) uint8.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.arrays import class_numbers, find_classes, is_dataset, read_arrays, read_dataset
from pyro_isingvit.data.images import Images, Normalise, Resized, as_images, copies, statistics
from pyro_isingvit.data.stratify import hold_out, stratified

log = logging.getLogger(__name__)
UNLABELLED = -1


@dataclass(frozen=True, init=False)
class Split:
    """One part of a data set.

    Args:
        images: an ``Images``, or a tensor or array (N, C, H, W) uint8. ``split.images[:10]`` is a tensor.
        labels: (N,) int64; ``UNLABELLED`` where not known.
        names: (N,) file names, where there are files.

    Raises:
        UserError: images of another kind, or counts that differ.
    """

    images: Images
    labels: Tensor
    names: tuple[str, ...] = ()

    def __init__(self, images: Images | Tensor | np.ndarray, labels: Tensor, names: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "images", as_images(images))
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "names", names)
        counts = f"{len(self.images)} images, {len(labels)} labels"
        need(len(self.images) == len(labels), f"label count mismatch: {counts}.")

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Split":
        """The images at ``index`` (n,), in that order; a copy where they lie in memory."""
        rows, names = torch.from_numpy(index), tuple(self.names[i] for i in index if self.names)
        return Split(self.images.take(rows), self.labels[rows.to(self.labels.device)], names)

    def resized(self, size: int | None) -> "Split":
        """The part with images of ``size`` pixels a side, resized when they are read; None: as it is."""
        same = size is None or self.images.shape[2:] == (size, size)
        return self if same else replace(self, images=Resized(self.images, size or 0))

    def to(self, device: torch.device | str) -> "Split":
        """The part on a device; images that are made on demand stay where they are made."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(
        self, size: int, normalise: Normalise, device: torch.device | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, normalised, with their labels.

        Args:
            size: B, images of a batch; the last one may have fewer.
            normalise: ``DataInfo.normalise`` of the training data.
            device: where to; None: where the labels are.

        Yields:
            x (B, C, H, W) float32 and y (B,) int64.

        Raises:
            UserError: ``size`` below 1, or images that do not fit the training data.
        """
        labels = self.labels.to(device or self.labels.device)
        for i, x in enumerate(self.images.batches(size, normalise, labels.device)):
            yield x, labels[i * size : (i + 1) * size]


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
    counts: tuple[int, ...] = ()  # training images of each class; () where they are not known, as before version 0.7

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Share of each class in the training part; None where ``counts`` is not known."""
        total = sum(self.counts)
        return tuple(count / total for count in self.counts) if total else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def is_that_of(self, raw: Any) -> bool:
        """Whether ``raw``, which ``to_dict`` wrote, describes these data; before version 0.7 it had no counts."""
        return isinstance(raw, dict) and {"counts": list(self.counts)} | raw == self.to_dict()

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "DataInfo":
        """Reads what ``to_dict`` wrote.

        Raises:
            UserError: a field is missing, unknown or of another kind.
        """
        try:
            tuples = {key: tuple(raw[key]) for key in ("classes", "mean", "std")}
            info = cls(**{**raw, **tuples, "counts": tuple(raw.get("counts", ()))})
            sizes = all(type(n) is int and 1 <= n <= 2**16 for n in (info.channels, info.height, info.width))
            texts = all(isinstance(name, str) for name in (info.dataset, *info.classes))
            pixels = [*info.mean, *info.std] if len(info.mean) == len(info.std) == info.channels else [math.nan]
            counted = not info.counts or len(info.counts) == len(info.classes)
            counted = counted and all(type(n) is int and 0 <= n < 2**53 for n in info.counts)
            if not (sizes and texts and counted and all(map(math.isfinite, pixels)) and min(info.std) > 0):
                raise TypeError("sizes, names, counts or pixel statistics that cannot be")
            return info
        except (KeyError, TypeError) as error:
            raise UserError(f"the saved data description is damaged ({why(error)}); train again.") from error

    def normalise(self, images: Tensor | Images) -> Tensor:
        """(images / 255 - mean) / std, (N, C, H, W) uint8 -> float32, on the images' device.

        Args:
            images: all of them become floats at once; ``Split.batches`` takes them in turn.

        Raises:
            UserError: other channels, size or type than the training images.
        """
        images = images if isinstance(images, Tensor) else as_images(images)[:]
        expected = f"(N, {self.channels}, {self.height}, {self.width}) torch.uint8"
        got = f"{('N', *images.shape[1:])} {images.dtype}".replace("'", "")
        need(got == expected, f"expected images {expected}, as in training on {self.dataset}; got {got}.")
        mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


Part = tuple[Any, Any] | Any  # (images, labels), or a torch Dataset of such pairs


@dataclass(frozen=True)
class ImageData:
    """A data set, split and described; ``load_data``, ``from_arrays`` and ``from_dataset`` make one.

    Attributes:
        train: what the posterior is fitted to, N images.
        val: what is watched in training and sets mask noise and temperature; may be empty.
        test: what the trained run is evaluated on.
        info: classes, image shape and pixel statistics of the training part; images of each class are counted here.
        source: settings and seed that ``load_data`` divides it by again; None for images that were given in memory.
    """

    train: Split
    val: Split
    test: Split
    info: DataInfo
    source: tuple[DataConfig, int] | None = None

    def __post_init__(self) -> None:
        """Counts the training images of each class, unless ``info`` has the counts."""
        labels = self.train.labels
        if not self.info.counts and len(labels) and int(labels.min()) >= 0:
            counts = torch.bincount(labels, minlength=self.info.num_classes)
            object.__setattr__(self, "info", replace(self.info, counts=tuple(counts.tolist())))

    @classmethod
    def from_arrays(
        cls,
        images: Any,
        labels: Any = None,
        *,
        val: Part | None = None,
        test: Part | None = None,
        classes: Sequence[str] | None = None,
        channels: Literal["first", "last"] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_size: int | None = None,
        seed: int = 0,
        name: str = "arrays",
    ) -> "ImageData":
        """Your own images and labels, split as ``load_data`` splits.

        Args:
            images: NumPy array, torch tensor or nested list of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or
                3 channels. uint8 or other integers from 0 to 255; floats in [0, 1], which are rounded to 255ths; bool,
                which becomes 0 and 255. An ``Images`` is taken as it is. A torch ``Dataset`` is read by
                ``from_dataset``.
            labels: (N,) or (N, 1). Integers 0..C-1 without gaps; strings, bool or anything else that has an order
                become classes in sorted order.
            val: (images, labels) of a validation part; None: split off by ``val_fraction``.
            test: (images, labels) of a test part; None: split off by ``test_fraction``.
            classes: names of the classes 0..C-1; with labels that are no integers, the labels in the wanted order.
            channels: "first" or "last" axis of an image; None: the axis of length 1 or 3.
            val_fraction: validation images per training image, 0 to 0.5.
            test_fraction: share of the images that is held out for testing, 0 to 0.5; the same whatever the seed.
            train_size: number of training images; None: all that validation leaves.
            seed: of the training subset and the validation part.
            name: of the data set, in reports.

        Raises:
            UserError: shapes, types or values that cannot be used, NaN, counts that differ, a class with too few
                images; the message names the argument.

        Examples:
            >>> import numpy as np
            >>> from pyro_isingvit import ImageData
            >>> images = np.random.default_rng(0).random((60, 8, 8))
            >>> data = ImageData.from_arrays(images, ["cat", "dog", "owl"] * 20, name="animals")
            >>> len(data.train), len(data.val), len(data.test), data.info.classes
            (43, 5, 12, ('cat', 'dog', 'owl'))
        """
        check_division(val_fraction, test_fraction, seed)
        need(channels in (None, "first", "last"), f"`channels` must be 'first', 'last' or None, not {channels!r}.")

        def read(pixels: Any, given: Any, what: str) -> tuple[Images, np.ndarray]:
            if given is None and is_dataset(pixels):
                return read_dataset(pixels, channels, what)
            need(given is not None, f"`{what}labels` are missing.")
            return read_arrays(pixels, given, channels, what)

        if classes is None and labels is None and is_dataset(images):
            classes = getattr(images, "classes", None)  # torchvision's data sets name theirs
        pixels, raw = read(images, labels, "")
        names, numbers = find_classes(raw, classes)
        pool = Split(pixels, class_numbers(raw, numbers, ""))
        parts: dict[str, Split | None] = {}
        for part, given in (("val", val), ("test", test)):
            parts[part] = None
            if given is None:
                continue
            pair = (given, None) if is_dataset(given) else given
            need(isinstance(pair, tuple | list) and len(pair) == 2, f"`{part}` must be a pair (images, labels).")
            pixels, raw = read(pair[0], pair[1], f"{part} ")
            same = pixels.shape[1:] == pool.images.shape[1:]
            shapes = f"{pixels.shape[1:]} and {pool.images.shape[1:]}"
            need(same, f"`{part}` images and training images differ in (C, H, W): {shapes}.")
            parts[part] = Split(pixels, class_numbers(raw, numbers, f"{part} "))
        held_out = parts["test"]
        if held_out is None:
            pool, held_out = hold_out_test(pool, names, test_fraction)
        return divide(
            pool, parts["val"], held_out, names, name=name, train_size=train_size, val_fraction=val_fraction,
            seed=seed,
        )  # fmt: skip

    @classmethod
    def from_dataset(cls, dataset: Any, **settings: Any) -> "ImageData":
        """A ``torch.utils.data.Dataset`` of (image, label), read once into memory as uint8.

        Random transforms are therefore drawn once; leave them to ``TrainConfig.augment``, and leave out ``Normalize``,
        since images are normalised here.

        Args:
            dataset: images are PIL, uint8 or float tensors (C, H, W), or arrays; all of one size.
            **settings: as for ``from_arrays``; ``val`` and ``test`` may be data sets too. The data set's own
                ``classes`` name the classes unless ``classes`` is given.

        Raises:
            UserError: as ``from_arrays``, or items that are no pairs.

        Examples:
            >>> import torch
            >>> from torch.utils.data import TensorDataset
            >>> from pyro_isingvit import ImageData
            >>> dataset = TensorDataset(torch.rand(40, 3, 8, 8), torch.arange(40) % 2)
            >>> data = ImageData.from_dataset(dataset, val_fraction=0.25)
            >>> len(data.train), len(data.val), len(data.test), data.info.channels
            (24, 8, 8, 3)
        """
        need(is_dataset(dataset), f"`dataset` must be a torch Dataset of (image, label), not {type(dataset).__name__}.")
        return cls.from_arrays(dataset, **settings)


def check_division(val_fraction: float, test_fraction: float, seed: int) -> None:
    """Raises UserError where a setting of the split is out of its range."""
    need(0 <= val_fraction <= 0.5, f"`val_fraction` must be between 0 and 0.5, got {val_fraction}.")
    need(0 <= test_fraction <= 0.5, f"`test_fraction` must be between 0 and 0.5, got {test_fraction}.")
    need(seed >= 0, f"`seed` must not be negative, got {seed}.")


def hold_out_test(train: Split, classes: tuple[str, ...], fraction: float) -> tuple[Split, Split]:
    """What remains and the test part, stratified; the same on every call.

    Raises:
        UserError: a class with a single image.
    """
    if fraction == 0:
        return train, train.take(np.arange(0))
    labels = train.labels.numpy()
    count = math.ceil(round(fraction * len(labels), 6))  # 0.2 * 35 is a little above 7
    rest, held_out = hold_out(labels, count, np.random.default_rng(0), classes, "testing")
    return train.take(rest), train.take(held_out)


def divide(
    pool: Split,
    val: Split | None,
    test: Split,
    classes: tuple[str, ...],
    *,
    name: str,
    train_size: int | None,
    val_fraction: float,
    seed: int,
) -> ImageData:
    """Cuts training and validation parts by the rule that heads data/load.py, and describes the training part.

    Args:
        pool: images for training, and for validation where there is no official part.
        val: the official validation part, or None.
        test: the test part.
        classes: names.
        name: of the data set.
        train_size: number of training images; None: all that validation leaves.
        val_fraction: validation images per training image.
        seed: of the training subset and the validation part.

    Raises:
        UserError: ``train_size`` out of its range, or a class with too few images.
    """
    labels = pool.labels.numpy()
    chosen = everything = np.arange(len(labels))
    if train_size is not None:
        limits = f"{len(classes)} (one per class) and {len(labels)} (all training images)"
        possible = len(classes) <= train_size <= len(labels)
        need(possible, f"`train_size` must be between {limits}, got {train_size}.")
        chosen = stratified(labels, train_size, np.random.default_rng([seed, 0]))
    if val_fraction == 0:
        val = pool.take(chosen[:0])
    elif val is None:
        left, rng = np.setdiff1d(everything, chosen), np.random.default_rng([seed, 1])
        count = max(round(val_fraction * len(chosen)), len(classes))
        if len(left) >= count and len(np.unique(labels[left])) == len(classes):
            val = pool.take(left[stratified(labels[left], count, rng)])
        else:
            rest, held_out = hold_out(labels[chosen], count, rng, classes, "validation (`val_fraction` above 0)")
            val, chosen = pool.take(chosen[held_out]), chosen[rest]
    train = pool.take(chosen)
    mean, std = statistics(train.images)
    log.info("%s: %d training, %d validation, %d test images", name, len(train), len(val), len(test))
    _, again, tested = copies(part.images for part in (train, val, test))
    if again or tested:
        log.warning("%d validation and %d test images are copies of images in an earlier part", again, tested)
    _, depth, height, width = train.images.shape
    return ImageData(train, val, test, DataInfo(name, classes, depth, height, width, mean, std))
