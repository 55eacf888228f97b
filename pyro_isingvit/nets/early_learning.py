"""Early-learning regularisation against wrong labels (Liu et al. 2020, arXiv 2007.00151).

A network learns what the classes share before it learns single wrong labels by heart. Each training image therefore
remembers what the network said of it in earlier epochs, and leaving that is punished:

    t_i <- b t_i + (1 - b) p_i,      R = mean_i log(1 - <t_i, p_i>),      d R / d p_i = -t_i / (1 - <t_i, p_i>) / B

p_i is the prediction for image i in this step, t_i its running mean, without gradient and 0 at first. Where p agrees
with t, R falls without end, so 1 - <t, p> is held above ``FLOOR``: beyond, it has no gradient.

Shapes: N training images, S samples, B batch, C classes.
"""

import torch
from torch import Tensor

FLOOR = 1e-4  # as in the authors' code, which clamps p there


def first_targets(num_data: int, num_classes: int) -> dict[str, Tensor]:
    """t of every image before the first step, (N, C)."""
    return {"targets": torch.zeros(num_data, num_classes)}


def early_learning(logits: Tensor, targets: Tensor, rows: Tensor, momentum: float) -> Tensor:
    """R of a batch; the targets of its images are moved first.

    Args:
        logits: (B, C), or (S, B, C): each sample has a term of its own, and the mean prediction moves the targets.
        targets: (N, C), t; the batch's rows are overwritten.
        rows: (B,) numbers of the images, each once.
        momentum: b, in [0, 1).

    Returns:
        a scalar, or (S,); nats per image, at most 0.
    """
    probs = logits.softmax(-1)
    said = probs.detach().reshape(-1, *probs.shape[-2:]).mean(0)
    moved = momentum * targets[rows] + (1 - momentum) * said
    targets[rows] = moved
    return (1 - (moved * probs).sum(-1)).clamp(min=FLOOR).log().mean(-1)
