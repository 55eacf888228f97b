"""p(y | x, W) of training: the softmax of the logits, or of logits moved by the classes' shares (logit adjustment).

Shapes: S samples, B batch, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.nets.vit import ViT, Weights


class Likelihood(nn.Module):
    """Categorical likelihood of the labels in training.

        p(y | x, W) = softmax(f_W(x))                 balance none, sampler and loss
        p(y | x, W) = softmax(f_W(x) + log pi)        balance logit; pi_c: share of class c in the training part

    With logit the shares explain how frequent a class is, and f need not: softmax(f), which predicts, is the posterior
    of the classes if all were equally frequent (Menon et al. 2021, arXiv 2007.07314, eq. 10 with tau = 1). Labels that
    are probabilities (mixed images, label smoothing) have the cross entropy of the same softmax.

    Args:
        settings: of training; ``balance`` counts. None: the softmax of the logits.
        shares: pi, (C,), each above 0.

    Raises:
        UserError: balance is logit, and the shares are not known or one is 0.
    """

    shift: Tensor | None

    def __init__(self, settings: TrainConfig | None = None, shares: Sequence[float] | None = None) -> None:
        super().__init__()
        adjusted = settings is not None and settings.balance == "logit"
        if adjusted:
            need(
                shares is not None and min(shares) > 0,
                "`balance` logit needs the number of training images of each class, and one image of each at least.",
            )
        shift = torch.tensor(shares).log() if adjusted else None
        self.register_buffer("shift", shift, persistent=False)  # the settings and the data say it

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits (..., C) of the training likelihood, from those that predict."""
        return logits if self.shift is None else logits + self.shift

    def nll(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean negative log-likelihood, nats per image.

        Args:
            logits: (B, C), f.
            y: (B,) class numbers, or (B, C) probabilities times the weight of the image.
        """
        return F.cross_entropy(self.adjusted(logits), y)

    def network(self, vit: ViT) -> "ViT | Adjusted":
        """The network whose softmax is the likelihood: images and weights to ``adjusted`` logits."""
        return vit if self.shift is None else Adjusted(vit, self)


class Adjusted:
    """A network whose logits are those of the training likelihood.

    Args:
        vit: the network.
        likelihood: of training.
    """

    def __init__(self, vit: ViT, likelihood: Likelihood) -> None:
        self.vit, self.likelihood = vit, likelihood

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, C)."""
        return self.likelihood.adjusted(self.vit(weights, x))

    @property
    def checkpoint_activations(self) -> bool:
        """That of the network."""
        return self.vit.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        self.vit.checkpoint_activations = on
