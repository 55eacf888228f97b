"""How good the answers are, and how honest the probabilities. Library implementations throughout.

Shapes: S samples, B batch, C classes. All entropies are in nats.
"""

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)
from torch import Tensor

from pyro_isingvit.errors import UserError

ECE_BINS = 15
TINY = 1e-12


def entropy(probs: Tensor) -> Tensor:
    """-sum_c p_c log p_c over the last axis, nats: (..., C) -> (...)."""
    return torch.special.entr(probs).sum(-1)


def calibration_error(probs: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the top class: sum over bins of share * |accuracy - confidence|.

    Args:
        probs: (B, C).
        labels: (B,).
        bins: equal-width bins of confidence.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(multiclass_calibration_error(probs, labels, num_classes=probs.shape[-1], n_bins=bins, norm="l1"))


def classification_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of mean class probabilities.

    Args:
        probs: (B, C), rows sum to 1.
        labels: (B,), class numbers.

    Returns:
        accuracy, precision_macro, recall_macro, f1_macro, fpr_macro (false positive rate), nll (nats per image),
        brier (sum over classes, 0 to 2), ece (15 bins).

    Raises:
        UserError: no images, counts that differ, or labels outside 0..C-1.
    """
    if len(probs) == 0 or len(probs) != len(labels):
        raise UserError(f"metrics need as many labels as predictions, and one at least: {len(labels)}, {len(probs)}.")
    classes = np.arange(probs.shape[-1])
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise UserError(f"labels must lie in 0..{len(classes) - 1}; found {int(labels.min())}..{int(labels.max())}.")
    p = probs.double().cpu().clamp(min=TINY)
    p_np, y = (p / p.sum(-1, keepdim=True)).numpy(), labels.cpu().numpy()
    guess = p_np.argmax(-1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        y, guess, labels=classes, average="macro", zero_division=0
    )
    table = confusion_matrix(y, guess, labels=classes)  # rows: truth
    false_positives = table.sum(0) - table.diagonal()
    negatives = len(y) - table.sum(1)
    return {
        "accuracy": float(accuracy_score(y, guess)),
        "precision_macro": float(precision),
        "recall_macro": float(recall),
        "f1_macro": float(f1),
        "fpr_macro": float(np.mean(false_positives / np.maximum(negatives, 1))),
        "nll": float(log_loss(y, p_np, labels=classes)),
        "brier": float(brier_score_loss(y, p_np, labels=classes, scale_by_half=False)),
        "ece": calibration_error(torch.from_numpy(p_np).float(), labels.cpu()),
    }
