"""Which numbers of a run are good, and why: each is held against what the test part itself allows to expect.

Shapes: B images, C classes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pyro_isingvit.predictive.detection import detection_metrics
from pyro_isingvit.predictive.metrics import calibration_error, entropy

Grade = Literal["good", "fair", "weak", "unclear"]
SIMULATIONS = 200  # sets of labels drawn from the predictions
FEW = 5  # wrong answers, below which a ranking of them says nothing


@dataclass(frozen=True)
class Verdict:
    """A number of the run, judged.

    Attributes:
        name: of the number.
        grade: good, fair, weak, or unclear where the test part is too small to tell.
        why: the value, what it was compared with, and what follows.
    """

    name: str
    grade: Grade
    why: str


def verdicts(probs: np.ndarray, labels: np.ndarray) -> list[Verdict]:
    """Judges accuracy, NLL, calibration and doubt of predictions on labelled images.

    - accuracy: the share of errors of always naming the most frequent class that is removed; good from 90%, fair from
      half.
    - NLL: good below that of a network with the same accuracy that is equally sure of every answer,
      H(a) + (1 - a) log(C - 1); fair below log C, that of guessing.
    - ECE: good up to the 95% quantile of what a perfectly calibrated network shows on as many images, by simulation:
      labels are drawn from the predictions themselves. Fair up to twice that.
    - AUROC of errors by entropy: good from 0.9, fair from 0.8; unclear with fewer than five errors.

    Args:
        probs: (B, C) mean predictions.
        labels: (B,) class numbers.

    Examples:
        >>> import numpy as np
        >>> sure = np.eye(2)[[0, 1] * 50] * 0.98 + 0.01
        >>> [verdict.grade for verdict in verdicts(sure, np.array([0, 1] * 50))]
        ['good', 'good', 'good', 'unclear']
    """
    probs = np.asarray(probs, dtype=float)
    count, classes = probs.shape
    right = probs.argmax(-1) == labels
    return [
        _accuracy(right, labels, count),
        _nll(probs, labels, float(right.mean()), classes),
        _calibration(probs, labels),
        _doubt(probs, right),
    ]


def _grade(good: bool, fair: bool) -> Grade:
    return "good" if good else "fair" if fair else "weak"


def _accuracy(right: np.ndarray, labels: np.ndarray, count: int) -> Verdict:
    accuracy, common = float(right.mean()), float(np.bincount(labels).max() / count)
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    why = (
        f"{right.sum()} of {count} images are right ({accuracy:.1%}; the standard error from {count} images is "
        f"{100 * error:.1f} points). "
    )
    if common == 1:
        return Verdict("Accuracy", "unclear", f"{why}All are of one class: what it tells apart cannot be seen.")
    removed = 1 - (1 - accuracy) / (1 - common)
    why += (
        f"Always naming the most frequent class would be right for {common:.1%}; "
        f"{max(removed, 0):.0%} of its errors are gone."
    )
    return Verdict("Accuracy", _grade(removed >= 0.9, removed >= 0.5), why)


def _nll(probs: np.ndarray, labels: np.ndarray, accuracy: float, classes: int) -> Verdict:
    nll = float(-np.log(probs[np.arange(len(labels)), labels].clip(1e-12)).mean())
    guess, a = math.log(classes), min(max(accuracy, 1e-9), 1 - 1e-9)
    flat = -a * math.log(a) - (1 - a) * math.log(1 - a) + (1 - a) * math.log(max(classes - 1, 1))
    why = (
        f"{nll:.3f} nats per image. Guessing costs {guess:.2f}; a network that is as often right and equally sure of "
        f"every answer costs {flat:.3f}. "
    )
    if accuracy == 1.0:
        flat, why = guess, f"{nll:.3f} nats per image, and no answer is wrong. Guessing costs {guess:.2f}. "
    why += (
        "Its probabilities tell easy images from hard ones."
        if nll < flat
        else "Its confidence misleads: see calibration."
    )
    return Verdict("NLL", _grade(nll < flat, nll < guess), why)


def _calibration(probs: np.ndarray, labels: np.ndarray) -> Verdict:
    p, made = torch.from_numpy(probs / probs.sum(-1, keepdims=True)), torch.Generator().manual_seed(0)
    ece = calibration_error(p, torch.from_numpy(np.asarray(labels, dtype=np.int64)))
    drawn = torch.multinomial(p, SIMULATIONS, replacement=True, generator=made)  # (B, SIMULATIONS)
    limit = float(np.quantile([calibration_error(p, each) for each in drawn.T], 0.95))
    why = (
        f"ECE {ece:.1%}. On these {len(labels)} images a perfectly calibrated network with the same confidences stays "
        f"below {limit:.1%} in 95 of 100 cases, since {len(labels)} labels scatter. "
    )
    why += (
        "No miscalibration can be seen."
        if ece <= limit
        else "Confidence and accuracy differ by more than chance explains."
    )
    return Verdict("Calibration", _grade(ece <= limit, ece <= 2 * limit), why)


def _doubt(probs: np.ndarray, right: np.ndarray) -> Verdict:
    wrong = int((~right).sum())
    if wrong < FEW:
        text = f"Only {wrong} answers are wrong: too few to say whether the network doubts them."
        return Verdict("Doubt of errors", "unclear", text)
    auroc = detection_metrics(entropy(torch.from_numpy(probs)).numpy(), ~right)["auroc"]
    if auroc is None:
        return Verdict("Doubt of errors", "unclear", "Every answer is wrong.")
    why = (
        f"A wrong answer has a higher entropy than a right one in {auroc:.0%} of all pairs (AUROC {auroc:.2f}; 50% is "
        "chance). Images with the highest entropy are the ones to look at by eye."
    )
    return Verdict("Doubt of errors", _grade(auroc >= 0.9, auroc >= 0.8), why)
