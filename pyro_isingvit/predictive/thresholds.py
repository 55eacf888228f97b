"""From which probability on a two-class network should say yes, and what follows from it.

Shapes: B images.
"""

from dataclasses import dataclass

import numpy as np

WANTED = 0.95  # of sensitivity, and of specificity


@dataclass(frozen=True)
class Threshold:
    """A rule, p >= value, and what it does on labelled images; None where nothing is divided.

    Attributes:
        rule: how the value was chosen.
        value: of the probability of the second class; above 1: no image is called positive.
        sensitivity: share of the positive images that are called so.
        specificity: share of the negative images that are called so.
        ppv: share of images called positive that are.
        npv: share of images called negative that are.
        positive: share of the images that are called positive.
    """

    rule: str
    value: float
    sensitivity: float | None
    specificity: float | None
    ppv: float | None
    npv: float | None
    positive: float


def choose_thresholds(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Values for four rules, by the images that are given.

    0.5; Youden's index, where sensitivity + specificity is largest; the highest threshold whose sensitivity is at least
    0.95; the lowest whose specificity is at least 0.95.

    Args:
        scores: (B,) probability of the second class.
        truth: (B,) bool, whether the image is of the second class; some are, and some are not.

    Returns:
        rule -> value.

    Examples:
        >>> found = choose_thresholds(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, False, True, True]))
        >>> [round(float(value), 2) for value in found.values()]
        [0.5, 0.3, 0.3, 0.3]
    """
    from sklearn.metrics import roc_curve

    false, right, values = roc_curve(truth, scores, drop_intermediate=False)  # thresholds fall, the first is infinite
    return {
        "0.5": 0.5,
        "Youden": float(values[np.argmax(right - false)]),
        f"sensitivity ≥ {WANTED:g}": float(values[np.argmax(right >= WANTED)]),
        f"specificity ≥ {WANTED:g}": float(values[np.flatnonzero(1 - false >= WANTED)[-1]]),
    }


def judge_threshold(rule: str, value: float, scores: np.ndarray, truth: np.ndarray) -> Threshold:
    """What a threshold does.

    Args:
        rule: its name.
        value: the threshold.
        scores: (B,) probability of the second class.
        truth: (B,) bool.
    """
    called = scores >= value
    hits, rejected = int((called & truth).sum()), int((~called & ~truth).sum())

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    positives, negatives = int(truth.sum()), int((~truth).sum())
    return Threshold(
        rule, value, share(hits, positives), share(rejected, negatives), share(hits, int(called.sum())),
        share(rejected, int((~called).sum())), float(called.mean()),
    )  # fmt: skip
