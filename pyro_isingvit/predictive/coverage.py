"""Coverage of credible sets and intervals, on labelled images.

Shapes: S samples, B images, C classes. Entropies in nats. A value that the data leave undefined is None, never NaN.
"""

import numpy as np
from torch import Tensor

from pyro_isingvit.predictive.detection import Metrics, check_labels, detects_wrong, uncertainty_scores
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.metrics import ECE_BINS, equal_mass_bins

MASS = 0.9  # of credible sets and intervals
REPLICATES = 20  # label sets drawn from each posterior draw


def uncertainty_metrics(draws: PredictiveDraws, labels: Tensor) -> Metrics:
    """Uncertainty of right and wrong predictions, and coverage of credible sets and intervals.

    The predicted class c of an image is that of the mean prediction. Over the bins b of confidence (15 of equal
    mass), with A_b the observed share of right answers:

        interval_coverage            = share of b with A_b in the 90 % interval, over s, of mean_{i in b} p_s(c_i | x_i)
        predictive_interval_coverage = the same, the interval being that of replicated shares: draw s, then labels
                                       y_i ~ p_s(. | x_i), then the share of y_i = c_i in b

    The true class probabilities of an image are never seen, so an interval of them cannot be checked image by
    image; bins can. The first interval has the uncertainty of the weights alone, while A_b also has the scatter of a
    few labels: expect less than 90 %. The second has both: compare it with 90 %. With few images the share of right
    answers is coarse, which makes the interval a little wide.

    Args:
        draws: (S, B, C) predictions.
        labels: (B,) class numbers.

    Returns:
        entropy_mean, mutual_information_mean; the same with _right and _wrong, over right and wrong images.
        auroc_wrong_* and fpr95_wrong_* of each score in ``SCORES``: wrong images are to be found.
        credible_set_coverage: share of images whose label is in their 90 % credible set, the fewest classes that hold
            90 % of the posterior predictive mass.
        credible_set_mass: the mass that the sets hold on average, at least 0.9: what the coverage should be.
        credible_set_size: mean number of classes.
        interval_coverage, predictive_interval_coverage: as above.

    Raises:
        UserError: counts that differ, no images, or labels outside 0..C-1.
    """
    check_labels(draws, labels)
    mean, y = draws.mean.double().numpy(), labels.cpu().numpy()
    wrong = mean.argmax(-1) != y
    scores = uncertainty_scores(draws)
    found: Metrics = {}
    for name in ("entropy", "mutual_information"):
        groups = {"mean": scores[name], "right": scores[name][~wrong], "wrong": scores[name][wrong]}
        found |= {f"{name}_{group}": float(values.mean()) if len(values) else None for group, values in groups.items()}
    for name, values in scores.items():
        found |= detects_wrong(name, values, wrong)
    held = credible_sets(mean)
    found["credible_set_coverage"] = float(held[np.arange(len(y)), y].mean())
    found["credible_set_mass"] = float((held * mean).sum(-1).mean())
    found["credible_set_size"] = float(held.sum(-1).mean())
    return found | _interval_coverage(draws.probs.numpy(), mean, ~wrong)


def credible_sets(mean: np.ndarray, mass: float = MASS) -> np.ndarray:
    """The fewest classes that hold ``mass`` of each prediction: (B, C) -> (B, C) bool, one class at least."""
    order = np.argsort(-mean, axis=-1, kind="stable")
    sorted_mean = np.take_along_axis(mean, order, -1)
    before = sorted_mean.cumsum(-1) - sorted_mean  # mass of the classes ahead; needed while too little
    held = np.zeros(mean.shape, dtype=bool)
    np.put_along_axis(held, order, before < mass - 1e-9, -1)  # 0.9 held up to rounding is 0.9
    return held


def _interval_coverage(probs: np.ndarray, mean: np.ndarray, right: np.ndarray) -> Metrics:
    """interval_coverage and predictive_interval_coverage: probs (S, B, C), mean (B, C), right (B,) bool."""
    which = equal_mass_bins(mean.max(-1))
    counts = np.bincount(which, minlength=ECE_BINS)
    full = counts > 0
    accuracy = (np.bincount(which, right, ECE_BINS)[full]) / counts[full]
    confidence = probs[:, np.arange(len(mean)), mean.argmax(-1)].astype(float)  # (S, B)
    random = np.random.default_rng(0)
    # The label of y ~ p_s is the predicted class with probability p_s(c): one uniform number decides.
    replicates = [random.random(confidence.shape[1]) < row for row in confidence for _ in range(REPLICATES)]
    found: Metrics = {}
    for name, rows in (("interval_coverage", confidence), ("predictive_interval_coverage", replicates)):
        shares = np.stack([np.bincount(which, row, ECE_BINS)[full] / counts[full] for row in rows])  # (rows, bins)
        low, high = np.quantile(shares, [(1 - MASS) / 2, (1 + MASS) / 2], axis=0)
        found[name] = float(((accuracy >= low - 1e-9) & (accuracy <= high + 1e-9)).mean())
    return found
