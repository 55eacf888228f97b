"""Posterior predictive draws, and what they say.

    p(y | x) ~ (1/S) sum_s softmax f_{W_s}(x),   W_s ~ q
    entropy of the mean = expected entropy (aleatoric) + mutual information (epistemic)

Shapes: S samples, B batch, C classes. Entropies in nats.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.metrics import entropy


@dataclass(frozen=True)
class PredictiveDraws:
    """Class probabilities of every draw.

    Attributes:
        probs: (S, B, C) float32 on the CPU.

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

    @property
    def mean(self) -> Tensor:
        """Posterior predictive probabilities, (B, C)."""
        return self.probs.mean(0)

    def interval(self, mass: float = 0.9) -> Tensor:
        """Equal-tailed credible intervals of the class probabilities.

        Args:
            mass: share of the draws inside, in (0, 1).

        Returns:
            (2, B, C): lower and upper ends.

        Raises:
            UserError: mass outside (0, 1).
        """
        if not 0 < mass < 1:
            raise UserError(f"the `mass` of a credible interval must lie in (0, 1), not {mass}.")
        ends = [(1 - mass) / 2, (1 + mass) / 2]
        return torch.from_numpy(np.quantile(self.probs.numpy(), ends, axis=0))  # torch's stops at 16M numbers

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty: entropy of the mean prediction, (B,)."""
        return entropy(self.mean)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric part: mean entropy of the draws, (B,)."""
        return entropy(self.probs).mean(0)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part: entropy minus expected entropy, (B,), at least 0."""
        return (self.entropy - self.expected_entropy).clamp(min=0.0)
