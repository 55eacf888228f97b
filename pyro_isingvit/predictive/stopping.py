"""When enough posterior draws of an image have been seen: the Monte Carlo error of its class probabilities.

With n draws of a class's probability the error is half the width of a normal interval around their mean,

    h_c = t_{n-1}(1 - (1 - certainty) / (2 C)) s_c / sqrt(n),

and an image is settled where every h_c is at most the bound. The quantile is divided among the C classes, so that all
of them hold together. s_c is what the standard deviation of the probability may be, the larger of

    its value among the draws, times r,
    that of sigmoid(m + r s Z), Z ~ N(0, 1), m and s being mean and standard deviation of the draws' log-odds,

with r = sqrt((n - 1) / chi2_{n-1}(0.1)), which makes a standard deviation the upper end of a one-sided 90% interval.
Who stops as soon as a standard deviation comes out small stops too early: r stands against that. And a few draws of a
probability near 1 may all have missed the cases where the network says something else; their log-odds show how far off
these are. (Intervals of fixed width: Chow & Robbins, Ann. Math. Stat. 1965; Starr, 1966.)

Where a method has only N networks, the mean over all of them is what is estimated: h_c is multiplied by
sqrt(1 - n / N), and is 0 once all have been asked.

The intervals rest on the central limit theorem and on log-odds that are roughly normal. An answer that one network in a
hundred gives, and for which nothing prepares, is easily missed by 16 draws; to exclude that whatever the distribution
takes about 3 / bound draws of every image.

Shapes: n draws, B images, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import need

GROWTH = 1.25  # of the draws from one look to the next
LUCK = 0.1  # chance that a standard deviation is larger than what is taken for it
NODES = 31  # of the Gauss-Hermite quadrature
TINY = 1e-15


@dataclass(frozen=True)
class Stopping:
    """Draws of an image end when every class probability is known to ``bound`` with probability ``certainty``.

    Attributes:
        bound: of the Monte Carlo error h_c, in (0, 1).
        most: draws after which an image is left as it is.
        least: draws before the first look.
        certainty: that all probabilities of an image lie within ``bound`` of the mean of infinitely many draws.

    Raises:
        UserError: a number out of its range.
    """

    bound: float = 0.02
    most: int = 1000
    least: int = 16
    certainty: float = 0.95

    def __post_init__(self) -> None:
        """Checks the numbers."""
        need(0 < self.bound < 1, f"`mc_error` must lie in (0, 1), not {self.bound}.")
        need(0 < self.certainty < 1, f"`certainty` must lie in (0, 1), not {self.certainty}.")
        need(self.least >= 4, f"`least` must be at least 4 draws, not {self.least}.")
        need(self.most >= self.least, f"`max_samples` must be at least {self.least} draws, not {self.most}.")

    def looks(self, most: int) -> list[int]:
        """Numbers of draws after which it is asked which images are settled; the last is ``most``."""
        found = [min(self.least, most)]
        while found[-1] < most:
            found.append(min(most, max(found[-1] + 4, round(found[-1] * GROWTH))))
        return found


def monte_carlo_error(probs: Tensor, certainty: float = 0.95, networks: int | None = None) -> Tensor:
    """The largest h_c of every image, at the head of ``pyro_isingvit.predictive.stopping``.

    Args:
        probs: (n, B, C) class probabilities of n draws.
        certainty: that it holds, for all classes of an image together.
        networks: N, where there are only so many; None: there is no limit.

    Returns:
        (B,), infinite for a single draw of many.

    Raises:
        UserError: certainty outside (0, 1).

    Examples:
        >>> import torch
        >>> from pyro_isingvit.predictive.stopping import monte_carlo_error
        >>> sure, unsure = torch.full((100,), 0.9), torch.linspace(0.2, 0.6, 100)
        >>> p = torch.stack([sure, unsure], 1)  # 100 draws of two images
        >>> [round(float(error), 3) for error in monte_carlo_error(torch.stack([p, 1 - p], 2))]
        [0.0, 0.029]
    """
    from scipy.stats import chi2, t

    need(0 < certainty < 1, f"`certainty` must lie in (0, 1), not {certainty}.")
    n, images, classes = probs.shape
    if images == 0 or (networks is not None and n >= networks):
        return torch.zeros(images)
    if n < 2:
        return torch.full((images,), torch.inf)
    quantile = float(t.ppf(1 - (1 - certainty) / (2 * classes), n - 1))
    raised = float(((n - 1) / chi2.ppf(LUCK, n - 1)) ** 0.5)
    left = 1.0 if networks is None else (1 - n / networks) ** 0.5
    spread = torch.maximum(probs.std(0) * raised, _logistic_normal_std(probs, raised))
    return (spread.amax(-1) * (quantile * left / n**0.5)).clamp(max=1.0)  # no probability can be further off


def _logistic_normal_std(probs: Tensor, raised: float) -> Tensor:
    """Standard deviation of a probability whose log-odds are normal, like those of the draws: (n, B, C) -> (B, C)."""
    p = probs.double()
    odds = p.clamp(min=TINY).log() - (p.sum(-1, keepdim=True) - p).clamp(min=TINY).log()
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(NODES))
    there = (odds.mean(0)[..., None] + raised * odds.std(0)[..., None] * nodes).sigmoid()  # (B, C, nodes)
    weights = weights / weights.sum()
    mean = (there * weights).sum(-1, keepdim=True)
    return ((there - mean).square() * weights).sum(-1).sqrt().to(probs.dtype)
