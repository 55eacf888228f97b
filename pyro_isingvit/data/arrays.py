"""Arrays, tensors and torch data sets of users: pixels become uint8 or stay as they are, labels become numbers.

Shapes: N images, C channels (1 to 16), H height, W width.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.decode import upright
from pyro_isingvit.data.images import CHUNK, MOST_CHANNELS, Images, InMemory, as_images, from_numpy

Channels = Literal["first", "last"] | None
FIRST: Channels = "first"
LAST: Channels = "last"
DEPTHS = (1, 3)
GREY = ("1", "L", "LA")  # Pillow's modes of one channel
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # of more than 8 bits: their values are checked like any array's


def is_dataset(given: object) -> bool:
    """Whether it is a torch ``Dataset`` or stands for one: items by number, and neither array, list nor images."""
    if isinstance(given, Dataset):
        return True
    items = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    return items and not isinstance(given, Images | list | tuple | dict | str) and not hasattr(given, "__array__")


def read_arrays(
    images: Any, labels: Any, channels: Channels, what: str, deep: bool = False
) -> tuple[Images, np.ndarray]:
    """Images, and labels (N,) as they are.

    Args:
        images: as ``ImageData.from_arrays`` takes them.
        labels: the same.
        channels: which axis the channels are, or None.
        what: the part, in messages: "", "val " or "test ".
        deep: keep 16 bits and floats as they are.

    Raises:
        UserError: something that cannot be used.
    """
    pixels = images if isinstance(images, Images) else InMemory(from_numpy(to_pixels(images, channels, what, deep)))
    given = label_array(labels, what)
    counts = f"{len(pixels)} images, {len(given)} labels"
    need(len(pixels) == len(given), f"`{what}images` and `{what}labels` differ in number: {counts}.")
    return pixels, given


def read_dataset(dataset: Any, channels: Channels, what: str, deep: bool = False) -> tuple[Images, np.ndarray]:
    """Every (image, label) of a torch ``Dataset``, read once.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, or iterable.
        channels: which axis of arrays and tensors the channels are; None: the first one of tensors.
        what: the part, in messages.
        deep: keep 16 bits and floats as they are.

    Raises:
        UserError: something that cannot be used.
    """
    pixels: list[np.ndarray] = []
    labels: list[Any] = []
    for number, item in enumerate(_items(dataset)):
        pair = isinstance(item, tuple | list) and len(item) == 2
        need(pair, f"item {number} of the {what}data set is {_kind(item)}, not a pair (image, label).")
        image, label = item
        where = f"{what}item {number}: "
        if hasattr(image, "convert") and hasattr(image, "mode"):
            array, axis = _picture(image), LAST
        else:
            array, axis = to_array(image, where), channels or (FIRST if isinstance(image, Tensor) else None)
        need(array.ndim in (2, 3), f"`{where}image` has shape {array.shape}; expected (H, W), (C, H, W) or (H, W, C).")
        pixels.append(to_pixels(array[None], axis if array.ndim == 3 else None, where, deep)[0])
        shapes = f"item 0 is {pixels[0].shape}, item {number} is {pixels[number].shape} (C, H, W)"
        need(pixels[0].shape == pixels[number].shape, f"images differ in shape: {shapes}; resize by a transform.")
        labels.append(label.item() if isinstance(label, Tensor) and label.numel() == 1 else label)
    need(pixels, f"the {what}data set is empty.")
    kinds = {image.dtype.name for image in pixels}
    if kinds == {"uint8", "uint16"}:  # as files are read
        pixels = [image if image.dtype == np.uint16 else image * np.uint16(257) for image in pixels]
    else:
        need(len(kinds) == 1, f"the {what}data set has images of types {' and '.join(sorted(kinds))}; convert one.")
    return as_images(np.stack(pixels)), label_array(labels, what)


def _items(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset):
        yield from dataset
        return
    need(hasattr(dataset, "__len__"), "the data set has no length; give it `__len__`.")
    for number in range(len(dataset)):
        yield dataset[number]


def _picture(image: Any) -> np.ndarray:
    """A PIL image as (H, W) or (H, W, 3), upright and without an alpha channel."""
    image = upright(image)
    if image.mode in DEEP:
        return np.asarray(image)
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns about transparency otherwise
    return np.asarray(image.convert("L" if image.mode in GREY else "RGB"))


def _kind(item: object) -> str:
    return f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__


def to_array(given: Any, what: str = "") -> np.ndarray:
    """Images of any kind as a NumPy array of their own type; ``what`` names the part in messages."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype == torch.bfloat16 else given
        return given.numpy()
    try:
        return np.asarray(given)
    except ValueError as error:
        raise UserError(f"`{what}images` are no array ({why(error)}); all images need one shape.") from error


