"""Images and labels as users of a trained run give them.

Shapes: N images, C channels (1 or 3), H height, W width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.data.arrays import label_array, to_array, to_uint8
from pyro_isingvit.data.images import from_numpy
from pyro_isingvit.data.split import DataInfo, ImageData, Split

Labelled = Split | tuple[Any, Any] | ImageData


def pixels(images: Any, info: DataInfo) -> Tensor:
    """Images as the network takes them.

    Args:
        images: (N, C, H, W), (N, H, W, C) or, with one channel, (N, H, W); uint8, or float in [0, 1].
        info: the images that the network was trained on.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        UserError: another shape or type, or values out of their range.
    """
    channels, height, width = info.channels, info.height, info.width
    array = to_array(images)
    if array.ndim == 3 and channels == 1:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1:] != (channels, height, width) and array.shape[3] == channels:
        array = array.transpose(0, 3, 1, 2)
    expected = f"(N, {channels}, {height}, {width})"
    fits = array.ndim == 4 and array.shape[1:] == (channels, height, width)
    need(fits, f"`images` have shape {np.shape(images)}; expected {expected}, as in training on {info.dataset}.")
    return from_numpy(to_uint8(array))


def labelled(data: Labelled, info: DataInfo, name: str) -> Split:
    """A part of a data set with labels.

    Args:
        data: a part, (images, labels), or a data set, of which the test part is taken for ``data`` and the validation
            part for ``val``.
        info: the images that the network was trained on.
        name: of the argument: ``data`` or ``val``.

    Raises:
        UserError: something else, or images or labels that do not fit.
    """
    if isinstance(data, ImageData):
        return data.val if name == "val" else data.test
    if isinstance(data, Split):
        return data
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise UserError(f"`{name}` must be a part of a data set or a pair (images, labels), not {type(data).__name__}.")
    images, labels = pixels(data[0], info), class_numbers(data[1], info)
    need(len(images) == len(labels), f"`{name}` has {len(images)} images and {len(labels)} labels.")
    return Split(images, labels)


def class_numbers(labels: Any, info: DataInfo) -> Tensor:
    """Class numbers (N,) int64 of labels that are class numbers or names of classes."""
    array = label_array(labels)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    known = {name: number for number, name in enumerate(info.classes)}
    strange = sorted({str(label) for label in array.tolist()} - known.keys())
    need(
        not strange, f"labels name {', '.join(map(repr, strange[:5]))}; the classes are {', '.join(info.classes[:20])}."
    )
    return torch.tensor([known[str(label)] for label in array.tolist()], dtype=torch.int64)
