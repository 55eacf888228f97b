"""Prediction sets that hold the true class with a chosen probability, by split conformal prediction (MAPIE).

Score of an image and a class: 1 - p(class | image). A class is in the set where its score is at most the k-th smallest
of the n scores that the true classes of the validation part have,

    k = ceil((n + 1) coverage),    P(y in set(x)) >= coverage,

over the draw of validation and new image together, whatever the network and its calibration, as long as both are
exchangeable: the new images come from where the validation images came from (Vovk et al. 2005; Sadinle, Lei &
Wasserman, JASA 2019, "least ambiguous sets"). For one validation part, the coverage of all later images is itself a
random number, Beta(k, n + 1 - k).

Shapes: B images, C classes, n validation images.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from pyro_isingvit.core.errors import need, need_share
from pyro_isingvit.predictive.draws import Predictions, labelled_probs, mean_probs


def conformal_sets(
    predictions: Predictions,
    val_predictions: Predictions,
    val_labels: Tensor | np.ndarray,
    coverage: float = 0.95,
    *,
    classwise: bool = False,
) -> Tensor:
    """Sets of classes that hold the true one with probability ``coverage`` at least.

    The most probable class is always in the set: no set is empty, and what is added never lowers the coverage.

    Args:
        predictions: of the new images, draws or (B, C) probabilities.
        val_predictions: of the validation images, (n, C), made with the same networks.
        val_labels: (n,) class numbers.
        coverage: wanted, in (0, 1).
        classwise: hold the coverage among the images of every single class (Mondrian sets): each class has its own
            threshold from its own validation images. It then holds under any other prevalence of the classes too.

    Returns:
        (B, C) bool.

    Raises:
        UserError: predictions that cannot be, or too few validation images, of all or of one class (``needed_images``).

    Examples:
        >>> import torch
        >>> from pyro_isingvit import conformal_sets
        >>> val = torch.tensor([[0.9, 0.1]] * 8 + [[0.6, 0.4], [0.3, 0.7]])
        >>> labels = torch.tensor([0] * 9 + [1])
        >>> new = torch.tensor([[0.95, 0.05], [0.55, 0.45], [0.62, 0.38]])
        >>> conformal_sets(new, val, labels, 0.9).tolist()
        [[True, False], [True, False], [True, False]]
    """
    val, y = labelled_probs(val_predictions, val_labels)
    check_images(y, range(val.shape[1]), coverage, classwise=classwise)
    probs = mean_probs(predictions, val.shape[1])
    if classwise:
        columns = [_mapie_sets(probs, val[y == c], y[y == c], coverage)[:, c] for c in range(val.shape[1])]
        held = np.stack(columns, axis=1)
    else:
        held = _mapie_sets(probs, val, y, coverage)
    held[np.arange(len(held)), probs.argmax(1)] = True
    return torch.from_numpy(held)


def check_images(
    labels: Tensor | np.ndarray, classes: Sequence[object], coverage: float, *, classwise: bool = False
) -> None:
    """Whether there are enough validation images for sets.

    Args:
        labels: (n,) class numbers of the validation images.
        classes: what the C classes are called, in messages.
        coverage: wanted.
        classwise: within every class.

    Raises:
        UserError: there are too few, of all or of one class, or a coverage outside of (0, 1).
    """
    need_share(coverage=coverage)
    least, counts = needed_images(coverage), np.bincount(np.asarray(labels), minlength=len(classes))
    if not classwise:
        need(
            len(labels) >= least,
            f"`coverage` {coverage} needs {least} validation images at least; there are {len(labels)}. Choose a lower "
            "coverage, or keep more images for validation.",
        )
        return
    few = [f"class {name} has {count}" for name, count in zip(classes, counts, strict=True) if count < least]
    need(
        not few,
        f"`coverage` {coverage} within every class needs {least} validation images of each at least; "
        f"{', '.join(few[:5])}{' and so on' if len(few) > 5 else ''}. Choose a lower coverage, keep more images "
        "for validation, or leave `classwise` out.",
    )


def needed_images(coverage: float) -> int:
    """Validation images, of all or of each class, that MAPIE asks for: max(1 / coverage, 1 / (1 - coverage))."""
    return math.ceil(round(max(1 / (1 - coverage), 1 / coverage), 9))


def coverage_band(count: int, coverage: float, images: int, mass: float = 0.95) -> tuple[float, float]:
    """Where the share of ``images`` new images in their sets lies with probability ``mass``: a beta-binomial law.

    Args:
        count: n, validation images.
        coverage: of the sets.
        images: new ones.
        mass: of the band, in (0, 1).

    Returns:
        its ends. The sets' own top class and ties can only raise the share.
    """
    from scipy.stats import betabinom

    rank = rank_of(count, coverage)
    low, high = betabinom.ppf([(1 - mass) / 2, (1 + mass) / 2], images, rank, max(count + 1 - rank, 1e-9))
    return float(low / images), float(high / images)


def rank_of(count: int, coverage: float) -> int:
    """k = ceil((n + 1) coverage), n = ``count``, with what floats make of it taken back."""
    return math.ceil(round((count + 1) * coverage, 9))


class _Given(ClassifierMixin, BaseEstimator):
    """Probabilities as a fitted classifier: what MAPIE is asked about are the probabilities themselves."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @property
    def classes_(self) -> np.ndarray:
        return np.arange(self.classes)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(probs).argmax(1)

    def predict_proba(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(probs)


def _mapie_sets(probs: np.ndarray, val: np.ndarray, labels: np.ndarray, coverage: float) -> np.ndarray:
    """Sets for probs (B, C) from val (n, C) and labels (n,): (B, C) bool."""
    from mapie.classification import SplitConformalClassifier

    # MAPIE has the rank from a float, which may lie a little above k: half a rank less leads to k itself.
    level = (rank_of(len(val), coverage) - 0.5) / (len(val) + 1)
    sets = SplitConformalClassifier(_Given(val.shape[1]), level, "lac", prefit=True, random_state=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "WARNING: your conformalization dataset has less labels")  # one class alone
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")  # of few images
        return np.array(sets.conformalize(val, labels).predict_set(probs)[1][:, :, 0])
