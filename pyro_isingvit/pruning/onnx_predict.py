"""Predictions of an exported ONNX file, of one network or of many, from images as they are.

Shapes: B batch, C classes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need, need_whole
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.predictive.metrics import entropy
from pyro_isingvit.pruning.export import open_onnx


@dataclass(frozen=True)
class OnnxPrediction:
    """What an ONNX file says of images; of one network, lower and upper are probs, and mutual information is 0."""

    classes: tuple[str, ...]
    """Their names, C of them."""
    probs: Tensor
    """Mean probabilities, (B, C)."""
    lower: Tensor
    """5% quantile of the members, (B, C)."""
    upper: Tensor
    """95% quantile of the members, (B, C)."""
    entropy: Tensor
    """Of the mean probabilities, nats, (B,)."""
    mutual_information: Tensor
    """What the members disagree on, nats, (B,)."""


def scale_of(texts: Mapping[str, str]) -> Scale:
    """How the images of a file are normalised, by its metadata.

    Raises:
        ValueError, KeyError, TypeError: they do not say it.
    """
    kind, *parts = (json.loads(texts[name]) for name in ("kind", "low", "high", "mean", "std"))
    return Scale(kind, *map(tuple, parts))


def predict_onnx(path: str | Path, images: Images | Tensor | np.ndarray, chunk: int = 256) -> OnnxPrediction:
    """Runs a file of ``export_onnx`` or ``export_members``, quantised or not, in onnxruntime on the CPU.

    Args:
        path: the file.
        images: (B, channels, height, width) of the training images' type, not normalised.
        chunk: at most this many images pass at a time.

    Raises:
        UserError: packages are missing, the file is not one of ours, images that do not fit, or chunk below 1.
    """
    need_whole(1, chunk=chunk)
    path, images = Path(path), as_images(images)
    session = open_onnx(path)
    try:
        texts = session.get_modelmeta().custom_metadata_map
        scale, classes = scale_of(texts), tuple(map(str, json.loads(texts["classes"])))
        [reads] = session.get_inputs()
        shape = tuple(reads.shape[1:])
        need(len(shape) == 3 and scale.fits(shape[0]), "not what the images look like")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say what its images are; it was not exported by this library.") from error
    need(
        tuple(images.shape[1:]) == shape,
        f"images of shape {tuple(images.shape)} given, {path} reads (B, {', '.join(map(str, shape))}).",
    )

    def normalise(rows: Tensor) -> Tensor:
        need(rows.dtype == scale.dtype, f"images of type {rows.dtype} given, {path} reads {scale.dtype}.")
        scale.check(rows, f"{path} reads {scale.kind}")
        return scale.standardised(scale.scaled(rows))

    passes = [
        [torch.from_numpy(part) for part in session.run(None, {reads.name: x.numpy()})]
        for x in images.batches(min(chunk, images.chunk), normalise)
    ]
    need(passes, "no images given.")
    found = [torch.cat(parts) for parts in zip(*passes, strict=True)]
    if len(found) == 1:  # logits
        probs = found[0].softmax(-1)
        found = [probs, probs, probs, entropy(probs), torch.zeros(len(probs))]
    return OnnxPrediction(classes, *found)
