"""Predictions where the classes are more or less frequent than in training, and how frequent they are.

Label shift: what an image of a class looks like stays, p'(x | y) = p(x | y), and only the shares of the classes change,
from pi to pi'. Then p'(y | x) is proportional to p(y | x) pi'(y) / pi(y) (Saerens, Latinne & Decaestecker 2002).

Shapes: S samples, B images, C classes, n validation images.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import need, need_whole
from pyro_isingvit.predictive.draws import Predictions, PredictiveDraws, labelled_probs, mean_probs

log = logging.getLogger(__name__)
Shares = Sequence[float] | Tensor | np.ndarray
TINY = 1e-30
SUM_TOLERANCE = 0.01  # shares that are written with two digits
FEW = 10  # validation images of a class, below which its column of the confusion matrix says little
NEARLY_SINGULAR = 0.2  # least singular value of the confusion matrix, below which classes can hardly be told apart


def with_prevalence(draws: PredictiveDraws, prevalence: Shares, prior: Shares) -> PredictiveDraws:
    """Predictions for images among which the classes have other shares than in training.

    The mean prediction p(y | x) = (1/S) sum_s p_s(y | x) is what is calibrated, so it is what Bayes' rule corrects:

        p'(y | x) = p(y | x) w(y) / Z(x),    w = pi' / pi,   Z(x) = sum_y p(y | x) w(y).

    If p is calibrated in training's shares, p' is in the new ones. It is not the mean of the corrected draws. Under
    draw s images like x have the density p(x) Z_s(x) in the new shares, Z_s(x) = sum_y p_s(y | x) w(y). Seeing x
    therefore says something about s, and the draws that expected it count more:

        p'(y | x) = sum_s v_s(x) p'_s(y | x),    p'_s = p_s w / Z_s,   v_s(x) = Z_s(x) / sum_r Z_r(x).

    The draws that come back are p'_s with the ``weights`` v_s, so that mean, intervals and entropies are those of this
    mixture.

    Args:
        draws: (S, B, C) predictions.
        prevalence: pi', (C,) shares of the classes among the images, at least 0, which sum to 1.
        prior: pi, (C,) shares that the probabilities stand for, those of training unless it balanced them; above 0.

    Raises:
        UserError: shares that are not as many as the classes, out of their range, or do not sum to 1 within 0.01.

    Examples:
        >>> import torch
        >>> from pyro_isingvit import PredictiveDraws, with_prevalence
        >>> draws = PredictiveDraws(torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]))  # mean 0.7, 0.3
        >>> rare = with_prevalence(draws, [0.1, 0.9], prior=[0.5, 0.5])
        >>> [round(float(p), 3) for p in rare.mean[0]]  # 0.7 * 0.1 and 0.3 * 0.9, normalised
        [0.206, 0.794]
        >>> [round(float(v), 3) for v in rare.weights[:, 0]]
        [0.735, 0.265]
    """
    need(draws.weights is None, "these predictions were corrected for a prevalence already.")
    classes = draws.probs.shape[-1]
    new, old = check_shares(prevalence, classes, "prevalence"), check_shares(prior, classes, "prior")
    need(bool((old > 0).all()), "every class must have a share above 0 in `prior`: the run was trained on it.")
    ratio = torch.from_numpy(new / old)
    raised = draws.probs.double().clamp(min=TINY) * ratio  # (S, B, C)
    total = raised.sum(-1)
    return PredictiveDraws((raised / total[..., None]).float(), (total / total.sum(0)).float())


def check_shares(shares: Shares, classes: int, name: str) -> np.ndarray:
    """Shares of the classes, (C,) float64, scaled to sum to 1 exactly.

    Raises:
        UserError: another number of them, below 0, not finite, or a sum that is not 1 within 0.01.
    """
    found = np.asarray(shares, dtype=np.float64)
    need(found.shape == (classes,), f"`{name}` needs a share for each of {classes} classes, not {found.size}.")
    need(bool(np.isfinite(found).all() and (found >= 0).all()), f"the shares in `{name}` must be at least 0.")
    total = float(found.sum())
    need(abs(total - 1) <= SUM_TOLERANCE, f"the shares in `{name}` must sum to 1, not {total:.4g}.")
    return found / total


@dataclass(frozen=True)
class PrevalenceEstimate:
    """Shares of the classes among images without labels.

    Attributes:
        shares: (C,), above 0, sum 1.
        low: (C,), lower ends of the intervals.
        high: (C,), upper ends.
        singular: the least singular value of the confusion matrix; near 0 the classes cannot be told apart.
    """

    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    singular: float


def estimate_prevalence(
    predictions: Predictions,
    val_predictions: Predictions,
    val_labels: Tensor | np.ndarray,
    *,
    mass: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
    quiet: bool = False,
) -> PrevalenceEstimate:
    """Black-box shift estimation (Lipton, Wang & Smola, arXiv 1802.03916), with its uncertainty.

    With A[i, j] the share of validation images of class j that are predicted as i, and m[i] the share of the new images
    that are predicted as i, label shift says m = A pi'. That needs no calibrated probabilities and no prior.

    Both samples are drawn anew, ``replicates`` times: m from the new images, and each column of A from its Dirichlet
    posterior, with one image in all, spread evenly, as the prior (a smoothed bootstrap: a class that is never confused
    would have no scatter at all). The shares are the mean of the replicates' pi' on the simplex with the least
    |A pi' - m|^2, again with one image in all spread evenly: a class with a share of 0 would never be predicted.
    The intervals are percentiles of A^-1 m, cut to [0, 1]: percentiles on the simplex are too narrow near 0.

    A warning is logged where classes have few validation images or can hardly be told apart.

    Args:
        predictions: of the new images, draws or (B, C) probabilities.
        val_predictions: of the validation images, (n, C), made with the same networks.
        val_labels: (n,) class numbers; every class must occur.
        mass: of the intervals, in (0, 1).
        replicates: of the bootstrap.
        seed: of the bootstrap.
        quiet: log no warning.

    Raises:
        UserError: predictions that cannot be, no new images, a class without validation images, or numbers out of their
            range.

    Examples:
        >>> import torch
        >>> from pyro_isingvit import estimate_prevalence
        >>> val, labels = torch.tensor([[0.9, 0.1]] * 45 + [[0.2, 0.8]] * 55), torch.tensor([0] * 50 + [1] * 50)
        >>> new = torch.tensor([[0.9, 0.1]] * 18 + [[0.2, 0.8]] * 82)  # 18% are predicted as class 0
        >>> found = estimate_prevalence(new, val, labels)
        >>> [round(float(share), 2) for share in found.shares]  # 0.18 = 0.9 pi'
        [0.2, 0.8]
        >>> bool(found.low[0] < 0.2 < found.high[0])
        True
    """
    need(0 < mass < 1, f"the `mass` of an interval must lie in (0, 1), not {mass}.")
    need_whole(1, replicates=replicates)
    need_whole(0, seed=seed)
    val, y = labelled_probs(val_predictions, val_labels)
    classes = val.shape[1]
    guesses = mean_probs(predictions, classes).argmax(1)
    need(len(guesses) > 0, "there are no images to estimate a prevalence from.")
    table = np.zeros((classes, classes))  # rows: predicted
    np.add.at(table, (val.argmax(1), y), 1)
    counts, seen = table.sum(0), np.bincount(guesses, minlength=classes)
    missing = np.flatnonzero(counts == 0).tolist()
    need(not missing, f"the validation part has no image of class {missing[:5]}: its prevalence cannot be estimated.")
    singular = float(np.linalg.svd(table / counts, compute_uv=False)[-1])
    if counts.min() < FEW and not quiet:
        log.warning(
            "%d classes have fewer than %d validation images: the estimated prevalence is rough",
            int((counts < FEW).sum()), FEW,
        )  # fmt: skip
    if singular < NEARLY_SINGULAR and not quiet:
        log.warning(
            "the confusion matrix is nearly singular (least singular value %.2f): some classes can hardly be told "
            "apart, and neither can their shares", singular,
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    shares, free = np.zeros(classes), np.empty((replicates, classes))
    for row in range(replicates):
        drawn = np.stack([rng.dirichlet(column + 1 / classes) for column in table.T], axis=1)
        m = rng.multinomial(len(guesses), seen / len(guesses)) / len(guesses)
        shares += _solve(drawn, m) / replicates
        free[row] = np.linalg.lstsq(drawn, m, rcond=None)[0]
    low, high = np.quantile(free, [(1 - mass) / 2, (1 + mass) / 2], axis=0).clip(0, 1)
    shares = (len(guesses) * shares + 1 / classes) / (len(guesses) + 1)
    return PrevalenceEstimate(shares, low, high, singular)


def _solve(confusion: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The pi' on the simplex with the least |A pi' - m|^2: (C, C), (C,) -> (C,)."""
    from scipy.optimize import nnls

    heavy = 1e3  # the row that makes the sum 1
    found, _ = nnls(np.vstack([confusion, np.full(len(shares), heavy)]), np.append(shares, heavy))
    return np.asarray(found / found.sum())
