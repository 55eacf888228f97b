"""Which predictions may stand without a human's look, with a limit on the errors among them.

Shapes: B images, C classes, n validation images.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.predictive.draws import Predictions, labelled_probs, mean_probs
from pyro_isingvit.predictive.metrics import selective_risk

START = 4  # the search begins at this part of the images
FACTORS = np.geomspace(1, 100, 60)  # of the validation part, at which it is tried whether more images would do


@dataclass(frozen=True)
class Acceptance:
    """The threshold of confidence above which a prediction stands.

    Attributes:
        threshold: predictions whose largest probability is above it are accepted; 1 accepts none, 0 all.
        max_error: the limit on the share of errors among the accepted.
        certainty: probability, over the draw of the validation part, that the limit holds.
        images: n.
        accepted: validation images above the threshold.
        errors: among them.
        needed: about how many validation images would let some predictions stand, if the error rates stayed as they
            are; None where some do, and where no number would help.
    """

    threshold: float
    max_error: float
    certainty: float
    images: int
    accepted: int
    errors: int
    needed: int | None = None

    def accepts(self, predictions: Predictions) -> Tensor:
        """Which predictions stand: draws or (B, C) probabilities -> (B,) bool. The others are for a human."""
        return torch.from_numpy(mean_probs(predictions).max(1) > self.threshold)


def acceptance(
    val_predictions: Predictions, val_labels: Tensor | np.ndarray, max_error: float, certainty: float = 0.95
) -> Acceptance:
    """The lowest threshold of confidence at which the error rate of the accepted is at most ``max_error``.

    Validation images are sorted by their largest probability. The k most confident stand for the threshold t_k, the
    confidence of the next one; given t_k they are independent, so their errors are binomial with the true error rate
    R(t_k) above the threshold. The hypothesis R(t_k) > ``max_error`` is tested by

        p_k = P(Binomial(k, max_error) <= errors_k),

    for growing k until one cannot be rejected (fixed-sequence testing, as in Learn then Test: Angelopoulos et al.,
    arXiv 2110.01052; Geifman & El-Yaniv 2017 take all at once). The first k is the smallest at which p_k can be small
    enough without an error, or about a quarter of the images where that is more: a single error among few images would
    end the search. Then

        P(R(threshold) <= max_error) >= certainty,

    exactly where R does not fall again with the threshold among the images before the first k.

    Args:
        val_predictions: of the validation images, draws or (n, C).
        val_labels: (n,) class numbers.
        max_error: wanted limit, in (0, 1).
        certainty: in (0, 1).

    Raises:
        UserError: predictions that cannot be, or numbers out of their range.

    Examples:
        >>> import torch
        >>> from pyro_isingvit import acceptance
        >>> sure = torch.linspace(0.5, 1.0, 400)
        >>> labels = (torch.arange(400) < 40).long()  # the 40 images that it doubts most are wrong
        >>> found = acceptance(torch.stack([sure, 1 - sure], 1), labels, max_error=0.05)
        >>> found.accepted, found.errors, round(found.threshold, 3)
        (371, 11, 0.535)
        >>> found.accepts(torch.tensor([[0.9, 0.1], [0.5, 0.5]])).tolist()
        [True, False]
    """
    from mapie.risk_control import control_fwer

    for name, value in (("max_error", max_error), ("certainty", certainty)):
        need(0 < value < 1, f"`{name}` must lie in (0, 1), not {value}.")
    probs, y = labelled_probs(val_predictions, val_labels)
    order = np.argsort(-probs.max(1), kind="stable")
    confidence, errors = probs.max(1)[order], (probs.argmax(1) != y)[order].cumsum()
    thresholds = np.append(confidence[1:], 0.0)  # the k-th lets the k most confident pass
    images, delta = len(y), 1 - certainty
    ks = np.arange(_first(images, max_error, delta), images + 1)
    ks = ks[confidence[ks - 1] > thresholds[ks - 1]]  # images of one confidence are accepted together
    p = _p_values(errors[ks - 1], ks, max_error)
    passed = ks[control_fwer(p, delta, "fixed_sequence")] if len(ks) else ks
    if not len(passed):
        return Acceptance(1.0, max_error, certainty, images, 0, 0, _needed(errors, max_error, delta))
    k = int(passed[-1])
    return Acceptance(float(thresholds[k - 1]), max_error, certainty, images, k, int(errors[k - 1]))


def risk_coverage(predictions: Predictions, labels: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The risk-coverage curve: error rate among the k most confident images, for every k (Geifman & El-Yaniv 2017).

    Args:
        predictions: draws or (B, C) probabilities.
        labels: (B,) class numbers.

    Returns:
        coverage k / B and risk, each (B,). Within a tie the errors are spread evenly.
    """
    probs, y = labelled_probs(predictions, labels)
    return np.arange(1, len(y) + 1) / len(y), selective_risk(probs.max(1), probs.argmax(1) == y)


def _p_values(errors: Any, counts: Any, max_error: float) -> np.ndarray:
    from scipy.stats import binom

    return np.asarray(binom.cdf(errors, counts, max_error))


def _first(images: int, max_error: float, delta: float) -> int:
    """The smallest k at which as many errors are allowed as among a quarter of the images, or none."""
    alone = math.ceil(round(math.log(delta) / math.log1p(-max_error), 9))  # (1 - max_error)^k <= delta
    if alone >= images // START:
        return alone
    ks = np.arange(alone, images // START + 1)
    allowed = (_p_values(np.arange(ks[-1] + 1), ks[-1], max_error) <= delta).sum() - 1
    return int(ks[_p_values(allowed, ks, max_error) <= delta][0])


def _needed(errors: np.ndarray, max_error: float, delta: float) -> int | None:
    """More validation images, with which some would be accepted at the error rates seen now; None: no number helps.

    Only the first k is looked at: where it fails, the search ends.
    """
    for factor in FACTORS:
        images = math.ceil(len(errors) * factor)
        first = _first(images, max_error, delta)
        alike = min(len(errors), max(1, math.ceil(first / factor)))  # the k of now that stands for it
        passes = first <= images and _p_values(math.ceil(errors[alike - 1] * factor), first, max_error) <= delta
        if images > len(errors) and passes:
            return images
    return None
