"""Accuracy of predictions and calibration of their probabilities, by scikit-learn and torchmetrics where they can.

Shapes: S samples, B batch, C classes. All entropies are in nats.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError

ECE_BINS = 15
TINY = 1e-12  # probabilities below count as it: one image costs at most 27.6 nats


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

    probs = probs.float().clamp(max=1 - torch.finfo(torch.float32).eps / 2)  # 1 itself would have a bin of its own
    return float(multiclass_calibration_error(probs, labels, num_classes=probs.shape[-1], n_bins=bins, norm="l1"))


def equal_mass_bins(values: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """The bin of each value, bins cut at the quantiles i / bins: (B,) -> (B,) numbers below ``bins``.

    Equal values share a bin, whatever their order; with many of them some bins stay empty and others are larger.
    """
    cuts = np.quantile(values, np.arange(1, bins) / bins)
    return np.searchsorted(cuts, values, side="left")


def adaptive_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = ECE_BINS) -> float:
    """ECE over bins of equal mass: sum_b |B_b| / B * |accuracy_b - confidence_b| (Nguyen & O'Connor 2015).

    Equal-width bins are mostly empty where most predictions are near certain; bins of equal mass are not.

    Args:
        confidence: (B,) probability of the predicted class.
        right: (B,) 0 or 1.
        bins: at most this many; ties may merge some (``equal_mass_bins``).
    """
    gaps = np.bincount(equal_mass_bins(confidence, bins), right - confidence, bins)  # |B_b| (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def area_under_risk_coverage(confidence: np.ndarray, right: np.ndarray) -> float:
    """AURC of selective prediction: (1/B) sum_{k=1..B} (errors among the k most confident images) / k.

    The mean, over every coverage k / B, of the error rate among the answered images (Geifman, Uziel & El-Yaniv,
    ICLR 2019). 0: no error at all; the error rate itself where confidence says nothing. Within a tie the errors are
    spread evenly, which is the mean over all orders of its images.

    Args:
        confidence: (B,), larger is answered earlier.
        right: (B,) 0 or 1.
    """
    return float(selective_risk(confidence, right).mean())


def selective_risk(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Error rate among the k most confident images, k = 1..B: (B,), (B,) 0 or 1 -> (B,). Ties spread their errors."""
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)  # most confident first
    errors = np.bincount(group, 1.0 - right) / sizes  # (groups,) error rate of each tie
    return np.asarray(np.repeat(errors, sizes).cumsum() / np.arange(1, len(right) + 1))


def classification_metrics(probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Metrics of mean class probabilities.

    Args:
        probs: (B, C), rows sum to 1.
        labels: (B,), class numbers.

    Returns:
        accuracy, precision_macro, recall_macro, f1_macro (a class without images counts as 0 in these three, unlike in
        ``balanced_accuracy``), fpr_macro (false positive rate), nll (nats per image, of
        probabilities of at least 1e-12), brier (sum over classes, 0 to 2), ece (15 bins of equal width), ece_adaptive
        (15 of equal mass), aurc, auroc_right_wrong (the chance that a right image has a higher top probability than a
        wrong one; None where all are right or all are wrong). All but the last are floats.

    Raises:
        UserError: no images, counts that differ, or labels outside 0..C-1.
    """
    from sklearn.metrics import (
        accuracy_score,
        brier_score_loss,
        confusion_matrix,
        log_loss,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    if len(probs) == 0 or len(probs) != len(labels):
        raise UserError(f"metrics need as many labels as predictions, and one at least: {len(labels)}, {len(probs)}.")
    classes = np.arange(probs.shape[-1])
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise UserError(f"labels must lie in 0..{len(classes) - 1}; found {int(labels.min())}..{int(labels.max())}.")
    if not bool(torch.isfinite(probs).all()):
        raise UserError("the predictions are not finite numbers: the network's weights are damaged; train again.")
    p = probs.double().cpu().clamp(min=TINY)
    p_np, y = (p / p.sum(-1, keepdim=True)).numpy(), labels.cpu().numpy()
    guess = p_np.argmax(-1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        y, guess, labels=classes, average="macro", zero_division=0
    )
    table = confusion_matrix(y, guess, labels=classes)  # rows: truth
    false_positives = table.sum(0) - table.diagonal()
    negatives = len(y) - table.sum(1)
    confidence, right = p_np.max(-1), (guess == y).astype(float)
    return {
        "accuracy": float(accuracy_score(y, guess)),
        "precision_macro": float(precision),
        "recall_macro": float(recall),
        "f1_macro": float(f1),
        "fpr_macro": float(np.mean(false_positives / np.maximum(negatives, 1))),
        "nll": float(log_loss(y, p_np, labels=classes)),
        "brier": float(brier_score_loss(y, p_np, labels=classes, scale_by_half=False)),
        "ece": calibration_error(torch.from_numpy(p_np).float(), labels.cpu()),
        "ece_adaptive": adaptive_calibration_error(confidence, right),
        "aurc": area_under_risk_coverage(confidence, right),
        "auroc_right_wrong": float(roc_auc_score(right, confidence)) if 0 < right.sum() < len(right) else None,
    }
