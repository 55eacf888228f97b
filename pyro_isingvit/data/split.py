"""Parts of a data set, what a network must know of it, and the rule that cuts the parts.

Shapes: N images, B batch, C channels, H height, W width; images are (N, C, H, W).
"""

import logging
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.arrays import (
    class_numbers,
    find_classes,
    is_dataset,
    loss_weights,
    missing,
    read_arrays,
    read_dataset,
)
from pyro_isingvit.data.images import Images, Normalise, Resize, Resized, as_images, copies
from pyro_isingvit.data.info import DataInfo, digest
from pyro_isingvit.data.stratify import hold_out, hold_out_groups, shared_group, stratified

log = logging.getLogger(__name__)
UNLABELLED = -1
SHOWN = 10  # classes that a log line names
VALIDATION = "validation (`val_fraction` above 0)"  # what images are held out for


def tell_unknown(labels: Sequence[int], names: Sequence[str], why: str) -> None:
    """Says that labels are not used where some are known and others are not.

    Args:
        labels: class numbers, ``UNLABELLED`` where not known.
        names: of the images.
        why: what is wrong with an image whose label is not known.
    """
    unknown = [number for number, label in enumerate(labels) if label == UNLABELLED]
    if unknown and len(unknown) < len(labels):
        told = "the labels are not used, since %d of %d are not known: of %s, %s"
        log.warning(told, len(unknown), len(labels), printable(str(names[unknown[0]])), why)


