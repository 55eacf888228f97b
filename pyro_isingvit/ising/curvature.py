"""Curvature of the likelihood: how much each weight matters (docs/method.md, Curvature).

An estimator maps (network, weights, images, labels) to the diagonal of the curvature of the per-example mean
negative log-likelihood, kind -> (layers, out, in), with respect to the effective weights at xi = 1. Weights whose mask
is off therefore receive a signal too. A new estimator is a function and a row of ``SALIENCY``; docs/saliency.md
compares them.

Where several processes train together, each calls the estimator with its own, equally many images. The diagonal is
that of all of them: the square of a mean of gradients takes the mean over the processes first, what is linear in the
images is averaged by the guide afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pyro_isingvit.core.processes import averaged, rank, world
from pyro_isingvit.nets.vit import ViT, Weights

ROUNDING = 1e-4  # probabilities of mixed images do not quite sum to 1
Estimator = Callable[[ViT, Weights, Tensor, Tensor], Weights]


def _leaves(weights: Weights) -> Weights:
    return {kind: weight.detach().requires_grad_() for kind, weight in weights.items()}


@contextmanager
def _kept_activations(vit: ViT) -> Iterator[None]:
    """No checkpointing: blocks computed again would miss second derivatives, function transforms and modes."""
    before = getattr(vit, "checkpoint_activations", False)  # any function of weights and images will do
    vit.checkpoint_activations = False
    try:
        yield
    finally:
        vit.checkpoint_activations = before


def _squared_mean(grads: tuple[Tensor, ...], leaves: Weights, images: int) -> Weights:
    """B g^2 with g the mean gradient of the B images of all processes; all of them have as many."""
    total = images * world()
    # In place: a large network has no room for a second copy of its weights.
    return {kind: averaged(grad.float()).square_().mul_(total) for kind, grad in zip(leaves, grads, strict=True)}


def image_weights(labels: Tensor) -> Tensor | None:
    """What each image counts in the likelihood, (B,): the sum of its label; None where all count 1.

    Args:
        labels: (B,) class numbers, or (B, C) probabilities times the weight of the image.
    """
    weights = labels.sum(-1) if labels.dim() == 2 else None
    return None if weights is None or bool(((weights - 1).abs() < ROUNDING).all()) else weights


def gnb(vit: ViT, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
    """Gauss-Newton-Bartlett: labels drawn from the model's own softmax, h = B g^2 with g the batch-mean gradient.

    Unbiased for the diagonal of the Gauss-Newton (Fisher) matrix, also through softmax and LayerNorm. With the
    true labels instead it would vanish as the training loss does. Bartlett's estimator as in Sophia (Liu et al.
    2023), equation (12). An image of weight w has its gradient times sqrt(w), and the square counts it w times.

    Args:
        vit: the network.
        weights: kind -> (layers, out, in).
        images: (B, channels, height, width), normalised.
        labels: read for the weights of the images alone.

    Returns:
        kind -> (layers, out, in), non-negative, nats per example per squared weight.
    """
    leaves = _leaves(weights)
    with torch.enable_grad():
        logits = vit(leaves, images).float()
        # Gumbel-max: unlike multinomial, it accepts NaN logits. Numbers for the images of all processes, in step.
        noise = logits.new_empty(world() * len(logits), logits.shape[1]).exponential_().log().chunk(world())[rank()]
        drawn = (logits.detach() - noise).argmax(-1)
        counted = image_weights(labels)
        if counted is None:
            loss = F.cross_entropy(logits, drawn)
        else:
            loss = (counted.sqrt() * F.cross_entropy(logits, drawn, reduction="none")).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
    return _squared_mean(grads, leaves, len(images))


def empirical_fisher(vit: ViT, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
    """h = B g^2 with g the batch-mean gradient at the true labels: for comparison, it vanishes with the training loss.

    In expectation over batches it is the mean squared per-example gradient plus (B - 1) times the squared mean
    gradient, so it reads as a curvature only near an optimum of well-calibrated predictions.

    Args:
        vit: the network.
        weights: kind -> (layers, out, in).
        images: (B, channels, height, width), normalised.
        labels: (B,), true classes, or (B, C), their probabilities times the weight of the image, which counts as in
            ``gnb``.

    Returns:
        kind -> (layers, out, in), non-negative, nats per example per squared weight.
    """
    leaves = _leaves(weights)
    with torch.enable_grad():
        logits, counted = vit(leaves, images).float(), image_weights(labels)
        if counted is None:
            loss = F.cross_entropy(logits, labels)
        else:
            shares = labels / counted.unsqueeze(-1)
            loss = (counted.sqrt() * F.cross_entropy(logits, shares, reduction="none")).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
    return _squared_mean(grads, leaves, len(images))


def hutchinson(vit: ViT, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
    """h = z * (H z), z = +-1 at random: unbiased for the diagonal of the true Hessian H at the true labels.

    Raw values, which can be negative: H itself is indefinite away from an optimum, and one probe carries the noise
    of H's off-diagonal elements. The guide averages them and clamps the average at 0.

    Args:
        vit: the network.
        weights: kind -> (layers, out, in).
        images: (B, channels, height, width), normalised.
        labels: (B,), true classes, or (B, C), their probabilities times the weight of the image.

    Returns:
        kind -> (layers, out, in), of either sign, nats per example per squared weight.
    """
    leaves = _leaves(weights)
    probes = [torch.randint_like(weight, 2) * 2 - 1 for weight in leaves.values()]
    # The fused kernels have no second derivative.
    with _kept_activations(vit), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(vit(leaves, images).float(), labels)
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        products = torch.autograd.grad(grads, list(leaves.values()), grad_outputs=probes)
    return {kind: (z * hz).float() for kind, z, hz in zip(leaves, probes, products, strict=True)}


@torch.no_grad()
def exact(vit: ViT, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
    """The full Gauss-Newton diagonal, C backward passes per image: the others' reference, for small networks only.

    h = mean over images of sum_c p_c J_c^2 - (sum_c p_c J_c)^2, with J_c the gradient of logit c: the diagonal of
    J^T (diag(p) - p p^T) J, times the weight of the image.

    Args:
        vit: the network.
        weights: kind -> (layers, out, in).
        images: (B, channels, height, width), normalised; each costs C times the memory of the weights in turn.
        labels: read for the weights of the images alone.

    Returns:
        kind -> (layers, out, in), non-negative, nats per example per squared weight.
    """
    point = {kind: weight.detach() for kind, weight in weights.items()}
    total = {kind: torch.zeros_like(weight) for kind, weight in point.items()}
    with _kept_activations(vit), sdpa_kernel(SDPBackend.MATH):  # the only kernel that vmap, inside jacrev, supports
        counted = image_weights(labels)
        for image, weight in zip(images, [1.0] * len(images) if counted is None else counted.tolist(), strict=True):

            def logits(at: Weights, image: Tensor = image) -> tuple[Tensor, Tensor]:
                row = vit(at, image[None])[0]
                return row, row

            jacobian, row = torch.func.jacrev(logits, has_aux=True)(point)  # kind -> (C, layers, out, in)
            p = row.softmax(-1)
            for kind, rows in jacobian.items():
                mean = torch.einsum("c,cloi->loi", p, rows)
                total[kind] += torch.einsum("c,cloi->loi", p, (rows - mean) ** 2) * (weight / len(images))
    return total


# The Levenberg-Marquardt recursion -------------------------------------------------------------------------------
# Every rule maps h, the diagonal second derivatives at an operation's output, to those at its inputs by the squared
# Jacobian, h_i = sum_o (dy_o / dx_i)^2 h_o: what is left of the chain rule without f'' and off-diagonal elements.

Rule = Callable[..., tuple[Tensor, ...]]


def _linear_rule(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_x = h W^2, and h_W = h x^2 summed over everything that shares W: images and tokens; LeCun et al. 1989."""
    return h @ weight**2, h.flatten(0, -2).T @ x.flatten(0, -2) ** 2


