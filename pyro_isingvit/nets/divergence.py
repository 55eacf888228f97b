"""Finds where numbers stopped being finite, once training has diverged.

Shapes: B images, L layers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyro_isingvit.nets.vit import ViT, plain

KINDS = ("patch", "qkv", "attn_out", "fc1", "fc2", "head_hidden", "head")  # from input to output
WORDS = {"loc": "weights", "log_scale": "scales", "bias": "biases", "mask_logit": "mask logits"}

ABOVE = ("loc", "log_scale", "mask_logit")  # of the matrices above a trunk


class _FoundError(Exception):
    """Stops a pass through the network."""


def not_finite(network: nn.Module) -> str | None:
    """The first parameter, from input to output, that is not finite, as "weights of fc1, layer 2"; None: all are.

    Args:
        network: any module; matrices of a ViT are told apart by layer.
    """
    below = _below(network)
    found = [place for name, value in network.named_parameters() for place in _places(name, value.detach(), below)]
    return min(found)[-1] if found else None


def _below(network: nn.Module) -> dict[str, int]:
    """Layers of a kind that a trunk has, below those of the matrices."""
    vits = [module for module in network.modules() if isinstance(module, ViT)]
    return {kind: len(weight) for vit in vits for kind, weight in vit.trunk.items()}


def _places(name: str, value: Tensor, below: dict[str, int]) -> Iterator[tuple[int, int, str]]:
    """Layer, place within it and words for the first layer of a parameter that is not finite."""
    if bool(torch.isfinite(value).all()):
        return
    # Of a matrix that is a function of what is trained (nets/reparametrise.py), the name of the matrix.
    *_, owner, kind = f".{name.replace('parametrizations.', '').removesuffix('.original')}".split(".")
    if kind not in KINDS:
        yield -1, 0, kind
        return
    layer = int(torch.isfinite(value.reshape(len(value), -1)).all(1).int().argmin())
    if owner in ABOVE:
        layer += below.get(kind, 0)
    depth = {"patch": -1, "head_hidden": value.numel(), "head": value.numel()}  # beyond any layer
    where = f"{WORDS.get(owner, owner)} of {kind}" + ("" if kind in depth else f", layer {layer + 1}")
    yield depth.get(kind, layer), KINDS.index(kind), where


@torch.no_grad()
def first_not_finite(network: nn.Module, images: Tensor) -> str | None:
    """The first parameter that is not finite, or else the first layer whose output is not, at the mean weights.

    Args:
        network: what was trained: a ``ViT`` and its matrices ``loc`` (kind -> (L, out, in)), or several of both.
        images: (B, channels, height, width), normalised.

    Returns:
        words for the place; None where nothing is found: the cause is then the noise of a draw, or a term other than
        the NLL.
    """
    place = not_finite(network)
    if place is not None:
        return place
    below, vits = _below(network), [module for module in network.modules() if isinstance(module, ViT)]
    locs = [getattr(module, "loc", None) for module in network.modules()]
    weights = [dict(loc.items()) for loc in locs if isinstance(loc, nn.ParameterDict)]

    def rule(kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = plain(kind, layer, x, weight, bias)
        for values, what in ((x, "input"), (y, "output")):
            if not bool(torch.isfinite(values).all()):
                raise _FoundError(f"{what} of {kind}, layer {layer + below.get(kind, 0) + 1}")
        return y

    try:
        for vit, loc in zip(vits, weights, strict=False):
            vit(loc, images, layer_rule=rule)
    except _FoundError as found:
        return str(found)
    return None
