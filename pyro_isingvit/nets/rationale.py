"""The same reasons for all images of a class: rationale invariance, RIDG (Chen et al. 2023, arXiv 2308.11158).

    R_n  = W o f_n, (C, F)                       what feature f of an image says for each class: its rows sum to W f_n
    term = mean over n of |R_n - M_{y_n}|_F^2
    M_k <- (1 - m) M_k + m (mean of R_n over the images of class k in the step),   m = 0.1

W is the last matrix, of the image's own draw, and f what it reads. M_k starts as the first mean there is. With labels
that are probabilities an image belongs to each class in its share. Two things differ from the authors' code, so that
micro-batches and processes add up to the step of one process: the mean is over images, not over the classes of the
batch and then over the images of each, which is the same where these are equally many; and M is that before the step.
m is the upper end of the authors' range; their 0.001 would keep the first step's M through a training of some hundred
steps.

Shapes: S samples, B batch, C classes, F features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.processes import averaged

MOMENTUM = 0.1  # m


def first_rationales(classes: int, features: int) -> dict[str, Tensor]:
    """M before the first step and which of its classes were seen; sums over the step's parts, and their images."""
    square, vector = torch.zeros(classes, classes, features), torch.zeros(classes)
    return {"mean": square, "known": vector, "sums": square.clone(), "counts": vector.clone()}


def contributions(logits: Tensor, features: Tensor, probe: Tensor) -> Tensor:
    """R of each image by the gradient of its logits, exact for a last layer that is linear, whatever its masks.

    Args:
        logits: (..., B, C).
        features: (..., B, F), what the last matrix reads.
        probe: as many zeros with gradients, which were added to the features.

    Returns:
        (..., B, C, F), with gradients to the features and to the last matrix.
    """
    rows = [torch.autograd.grad(z.sum(), probe, create_graph=True)[0] for z in logits.unbind(-1)]
    return torch.stack([row.view_as(features) * features for row in rows], dim=-2).float()


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def rationale(reasons: Tensor, labels: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """The term of a step, or of one of its parts.

    Args:
        reasons: R, (B, C, F), or (S, B, C, F): each sample has a term of its own, and M moves by their mean.
        labels: (B,) class numbers, or (B, C) probabilities.
        memory: what ``first_rationales`` made; the parts of the step are added up here.

    Returns:
        a scalar, or (S,); at least 0. Classes that were not seen before the step have no part in it.
    """
    reasons = reasons.float()  # what is left of |R|^2 - 2 R M + |M|^2 is small
    share = F.one_hot(labels, reasons.shape[-2]) if labels.dim() == 1 else labels / labels.sum(-1, keepdim=True)
    share, mean = share.to(reasons), memory["mean"]
    known = share * memory["known"]
    squared = (
        known.sum(-1) * reasons.square().sum((-2, -1))
        - 2 * (reasons * torch.einsum("bk,kcf->bcf", known, mean)).sum((-2, -1))
        + known @ mean.square().sum((-2, -1))
    )
    now = reasons.detach().reshape(-1, *reasons.shape[-3:]).mean(0)
    memory["sums"] += torch.einsum("bk,bcf->kcf", share, now)
    memory["counts"] += share.sum(0)
    return squared.mean(-1)


def settle_rationale(memory: dict[str, Tensor]) -> None:
    """Ends a step: M takes the means of all parts and processes."""
    mean, known = memory["mean"], memory["known"]
    sums, counts = averaged(memory["sums"]), averaged(memory["counts"])
    found = (counts > 0).to(mean)
    step = sums / counts.clamp(min=1e-12)[:, None, None]
    pull = found * torch.where(known > 0, MOMENTUM, 1.0)
    mean.lerp_(step, pull[:, None, None].expand_as(mean))
    known.copy_(torch.maximum(known, found))
    memory["sums"].zero_()
    memory["counts"].zero_()