@dataclass(frozen=True, init=False)
class Split:
    """One part of a data set.

    Args:
        images: an ``Images``, or a tensor or array (N, C, H, W) uint8, uint16 or float32. ``split.images[:10]`` is a
            tensor.
        labels: (N,) int64; ``UNLABELLED`` where not known.
        names: (N,) file names, where there are files.
        groups: (N,) the patient, slide or plate of each image, where known; no two parts share one.
        weights: (N,) positive, of each image in the training loss, with mean 1; None: all count alike.
        classes: what the class numbers are called; () where not known.

    Raises:
        UserError: images of another kind, or counts that differ.
    """

    images: Images
    labels: Tensor
    names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    weights: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __init__(
        self,
        images: Images | Tensor | np.ndarray,
        labels: Tensor,
        names: tuple[str, ...] = (),
        groups: tuple[str, ...] = (),
        weights: Tensor | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        fields = {
            "images": as_images(images), "labels": labels, "names": names, "groups": groups, "weights": weights,
            "classes": classes,
        }  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        counts = f"{len(self.images)} images, {len(labels)} labels"
        need(len(self.images) == len(labels), f"label count mismatch: {counts}.")
        need(len(groups) in (0, len(labels)), f"{counts}, {len(groups)} groups.")
        need(
            weights is None or len(weights) == len(labels),
            f"{counts}, {0 if weights is None else len(weights)} weights.",
        )

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Split":
        """The images at ``index`` (n,), in that order; a copy where they lie in memory."""
        rows = torch.from_numpy(index)
        names, groups = (tuple(texts[i] for i in index if texts) for texts in (self.names, self.groups))
        there = rows.to(self.labels.device)
        weights = None if self.weights is None else self.weights[there]
        return Split(self.images.take(rows), self.labels[there], names, groups, weights, self.classes)

    def resized(self, size: int | None, how: Resize = "stretch") -> "Split":
        """The part with images of ``size`` pixels a side, resized when they are read; None: as it is."""
        same = size is None or self.images.shape[2:] == (size, size)
        return self if same else replace(self, images=Resized(self.images, size or 0, how))

    def to(self, device: torch.device | str) -> "Split":
        """The part on a device; images that are made on demand stay where they are made."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), weights=weights)

    def numbered_as(self, classes: tuple[str, ...]) -> "Split":
        """The part with the class numbers that its classes have among others; as it is where they have no names.

        Raises:
            UserError: a class that is not among them.
        """
        if self.classes in ((), classes):
            return self
        need({*self.classes} <= {*classes}, f"not all of {self.classes!r:.60} are among {classes!r:.60}.")
        numbers = torch.tensor([*map(classes.index, self.classes), UNLABELLED], device=self.labels.device)
        return replace(self, labels=numbers[self.labels], classes=classes)

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


Part = tuple[Any, Any] | Any  # (images, labels), or a torch Dataset of such pairs


@dataclass(frozen=True)
class ImageData:
    """A data set, split and described; ``load_data``, ``from_arrays`` and ``from_dataset`` make one.

    Attributes:
        train: what the posterior is fitted to, N images.
        val: what is watched in training and sets mask noise and temperature; may be empty.
        test: what the trained run is evaluated on.
        info: classes, image shape and pixel statistics of the training part; images of each class are counted here,
            and their weights summed.
        source: settings and seed that ``load_data`` divides it by again; None for images that were given in memory.
    """

    train: Split
    val: Split
    test: Split
    info: DataInfo
    source: tuple[DataConfig, int] | None = None

    def __post_init__(self) -> None:
        """Counts the training images of each class, unless ``info`` has the counts, and names the parts' classes."""
        classes = self.info.classes
        for name in ("train", "val", "test"):
            part = getattr(self, name)
            if part.classes != classes:
                part = part.numbered_as(classes) if {*part.classes} <= {*classes} else part  # or they are called anew
                object.__setattr__(self, name, replace(part, classes=classes))
        labels = self.train.labels
        if not self.info.counts and len(labels) and int(labels.min()) >= 0:
            counts, weights = torch.bincount(labels, minlength=self.info.num_classes), self.train.weights
            sums = None if weights is None else torch.bincount(labels, weights.double(), self.info.num_classes)
            weighted = () if sums is None else tuple(sums.tolist())
            object.__setattr__(self, "info", replace(self.info, counts=tuple(counts.tolist()), weighted=weighted))

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
        intensity: str | None = None,
        groups: Sequence[Hashable] | None = None,
        weights: Any = None,
    ) -> "ImageData":
        """Your own images and labels, split as ``load_data`` splits.

        Args:
            images: NumPy array, torch tensor or nested list of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 to
                16 channels. uint8 or other integers from 0 to 255; floats in [0, 1], which are rounded to 255ths; bool,
                which becomes 0 and 255. With ``intensity``, uint16 and floats stay as they are, and integers of other
                types than uint8 become floats. An ``Images`` is taken
                as it is. A torch ``Dataset`` is read by ``from_dataset``.
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
            intensity: which pixel values become 0 and 1: "full", "percentile LOW HIGH" or "none" (data/intensity.py).
            groups: (N,) patient, slide or plate of each image; a group stays in one part.
            weights: (N,) positive, of each image in the training loss.

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
                return read_dataset(pixels, channels, what, intensity is not None)
            need(given is not None, f"`{what}labels` are missing.")
            return read_arrays(pixels, given, channels, what, intensity is not None)

        if classes is None and labels is None and is_dataset(images):
            classes = getattr(images, "classes", None)  # torchvision's data sets name theirs
        pixels, raw = read(images, labels, "")
        names, numbers = find_classes(raw, classes)
        patients: list[Any] = [] if groups is None else list(groups)
        nameless = sum(missing(patient) for patient in patients if np.shape(patient) == ())
        need(not nameless, f"`groups` have {nameless} NaN or missing values; name them, or remove those images.")
        named = tuple(printable(str(patient)) for patient in patients)
        pool = Split(pixels, class_numbers(raw, numbers, ""), (), named, loss_weights(weights))
        parts: dict[str, Split | None] = {}
        for part, given in (("val", val), ("test", test)):
            parts[part] = None
            if given is None:
                continue
            pair = (given, None) if is_dataset(given) else given
            need(isinstance(pair, tuple | list) and len(pair) == 2, f"`{part}` must be a pair (images, labels).")
            pixels, raw = read(pair[0], pair[1], f"{part} ")
            shapes = f"{pixels.shape[1:]} {pixels.kind} and {pool.images.shape[1:]} {pool.images.kind}"
            same = (pixels.shape[1:], pixels.kind) == (pool.images.shape[1:], pool.images.kind)
            need(same, f"`{part}` images and training images differ in (C, H, W) or type: {shapes}.")
            parts[part] = Split(pixels, class_numbers(raw, numbers, f"{part} "))
        held_out = parts["test"]
        if held_out is None:
            pool, held_out = hold_out_test(pool, names, test_fraction)
        return divide(
            pool, parts["val"], held_out, names, name=name, train_size=train_size, val_fraction=val_fraction,
            seed=seed, intensity=intensity or "full",
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
    for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        need(isinstance(share, Real) and 0 <= share <= 0.5, f"`{name}` must be between 0 and 0.5, got {share!r:.60}.")
    need(isinstance(seed, Integral) and seed >= 0, f"`seed` must not be negative, but whole; got {seed!r:.60}.")


def hold_out_test(train: Split, classes: tuple[str, ...], fraction: float) -> tuple[Split, Split]:
    """What remains and the test part, stratified; the same on every call.

    Raises:
        UserError: a class with a single image.
    """
    if fraction == 0:
        return train, train.take(np.arange(0))
    count = math.ceil(round(fraction * len(train), 6))  # 0.2 * 35 is a little above 7
    rest, held_out = _hold_out(train, count, np.random.default_rng(0), classes, "testing")
    return train.take(rest), train.take(held_out)


def _hold_out(
    part: Split, count: int, rng: np.random.Generator, classes: tuple[str, ...], purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    labels = part.labels.numpy()
    if part.groups:
        return hold_out_groups(labels, part.groups, count, rng, classes, purpose)
    return hold_out(labels, count, rng, classes, purpose)


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
    intensity: str = "full",
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
        intensity: which pixel values become 0 and 1 (data/intensity.py).

    Raises:
        UserError: ``train_size`` out of its range, a class with too few images or groups, or a group in two parts.
    """
    if train_size is not None:
        need(isinstance(train_size, Integral), f"`train_size` must be a whole number, not {train_size!r}.")
        limits = f"{len(classes)} (one per class) and {len(pool)} (all training images)"
        possible = len(classes) <= train_size <= len(pool)
        need(possible, f"`train_size` must be between {limits}, got {train_size}.")
    cut = _cut_groups if pool.groups else _cut
    train, val = cut(pool, val, classes, train_size, val_fraction, seed)
    if val_fraction == 0:
        val = pool.take(np.arange(0))
    if train.weights is not None:
        train = replace(train, weights=train.weights / train.weights.mean())
    counts = map("{} {}".format, classes[:SHOWN], torch.bincount(train.labels).tolist())
    told, sizes = ", ".join(counts), (len(train), len(val), len(test))
    log.info("%s: %d training, %d validation, %d test images; to train on, of each class: %s", name, *sizes, told)
    if strange := shared_group(part.groups for part in (train, val, test)):
        raise UserError(f"group {strange!r} has images in two parts of {name}; put all of its images into one part.")
    _, again, tested = copies(part.images for part in (train, val, test))
    if again or tested:
        log.warning("%d validation and %d test images are copies of images in an earlier part", again, tested)
    info = replace(
        DataInfo.of(name, classes, train.images, intensity), pool=digest(pool.labels, pool.names, pool.groups)
    )
    return ImageData(train, val, test, info)


