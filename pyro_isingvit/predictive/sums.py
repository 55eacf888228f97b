"""Scores of predictions that come part by part: sums that add up, and the metrics that follow from them.

Shapes: B images of a part, C classes, K pairs of classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.predictive.by_class import choice_metrics
from pyro_isingvit.predictive.metrics import ECE_BINS, TINY

ScoreSums = dict[str, Any]  # ready for JSON


def score_sums(mean: Tensor, labels: Tensor) -> ScoreSums:
    """Sums over the images of a part.

    Args:
        mean: (B, C) class probabilities.
        labels: (B,) class numbers.

    Returns:
        ``images``; ``nll`` (nats); ``pairs``, (K, 3) class, predicted class and number of such images; ``bins``,
        (15, 2) right images and sum of the confidence in bins of the confidence of equal width.
    """
    confidence, chosen = mean.double().cpu().max(-1)
    y = labels.cpu()
    nll = -mean.double().cpu().gather(1, y[:, None]).clamp(min=TINY).log()
    pairs, counts = torch.stack([y, chosen], 1).unique(dim=0, return_counts=True)
    ends = torch.linspace(0, 1, ECE_BINS + 1)  # each bin has its lower one, as torchmetrics has them
    bins = (torch.bucketize(confidence.float(), ends, right=True) - 1).clamp(max=ECE_BINS - 1)
    of_each = torch.stack([(chosen == y).double(), confidence], 1)
    summed = torch.zeros(ECE_BINS, 2, dtype=torch.double).index_add(0, bins, of_each)
    return {
        "images": len(y), "nll": float(nll.sum()), "bins": summed.tolist(),
        "pairs": torch.cat([pairs, counts[:, None]], 1).tolist(),
    }  # fmt: skip


def together(some: ScoreSums | None, more: ScoreSums) -> ScoreSums:
    """The sums over two parts; ``some`` may be missing."""
    if some is None:
        return more
    pairs = {(t, c): n for t, c, n in some["pairs"]}
    for t, c, n in more["pairs"]:
        pairs[t, c] = pairs.get((t, c), 0) + n
    return {
        "images": some["images"] + more["images"], "nll": some["nll"] + more["nll"],
        "bins": np.add(some["bins"], more["bins"]).tolist(), "pairs": [[*pair, n] for pair, n in pairs.items()],
    }  # fmt: skip


def metrics_of(sums: ScoreSums, classes: tuple[str, ...]) -> dict[str, Any]:
    """What follows from sums over all images.

    Args:
        sums: of one image at least.
        classes: C names.

    Returns:
        ``accuracy``, ``nll`` (nats), ``ece`` (15 bins of equal width) and what ``choice_metrics`` gives.
    """
    truth, chosen, counts = np.array(sums["pairs"]).T
    right, confidence = np.array(sums["bins"]).T
    images = sums["images"]
    return {
        "accuracy": float(right.sum() / images), "nll": sums["nll"] / images,
        "ece": float(np.abs(right - confidence).sum() / images), **choice_metrics(truth, chosen, counts, classes),
    }  # fmt: skip
