"""Attention that spreads: three terms whose minimum is uniform attention.

A = softmax(q k^T / sqrt d), (T, T) for each image, layer and head; each row sums to 1.

    attention_entropy    mean over rows of sum_j A log A       at least -log T, nats
    attention_spread     mean over entries of log(1 + A^2)     at least log(1 + 1 / T^2) (after Sparse-ViT)
    attention_log        mean over entries of -log A           at least log T, nats (the log-barrier as -sum log a)

All three are sums of one convex function over the entries of a row, which sum to 1, so that A = 1 / T is the least
(Jensen's inequality; log(1 + a^2) is convex up to a = 1).

Shapes: S samples, B batch, H heads, T tokens, d channels of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_isingvit.nets.margins import Projections


def attention_logits(q: Tensor, k: Tensor) -> Tensor:
    """log A of every row, (..., T, T), float32 or wider, whatever autocast says."""
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q.shape[-1] ** -0.5 * q.to(wide) @ k.to(wide).mT).log_softmax(-1)


def _mean(attention: Projections, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of a value of log A, (..., T, T) -> (..., T) or (..., T, T), over images, layers, heads and tokens."""
    each = []
    for q, k in attention:  # (B, H, T, d) or (S, B, H, T, d)
        found = value(attention_logits(q, k))
        each.append(found.flatten(q.dim() - 4).mean(-1))
    return torch.stack(each).mean(0)


def negative_entropy(attention: Projections) -> Tensor:
    """Mean over rows of sum_j A log A, a scalar or (S,); nats.

    Args:
        attention: queries and keys of each layer, (B, H, T, d) or (S, B, H, T, d), as ``ViT.forward`` collects them.
    """
    return _mean(attention, lambda log_a: (log_a.exp() * log_a).sum(-1))


def spread(attention: Projections) -> Tensor:
    """Mean over entries of log(1 + A^2), a scalar or (S,)."""
    return _mean(attention, lambda log_a: (2 * log_a).exp().log1p())


def negative_log(attention: Projections) -> Tensor:
    """Mean over entries of -log A, a scalar or (S,); nats."""
    return _mean(attention, torch.neg)