def _cut(
    pool: Split, val: Split | None, classes: tuple[str, ...], train_size: int | None, val_fraction: float, seed: int
) -> tuple[Split, Split]:
    """Training and validation part of images that have nothing to do with each other."""
    labels = pool.labels.numpy()
    chosen = everything = np.arange(len(labels))
    if train_size is not None:
        chosen = stratified(labels, train_size, np.random.default_rng([seed, 0]))
    if val is None and val_fraction:
        left, rng = np.setdiff1d(everything, chosen), np.random.default_rng([seed, 1])
        count = max(round(val_fraction * len(chosen)), len(classes))
        if len(left) >= count and len(np.unique(labels[left])) == len(classes):
            val = pool.take(left[stratified(labels[left], count, rng)])
        else:
            rest, held_out = hold_out(labels[chosen], count, rng, classes, VALIDATION)
            val, chosen = pool.take(chosen[held_out]), chosen[rest]
    return pool.take(chosen), val or pool.take(everything[:0])


def _cut_groups(
    pool: Split, val: Split | None, classes: tuple[str, ...], train_size: int | None, val_fraction: float, seed: int
) -> tuple[Split, Split]:
    """The same of images in groups: whole groups for validation first, then training images from the others."""
    rest = pool
    if val is None and val_fraction:
        wanted = len(pool) / (1 + val_fraction) if train_size is None else train_size
        count, rng = max(round(val_fraction * wanted), len(classes)), np.random.default_rng([seed, 1])
        kept, held_out = _hold_out(pool, count, rng, classes, VALIDATION)
        rest, val = pool.take(kept), pool.take(held_out)
    if train_size is not None:
        need(
            train_size <= len(rest),
            f"`train_size` {train_size}: {len(rest)} training images are left beside the groups for validation; choose "
            "less, or a smaller `val_fraction`.",
        )
        rest = rest.take(stratified(rest.labels.numpy(), train_size, np.random.default_rng([seed, 0])))
    return rest, val or pool.take(np.arange(0))
