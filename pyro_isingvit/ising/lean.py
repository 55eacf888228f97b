"""Large networks at the price of plain fine-tuning: nothing is kept for every weight but what AdamW keeps.

A network is large from ``LARGE`` masked weights on, if its masks lie on units, heads or blocks and its scale s is
shared. Then

    curvature     the average is of sum_e h_e m_e^2 over each mask, not of h_e
    scale         one number for each kind of matrices
    noise         m + s e is made for one layer at a time, and again in the backward pass, with e from a small pool
    weight KL     its gradient pi (m - m0) / tau_1^2 is made in the backward pass
    centre        m0 in bfloat16: rounded by at most 0.4%

and a curvature estimate looks at a quarter of a batch at most. It is the same objective, drawn with other random
numbers.

Shapes: B batch, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.settings import IsingConfig

LARGE = 5_000_000  # masked weights
QUARTER = 4  # a curvature estimate looks at this part of a batch at most: it costs as much as its part of a step


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


@dataclass(frozen=True)
class Noise:
    """Standard normal numbers for the layers of one step, from one pool that is drawn once.

    A layer takes a window of the pool, at a place of its own and with a sign of its own. Each number is N(0, 1); those
    of a layer are independent, those of two layers uncorrelated. One for every weight would take a third of a step.

    Attributes:
        pool: N(0, 1), of twice as many numbers as the largest layer has.
        places: layers, in the order of use, -> start of the window.
        signs: likewise, -> 1.0 or -1.0.
    """

    pool: Tensor
    places: dict[tuple[str, int], int]
    signs: dict[tuple[str, int], float]

    @classmethod
    def draw(cls, weights: Mapping[str, Tensor]) -> "Noise":
        """Noise for matrices, kind -> (layers, out, in)."""
        first = next(iter(weights.values()))
        size = max(weight[0].numel() for weight in weights.values())
        keys = [(kind, layer) for kind, weight in weights.items() for layer in range(len(weight))]
        places = torch.randint(size, (len(keys),)).tolist()
        signs = (2.0 * torch.randint(2, (len(keys),)) - 1.0).tolist()
        pool = torch.randn(2 * size, device=first.device)
        return cls(pool, dict(zip(keys, places, strict=True)), dict(zip(keys, signs, strict=True)))

    def of(self, kind: str, layer: int, like: Tensor) -> tuple[Tensor, float]:
        """The window of a layer, of its matrix's shape, and its sign."""
        start = self.places[kind, layer]
        return self.pool[start : start + like.numel()].view(like.shape), self.signs[kind, layer]


class _NoisyLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, window: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, window)
        ctx.scale = scale
        return F.linear(x, torch.add(weight.detach(), window, alpha=scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,), (x, weight, window) = grads, ctx.saved_tensors
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = grad @ torch.add(weight, window, alpha=ctx.scale).to(grad.dtype)  # differentiable once more
        if ctx.needs_input_grad[1]:
            for_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        return for_x, for_weight, None, None


def noisy_linear(x: Tensor, weight: Tensor, window: Tensor, scale: float) -> Tensor:
    """x (m + s e)^T; the sum is made again in the backward pass, not kept.

    Args:
        x: (B, T, in).
        weight: m, (out, in).
        window: e, (out, in), of a pool that all layers share.
        scale: s times the sign, to which no gradient flows.
    """
    return _NoisyLinear.apply(x, weight, window, scale)


class _SlabPull(torch.autograd.Function):
    """Layer by layer, so that what is made on the way stays in the cache."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, centre: Tensor | None, pi: Tensor, tau_1: Tensor) -> Tensor:
        ctx.save_for_backward(loc, centre, pi, tau_1)
        total = torch.zeros((), device=loc.device)
        for layer in range(len(loc)):
            moved = loc[layer] if centre is None else loc[layer] - centre[layer]
            total += 0.5 * torch.dot((moved * pi[layer]).flatten(), moved.flatten()) / tau_1[layer, 0, 0] ** 2
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        loc, centre, pi, tau_1 = ctx.saved_tensors
        pull = torch.empty_like(loc)
        for layer in range(len(loc)):
            moved = loc[layer] if centre is None else loc[layer] - centre[layer]
            torch.mul(moved, pi[layer] * (grads[0] / tau_1[layer] ** 2), out=pull[layer])
        return pull, None, None, None


def slab_pull(loc: Tensor, centre: Tensor | None, pi: Tensor, tau_1: Tensor) -> Tensor:
    """sum_e pi_e (m_e - m0_e)^2 / (2 tau_1^2), nats: the part of the weight KL that moves with the means.

    Args:
        loc: m, (layers, out, in).
        centre: m0, likewise; None: 0.
        pi: retention, which broadcasts with ``loc``.
        tau_1: width of the slab, (layers, 1, 1).
    """
    return _SlabPull.apply(loc, centre, pi, tau_1)
