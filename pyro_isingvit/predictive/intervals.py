"""95% bootstrap intervals of the metrics of all images together."""

import numpy as np
from torch import Tensor

from pyro_isingvit.predictive.by_class import FEWEST, RESAMPLES, exact_interval, interval
from pyro_isingvit.predictive.metrics import ECE_BINS, TINY

WORK = 200_000_000  # images times resamples, a few seconds


def overall_intervals(probs: Tensor, labels: Tensor, seed: int = 0) -> dict[str, list[float]]:
    """Intervals of ``classification_metrics``: images are drawn with replacement, up to 1,000 times.

    The percentiles are corrected for bias, as those of ``class_metrics``: a resample makes the ECE look larger than it
    is. An accuracy of exactly 0 or 1 has Clopper and Pearson's interval.

    Args:
        probs: (B, C) mean class probabilities.
        labels: (B,) class numbers.
        seed: of the resamples.

    Returns:
        ``accuracy``, ``nll``, ``brier`` and ``ece`` -> [low, high]; those that cannot be told are left out.
    """
    p, y = probs.double().cpu().numpy(), labels.cpu().numpy()
    count, rows = len(y), np.arange(len(y))
    confidence, right = p.max(-1), (p.argmax(-1) == y).astype(float)
    brier = (p**2).sum(-1) - 2 * p[rows, y] + 1
    each = np.stack([right, -np.log(np.maximum(p[rows, y], TINY)), brier])  # (3, B)
    bins = np.searchsorted(np.linspace(0, 1, ECE_BINS + 1), confidence, side="right").clip(1, ECE_BINS) - 1
    gap = right - confidence

    def metrics(weights: np.ndarray) -> np.ndarray:
        """The four metrics where image i counts ``weights[i]`` times, of (B,) with sum B."""
        ece = np.abs(np.bincount(bins, weights * gap, ECE_BINS)).sum()
        return np.append(each @ weights, ece) / count

    resamples = min(RESAMPLES, WORK // count) if count > 1 else 0  # of one image there is but one resample
    made = np.random.default_rng(seed)
    drawn = [metrics(np.bincount(made.integers(count, size=count), minlength=count).astype(float))
             for _ in range(resamples if resamples >= FEWEST else 0)]  # fmt: skip
    values, columns = metrics(np.ones(count)), np.array(drawn).reshape(-1, 4).T
    found = {name: interval(float(value), column) for name, value, column in zip(
        ("accuracy", "nll", "brier", "ece"), values, columns, strict=True
    )}  # fmt: skip
    if values[0] in (0.0, 1.0):
        found["accuracy"] = exact_interval(float(values[0]), count)
    return {name: ends for name, ends in found.items() if ends is not None}
