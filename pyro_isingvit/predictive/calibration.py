"""Temperature of the predictions, fitted on the validation part.

Training calibrates single draws. The mean of many draws is more often right and less certain than each of them, so a
posterior predictive is underconfident by construction. Pooling first and calibrating afterwards corrects this (Rahaman
& Thiery, arXiv 2007.08792). One number is fitted,

    p_T(y | x) = (1/S) sum_s softmax(f_{W_s}(x) / T),

which leaves every draw's ranking of the classes as it is.

Shapes: S samples, B batch, C classes.
"""

import math

import torch
from torch import Tensor

PRIOR_WIDTH = 0.2  # standard deviation of log T around 0: a few images do not move T far
CALIBRATION_SAMPLES = 50  # draws that T is fitted on
LIMIT = math.log(10.0)
TINY = 1e-30


def temper(probs: Tensor, temperature: float) -> Tensor:
    """softmax(f / T) from softmax(f), over the last axis."""
    return (probs.clamp(min=TINY).log() / temperature).softmax(-1)


def fit_temperature(probs: Tensor, labels: Tensor) -> float:
    """The T that gives the labels the highest posterior: -sum log p_T(y) + (log T)^2 / (2 PRIOR_WIDTH^2).

    Args:
        probs: (S, B, C) draws at T = 1.
        labels: (B,).

    Returns:
        T in [0.1, 10]; 1 where there are no labels.
    """
    from scipy.optimize import minimize_scalar

    if len(labels) == 0:
        return 1.0
    logs = probs.double().clamp(min=TINY).log()
    rows = torch.arange(len(labels))

    def cost(log_t: float) -> float:
        mean = (logs / math.exp(log_t)).softmax(-1).mean(0)  # (B, C)
        nll = -mean[rows, labels.cpu()].clamp(min=TINY).log().sum()
        return float(nll) + log_t**2 / (2 * PRIOR_WIDTH**2)

    return math.exp(minimize_scalar(cost, bounds=(-LIMIT, LIMIT), method="bounded", options={"xatol": 1e-4}).x)