# Pixels ---------------------------------------------------------------------------------------------------------


def to_pixels(images: Any, channels: Channels = None, what: str = "", deep: bool = False) -> np.ndarray:
    """Images of any accepted layout and type as (N, C, H, W) uint8; uint8 images are not copied.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 to 16.
        channels: which axis the channels are; None: the axis of length 1 or 3.
        what: the part, in messages.
        deep: give uint16 as it is, other numbers but uint8 as float32.

    Raises:
        UserError: another shape, no images, NaN, or values out of their range.
    """
    array = to_array(images, what)
    need(array.size > 0, f"`{what}images` are empty, their shape is {array.shape}.")
    flat = "; bring flat pixels into shape by `images.reshape(-1, height, width)`" if array.ndim == 2 else ""
    shapes = f"`{what}images` have shape {array.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)"
    need(array.ndim in (3, 4), f"{shapes}{flat}.")
    if array.ndim == 3:
        return to_uint8(array, what, deep)[:, None]
    if channels is None:
        fits = [name for name, axis in (("first", 1), ("last", 3)) if array.shape[axis] in DEPTHS]
        alpha = "; drop the alpha channel by `images[..., :3]`" if array.shape[3] == 4 else ""
        need(fits, f"{shapes} with C = 1 or 3{alpha}; with other channels say `channels='first'` or `channels='last'`.")
        need(len(fits) == 1, f"{shapes}: both axes can be the channels; say `channels='first'` or `channels='last'`.")
        channels = FIRST if fits == ["first"] else LAST
    depth = array.shape[1 if channels == "first" else 3]
    need(
        depth <= MOST_CHANNELS,
        f"{shapes} with C = 1 to {MOST_CHANNELS}, but with `channels={channels!r}` it has {depth}.",
    )
    array = to_uint8(array, what, deep)
    return array if channels == "first" else array.transpose(0, 3, 1, 2)


def to_uint8(array: np.ndarray, what: str = "", deep: bool = False) -> np.ndarray:
    """Pixels as uint8: floats x in [0, 1] as round(255 x), bool as 0 and 255, integers as they are.

    Args:
        array: (N, ...) of any type.
        what: the part, in messages.
        deep: give uint16 as it is, other numbers but uint8 as float32.

    Raises:
        UserError: NaN or infinite values, or values out of their range.
    """
    kind, images = array.dtype.kind, f"`{what}images`"
    if array.dtype == np.uint8:
        return array
    need(kind in "bfiu", f"{images} are {array.dtype}; expected uint8, or float in [0, 1].")
    blocks = [slice(i, i + CHUNK) for i in range(0, len(array), CHUNK)]  # no second float copy of all
    if kind == "f":
        bad = sum(int((~np.isfinite(array[block])).sum()) for block in blocks)
        need(not bad, f"{images} have {bad} NaN or infinite values; repair or remove those images.")
    if deep and kind in "iuf":  # as files are read
        whole = array.dtype.newbyteorder("=") == np.uint16
        return array.astype(np.uint16 if whole else np.float32, copy=False)
    low, high = array.min(), array.max()
    if kind in "iu":
        fix = "keep 16 bits by `intensity='full'`, or rescale to 0..255, such as by `(images // 256).astype('uint8')`"
        need(low >= 0 and high <= 255, f"{images} are {array.dtype} from {low} to {high}, not 0 to 255; {fix}.")
    if kind == "f" and not (low >= 0 and high <= 1):
        fix = f"rescale them by `images / {255 if 16 < high <= 255 else high:g}`"
        if low < 0:
            fix = "rescale them by `(images - images.min()) / (images.max() - images.min())`, and leave out any "
            fix += "transform that normalises: training normalises images itself"
        raise UserError(f"{images} are {array.dtype} from {low:g} to {high:g}, and floats must lie in [0, 1]; {fix}.")
    result = np.empty(array.shape, np.uint8)
    for block in blocks:
        if kind == "f":
            result[block] = np.rint(array[block] * array.dtype.type(255))
        else:
            result[block] = array[block] * np.uint8(255) if kind == "b" else array[block]
    return result


