"""Augmentation of training batches on their device: random crops, flips, RandAugment, mixed images, smoothed labels.

Shapes: B images, C channels (1 or 3), H height, W width, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.balance import class_weights
from pyro_isingvit.data.info import DataInfo

PADDING = 8  # a crop's margin is the side over this where the settings leave it open, as 4 pixels of CIFAR's 32
GROUPS = 8  # of a batch, each with its own draw of RandAugment
RAND_AUGMENT = {
    "num_ops": 2,
    "magnitude": 9,
    "num_magnitude_bins": 31,
}  # torchvision's defaults; ImageNet's in the paper
MIXES = {"mixup": "MixUp", "cutmix": "CutMix"}  # torchvision's names
ALPHAS = {"mixup": 0.2, "cutmix": 0.2, "regmixup": 10.0}  # where the settings leave mix_alpha open


def random_crop(images: Tensor, margin: int | None = None) -> Tensor:
    """Pads with zeros and cuts from each image a window of the old size at a place of its own, drawn uniformly.

    ``v2.RandomCrop`` does the same to one image. It would give a whole batch one window, and image by image it takes as
    long as a good part of a training step.

    Args:
        images: (B, C, H, W) of any type.
        margin: pixels of each margin, the farthest that an image moves; 0 gives the images back. None: H/8 above and
            below, W/8 left and right, rounded, and at least 1.

    Returns:
        the same shape and type.
    """
    if margin == 0:
        return images
    height, width = images.shape[-2:]
    vertical, horizontal = (max(1, round(side / PADDING)) if margin is None else margin for side in (height, width))
    padded = F.pad(images, (horizontal, horizontal, vertical, vertical))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, rows, columns, H, W)
    count, device = len(images), images.device
    top, left = (torch.randint(2 * margin + 1, (count,), device=device) for margin in (vertical, horizontal))
    return windows[torch.arange(count, device=device), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image left to right with probability 1/2: (B, C, H, W) of any type -> the same."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def draw_share(alpha: float) -> float:
    """l ~ Beta(alpha, alpha), with mean 1/2 and variance 1 / (4 (2 alpha + 1))."""
    return float(Beta(alpha, alpha).sample())


def probabilities(labels: Tensor, classes: int) -> Tensor:
    """Class numbers (B,) as (B, K) with a single one; probabilities (B, K) as they are."""
    return labels if labels.dim() == 2 else F.one_hot(labels, classes).float()


class RegMixup:
    """RegMixup (Pinto et al. 2022) at the cost of a plain step: half the batch is clean, half is mixed.

        loss = 1/2 mean CE(x, y) + 1/2 mean CE(l x + (1 - l) x', l y + (1 - l) y'),   l ~ Beta(alpha, alpha) per batch

    The source adds both terms over the whole batch. The mean of two halves keeps the loss in nats per image. The second
    image of each pair of neighbours is mixed with the first, so that each contiguous part of a batch (posterior draw,
    micro-batch, process) has clean and mixed images alike; x' is clean in the same batch.

    Args:
        alpha: of the share.
        num_classes: K.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        self.alpha, self.num_classes = alpha, num_classes

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and (B,) -> (B, C, H, W) and (B, K); rows 0, 2, 4, ... stay clean."""
        share = draw_share(self.alpha)
        x, y = x.clone(), probabilities(labels, self.num_classes)
        for values in (x, y):
            mixed = values[1::2]
            mixed.mul_(share).add_(values[::2][: len(mixed)], alpha=1 - share)
        return x, y


def group_size(settings: TrainConfig) -> int:
    """Neighbouring images that must not be parted: a pair of RegMixup or manifold mixup, otherwise one."""
    return 2 if settings.mix in ("regmixup", "manifold") else 1


class Augmentation:
    """Training images and class numbers to what the network is trained on.

        crop, flip, RandAugment   ->   normalise   ->   x' = l x + (1 - l) x_other,  l ~ Beta(alpha, alpha)
        y' = (1 - e) y + e / K,   e = label_smoothing, y mixed as the images are
        balance loss: y' is that of each mixed image times its weight w (``class_weights``), summed in the same shares
        images with weights: y is times the weight of the image before images mix

    Crops and flips are drawn for every image. RandAugment (Cubuk et al. 2020: 2 of 14 operations at magnitude 9 of
    0 to 30) is torchvision's, which draws once for all images that it is given; it is given ``GROUPS`` parts of a batch
    in turn. Batches are shuffled, so an image still meets other operations in every epoch.

    mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) draw one l per batch and pair each image with the one before
    it; cutmix pastes a box of share 1 - l in place of the sum. Labels are mixed in the
    shares that the images have: l, or for cutmix the area that the box really covers.

    Random numbers are torch's global ones, which checkpoints keep. Without augmentation none are drawn.

    Args:
        settings: ``augment``, ``margin``, ``mix``, ``mix_alpha``, ``label_smoothing`` and ``balance``, checked by
            ``check_training``.
        info: what the images look like.

    Attributes:
        clean: rows of a batch that are no mixtures, where some always are; otherwise all rows.

    Raises:
        UserError: crops with a margin that is no smaller than the images, or RandAugment of unknown images.
    """

    def __init__(self, settings: TrainConfig, info: DataInfo) -> None:
        self.kind, self.info, self.margin = settings.augment, info, settings.margin
        self.smoothing, self.clean = settings.label_smoothing, slice(None, None, 2 if settings.mix == "regmixup" else 1)
        self.weights = class_weights(info.sizes) if settings.balance == "loss" else None
        side = min(info.height, info.width)
        need(
            self.kind == "none" or self.margin is None or self.margin < side,
            f"`margin` {self.margin} could move images of {info.height}x{info.width} pixels out of sight; choose at "
            f"most {side - 1}, or 1 for small shifts.",
        )
        known = info.channels in (1, 3) and (info.kind != "float32" or bool(info.low))
        need(
            self.kind != "randaugment" or known,
            f"`augment` randaugment is for images of 1 or 3 channels whose pixels are scaled to [0, 1], not for "
            f"{info.channels} channels of {info.kind} as they are; take crop or crop-flip.",
        )
        self.rand_augment: Any = None
        self.mix: Any = None
        alpha = ALPHAS.get(settings.mix, 0.0) if settings.mix_alpha is None else settings.mix_alpha
        if settings.mix == "regmixup":
            self.mix = RegMixup(alpha, info.num_classes)
        if self.kind != "randaugment" and settings.mix not in MIXES:
            return
        from torchvision.transforms import v2  # a second of imports, for these two alone

        if self.kind == "randaugment":
            self.rand_augment = v2.RandAugment(**RAND_AUGMENT)
        if settings.mix in MIXES:
            self.mix = getattr(v2, MIXES[settings.mix])(alpha=alpha, num_classes=info.num_classes)

    def images(self, images: Tensor) -> Tensor:
        """Crops, flips and RandAugment, (B, C, H, W) uint8, or floats in [0, 1] -> the same shape and type."""
        if self.kind == "none":
            return images
        images = random_crop(images, self.margin)
        if self.kind != "crop":
            images = random_flip(images)
        if self.kind == "randaugment":
            groups = images.tensor_split(min(GROUPS, len(images)))
            images = torch.cat([self.rand_augment(group) for group in groups])
        return images

    def __call__(self, images: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One batch, on its device.

        Args:
            images: (B, C, H, W) as they are read.
            labels: (B,) class numbers.
            weights: (B,) of the images in the loss; None: 1.

        Returns:
            x (B, C, H, W) float32, normalised; y: the labels as they are, or (B, K) probabilities where images mix,
            labels are smoothed or images weigh differently; an image's sum is its weight.

        Raises:
            UserError: images of another shape or type than in ``info``.
        """
        scale, images = self.info.scale, self.info.checked(images)
        # Of deep images, margins are as dark as the lowest pixel, and RandAugment knows floats in [0, 1].
        whole = scale.kind == "uint8"
        x = scale.standardised(scale.scaled(self.images(images)) if whole else self.images(scale.scaled(images)))
        classes = self.info.num_classes
        if weights is not None:
            labels = probabilities(labels, classes) * weights.unsqueeze(-1)
        if self.mix is not None:
            x, labels = self.mix(x, labels)
        if self.weights is not None:  # before labels are smoothed, each share of a mixture is that of a class
            labels = probabilities(labels, classes) * self.weights.to(labels.device)
        if self.smoothing:
            weight = labels.sum(-1, keepdim=True) if labels.dim() == 2 else 1.0
            labels = (1 - self.smoothing) * probabilities(labels, classes) + self.smoothing / classes * weight
        return x, labels
