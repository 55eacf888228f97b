"""What one prediction of a trained method costs where it is deployed: cut, and without sampling.

Methods are compared at equal cost by it. All are measured alike: every network is rebuilt as a ``CompactViT`` from its
matrices where pi > 0.5. Rows, columns, heads and branches without any weight are gone (``assembly``); single zeros stay
in their matrix and save nothing. Networks of an ensemble add up.
"""

from dataclasses import dataclass

import torch

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import Method
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.pruning.assembly import assemble
from pyro_isingvit.pruning.cost import BATCH, latency, macs
from pyro_isingvit.pruning.network import CompactViT

REPEATS = 7
WORK = 5e10  # multiply-accumulates of a timed pass: about a second of one CPU core


@dataclass(frozen=True)
class Cost:
    """Of one image, one forward pass; all networks of an ensemble together."""

    macs: int
    """Multiply-accumulates."""
    ms_per_image: float
    """Milliseconds of an image in a batch of 256, or fewer where the network is large; median of several passes."""


def deployed_networks(method: Method, or_whole: bool = True) -> list[CompactViT]:
    """The networks that a prediction without sampling needs, on the CPU; none where the method does not say.

    Args:
        method: a trained method.
        or_whole: where nothing would be left of a network, give one of its size, to be counted: its weights are ones.

    Raises:
        UserError: nothing would be left, and ``or_whole`` is False.
    """
    rebuilt = _rebuilt if or_whole else assemble
    with torch.random.fork_rng(devices=[]):  # a new layer draws its first weights
        return [rebuilt(vit, method.info, weights) for vit, weights in method.deployed()]


def _rebuilt(vit: ViT, info: DataInfo, weights: Weights) -> CompactViT:
    try:
        return assemble(vit, info, weights)
    except UserError:  # nothing would be left: the network cannot be cut at 0.5, and is needed as a whole
        return assemble(vit, info, {kind: torch.ones_like(weight) for kind, weight in weights.items()})


def deployment_cost(method: Method) -> Cost | None:
    """Counts and times what a deployed method computes, on the device and with the threads of this process.

    Args:
        method: a trained method.

    Returns:
        None where the method does not say what it deploys. Random states stay as they are.
    """
    networks, device = deployed_networks(method), method.temperature.device
    if not networks:
        return None
    shape = networks[0].config.image_shape
    each = [macs(network, shape) for network in networks]
    batch = max(1, min(BATCH, int(WORK / max(each))))
    seconds = latency([network.to(device) for network in networks], shape, batch, REPEATS, device)
    return Cost(sum(each), 1e3 * sum(seconds) / batch)
