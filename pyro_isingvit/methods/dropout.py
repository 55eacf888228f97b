"""Noise that drops activations or weights at a rate, fixed or learned.

Shapes: B batch, S samples, T tokens, C classes; x of a layer is (B, T, in), its weight (out, in).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import Networks
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.nets.vit import Weights, linear


class Dropout(Plain):
    """Dropout on the embedding, after attention and in the MLP, kept on at prediction (Gal & Ghahramani 2016)."""

    max_draws = None
    image_noise = True

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Drops the hidden units that fc2 reads and what is added to the residual stream."""
        rate = self.settings.drop_rate
        y = linear(F.dropout(x, rate) if kind == "fc2" else x, weight, bias)
        return F.dropout(y, rate) if kind in ("patch", "attn_out", "fc2") else y

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Every image has noise of its own, as in training."""
        return self.noisy_networks(count, self.layer_rule)


class DropConnect(Plain):
    """Each weight is dropped with a fixed probability, at prediction too (Wan et al. 2013): w M / (1 - p)."""

    max_draws = None

    def weights(self) -> Weights:
        """One mask per step."""
        return {kind: F.dropout(weight, self.settings.drop_rate) for kind, weight in self.loc.items()}

    draw_weights = weights


class ConcreteDropout(Plain):
    """Dropout of every layer's inputs with learned rates (Gal, Hron & Kendall 2017, eq. 3 and 4).

    penalty = sum_layers [ l^2 / (2 (1 - p)) |W|^2 - K H(p) ],   K inputs, H the Bernoulli entropy in nats
    """

    max_draws = None
    image_noise = True
    fast = ("drop_logit",)
    TEMPERATURE = 0.1

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        start = math.log(self.settings.drop_rate / (1 - self.settings.drop_rate))
        self.drop_logit = nn.ParameterDict(
            {kind: nn.Parameter(torch.full(shape[:1], start)) for kind, shape in self.vit.matrix_shapes.items()}
        )

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Concrete relaxation of dropping the inputs."""
        logit = self.drop_logit[kind][layer]
        u = torch.rand_like(x).clamp(1e-6, 1 - 1e-6)
        drop = ((logit + u.logit()) / self.TEMPERATURE).sigmoid()
        return linear(x * (1 - drop) / (1 - logit.sigmoid()), weight, bias)

    def penalty(self) -> Tensor:
        """-log prior and entropy terms, nats over all images; frozen layers have no part in it."""
        total = torch.zeros((), device=self.temperature.device)
        means = self.moving(dict(self.loc.items()))
        for kind, logit in self.moving(dict(self.drop_logit.items())).items():
            p = logit.sigmoid()  # (layers,)
            squares = means[kind].pow(2).sum((1, 2))
            entropy = torch.special.entr(p) + torch.special.entr(1 - p)
            total = total + (self.settings.length_scale**2 / (2 * (1 - p)) * squares).sum()
            total = total - self.loc[kind].shape[2] * entropy.sum()
        return total

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Hard masks at the learned rates, drawn for each image."""
        rates = {kind: logit.sigmoid().tolist() for kind, logit in self.drop_logit.items()}

        def rule(kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear(F.dropout(x, rates[kind][layer]), weight, bias)

        return self.noisy_networks(count, rule)
