"""A trunk, or a stem, that is computed once for many draws of what lies above it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pyro_isingvit.nets.vit import ViT


def with_trunk(module: nn.Module) -> list[ViT]:
    """The networks in a module whose first part is the same in every draw: a trunk, or a convolutional stem."""
    networks = [each for each in module.modules() if isinstance(each, ViT)]
    return [each for each in networks if each.trunk_depth or each.stem is not None]


@contextmanager
def one_trunk(module: nn.Module) -> Iterator[None]:
    """Within it, every network computes its trunk or stem for the first images that it gets, and no more.

    All passes within it must be of the same images.
    """
    networks = with_trunk(module)
    for network in networks:
        network.shared = []
    try:
        yield
    finally:
        for network in networks:
            network.shared = None


def keep_images(module: nn.Module, rows: Tensor) -> None:
    """Within ``one_trunk``: the passes that follow are of these rows (n,) of the images alone."""
    for network in with_trunk(module):
        if network.shared:
            network.shared[0] = network.shared[0][rows]
