"""Shapes that a network can have: activations by name, the grid of patches, and what is refused."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import ViTConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), elementwise."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def patch_grid(height: int, width: int, size: int, stride: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Rows and columns of patches that cover an image, and the zeros that they need: left, right, top, bottom.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        size: of a patch.
        stride: from one patch to the next.

    Examples:
        >>> patch_grid(28, 28, size=8, stride=8)
        ((4, 4), (0, 4, 0, 4))
        >>> patch_grid(28, 28, size=8, stride=4)
        ((6, 6), (0, 0, 0, 0))
    """
    rows, columns = (1 + max(0, -(-(side - size) // stride)) for side in (height, width))
    return (rows, columns), (0, (columns - 1) * stride + size - width, 0, (rows - 1) * stride + size - height)


def widest_activation(config: ViTConfig, height: int, width: int) -> int:
    """Numbers of the widest activation of one image: hidden units, or queries, keys and values, of all tokens.

    Args:
        config: of the network.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Examples:
        >>> widest_activation(ViTConfig(patch_size=7, width=64, mlp_ratio=4), 28, 28)
        4096
    """
    (rows, columns), _ = patch_grid(height, width, config.patch_size, config.stride)
    return (rows * columns + config.prefix) * config.width * max(config.mlp_ratio, 3)


def check_shape(config: ViTConfig, height: int, width: int, classes: int) -> None:
    """Raises UserError where the network cannot be built for such images."""
    sizes = ("patch_size", "width", "heads", "depth", "mlp_ratio")
    for name in sizes:
        if getattr(config, name) < 1:
            raise UserError(f"`{name}` must be at least 1, not {getattr(config, name)}.")
    if config.width % config.heads:
        raise UserError(f"`width` {config.width} is not divisible by `heads` {config.heads}; change one of them.")
    if config.head == "mlp" and config.width % 2:
        raise UserError(f"`head` mlp halves the width, and `width` {config.width} is odd; make it even.")
    if config.patch_size > min(height, width):
        raise UserError(
            f"`patch_size` {config.patch_size} does not fit images of {height}x{width} pixels; "
            f"choose at most {min(height, width)}."
        )
    need(
        1 <= config.stride <= config.patch_size,
        f"`patch_stride` {config.patch_stride} leaves pixels out or is none; choose 1 to {config.patch_size}.",
    )
    need(
        config.stem == "none" or config.stride == config.patch_size,
        "`stem` conv has overlapping windows of its own; leave `patch_stride` out.",
    )
    need(config.registers >= 0, f"`registers` must not be negative, but is {config.registers}.")
    need(config.norm_eps > 0, f"`norm_eps` must be positive, not {config.norm_eps}.")
    need(
        config.final_norm == "tokens" or config.pool == "mean",
        "`final_norm` pooled is for `pool` mean; with a CLS token both are the same, so leave it at tokens.",
    )
    if classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, the data have {classes}.")
