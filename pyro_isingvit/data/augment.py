"""Augmentation of training batches on their device: random crops, flips, RandAugment, mixup and cutmix.

Shapes: B images, C channels (1 or 3), H height, W width, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_isingvit.core.settings import TrainConfig
from pyro_isingvit.data.split import DataInfo

PADDING = 8  # a crop's margin is the side over this, as 4 pixels of CIFAR's 32
GROUPS = 8  # of a batch, each with its own draw of RandAugment
RAND_AUGMENT = {
    "num_ops": 2,
    "magnitude": 9,
    "num_magnitude_bins": 31,
}  # torchvision's defaults; ImageNet's in the paper
MIXES = {"mixup": "MixUp", "cutmix": "CutMix"}  # torchvision's names


def random_crop(images: Tensor) -> Tensor:
    """Pads with zeros and cuts from each image a window of the old size at a place of its own, drawn uniformly.

    The margin of each side is H/8 or W/8 pixels, rounded, and at least 1. ``v2.RandomCrop`` does the
    same to one image. It would give a whole batch one window, and image by image it takes as long as a good part of a
    training step.

    Args:
        images: (B, C, H, W) of any type.

    Returns:
        the same shape and type.
    """
    height, width = images.shape[-2:]
    vertical, horizontal = (max(1, round(side / PADDING)) for side in (height, width))
    padded = F.pad(images, (horizontal, horizontal, vertical, vertical))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, rows, columns, H, W)
    count, device = len(images), images.device
    top, left = (torch.randint(2 * margin + 1, (count,), device=device) for margin in (vertical, horizontal))
    return windows[torch.arange(count, device=device), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image left to right with probability 1/2: (B, C, H, W) of any type -> the same."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


class Augmentation:
    """Training images (uint8) and class numbers to what the network is trained on.

        crop, flip, RandAugment on uint8   ->   normalise   ->   x' = l x + (1 - l) x_other,  l ~ Beta(alpha, alpha)

    Crops and flips are drawn for every image. RandAugment (Cubuk et al. 2020: 2 of 14 operations at magnitude 9 of
    0 to 30) is torchvision's, which draws once for all images that it is given; it is given ``GROUPS`` parts of a batch
    in turn. Batches are shuffled, so an image still meets other operations in every epoch.

    mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) draw one l per batch and pair each image with the one before
    it; cutmix pastes a box of share 1 - l in place of the sum. Labels are mixed in the
    shares that the images have: l, or for cutmix the area that the box really covers.

    Random numbers are torch's global ones, which checkpoints keep. Without augmentation none are drawn.

    Args:
        settings: ``augment``, ``mix`` and ``mix_alpha``, checked by ``check_training``.
        info: what the images look like.
    """

    def __init__(self, settings: TrainConfig, info: DataInfo) -> None:
        self.kind, self.info = settings.augment, info
        self.rand_augment: Any = None
        self.mix: Any = None
        if self.kind != "randaugment" and settings.mix not in MIXES:
            return
        from torchvision.transforms import v2  # a second of imports, for these two alone

        if self.kind == "randaugment":
            self.rand_augment = v2.RandAugment(**RAND_AUGMENT)
        if settings.mix in MIXES:
            mix = getattr(v2, MIXES[settings.mix])
            self.mix = mix(alpha=settings.mix_alpha, num_classes=info.num_classes)

    def images(self, images: Tensor) -> Tensor:
        """Crops, flips and RandAugment, (B, C, H, W) uint8 -> the same shape and type."""
        if self.kind == "none":
            return images
        images = random_crop(images)
        if self.kind != "crop":
            images = random_flip(images)
        if self.kind == "randaugment":
            groups = images.tensor_split(min(GROUPS, len(images)))
            images = torch.cat([self.rand_augment(group) for group in groups])
        return images

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One batch, on its device.

        Args:
            images: (B, C, H, W) uint8.
            labels: (B,) class numbers.

        Returns:
            x (B, C, H, W) float32, normalised; y: the labels as they are, or (B, K) probabilities where images mix.

        Raises:
            UserError: images of another shape or type than in ``info``.
        """
        x = self.info.normalise(self.images(images))
        return (x, labels) if self.mix is None else self.mix(x, labels)
