"""Weight matrices as functions of what is trained: a spectral norm of its own, or weights of bounded size.

    sigma-reparam      W = g V / sigma(V)         sigma: largest singular value; g is trained too (Zhai et al. 2023)
    weight compander   W = a arctan(V / a)        |W| < a pi / 2 (Cakaj et al. 2023, with b = a)

sigma(V) = |V u| is estimated by power iteration: u <- V^T V u / |V^T V u| once a step, which costs two products of a
matrix and a vector; the gradient takes u as fixed. It starts at the singular vector itself, and g at c sigma: with
c = 1 the first network is that without it. A decay of V does not shrink W.

The compander hardly changes small weights and holds large ones back: dW/dV = 1 / (1 + (V / a)^2). a is c times the
largest weight of the kind at the start.

Everything else (noise of a method, masks, prediction) reads W: torch.nn.utils.parametrize computes it at each access.

Shapes: L layers; V and W are (L, out, in).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pyro_isingvit.core.train_settings import TrainConfig

EPS = 1e-12  # no division by 0


class SigmaReparam(nn.Module):
    """g V / sigma(V) for every layer of a kind.

    Args:
        weight: V at the start, (L, out, in).
        scale: c.

    Attributes:
        gain: g, (L, 1, 1).
        u: right singular vectors, (L, in, 1).
    """

    u: Tensor

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        _, sigma, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        self.gain = nn.Parameter(scale * sigma[:, :1, None])
        self.register_buffer("u", right[:, :1].mT.contiguous())

    def sigma(self, weight: Tensor) -> Tensor:
        """|V u|, at most the spectral norm: (L, 1, 1)."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.linalg.vector_norm(weight @ self.u, dim=-2, keepdim=True)

    def forward(self, weight: Tensor) -> Tensor:
        """V to W."""
        return weight * (self.gain / self.sigma(weight).clamp(min=EPS))

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """One power iteration."""
        left = F.normalize(weight @ self.u, dim=-2, eps=EPS)
        self.u.copy_(F.normalize(weight.mT @ left, dim=-2, eps=EPS))


class Compander(nn.Module):
    """a arctan(V / a) for every weight of a kind.

    Args:
        weight: V at the start, (L, out, in).
        scale: c.

    Attributes:
        bound: a, a scalar.
    """

    bound: Tensor

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("bound", scale * weight.detach().abs().max().clamp(min=EPS))

    def forward(self, weight: Tensor) -> Tensor:
        """V to W."""
        return self.bound * (weight / self.bound).atan()


def reparametrise(weights: nn.ParameterDict, settings: TrainConfig) -> None:
    """Makes the matrices, kind -> (L, out, in), functions of what they are now, if the settings ask for it."""
    for kind in list(weights):
        if settings.sigma_reparam:
            parametrize.register_parametrization(weights, kind, SigmaReparam(weights[kind], settings.sigma_reparam))
        elif settings.weight_compander:
            parametrize.register_parametrization(weights, kind, Compander(weights[kind], settings.weight_compander))


def trained(weights: nn.ParameterDict) -> Mapping[str, nn.Parameter]:
    """V of every kind: the matrices themselves where they are no functions of anything."""
    found = {}
    for kind in weights:
        made = parametrize.is_parametrized(weights, kind)
        found[kind] = weights.parametrizations[kind].original if made else weights[kind]  # type: ignore[index, union-attr]
    return found


def gains(weights: nn.ParameterDict) -> list[nn.Parameter]:
    """g of every kind; none without ``sigma_reparam``."""
    return [each.gain for each in weights.modules() if isinstance(each, SigmaReparam)]


def follow(weights: nn.ParameterDict) -> None:
    """One power iteration of every kind; nothing without ``sigma_reparam``."""
    for kind, value in trained(weights).items():
        if parametrize.is_parametrized(weights, kind):
            for each in weights.parametrizations[kind]:  # type: ignore[index]
                if isinstance(each, SigmaReparam):
                    each.follow(value)
