"""Distillation: a network is trained towards the predictions of a teacher, besides the labels (Zheng & Yang 2024).

    R = mean_i U_i KL(q_i || p_i),   q_i = t_i^g / U_i,   U_i = sum_c t_ic^g

t: the teacher's probabilities, p: the network's. With g = 1, where U = 1, it is the divergence from the teacher; its
gradient by the logits of an image is p - t. g below 1 flattens the teacher, as a temperature 1 / g of the teacher alone
does, and U gives flat targets more weight (weighted transformed teacher matching); without it U is taken for 1
(transformed teacher matching). The network itself has no temperature.

Shapes: S samples, B batch, C classes.
"""

import torch
from torch import Tensor


def distillation(logits: Tensor, told: Tensor, labels: Tensor, power: float, weighted: bool) -> Tensor:
    """R of a batch.

    Args:
        logits: (B, C), or (S, B, C).
        told: t, (B, C), rows that sum to 1.
        labels: (B,) class numbers, or (B, C) probabilities times the weight of the image, which R has too.
        power: g, above 0.
        weighted: with U.

    Returns:
        a scalar, or (S,); nats per image.
    """
    target = told.pow(power)
    total = target.sum(-1, keepdim=True)
    target = target / total
    each = (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)
    weight = total.squeeze(-1) if weighted else 1.0
    return (each * weight * (labels.sum(-1) if labels.dim() == 2 else 1.0)).mean(-1)