def _gelu_rule(h: Tensor, x: Tensor) -> tuple[Tensor]:
    slope = torch.special.ndtr(x) + x * torch.exp(-0.5 * x**2) / (2 * torch.pi) ** 0.5
    return (slope**2 * h,)


def _relu_rule(h: Tensor, x: Tensor, inplace: bool) -> tuple[Tensor]:
    return ((x > 0) * h,)


def _mean_rule(h: Tensor, x: Tensor, dim: int, keepdim: Literal[True]) -> tuple[Tensor]:
    """dy / dx = 1 / T."""
    return ((h / (x.numel() // h.numel()) ** 2).expand_as(x),)


def _layer_norm_rule(h: Tensor, x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor]:
    """dy_o / dx_i = gain_o / sigma (delta_oi - (1 + n_o n_i) / D), n the normalised x; squared and summed over o."""
    width = x.shape[-1]
    sigma = (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
    n = (x - x.mean(-1, keepdim=True)) / sigma
    a = h * (weight / sigma) ** 2
    moments = [(a * n**power).sum(-1, keepdim=True) for power in range(3)]
    spread = (moments[0] + 2 * n * moments[1] + n**2 * moments[2]) / width**2  # sum_o a_o (1 + n_o n_i)^2 / D^2
    return ((a * (1 - 2 * (1 + n**2) / width) + spread).clamp(min=0.0),)


def _attention_rule(h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With A = softmax(q k^T / sqrt(d)) and y = A v, all (..., H, T, d), t reading s and channels c, j:

    dy_tc / dv_sc = A_ts
    dy_tc / dq_tj = sum_s A_ts v_sc (k_sj - sum_r A_tr k_rj) / sqrt(d)      covariance of v_c and k_j under A_t
    dy_tc / dk_sj = A_ts (v_sc - y_tc) q_tj / sqrt(d)
    """  # noqa: D415
    d = q.shape[-1]
    a = (q @ k.mT / d**0.5).softmax(-1)
    y = a @ v
    covariance = torch.einsum("...ts,...sc,...sj->...tcj", a, v, k) - torch.einsum("...tc,...tj->...tcj", y, a @ k)
    h_q = torch.einsum("...tc,...tcj->...tj", h, covariance**2) / d
    gaps = h @ (v**2).mT - 2 * (h * y) @ v.mT + (h * y**2).sum(-1, keepdim=True)  # sum_c h_tc (v_sc - y_tc)^2
    h_k = (a**2 * gaps.clamp(min=0.0)).mT @ q**2 / d
    return h_q, h_k, (a**2).mT @ h


RULES: dict[Callable, Rule] = {
    F.linear: _linear_rule,
    F.gelu: _gelu_rule,
    F.relu: _relu_rule,
    Tensor.mean: _mean_rule,
    F.layer_norm: _layer_norm_rule,
    F.scaled_dot_product_attention: _attention_rule,
}
# Operations that only move, copy or add numbers: their Jacobian holds zeros and ones and is its own square.
MOVES = {
    "__get__", "__getitem__", "add", "cat", "contiguous", "dim", "expand", "flatten", "numel", "pad", "permute",
    "reshape", "size", "squeeze", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
STEM = {"conv2d", "max_pool2d"}  # before the first matrix: nothing is asked for behind them


class _Diagonal(torch.autograd.Function):
    """An operation whose backward pass carries diagonal second derivatives in the place of gradients."""

    @staticmethod
    def forward(ctx: Any, operation: Callable, kwargs: dict, *inputs: Any) -> Tensor:
        ctx.rule, ctx.inputs, ctx.kwargs = RULES[operation], inputs, kwargs
        return operation(*inputs, **kwargs)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:
        found = ctx.rule(h, *ctx.inputs, **ctx.kwargs)
        return None, None, *found, *[None] * (len(ctx.inputs) - len(found))  # shapes and biases


class _Recursion(TorchFunctionMode):
    """Gives every operation of a forward pass its rule."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RULES:
            return _Diagonal.apply(func, kwargs or {}, *args)
        if func.__name__ not in MOVES | STEM:
            raise NotImplementedError(f"the lm saliency has no rule for {func.__name__}; add one to curvature.RULES.")
        return func(*args, **(kwargs or {}))


def lm(vit: ViT, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
    """The Levenberg-Marquardt recursion of optimal brain damage (LeCun, Denker and Solla 1989), the paper's saliency.

    Starts from p (1 - p) at the logits and goes backward once, without noise, by each operation's squared Jacobian:
    linear layers h_x = h W^2, GELU and ReLU f'^2 h, residual sums h + J^2 h, LayerNorm and softmax attention the
    sum over all their outputs in closed form. It drops every f'', as Gauss-Newton does, and moreover the
    off-diagonal second derivatives between units, classes, and tokens that share a weight. It is exact for the
    Gauss-Newton diagonal where each unit has one way to one logit: the head, or a chain of such layers.

    Args:
        vit: the network.
        weights: kind -> (layers, out, in).
        images: (B, channels, height, width), normalised.
        labels: read for the weights of the images alone.

    Returns:
        kind -> (layers, out, in), non-negative, nats per example per squared weight.

    Raises:
        NotImplementedError: the network computes with an operation that ``RULES`` lacks.
    """
    leaves = _leaves(weights)
    with torch.enable_grad():
        with _Recursion(), _kept_activations(vit):
            logits = vit(leaves, images)
        p, counted = logits.detach().softmax(-1), image_weights(labels)
        start = p * (1 - p) / len(images)
        start = start if counted is None else start * counted.unsqueeze(-1)
        diagonals = torch.autograd.grad(logits, list(leaves.values()), grad_outputs=start)
    return {kind: diagonal.float() for kind, diagonal in zip(leaves, diagonals, strict=True)}


SALIENCY: dict[str, Estimator] = {
    "gnb": gnb,
    "lm": lm,
    "hutchinson": hutchinson,
    "empirical_fisher": empirical_fisher,
    "exact": exact,
}


def second_order_gain(curvature: Tensor, weight: Tensor, num_data: int) -> Tensor:
    """Dl_e = N max(h_e, 0) m_e^2 / 2: log-likelihood of the data kept minus dropped (docs/method.md, Posterior).

    Second order, as in optimal brain damage (LeCun, Denker and Solla 1989).

    Args:
        curvature: h, any shape, nats per example per squared weight; of either sign.
        weight: m, of the same shape.
        num_data: N.

    Returns:
        nats, of the same shape.

    Examples:
        >>> second_order_gain(torch.tensor([0.5, -0.5]), torch.tensor([2.0, 2.0]), num_data=100)
        tensor([100.,   0.])
    """
    return 0.5 * num_data * curvature.clamp(min=0.0) * weight**2
