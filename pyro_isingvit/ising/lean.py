"""Large networks at the price of plain fine-tuning: nothing is kept for every weight but what AdamW keeps.

A network is large from ``LARGE`` masked weights on, if its masks lie on units, heads or blocks and its scale s is
shared. Then

    curvature     the average is of sum_e h_e m_e^2 over each mask, not of h_e
    scale         one number for each kind of matrices
    noise         m + s e is made for one layer at a time, and again in the backward pass, with e from a small pool
    weight KL     its gradient pi (m - m0) / tau_1^2 is added to that of the likelihood where the latter is stored
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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pyro_isingvit.core.settings import IsingConfig

LARGE = 5_000_000  # masked weights
PIECE = 1 << 17  # weights
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


class Gradient:
    """Where the gradient of stacked matrices is made: each layer's is written into its place, not copied there.

    Args:
        like: the matrices, (layers, out, in).
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like.detach()
        self._whole: Tensor | None = None
        self._taken = set[int]()

    def place(self, layer: int) -> Tensor | None:
        """The place of a layer, (out, in), for what reads the layer first; None for all others."""
        if layer in self._taken:
            return None
        self._taken.add(layer)
        return self._all()[layer]

    def finished(self) -> Tensor:
        """The memory of all layers, which is not written to afterwards."""
        whole, self._whole = self._all(), None
        return whole

    def _all(self) -> Tensor:
        if self._whole is None:
            self._whole = torch.empty_like(self._like)
        return self._whole


class _NoisyLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, window: Tensor, scale: float, gradient: Gradient | None, layer: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, window)
        ctx.scale, ctx.gradient, ctx.layer = scale, gradient, layer
        return F.linear(x, torch.add(weight.detach(), window, alpha=scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight, window) = grads, ctx.saved_tensors
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = grad @ torch.add(weight, window, alpha=ctx.scale).to(grad.dtype)  # differentiable once more
        if ctx.needs_input_grad[1]:
            rows, columns = grad.flatten(0, -2).T, x.flatten(0, -2).to(grad.dtype)
            once = ctx.gradient is not None and not torch.is_grad_enabled()
            place = ctx.gradient.place(ctx.layer) if once else None
            if place is None:
                for_weight = (rows @ columns).to(weight.dtype)
            elif place.dtype == rows.dtype:
                for_weight = torch.mm(rows, columns, out=place)
            else:
                for_weight = place.copy_(rows @ columns)
        return for_x, for_weight, None, None, None, None


def noisy_linear(
    x: Tensor, weight: Tensor, window: Tensor, scale: float, gradient: Gradient | None = None, layer: int = 0
) -> Tensor:
    """x (m + s e)^T; the sum is made again in the backward pass, not kept.

    Args:
        x: (B, T, in).
        weight: m, (out, in).
        window: e, (out, in), of a pool that all layers share.
        scale: s times the sign, to which no gradient flows.
        gradient: where that of ``weight`` goes, as its ``layer``; None: into a tensor of its own.
        layer: its number.
    """
    return _NoisyLinear.apply(x, weight, window, scale, gradient, layer)


@dataclass(frozen=True)
class NoisyLayers:
    """The layers of a network under one draw of the Gaussian noise.

    Attributes:
        scales: s of every kind.
        noise: e of every layer.
        gradients: kind -> where the gradient of its matrices goes; {}: into tensors of their own.
    """

    scales: dict[str, float]
    noise: Noise
    gradients: dict[str, Gradient]

    def linear(self, kind: str, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """x (m + s e)^T."""
        window, sign = self.noise.of(kind, layer, weight)
        return noisy_linear(x, weight, window, sign * self.scales[kind], self.gradients.get(kind), layer)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, centre: Tensor | None, pi: Tensor, tau_1: Tensor, gradient: Gradient
    ) -> tuple[Tensor, *tuple[Tensor, ...]]:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(loc, centre, pi, tau_1)
        total = torch.zeros((), device=loc.device)
        for layer in range(len(loc)):
            pull = torch.zeros_like(total)
            for rows in _pieces(loc):
                moved = _moved(loc, centre, layer, rows)
                pull += torch.dot((moved * _rows(pi[layer], rows)).flatten(), moved.flatten())
            total += 0.5 * pull / tau_1[layer, 0, 0] ** 2
        return total, *loc.detach().unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_kl: Tensor | None, *for_layers: Tensor | None) -> tuple[Tensor | None, ...]:
        loc, centre, pi, tau_1 = ctx.saved_tensors
        found = ctx.gradient.finished()
        for layer, likelihood in enumerate(for_layers):
            factor = pi[layer] * (0.0 if for_kl is None else for_kl / tau_1[layer] ** 2)
            for rows in _pieces(loc):
                moved, out = _moved(loc, centre, layer, rows), found[layer, rows]
                if likelihood is None:
                    torch.mul(moved, _rows(factor, rows), out=out)
                else:  # mostly the same memory
                    torch.addcmul(likelihood[rows], moved, _rows(factor, rows), out=out)
        return found, None, None, None, None


def _pieces(loc: Tensor) -> list[slice]:
    """Rows of a layer that are worked on at a time: on a CPU so few that what is made on the way stays in the cache."""
    _, rows, columns = loc.shape
    step = rows if loc.is_cuda else max(1, PIECE // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _rows(factor: Tensor, rows: slice) -> Tensor:
    """The rows of a factor that may have one for all."""
    return factor[rows] if len(factor) > 1 else factor


def _moved(loc: Tensor, centre: Tensor | None, layer: int, rows: slice) -> Tensor:
    here = loc[layer, rows]
    return here if centre is None else here - centre[layer, rows]


@dataclass(frozen=True)
class Layers:
    """The matrices of a kind, one by one.

    Attributes:
        matrices: m of each layer, (out, in).
        gradient: where ``noisy_linear`` may write theirs.
    """

    matrices: tuple[Tensor, ...]
    gradient: Gradient


def apart(loc: Tensor, centre: Tensor | None, pi: Tensor, tau_1: Tensor) -> tuple[Tensor, Layers]:
    """The part of the weight KL that moves with the means, and the matrices for a network to read one by one:

        sum_e pi_e (m_e - m0_e)^2 / (2 tau_1^2)   nats

    The gradient of the network's loss is written where pi (m - m0) / tau_1^2 is then added to it. Made separately,
    stacked and summed, both would pass through memory three times.

    Args:
        loc: m, (layers, out, in).
        centre: m0, likewise; None: 0.
        pi: retention, which broadcasts with ``loc``: (layers, out or 1, in or 1).
        tau_1: width of the slab, (layers, 1, 1).

    Returns:
        a scalar, and the layers.
    """  # noqa: D415
    gradient = Gradient(loc)
    kl, *matrices = _Apart.apply(loc, centre, pi, tau_1, gradient)
    return kl, Layers(tuple(matrices), gradient)
