"""Confusion-aware spectral regularisation, CAR (Zhu et al. 2026, arXiv 2603.16732): against classes that are mistaken.

    C_ij = mean over the images of class j of sg[sigma(z_i - z_j)] softmax(z)_i,   i != j     soft confusion of a batch
    M   <- b M + (1 - b) C                                                                  averaged over the steps
    R    = || M diag(w) ||_2,   w_j = 1 / sqrt(m_j + 0.2) / mean,   m_j: share of class j in training

The spectral norm bounds the error of the worst class; sg[] stops the gradient, as in the authors' code. Their b is
0.9, and 0.3 the weight of R. Two things are computed otherwise here, so that micro-batches and processes add up to the
step of one process, and so that a batch without a class says nothing of it (the authors' ratio says that it has no
errors). The mean over a class divides by the number of its images that a batch has on average, not by that of this
batch. And the norm is taken along the singular vectors u, v of M as it was before the step:

    R = u^T (b M + (1 - b) C) diag(w) v,        d R / d C = (1 - b) u v^T diag(w)

which is the norm's own gradient up to the turn of u and v in one step. The first step has no gradient.

Shapes: S samples, B batch, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.processes import averaged

MOMENTUM = 0.9  # b
RADIUS = 0.2  # added to a class's share, so that the rarest does not count without end


def first_confusion(num_data: int, num_classes: int) -> dict[str, Tensor]:
    """M before the first step; the confusion of a step's parts so far, and their number; singular vectors of M."""
    square, vector = torch.zeros(num_classes, num_classes), torch.zeros(num_classes)
    return {"mean": square, "parts": square.clone(), "count": torch.zeros(()), "left": vector, "right": vector.clone()}


def column_weights(shares: Sequence[float]) -> Tensor:
    """w, (C,), with mean 1."""
    weights = (torch.tensor(shares) + RADIUS).rsqrt()
    return weights / weights.mean()


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def soft_confusion(logits: Tensor, labels: Tensor, drawn: Tensor) -> Tensor:
    """C of a batch, rows predicted, columns true.

    Args:
        logits: (..., B, C).
        labels: (B,) class numbers, or (B, C) probabilities, of any sum: an image belongs to each class in its share.
        drawn: (C,) share of each class in what training draws.

    Returns:
        (..., C, C), with zeros on the diagonal.
    """
    logits = logits.float()
    z, p, classes = logits.detach(), logits.softmax(-1), logits.shape[-1]
    if labels.dim() == 1:
        belongs = F.one_hot(labels, classes).to(logits) / (drawn * len(labels))
        beats = (z - z.gather(-1, labels.expand(z.shape[:-1]).unsqueeze(-1))).sigmoid()
        found = torch.einsum("...bi,bj->...ij", beats * p, belongs)
    else:
        belongs = labels / labels.sum(-1, keepdim=True) / (drawn * len(labels))
        beats = (z.unsqueeze(-1) - z.unsqueeze(-2)).sigmoid()  # (..., B, i, j)
        found = torch.einsum("...bij,...bi,bj->...ij", beats, p, belongs)
    return found * (1 - torch.eye(classes, device=logits.device))


def confusion(
    logits: Tensor, labels: Tensor, shares: Sequence[float], equal: bool, memory: dict[str, Tensor]
) -> Tensor:
    """R of a step, or of one of its parts, whose mean it is.

    Args:
        logits: (B, C), or (S, B, C): each sample has a term of its own, and M moves by their mean.
        labels: (B,) class numbers, or (B, C) probabilities.
        shares: (C,) of the classes in the training part.
        equal: training draws every class alike often.
        memory: what ``first_confusion`` made; the parts of the step are added up here.

    Returns:
        a scalar, or (S,); at least 0.
    """
    drawn = torch.tensor(shares if not equal else [1 / len(shares)] * len(shares), device=logits.device)
    drawn = drawn.clamp(min=torch.finfo(drawn.dtype).tiny)  # a class without images has no column
    now = soft_confusion(logits, labels, drawn)
    memory["parts"] += now.detach().reshape(-1, *now.shape[-2:]).mean(0)
    memory["count"] += 1
    right = column_weights(shares).to(logits.device) * memory["right"]
    return (MOMENTUM * memory["mean"] + (1 - MOMENTUM) * now) @ right @ memory["left"]


def settle_confusion(memory: dict[str, Tensor], shares: Sequence[float]) -> None:
    """Ends a step: M takes the confusion of all parts and processes, and u and v follow it."""
    mean, left, right = (memory[name] for name in ("mean", "left", "right"))
    step = averaged(memory["parts"] / memory["count"])
    mean.copy_(step if not left.any() else MOMENTUM * mean + (1 - MOMENTUM) * step)
    u, _, v = torch.linalg.svd(mean * column_weights(shares).to(mean.device))
    left.copy_(u[:, 0])
    right.copy_(v[0])
    memory["parts"].zero_()
    memory["count"].zero_()
