"""Attention log-barrier: keeps attention an invertible change of variables (docs/method.md, Attention log-barrier).

In causal attention the residual x_i - sum_j alpha_ij x_j, as a function of the querying token x_i, has the Jacobian

    I - Sigma_i A,   Sigma_i = Cov_alpha_i(x, x),   A = W_K^T W_Q / sqrt(d)

(Agarwal et al. 2026, "Support Tokens, Stability Margins, and a New Foundation for Robust LLMs", arXiv 2602.22271).
Training subtracts lambda mean_i log|det(I - Sigma_i A)| from the loss; |det| is the margin of token i, and the
support token of an image is the position with the smallest one. Exact for causal attention; in a vision transformer,
whose attention is bidirectional (a token is also key and value of the others), a heuristic: one diagonal block of the
whole Jacobian, without the value and output matrices.

Computed in the head dimension, by det(I - UV) = det(I - VU):

    det(I_D - Sigma_i A) = det(I_d - Cov_alpha_i(W_Q x, W_K x) / sqrt(d))

Shapes: S samples, B batch, L depth, H heads, T tokens, d width of a head.
"""

import math

import torch
from torch import Tensor

FLOOR = 1e-6  # a margin below it counts as this and passes no gradient back: none is defined at det = 0

Projections = list[tuple[Tensor, Tensor]]  # queries and keys of each layer, (..., H, T, d)


def log_margin(q: Tensor, k: Tensor) -> Tensor:
    """log|det(I - Sigma_i A)| of every head and token of one layer.

    Biases of the projections matter to alpha alone: a covariance does not see them.

    Args:
        q: (..., T, d), W_Q x_j of every token, before the division by sqrt(d).
        k: (..., T, d), W_K x_j.

    Returns:
        (..., T), nats, at least log ``FLOOR``; float32 or wider, whatever autocast says.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        scale = q.shape[-1] ** -0.5
        alpha = (scale * q @ k.mT).softmax(-1)  # (..., T, T)
        q, k = (x - x.mean(-2, keepdim=True) for x in (q, k))  # the same covariance, with less cancellation
        product = q.unsqueeze(-1) * k.unsqueeze(-2)  # (..., T, d, d)
        second = (alpha @ product.flatten(-2)).view_as(product)  # sum_j alpha_ij q_j k_j^T
        jacobian = scale * ((alpha @ q).unsqueeze(-1) * (alpha @ k).unsqueeze(-2) - second)
        jacobian.diagonal(dim1=-2, dim2=-1).add_(1.0)  # I - Cov_alpha_i(q, k) / sqrt(d)
        value = torch.linalg.slogdet(jacobian).logabsdet
        inside = value > math.log(FLOOR)
        if jacobian.requires_grad:  # at det = 0 the gradient of slogdet is NaN, which 0 * NaN would not stop
            jacobian.register_hook(
                lambda grad: grad if grad is None else torch.where(inside[..., None, None], grad, 0.0)
            )
        return torch.where(inside, value, math.log(FLOOR))


def log_margins(attention: Projections) -> Tensor:
    """``log_margin`` of all layers.

    Args:
        attention: queries and keys of each layer, (B, H, T, d) or (S, B, H, T, d), as ``ViT.forward`` collects them.

    Returns:
        (B, L, H, T) or (S, B, L, H, T), nats.
    """
    return torch.stack([log_margin(q, k) for q, k in attention], dim=-3)


def log_barrier(attention: Projections) -> Tensor:
    """-mean log|det(I - Sigma_i A)| over images, layers, heads and tokens: the penalty that lambda multiplies.

    Args:
        attention: as for ``log_margins``.

    Returns:
        a scalar, or (S,) with a sample axis; nats.
    """
    return -log_margins(attention).mean((-4, -3, -2, -1))


def least_margins(margins: Tensor) -> tuple[Tensor, Tensor]:
    """Margins (or their logarithms) of each token, the least over layers and heads, and the support tokens.

    Args:
        margins: (B, L, H, T).

    Returns:
        (B, T) least margins and (B,) support tokens, the positions of each image's least margin.
    """
    least = margins.amin((1, 2))
    return least, least.argmin(-1)
