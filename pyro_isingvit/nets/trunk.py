"""A trunk that is computed once for many draws of what lies above it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pyro_isingvit.nets.vit import ViT


def with_trunk(module: nn.Module) -> list[ViT]:
    """The networks in a module that have a trunk."""
    return [each for each in module.modules() if isinstance(each, ViT) and each.trunk_depth]


@contextmanager
def one_trunk(module: nn.Module) -> Iterator[None]:
    """Within it, every network with a trunk computes the trunk for the first images that it gets, and no more.

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
