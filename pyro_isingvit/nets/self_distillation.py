"""Progressive self-distillation (PS-KD; Kim et al. 2021, arXiv 2006.12000): an image's target softens by what was said.

    target = (1 - a) y + a p',   a = a_T n / E,   n times seen before, E epochs in all

p' is the prediction for the image when it was last seen. The cross entropy is linear in its target, so that the change
against CE(y, p) is a term of its own:

    R = mean_i a_i (CE(p'_i, p_i) - CE(y_i, p_i))

An image that was not seen yet has a = 0. The source takes the epoch before for p', and a by the epoch; here both are by
the image, which is the same where every epoch shows every image once. Under a posterior with masks one prediction is
that of one draw: p' is then the mean of all since the pilot phase, and n counts from there.

Shapes: N training images, S samples, B batch, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def first_predictions(num_data: int, num_classes: int) -> dict[str, Tensor]:
    """p' of every image (N, C) and how often it was seen (N,), before the first step."""
    return {"said": torch.zeros(num_data, num_classes), "seen": torch.zeros(num_data)}


def self_distillation(
    logits: Tensor, labels: Tensor, memory: dict[str, Tensor], rows: Tensor, epochs: int, mean: bool = False
) -> Tensor:
    """R of a batch with a_T = 1; its predictions are remembered, and its images counted, after that.

    Args:
        logits: (B, C), or (S, B, C): each sample has a term of its own, and the mean prediction is remembered.
        labels: (B,) class numbers, or (B, C) probabilities times the weight of the image.
        memory: of ``first_predictions``; the batch's rows are overwritten.
        rows: (B,) numbers of the images, each once.
        epochs: E.
        mean: p' is the mean of all earlier predictions, not the last one.

    Returns:
        a scalar, or (S,); nats per image.
    """
    said, seen = memory["said"][rows], memory["seen"][rows]
    target = labels if labels.dim() == 2 else F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    weight = target.sum(-1, keepdim=True)  # of the images, 1 unless they have some
    share = (seen / max(epochs, 1)).clamp(max=1.0)
    log_p = logits.log_softmax(-1)
    value = -(share * ((weight * said - target) * log_p).sum(-1)).mean(-1)
    with torch.no_grad():
        now = log_p.exp().reshape(-1, *log_p.shape[-2:]).mean(0).to(said)
        memory["said"][rows] = said + (now - said) / (seen[:, None] + 1) if mean else now
        memory["seen"][rows] += 1
    return value
