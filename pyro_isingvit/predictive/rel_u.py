"""Rel-U: distances between classes, learned from the errors on held-out images, as a score of doubt.

Shapes: B images, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.predictive.calibration import temper
from pyro_isingvit.predictive.detection import check_labels, detects_wrong
from pyro_isingvit.predictive.draws import PredictiveDraws


@dataclass(frozen=True)
class RelativeUncertainty:
    """Rel-U: p^T D p with learned distances D between classes (Dadalto et al., arXiv 2306.01710).

    Attributes:
        distances: D, (C, C) double: symmetric, not negative, zero diagonal, Frobenius norm 1.
        temperature: of p.
        wrong: validation images that D learned wrong answers from; 0: D is the neutral one.
    """

    distances: Tensor
    temperature: float = 1.0
    wrong: int = 0

    def score(self, probs: Tensor) -> Tensor:
        """Sum_ij D_ij p_i p_j, p sharpened by the temperature: (B, C) -> (B,), higher is more doubtful."""
        p = temper(probs.double(), self.temperature)
        return torch.einsum("bi,ij,bj->b", p, self.distances, p)


def fit_relative_uncertainty(
    probs: Tensor, labels: Tensor, weight: float = 0.5, temperature: float = 1.0
) -> RelativeUncertainty:
    """Learns D on held-out images: uncertain where the network errs, certain where it does not.

    D minimises (1 - weight) E_right[p^T D p] - weight E_wrong[p^T D p] under the constraints of
    ``RelativeUncertainty``, norm at most 1. The objective is linear in D, so there is a closed form (the paper's, whose
    temperature 1 and weight 1/2 are the defaults)

        D_ij = max(0, weight E_wrong[p_i p_j] - (1 - weight) E_right[p_i p_j]) / Z   (i != j),   D_ii = 0.

    Without a wrong image (or with none of the maxima positive) there is nothing to learn and D_ij = 1 / Z off the
    diagonal: the Gini impurity 1 - sum_c p_c^2, up to a factor.

    Args:
        probs: (B, C) mean predictions of images that were not trained on.
        labels: (B,) class numbers.
        weight: lambda, of the wrong images, in (0, 1).
        temperature: of p, positive.

    Raises:
        UserError: weight or temperature out of range, or counts that differ.
    """
    need(
        0 < weight < 1 and temperature > 0,
        f"Rel-U needs 0 < `weight` < 1 and `temperature` > 0, not {weight} and {temperature}.",
    )
    need(len(probs) == len(labels), f"{len(labels)} labels for {len(probs)} predictions.")
    wrong = probs.argmax(-1) != labels.to(probs.device)
    p = temper(probs.double(), temperature)
    off = 1 - torch.eye(p.shape[-1], dtype=p.dtype)
    means = [part.T @ part / max(len(part), 1) for part in (p[wrong], p[~wrong])]  # E[p p^T], (C, C)
    distances = (weight * means[0] - (1 - weight) * means[1]).clamp(min=0) * off
    learned = bool(wrong.any()) and bool(distances.any())
    distances = distances if learned else off
    return RelativeUncertainty(distances / distances.norm(), temperature, int(wrong.sum()) if learned else 0)


def misclassification_metrics(
    draws: PredictiveDraws, labels: Tensor, val_draws: PredictiveDraws | None, val_labels: Tensor | None
) -> dict[str, Any]:
    """How well Rel-U, fitted on the validation part, finds wrong answers on other images.

    Args:
        draws: predictions to judge.
        labels: (B,) class numbers.
        val_draws: predictions of the validation part; None: there is none.
        val_labels: its labels.

    Returns:
        auroc_wrong_rel_u, fpr95_wrong_rel_u; rel_u_val_wrong, the validation images D learned wrong answers from
        (0: the neutral D). None each without a validation part.

    Raises:
        UserError: labels that do not fit.
    """
    check_labels(draws, labels)
    if val_draws is None or val_labels is None or len(val_labels) == 0:
        return {"auroc_wrong_rel_u": None, "fpr95_wrong_rel_u": None, "rel_u_val_wrong": None}
    check_labels(val_draws, val_labels)
    detector = fit_relative_uncertainty(val_draws.mean, val_labels)
    wrong = (draws.mean.argmax(-1) != labels.cpu()).numpy()
    found = detects_wrong("rel_u", detector.score(draws.mean).numpy(), wrong)
    return {**found, "rel_u_val_wrong": detector.wrong}