# Labels ---------------------------------------------------------------------------------------------------------


def label_array(labels: Any, what: str = "") -> np.ndarray:
    """Labels as (N,), of any type that has an order.

    Args:
        labels: (N,) or (N, 1).
        what: the part, in messages.

    Raises:
        UserError: another shape, floats, or labels that are missing.
    """
    name = f"`{what}labels`"
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    elif not hasattr(labels, "__array__"):
        labels = _column(labels, name)
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    hot = "; of one-hot labels take `labels.argmax(1)`" if array.ndim == 2 else ""
    need(array.ndim == 1, f"{name} have shape {array.shape}; expected (N,) or (N, 1){hot}.")
    lost = 0
    if array.dtype.kind == "f":
        lost = int((~np.isfinite(array)).sum())
    elif array.dtype.kind == "O":
        lost = sum(map(missing, array.tolist()))
        array = array if lost else _narrow(array)
    need(not lost, f"{name} have {lost} NaN or missing values; label or remove those images.")
    need(array.dtype.kind not in "fc", f"{name} are {array.dtype}; convert whole numbers by `labels.astype(int)`.")
    return array


def _column(labels: Any, name: str) -> np.ndarray:
    """A list as (N,) objects: np.asarray would make a table of tuples, and strings of numbers."""
    need(isinstance(labels, Iterable) and not isinstance(labels, str), f"{name} must be a list or an array (N,).")
    values = [
        (value.item() if value.numel() == 1 else value.numpy(force=True)) if isinstance(value, Tensor) else value
        for value in labels
    ]
    if any(isinstance(value, list | np.ndarray) for value in values):
        try:
            return np.asarray(values)
        except ValueError as error:
            raise UserError(f"{name} are no array ({why(error)}); expected (N,) or (N, 1).") from error
    column = np.empty(len(values), object)
    column[:] = values
    return _narrow(column)


def missing(value: object) -> bool:
    """None, NaN, and what cannot be compared with itself, such as pandas' NA."""
    try:
        return value is None or bool(value != value)  # noqa: PLR0124
    except (TypeError, ValueError):
        return True


def _narrow(column: np.ndarray) -> np.ndarray:
    """Objects as an array of their own type, where all have the same and it is a scalar."""
    kinds = {type(value) for value in column.tolist()}
    plain = len(kinds) == 1 and issubclass(next(iter(kinds)), bool | int | float | str | np.generic)
    return np.array(column.tolist()) if plain else column


