"""posterior_scale "curvature": how wide the slabs are, from the curvature of the likelihood alone.

Around the means m, the mean NLL per image is nearly quadratic, with the curvature h_e of weight e. Under q, weight e
has the variance s_e^2 where its mask is on, which has the probability pi. The terms of the objective (docs/method.md,
Objective), times N, that depend on s_e are therefore

    pi N h_e s_e^2 / 2  +  pi (s_e^2 / (2 tau_1^2) - log s_e) / kappa_weights

The cross terms with other weights vanish, since q draws the noise of each weight independently. The derivative

    pi (N h_e s_e + (s_e / tau_1^2 - 1 / s_e) / kappa_weights)

is 0 where s_e^-2 = kappa_weights N h_e + tau_1^-2: no gradient is needed to get there, and pi drops out.
"""

import math

import torch
from torch import Tensor


def curvature_log_scale(curvature: Tensor, tau_1: Tensor | float, emphasis: float) -> Tensor:
    """log s with s^-2 = emphasis max(h, 0) + tau_1^-2, elementwise (docs/method.md, Scales).

    Args:
        curvature: h, any shape, nats per example per squared weight; of either sign.
        tau_1: standard deviation of the slab, a number or a tensor that broadcasts with ``curvature``.
        emphasis: weight of the likelihood of all images, curvature_factor kappa_weights N; positive.

    Returns:
        of the curvature's shape: at most log tau_1, which it is where the likelihood is flat.

    Examples:
        >>> curvature_log_scale(torch.tensor([0.75, 0.0, -1.0]), tau_1=0.5, emphasis=16.0).exp()
        tensor([0.2500, 0.5000, 0.5000])
    """
    # In logarithms: emphasis is 1e30 or more where kappa_weights is no_kl.
    prior = -2.0 * torch.as_tensor(tau_1, dtype=curvature.dtype, device=curvature.device).log()
    return -0.5 * torch.logaddexp(curvature.clamp(min=0.0).log() + math.log(emphasis), prior)
