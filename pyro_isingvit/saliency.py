"""Curvature of the likelihood: how much each weight matters (METHOD section 3).

An estimator maps (network, weights, images) to the diagonal of the curvature of the per-example mean negative
log-likelihood, kind -> (layers, out, in), with respect to the effective weights at xi = 1. Masked weights so
still receive a signal. A new estimator is a function and a line in ``SALIENCY``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.vit import ViT, Weights

Estimator = Callable[[ViT, Weights, Tensor], Weights]


def gnb(vit: ViT, weights: Weights, images: Tensor) -> Weights:
    """Gauss-Newton-Bartlett: labels drawn from the model's own softmax, h = B g^2 with g the batch-mean gradient.

    Unbiased for the diagonal of the Gauss-Newton (Fisher) matrix, also through softmax and LayerNorm. With the
    true labels instead it would vanish as the training loss does. Bartlett's estimator as in Sophia (Liu et al.
    2023), equation (12).

    Args:
        vit: the network.
        weights: kind -> (layers, out, in).
        images: (B, channels, height, width), normalised.

    Returns:
        kind -> (layers, out, in), non-negative, nats per example per squared weight.
    """
    leaves = {kind: weight.detach().requires_grad_() for kind, weight in weights.items()}
    with torch.enable_grad():
        logits = vit(leaves, images).float()
        noise = torch.empty_like(logits).exponential_().log()  # Gumbel-max: unlike multinomial, bears NaN logits
        labels = (logits.detach() - noise).argmax(-1)
        grads = torch.autograd.grad(F.cross_entropy(logits, labels), list(leaves.values()))
    return {kind: len(images) * grad.float() ** 2 for kind, grad in zip(leaves, grads, strict=True)}


SALIENCY: dict[str, Estimator] = {"gnb": gnb}


def second_order_gain(curvature: Tensor, weight: Tensor, num_data: int) -> Tensor:
    """Dl_e = N h_e m_e^2 / 2: log-likelihood of the data with the weight kept minus dropped (optimal brain damage)."""
    return 0.5 * num_data * curvature * weight**2
