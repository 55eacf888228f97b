"""Images and labels as users of a trained run give them.

Shapes: N images, C channels, H height, W width.
"""

import logging
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.arrays import class_numbers, label_array, to_array, to_pixels
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import ImageData, Split

log = logging.getLogger(__name__)
MANY = 256  # images that are looked at
Labelled = Split | tuple[Any, Any] | ImageData


def pixels(images: Any, info: DataInfo, what: str = "") -> Images:
    """Images as the network takes them.

    Args:
        images: ``Images``, or an array, tensor or nested list of shape (N, C, H, W), (N, H, W, C) or, with one channel,
            (N, H, W), and the first of these that fits; of the training images' type, where that was uint8 also float
            in [0, 1].
        info: the images that the network was trained on.
        what: the part, in messages: "" or "val ".

    Raises:
        UserError: another shape or type, or values out of their range.
    """
    if isinstance(images, Images):
        need(
            images.kind == info.kind,
            f"`{what}images` are {images.kind}; expected {info.kind}, as in training on {info.dataset}.",
        )
        return images
    array = images if isinstance(images, Tensor) else to_array(images, what)
    height, width, channels = info.height, info.width, info.channels
    layouts = {(height, width, channels): "last", (channels, height, width): "first"}  # first, where it can be both
    wanted = f"(N, {channels}, {height}, {width})"
    given = f"`{what}images` have shape {tuple(array.shape)}"
    fits = tuple(array.shape[1:]) in {*layouts, (height, width) if channels == 1 else None}
    need(fits, f"{given}; expected {wanted} or (N, {height}, {width}, {channels}), as in training on {info.dataset}.")
    channels_are = layouts.get(tuple(array.shape[1:]))
    found = as_images(to_pixels(array, channels_are, what, deep=info.kind != "uint8"))  # type: ignore[arg-type]
    read = info.kind == "uint16" and found.kind == "float32"  # as images of 16 bits are read
    kind = f"`{what}images` are {found.kind}; expected {info.kind}, as in training on {info.dataset}"
    need(found.kind == info.kind or read, f"{kind}.")
    if read:
        info.scale.check(found[:MANY], kind)
    return found


def labelled(data: Labelled, info: DataInfo, name: str) -> Split:
    """A part of a data set with labels.

    Args:
        data: a part of a data set, whose classes count by their names, or by their numbers where they have none;
            (images, labels); or a data set, of which the test part is taken for ``data`` and the validation part for
            ``val``.
        info: the images that the network was trained on.
        name: of the argument: ``data`` or ``val``.

    Raises:
        UserError: something else, or images or labels that do not fit.
    """
    if isinstance(data, ImageData):
        data = data.val if name == "val" else data.test
    if isinstance(data, Split):
        unknown = ", ".join(text for text in data.classes if text not in info.classes)
        need(
            not unknown,
            f"`{name}` has the class {unknown:.60}; the run knows {', '.join(info.classes[:10])}. If its class numbers "
            "are those of the run, give (part.images, part.labels).",
        )
        return data.numbered_as(info.classes)
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise UserError(f"`{name}` must be a part of a data set or a pair (images, labels), not {type(data).__name__}.")
    what = "val " if name == "val" else ""
    images, labels = pixels(data[0], info, what), label_array(data[1], what)
    need(len(images) == len(labels), f"`{name}` has {len(images)} images and {len(labels)} labels.")
    known: dict[Hashable, int] = {text: number for number, text in enumerate(info.classes)}
    if labels.dtype.kind == "b" and not known.keys() & {"False", "True"}:
        labels = labels.astype(int)  # the classes were named
    if labels.dtype.kind in "iu":
        other = [f"{number} is {text!r}" for text, number in known.items() if _other_number(str(text), number)]
        told = f"`{what}labels` are whole numbers, but classes are called by others ({', '.join(other[:3])})"
        fix = (
            "give names: `labels.astype(str)` of such that are names, `np.array(classes)[labels]` of numbers from 0 on"
        )
        need(not other, f"{told}; {fix}.")
        known = {number: number for number in known.values()}
    else:
        labels = labels.astype(str)
    return Split(images, class_numbers(labels, known, what))


def own_validation(data: ImageData, info: DataInfo, config: RunConfig) -> Split | None:
    """The validation images of a data set, if they are those of a run; None, with a warning, where they may be others.

    Other divisions have images for validation that the run was trained on.

    Args:
        data: the data set.
        info: the images that the network was trained on.
        config: of the run.
    """
    if not len(data.val):
        return None
    same = data.info.is_that_of(info.to_dict())  # the mean of the training images, for one
    if config.init is not None:  # which is that of the start
        same = data.source == (config.data, config.train.seed)
    if same:
        return data.val
    log.warning(
        "`data` is not divided as for the run's training, which may have seen its validation images, if not its test "
        "images: none is used for validation. Divide it with the run's seed and settings, or give them as `val`."
    )
    return None


def _other_number(name: str, number: int) -> bool:
    """Whether the name of a class is a whole number, and another one than its own."""
    return name.isdecimal() and int(name) != number
