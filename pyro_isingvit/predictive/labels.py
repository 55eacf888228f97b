"""Which given labels are doubtful, by probabilities from networks that have not seen the image.

A label is flagged if the networks are sure that it is less likely than a guess: the 95% quantile over the posterior
draws of its probability lies below 1/C, and another class is the most probable one.

How many labels are wrong is estimated by confident learning (Northcutt, Jiang & Chuang 2021, arXiv 1911.00068). Given
labels y, mean probabilities p:

    t_k = mean of p_k over the images labelled k              what is usual for an image that is labelled k
    guess_n = argmax_{k: p_nk >= t_k} p_nk                    none where no class reaches its threshold
    J_jk = #{n: y_n = j, guess_n = k}                         the confident joint
    Q_jk = (J_jk / sum_k J_jk) #{n: y_n = j} / N              share of the images labelled j that are k
    share of wrong labels = 1 - sum_k Q_kk

Shapes: S samples, N images, C classes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyro_isingvit.core.errors import need

SLACK = 1e-6  # of the thresholds: a class whose images all have one probability reaches its own
Score = Literal["margin", "given", "upper"]


@dataclass(frozen=True)
class Doubts:
    """What is thought of N given labels.

    Attributes:
        given: (N,) p of the given label, the mean over the draws.
        interval: (2, N) its 5% and 95% quantiles over the draws.
        suggested: (N,) the most probable other class.
        suspicion: (N,) in [0, 1]; the more, the more doubtful.
        flagged: (N,) whether the label is thought to be wrong.
        off_diagonal: (N,) whether confident learning alone thinks so: guess and label differ.
        joint: (C, C) Q, share of images by given (rows) and guessed class.
        share: estimated share of wrong labels.
        share_interval: (2,) its 5% and 95% quantiles when the images are drawn anew (bootstrap).
    """

    given: np.ndarray
    interval: np.ndarray
    suggested: np.ndarray
    suspicion: np.ndarray
    flagged: np.ndarray
    off_diagonal: np.ndarray
    joint: np.ndarray
    share: float
    share_interval: tuple[float, float]

    def order(self) -> np.ndarray:
        """Row numbers (N,), the most doubtful first; flagged ones before all others."""
        return np.lexsort((-self.suspicion, ~self.flagged))

    def confused(self, labels: np.ndarray, most: int = 10) -> list[tuple[int, int, int]]:
        """(given class, suggested class, images) of the pairs that most flagged images have."""
        pairs = np.stack([labels[self.flagged], self.suggested[self.flagged]], 1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        return [(int(found[i, 0]), int(found[i, 1]), int(counts[i])) for i in order]


def doubt(
    probs: np.ndarray, given_draws: np.ndarray, labels: np.ndarray, *, score: Score = "given", resamples: int = 200
) -> Doubts:
    """Ranks given labels, flags those that are thought to be wrong, and estimates their share.

    Args:
        probs: (N, C), the mean over the draws, each from a network that has not seen the image.
        given_draws: (S, N), p of the given label in every draw.
        labels: (N,) given class numbers.
        score: what the ranking goes by: ``given``, p of the given label; ``upper``, the upper end of its credible
            interval; ``margin``, p of the given label minus the largest other one.
        resamples: of the bootstrap.

    Raises:
        UserError: shapes that do not fit, or numbers that are no probabilities.

    Examples:
        >>> import numpy as np
        >>> from pyro_isingvit.predictive.labels import doubt
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1]])
        >>> labels = np.array([0, 0, 1, 1, 1])  # the last one looks wrong
        >>> found = doubt(probs, probs[None, np.arange(5), labels], labels)
        >>> found.flagged.tolist(), int(found.order()[0]), int(found.suggested[4])
        ([False, False, False, False, True], 4, 0)
    """
    labels = np.asarray(labels)
    count = len(labels)
    fits = probs.ndim == 2 and len(probs) == count and given_draws.ndim == 2 and given_draws.shape[1] == count
    need(count and fits, f"{count} labels, probabilities {probs.shape} and draws {given_draws.shape} do not fit.")
    sure = np.isfinite(probs).all() and probs.min() >= 0 and np.allclose(probs.sum(1), 1, atol=1e-3)
    need(sure, "the probabilities of an image must be at least 0 and sum to 1.")
    need(np.isfinite(given_draws).all(), "the probabilities of the given labels have NaN or infinite values.")
    numbers = labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < probs.shape[1]
    need(numbers, f"labels must be class numbers, 0 to {probs.shape[1] - 1}.")
    rows = np.arange(count)
    given, interval = probs[rows, labels], np.quantile(given_draws, (0.05, 0.95), axis=0)
    others = probs.copy()
    others[rows, labels] = -1.0
    suggested = others.argmax(1)
    scores = {"margin": (1 - given + others[rows, suggested]) / 2, "given": 1 - given, "upper": 1 - interval[1]}
    joint, off_diagonal = confident_joint(probs, labels, np.ones(count))
    flagged = (interval[1] < 1 / probs.shape[1]) & (probs.argmax(1) != labels)
    rng, shares = np.random.default_rng(0), []
    for _ in range(resamples):
        weights = rng.multinomial(count, np.full(count, 1 / count)).astype(float)
        shares.append(1 - float(np.trace(confident_joint(probs, labels, weights)[0])))
    low, high = np.quantile(shares, (0.05, 0.95)) if shares else (np.nan, np.nan)
    return Doubts(
        given, interval, suggested, scores[score].clip(0, 1), flagged, off_diagonal, joint, 1 - float(np.trace(joint)),
        (float(low), float(high)),
    )  # fmt: skip


def confident_joint(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q, and which labels are off its diagonal.

    A label that is itself the most probable class is never wrong, though another class may reach its threshold alone.

    Args:
        probs: (N, C).
        labels: (N,) given class numbers.
        weights: (N,) how often each image counts.

    Returns:
        Q (C, C), which sums to 1; and (N,) bool, whether guess and label differ.
    """
    classes, rows = probs.shape[1], np.arange(len(labels))
    counts = np.bincount(labels, weights, classes)
    sums = np.bincount(labels, weights * probs[rows, labels], classes)
    thresholds = np.divide(sums, counts, out=np.full(classes, 2.0), where=counts > 0)  # no image reaches 2
    confident = np.where(probs >= thresholds - SLACK, probs, -1.0)
    guess = confident.argmax(1)
    sure = confident[rows, guess] >= 0
    joint = np.zeros((classes, classes))
    np.add.at(joint, (labels[sure], guess[sure]), weights[sure])
    np.fill_diagonal(joint, joint.diagonal().clip(min=1))  # as cleanlab: each class has an image that is right
    joint *= (counts / joint.sum(1))[:, None]
    return joint / joint.sum(), sure & (guess != labels) & (probs.argmax(1) != labels)