def find_classes(labels: np.ndarray, names: Sequence[str] | None) -> tuple[tuple[str, ...], dict[Hashable, int]]:
    """Names of the classes, and the number of each label.

    Args:
        labels: (N,) of the training images.
        names: as ``ImageData.from_arrays`` takes ``classes``.

    Raises:
        UserError: gaps in the numbers, a class without a training image, names that do not fit, or labels that cannot
            be told apart or sorted.
    """
    if names is not None:
        names = [str(name) for name in names]
        need(len(set(names)) == len(names), f"`classes` name a class twice: {', '.join(names)}.")
        labels = labels.astype(np.int64) if labels.dtype.kind == "b" else labels
    values = _sorted(labels)
    if labels.dtype.kind in "iu":
        count = values[-1] + 1 if names is None else len(names)
        need(values[0] >= 0, f"`labels` are negative (from {values[0]}); number the classes 0, 1, 2, ...")
        beyond = f"`labels` go up to {values[-1]}, and `classes` name {count}, numbered from 0"
        need(values[-1] < count, f"{beyond}; give a name for each.")
        gap = next((i for i, value in enumerate([*values, -1]) if i != value), 0)
        called = f"{gap}" if names is None or gap >= len(names) else f"{gap} ({names[gap]!r})"
        fix = (
            "number the classes 0, 1, 2, ... without gaps, or make names of them by `labels.astype(str)`"
            if gap < values[-1] else "leave out of `classes` what has no image"
        )  # fmt: skip
        need(gap == count, f"no training image has label {called}, and labels go up to {values[-1]}; {fix}.")
        known: dict[Hashable, int] = {value: value for value in values}
        names = names or [str(value) for value in values]
    else:
        known = {value: number for number, value in enumerate(values)}
        if names is not None:
            found, given = {str(value) for value in values}, set(names)
            need(found <= given, f"`labels` have {_some(found - given)}, which `classes` do not name.")
            need(given <= found, f"class {_some(given - found)} of `classes` has no training image.")
            known = {value: names.index(str(value)) for value in values}
        names = names or [str(value) for value in values]
        need(len(set(names)) == len(names), "`labels` that differ look the same as text; make them strings.")
    shown = tuple(printable(name) for name in names)
    need(len(shown) > 1, f"`labels` have only the class {shown[0]!r}; at least two are needed.")
    return shown, known


def class_numbers(labels: np.ndarray, known: dict[Hashable, int], what: str) -> Tensor:
    """The class number of each label, (N,) int64.

    Args:
        labels: (N,).
        known: as ``find_classes`` gives it.
        what: the part, in messages.

    Raises:
        UserError: a label that no training image has.
    """
    values = labels.tolist()
    strange = {value for value in values if value not in known}
    need(not strange, f"`{what}labels` have {_some(strange)}, which no training image has.")
    return torch.tensor([known[value] for value in values], dtype=torch.int64)


def _sorted(labels: np.ndarray) -> list[Any]:
    try:
        return sorted(set(labels.tolist()))
    except TypeError as error:  # lists are not hashable, 3 and "a" have no order
        raise UserError(f"`labels` cannot be sorted into classes ({why(error)}); make them strings.") from error


def _some(values: set[Any], most: int = 5) -> str:
    shown = [repr(value) for value in sorted(values, key=repr)[:most]]
    return ", ".join([*shown, *(["..."] if len(values) > most else [])])


def loss_weights(weights: Any) -> Tensor | None:
    """Weights of images in the training loss, (N,) float32 with mean 1; None stays None.

    Raises:
        UserError: not (N,), or not all positive and finite.
    """
    if weights is None:
        return None
    wrong = "`weights` must be positive numbers (N,), one for each image"
    try:
        array = to_array(weights).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{wrong} ({why(error)}).") from error
    if not array.size:
        return torch.zeros(0)
    need(array.ndim == 1 and bool((np.isfinite(array) & (array > 0)).all()), f"{wrong}.")
    with np.errstate(over="ignore"):
        found = (array / array.max() / (array / array.max()).mean()).astype(np.float32)
    need(bool((found > 0).all()), f"{wrong}, and the largest at most 10^37 times the smallest.")
    return torch.from_numpy(found)
