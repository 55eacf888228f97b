"""Temperature of the predictions, fitted on the validation part.

Training calibrates single draws. The mean of many draws is more often right and less certain than each of them, so a
posterior predictive is underconfident by construction. Pooling first and calibrating afterwards corrects this (Rahaman
& Thiery, arXiv 2007.08792). One number is fitted,

    p_T(y | x) = (1/S) sum_s softmax(f_{W_s}(x) / T),

which leaves every draw's ranking of the classes as it is. Where training has counted classes otherwise than by their
images (docs/skew.md), p_T is moved to the classes' shares in the validation part while T is fitted.

Shapes: S samples, B batch, C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Mean and standard deviation of log T: a few images do not move T far. Networks that trained for long enough to be
# accurate are too sure, the more so the fewer images they had (docs/tuning.md, Temperature).
PRIOR_MEAN, PRIOR_WIDTH = 0.3, 0.3
CALIBRATION_SAMPLES = 50  # draws that T is fitted on
LIMIT = math.log(10.0)
TINY = 1e-30


def temper(probs: Tensor, temperature: float) -> Tensor:
    """softmax(f / T) from softmax(f), over the last axis."""
    return (probs.clamp(min=TINY).log() / temperature).softmax(-1)


def with_shares_of(labels: Tensor, probs: Tensor, prior: Sequence[float] | None = None) -> Tensor:
    """Probabilities under some shares of the classes as they are under those that the classes have in ``labels``.

    p(y | x) proportional to p_prior(y | x) n_y / prior_y, with n_y the number of labels y: Bayes' rule.

    Args:
        labels: (n,) class numbers.
        probs: (..., C), rows sum to 1.
        prior: (C,), the shares that ``probs`` stand for; None: equal ones. A share of 0 counts as the least above 0.

    Returns:
        the same shape, rows sum to 1.

    Examples:
        >>> with_shares_of(torch.tensor([0, 0, 0, 1]), torch.tensor([[0.5, 0.5]]))
        tensor([[0.7500, 0.2500]])
    """
    counts = torch.bincount(labels, minlength=probs.shape[-1]).to(probs)
    if prior is not None and len({*prior}) > 1:  # equal ones cancel
        counts = counts / counts.new_tensor(prior).clamp(min=min(share for share in prior if share > 0))
    moved = probs.clamp(min=TINY) * counts
    return moved / moved.sum(-1, keepdim=True).clamp(min=TINY)


def fit_temperature(probs: Tensor, labels: Tensor, prior: Sequence[float] | None = None) -> float:
    """The T that gives the labels the highest posterior: -sum log p_T(y) + (log T - m)^2 / (2 s^2).

    log T ~ N(m, s^2) beforehand, m = PRIOR_MEAN and s = PRIOR_WIDTH.

    Probabilities under other shares of the classes than the images have, such as equal ones, are first brought to the
    shares in ``labels``: otherwise T would be raised to make up for predictions of rare classes that only the other
    shares make look wrong.

    Args:
        probs: (S, B, C) draws at T = 1.
        labels: (B,).
        prior: (C,), the shares that ``probs`` stand for (``Run.moved_prior``); None: those of the images.

    Returns:
        T in [0.1, 10]; 1 where there are no labels.
    """
    from scipy.optimize import minimize_scalar

    if len(labels) == 0:
        return 1.0
    labels = labels.cpu()
    logs = probs.double().clamp(min=TINY).log()
    rows = torch.arange(len(labels))

    def cost(log_t: float) -> float:
        mean = (logs / math.exp(log_t)).softmax(-1).mean(0)  # (B, C)
        mean = mean if prior is None else with_shares_of(labels, mean, prior)
        nll = -mean[rows, labels].clamp(min=TINY).log().sum()
        return float(nll) + (log_t - PRIOR_MEAN) ** 2 / (2 * PRIOR_WIDTH**2)

    return math.exp(minimize_scalar(cost, bounds=(-LIMIT, LIMIT), method="bounded", options={"xatol": 1e-4}).x)
