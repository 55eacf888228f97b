"""A network in which every image has masks of its own on units, heads or blocks.

A mask on a row of W multiplies what the row writes, a mask on a column what the column reads:

    y_nto = xi_no sum_i (W - V)_oi xi_ni x_nti + sum_i V_oi x_nti + b_o

V is the spike's share of the weights, which is there whether or not a mask is on; none where tau_0 = 0. The masks of an
image hold for all its tokens, and for all the matrices that a mask covers.

Shapes: B batch, T tokens; masks (B, *site shape); x of a layer is (B, T, in), its weight (out, in).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.ising.lean import NoisyLayers
from pyro_isingvit.nets.vit import Apart, ViT, Watch, Weights


def masked_network(
    vit: ViT,
    layout: MaskLayout,
    weights: Weights | Apart,
    spikes: Weights,
    masks: dict[str, Tensor],
    images: Tensor,
    watch: Watch | None = None,
    noise: NoisyLayers | None = None,
) -> Tensor:
    """Logits (B, C) of images under masks of their own.

    Args:
        vit: the network.
        layout: the mask sites, none of them on single weights.
        weights: what the masks multiply, W - V, kind -> (layers, out, in), or the layers one by one.
        spikes: V, likewise; empty where tau_0 = 0.
        masks: zeros and ones, site -> (B, *site shape).
        images: (B, channels, height, width), normalised.
        watch: see ``ViT.forward``.
        noise: the Gaussian noise that is added to the weights of each layer when they are used; needs tau_0 = 0.
            None: ``weights`` has it.
    """
    factors: dict[tuple[str, int], Tensor] = {}  # (kind, layer) -> (B, 1, channels): for every token the same
    for kind, site in layout.site_of.items():
        channels = site.spreads[kind].channels(masks[site.name])  # (B, layers, channels)
        factors |= {(kind, layer): mask.unsqueeze(1) for layer, mask in enumerate(channels.unbind(1))}

    def rule(kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mask = factors[kind, layer].to(x.dtype)
        if noise is not None:
            inward = layout.site_of[kind].spreads[kind].side == "in"
            y = noise.linear(kind, layer, x * mask if inward else x, weight)
            return y + bias.to(y.dtype) if inward else torch.addcmul(bias.to(y.dtype), y, mask.to(y.dtype))
        spike = spikes[kind][layer] if spikes else None
        if layout.site_of[kind].spreads[kind].side == "in":
            y = F.linear(x * mask, weight, bias)
            return y if spike is None else y + F.linear(x, spike)
        base = bias if spike is None else F.linear(x, spike, bias)
        y = F.linear(x, weight)
        return torch.addcmul(base.to(y.dtype), y, mask.to(y.dtype))

    return vit(weights, images, watch, rule)
