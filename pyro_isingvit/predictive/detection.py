"""How well scores of uncertainty find wrong answers and out-of-distribution images.

The wrong answers, or the images from elsewhere, are the positive class throughout, and positives should score higher.
FPR95 is the share of the negatives that is flagged when 95 % of the positives are.

Shapes: S samples, B images, C classes. Entropies in nats. A value that the data leave undefined is None, never NaN.
"""

import numpy as np
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.predictive.draws import PredictiveDraws

TPR = 0.95
SCORES = ("entropy", "mutual_information", "max_probability")
Metrics = dict[str, float | None]


def uncertainty_scores(draws: PredictiveDraws) -> dict[str, np.ndarray]:
    """The uncertainty of every image, (B,) each, named as in ``SCORES``; higher is less certain.

    ``entropy`` of the mean prediction, ``mutual_information`` of label and weights, and ``max_probability``, which is
    1 - max_c p_c of the mean prediction.
    """
    tensors = (draws.entropy, draws.mutual_information, 1 - draws.mean.max(-1).values)
    return {name: tensor.double().numpy() for name, tensor in zip(SCORES, tensors, strict=True)}


def detection_metrics(scores: np.ndarray, positive: np.ndarray) -> Metrics:
    """How well a score finds the positives, by scikit-learn.

    Args:
        scores: (B,), higher means positive.
        positive: (B,) bool.

    Returns:
        auroc: the chance that a positive scores higher than a negative, ties counted half.
        fpr95: the least share of negatives at or above a threshold that at least 95 % of the positives reach.
        aupr: average precision; its value for a score that says nothing is the share of positives.
        None each where all or none are positive.

    Raises:
        UserError: counts that differ, or a score that is no finite number.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    need(scores.shape == positive.shape and scores.ndim == 1, f"scores {scores.shape} for {positive.shape} images.")
    need(np.isfinite(scores).all(), "a score is not a finite number: the predictions hold NaN; train the run again.")
    if positive.all() or not positive.any():
        return {"auroc": None, "fpr95": None, "aupr": None}
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)  # every threshold: fpr95 needs them
    return {
        "auroc": float(roc_auc_score(positive, scores)),
        "fpr95": float(false[np.argmax(true >= TPR)]),
        "aupr": float(average_precision_score(positive, scores)),
    }


def ood_metrics(scores_in: np.ndarray, scores_out: np.ndarray) -> Metrics:
    """How well a score tells out-of-distribution images (positive) from images of the training distribution.

    Args:
        scores_in: (B,) of in-distribution images; higher means less familiar.
        scores_out: (B',) of out-of-distribution images.

    Returns:
        auroc, fpr95 (share of the in-distribution images flagged when 95 % of the others are), aupr.

    Raises:
        UserError: no image on one side, or a score that is no finite number.
    """
    need(len(scores_in) and len(scores_out), "out-of-distribution metrics need images on both sides.")
    positive = np.repeat([False, True], [len(scores_in), len(scores_out)])
    return detection_metrics(np.concatenate([scores_in, scores_out]), positive)


def check_labels(draws: PredictiveDraws, labels: Tensor) -> None:
    """Raises UserError unless every prediction has a label that is one of its classes."""
    _, count, classes = draws.probs.shape
    if count == 0 or count != len(labels):
        raise UserError(f"metrics need as many labels as predictions, and one at least: {len(labels)}, {count}.")
    low, high = int(labels.min()), int(labels.max())
    need(low >= 0 and high < classes, f"labels must lie in 0..{classes - 1}; found {low}..{high}.")


def detects_wrong(name: str, scores: np.ndarray, wrong: np.ndarray) -> Metrics:
    """AUROC and FPR95 of finding wrong answers, as auroc_wrong_<name> and fpr95_wrong_<name>."""
    found = detection_metrics(scores, wrong)
    return {f"{key}_wrong_{name}": found[key] for key in ("auroc", "fpr95")}
