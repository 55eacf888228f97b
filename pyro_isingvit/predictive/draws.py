"""Posterior predictive draws, and what they say.

    p(y | x) ~ (1/S) sum_s softmax f_{W_s}(x),   W_s ~ q
    entropy of the mean = expected entropy (aleatoric) + mutual information (epistemic)

Shapes: S samples, B batch, C classes. Entropies in nats.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import need, need_share
from pyro_isingvit.predictive.metrics import entropy


@dataclass(frozen=True)
class PredictiveDraws:
    """Class probabilities of every draw.

    Attributes:
        probs: (S, B, C) float32 on the CPU.
        weights: (S, B), what each draw counts for each image, columns sum to 1; None: all the same.

    Examples:
        Two draws that disagree about one image of two classes:

        >>> import torch
        >>> from pyro_isingvit import PredictiveDraws
        >>> draws = PredictiveDraws(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]))
        >>> draws.mean
        tensor([[0.7000, 0.3000]])
        >>> low, high = draws.interval(0.5)
        >>> round(float(low[0, 0]), 2), round(float(high[0, 0]), 2)
        (0.6, 0.8)
        >>> parts = draws.entropy, draws.expected_entropy, draws.mutual_information
        >>> [round(float(part), 3) for part in parts]  # nats; the first is the sum of the others
        [0.611, 0.509, 0.102]
    """

    probs: Tensor
    weights: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Posterior predictive probabilities, (B, C)."""
        return self.probs.mean(0) if self.weights is None else (self.weights[..., None] * self.probs).sum(0)

    def interval(self, mass: float = 0.9) -> Tensor:
        """Equal-tailed credible intervals of the class probabilities.

        Args:
            mass: share of the draws inside, in (0, 1).

        Returns:
            (2, B, C): lower and upper ends.

        Raises:
            UserError: mass outside (0, 1).
        """
        need_share(mass=mass)
        ends = [(1 - mass) / 2, (1 + mass) / 2]
        if self.weights is not None:
            weights = self.weights[..., None].expand_as(self.probs).numpy()
            found = np.quantile(self.probs.numpy(), ends, axis=0, weights=weights, method="inverted_cdf")
            return torch.from_numpy(found)
        return torch.from_numpy(np.quantile(self.probs.numpy(), ends, axis=0))  # torch's stops at 16M numbers

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty: entropy of the mean prediction, (B,)."""
        return entropy(self.mean)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric part: mean entropy of the draws, (B,)."""
        each = entropy(self.probs)
        return each.mean(0) if self.weights is None else (self.weights * each).sum(0)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part: entropy minus expected entropy, (B,), at least 0."""
        return (self.entropy - self.expected_entropy).clamp(min=0.0)


Predictions = PredictiveDraws | Tensor | np.ndarray


def mean_probs(predictions: Predictions, classes: int | None = None) -> np.ndarray:
    """Mean class probabilities as float64 whose rows sum to 1.

    Args:
        predictions: draws, or probabilities (B, C).
        classes: C, where it is known.

    Raises:
        UserError: another shape, values that are not finite or negative, or rows that do not sum to 1 within 0.001.
    """
    mean = predictions.mean if isinstance(predictions, PredictiveDraws) else predictions
    probs = np.asarray(mean.numpy(force=True) if isinstance(mean, Tensor) else mean, dtype=np.float64)
    fits = probs.ndim == 2 and probs.shape[1] >= 2 and (classes is None or probs.shape[1] == classes)
    need(fits, f"probabilities must have shape (images, {classes or 'classes'}), not {probs.shape}.")
    sums = probs.sum(1, keepdims=True)
    right = bool(np.isfinite(probs).all() and (probs >= 0).all() and (np.abs(sums - 1) < 1e-3).all())
    need(right, "probabilities must be finite and at least 0, and those of an image must sum to 1.")
    return probs / sums


def labelled_probs(predictions: Predictions, labels: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``mean_probs`` of labelled images, and their labels (B,) int64.

    Raises:
        UserError: as ``mean_probs``; no images, counts that differ, or labels that are no class numbers 0..C-1.
    """
    probs = mean_probs(predictions)
    given = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    need(given.ndim == 1, f"labels must be class numbers of shape (n,), not {given.shape}.")
    if given.dtype.kind == "O":  # a column of a mixed table
        with contextlib.suppress(TypeError, ValueError):
            given = given.astype(float)
    whole = given.dtype.kind in "biuf" and bool(np.isfinite(given).all() and (given == np.floor(given)).all())
    need(whole, "labels must be whole numbers.")
    y = given.astype(np.int64)
    need(0 < len(probs) == len(y), f"need as many labels as predictions, and one at least: {len(y)}, {len(probs)}.")
    need(y.min() >= 0 and y.max() < probs.shape[1], f"labels must lie in 0..{probs.shape[1] - 1}.")
    return probs, y
