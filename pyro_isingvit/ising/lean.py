"""Large networks at the price of plain fine-tuning: nothing is kept for every weight but what AdamW keeps.

A network is large from ``LARGE`` masked weights on, if its masks lie on units, heads or blocks and its scale s is
shared. Then

    curvature     the average is of sum_e h_e m_e^2 over each mask, not of h_e
    scale         one number for each kind of matrices
    noise         m + s e is made for one layer at a time, and again in the backward pass, from the seed of e
    weight KL     its gradient pi (m - m0) / tau_1^2 is made in the backward pass
    centre        m0 in bfloat16: rounded by at most 0.4%

It is the same objective, drawn with other random numbers.

Shapes: B batch, T tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.settings import IsingConfig

LARGE = 5_000_000  # masked weights


def is_large(config: IsingConfig, weights: int) -> bool:
    """Whether a posterior is kept in this form.

    Args:
        config: of the posterior.
        weights: P, masked weights.
    """
    return weights >= LARGE and config.granularity != "weight" and config.posterior_scale == "shared"


class Squares:
    """w^2 of every matrix, made when it is asked for: squares[kind][layer] is (out, in).

    Args:
        weights: kind -> (layers, out, in).
    """

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __getitem__(self, kind: str) -> "_Layers":
        """The matrices of a kind."""
        return _Layers(self.weights[kind].detach())


class _Layers:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __getitem__(self, layer: int) -> Tensor:
        return self.weight[layer] ** 2


def seeded_noise(like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers of a tensor's shape, the same for the same seed."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


class _NoisyLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.seed = seed
        return F.linear(x, _drawn(weight, scale, seed).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,), (x, weight, scale) = grads, ctx.saved_tensors
        for_x = grad @ _drawn(weight, scale, ctx.seed).to(grad.dtype) if ctx.needs_input_grad[0] else None
        flat = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return for_x, None if flat is None else flat.to(weight.dtype), None, None


def _drawn(weight: Tensor, scale: Tensor, seed: int) -> Tensor:
    return seeded_noise(weight, seed).mul_(scale.view(())).add_(weight.detach())


def noisy_linear(x: Tensor, weight: Tensor, scale: Tensor, seed: int) -> Tensor:
    """x (m + s e)^T with e from a seed; neither e nor the sum is kept for the backward pass.

    Args:
        x: (B, T, in).
        weight: m, (out, in).
        scale: s, one number, to which no gradient flows.
        seed: of e.
    """
    return _NoisyLinear.apply(x, weight, scale, seed)


class _SlabPull(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, centre: Tensor | None, pi: Tensor, tau_1: Tensor) -> Tensor:
        ctx.save_for_backward(loc, centre, pi, tau_1)
        moved = loc if centre is None else loc - centre
        return 0.5 * (pi * (moved / tau_1) ** 2).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        loc, centre, pi, tau_1 = ctx.saved_tensors
        moved = loc.clone() if centre is None else loc - centre
        return moved.mul_(pi / tau_1**2).mul_(grads[0]), None, None, None


def slab_pull(loc: Tensor, centre: Tensor | None, pi: Tensor, tau_1: Tensor) -> Tensor:
    """sum_e pi_e (m_e - m0_e)^2 / (2 tau_1^2), nats: the part of the weight KL that moves with the means.

    Args:
        loc: m, (layers, out, in).
        centre: m0, likewise; None: 0.
        pi: retention, which broadcasts with ``loc``.
        tau_1: width of the slab, (layers, 1, 1).
    """
    return _SlabPull.apply(loc, centre, pi, tau_1)
