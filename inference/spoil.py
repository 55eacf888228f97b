"""Corruptions of images in five severities, the scores of a run under them, and wrong labels.

Shapes: B images, C channels, H height, W width; images are (B, C, H, W) uint8. The side of an image is min(H, W).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.random_state import undisturbed
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.predictive.metrics import classification_metrics

METRICS = ("accuracy", "nll", "ece")
Scores = dict[str, float]


@dataclass(frozen=True)
class Corruption:
    """One way to spoil an image.

    Attributes:
        unit: what the values measure.
        values: of severity 1 to 5.
        spoil: (images, value) -> images; its random numbers are torch's global ones.
    """

    unit: str
    values: tuple[float, ...]
    spoil: Callable[[Tensor, float], Tensor]


def background(images: Tensor) -> Tensor:
    """The median of each channel, (C,) float, which fills the gaps: black for digits, a grey for photographs."""
    return images.transpose(0, 1).flatten(1).float().median(1).values


def add_noise(images: Tensor, sigma: float) -> Tensor:
    """Adds independent normal noise to every pixel and channel; sigma on the scale 0 to 1."""
    return tv.gaussian_noise(images.float() / 255, sigma=sigma).mul(255).round().to(torch.uint8)


def blur(images: Tensor, share: float) -> Tensor:
    """Blurs by a Gaussian with standard deviation ``share`` times the side, cut off at three deviations."""
    side = min(images.shape[-2:])
    sigma = share * side
    radius = min(math.ceil(3 * sigma), side - 1)  # the mirrored edge has no more pixels
    return tv.gaussian_blur(images, [2 * radius + 1] * 2, [sigma, sigma])


def lower_contrast(images: Tensor, factor: float) -> Tensor:
    """Moves every pixel towards the mean grey of its image, to ``factor`` times its distance."""
    return tv.adjust_contrast(images, factor)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotates about the centre, each image to the left or to the right at random."""
    left, fill = torch.rand(len(images)) < 0.5, background(images).tolist()
    turned = images.clone()
    for chosen, angle in ((left, degrees), (~left, -degrees)):
        if chosen.any():
            turned[chosen] = tv.rotate(images[chosen], angle, InterpolationMode.BILINEAR, fill=fill)
    return turned


def occlude(images: Tensor, share: float) -> Tensor:
    """Hides a square with a side of ``share`` times the image's, somewhere inside each image."""
    height, width = images.shape[-2:]
    side = max(1, round(share * min(height, width)))
    fill = background(images).round().to(torch.uint8)[:, None, None]
    where = torch.rand(len(images), 2) * torch.tensor([height - side + 1, width - side + 1])
    tops = where.long().tolist()
    spoilt = [tv.erase(image, i, j, side, side, fill) for image, (i, j) in zip(images, tops, strict=True)]
    return torch.stack(spoilt)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption("standard deviation, pixels in [0, 1]", (0.05, 0.1, 0.15, 0.2, 0.3), add_noise),
    "blur": Corruption("standard deviation / side", (0.04, 0.06, 0.08, 0.1, 0.13), blur),
    "contrast": Corruption("contrast left", (0.7, 0.5, 0.35, 0.2, 0.1), lower_contrast),
    "rotation": Corruption("degrees", (10, 20, 30, 45, 60), rotate),
    "occlusion": Corruption("hidden side / side", (0.2, 0.35, 0.45, 0.6, 0.7), occlude),
}


def check_severity(severity: int) -> None:
    """Raises UserError where no corruption has such a severity."""
    most = len(next(iter(CORRUPTIONS.values())).values)
    need(1 <= severity <= most, f"severity must be 1 to {most}, got {severity}.")


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupted copies of images, the same for the same seed; one seed serves all severities.

    Args:
        images: (B, C, H, W) uint8, 1 or 3 channels.
        name: in ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of the noise, directions and places; the global random state is left as it was.

    Raises:
        UserError: unknown corruption or severity.
    """
    need(name in CORRUPTIONS, f"unknown corruption {name!r}; known: {', '.join(CORRUPTIONS)}.")
    corruption = CORRUPTIONS[name]
    check_severity(severity)
    with undisturbed(seed):
        return corruption.spoil(images, corruption.values[severity - 1])


def flip_labels(labels: Tensor, share: float, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Moves a share of the labels to another class, each other one being as likely.

    Args:
        labels: (B,) class numbers.
        share: of the labels, in [0, 1]; rounded to whole labels.
        classes: how many there are, at least 2.
        seed: of the choice.

    Returns:
        the labels (B,), and a mask (B,) of those that were moved.

    Raises:
        UserError: share or classes out of their range.
    """
    need(0 <= share <= 1, f"the share of wrong labels must lie in [0, 1], not {share}.")
    need(classes >= 2, f"labels of {classes} class cannot be moved to another.")
    random = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
    flipped, moved = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    flipped[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=random)) % classes
    moved[wrong] = True
    return flipped, moved


def noisy(data: ImageData, share: float, seed: int) -> tuple[ImageData, np.ndarray]:
    """The data with wrong labels in training and validation part, and which are wrong, training images first."""
    parts, moved = dict[str, Any](), []
    for number, name in enumerate(("train", "val")):
        part: Split = getattr(data, name)
        labels, wrong = flip_labels(part.labels, share, data.info.num_classes, 2 * seed + number)
        parts[name] = replace(part, labels=labels)
        moved.append(wrong.numpy())
    return replace(data, **parts), np.concatenate(moved)


def judge(predict: Callable[[Tensor], Tensor], split: Split, seed: int, bar: Any) -> dict[str, Any]:
    """Scores on clean images and under every corruption and severity, and their mean over the severities.

    Args:
        predict: images (B, C, H, W) -> class probabilities (B, K).
        split: labelled images.
        seed: of the corruptions.
        bar: is told of each prediction.
    """

    def scores(images: Tensor) -> Scores:
        metrics = classification_metrics(predict(images), split.labels)
        bar.update()
        return {name: metrics[name] for name in METRICS}

    images = split.images[:]
    clean, corrupted, every = scores(images), {}, []
    for name, corruption in CORRUPTIONS.items():
        found = [scores(corrupt(images, name, i + 1, seed)) for i in range(len(corruption.values))]
        corrupted[name] = {metric: [each[metric] for each in found] for metric in METRICS}
        every += found
    mean = {metric: sum(each[metric] for each in every) / len(every) for metric in METRICS}
    return {"clean": clean, "corrupted": corrupted, "mean": mean}


def summary_rows(found: dict[str, dict[str, Any]]) -> list[tuple[object, ...]]:
    """One row per run and corruption: the mean over the severities."""
    rows: list[tuple[object, ...]] = []
    for run, scores in found.items():
        rows.append((run, "clean", *(scores["clean"][metric] for metric in METRICS)))
        for name, by in scores["corrupted"].items():
            rows.append((run, name, *(sum(by[metric]) / len(by[metric]) for metric in METRICS)))
        rows.append((run, "all corrupted", *(scores["mean"][metric] for metric in METRICS)))
    return rows
