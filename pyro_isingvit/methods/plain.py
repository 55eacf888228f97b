"""A ViT with ordinary weights and ordinary training: what the methods of baselines.py start from.

Shapes: B batch, S samples, T tokens, C classes; x of a layer is (B, T, in), its weight (out, in).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import BaselineConfig, RunConfig, TrainConfig
from pyro_isingvit.data.split import DataInfo
from pyro_isingvit.methods.base import Objective
from pyro_isingvit.nets.vit import Layer, ViT, Weights, linear, stack

Networks = Callable[[Tensor], Tensor]  # normalised images (B, ...) -> logits (S, B, C)


class Baseline(Objective):
    """A ViT with ordinary weights; subclasses add noise, penalties and what happens after training.

        loss = cross entropy of the noisy network + penalty / N

    Args:
        config: ``vit`` shapes the network, ``baseline`` sets the method.
        info: what the images look like.
        num_data: N, training images.

    Attributes:
        max_draws: how many different networks prediction can draw; None: any number.
        temperature: T of the predictions (calibration.py).
    """

    max_draws: int | None = 1
    fast: tuple[str, ...] = ()  # parameters of the noise, on a logarithmic scale: scale_lr_factor times the rate

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__()
        check_baseline(config.baseline)
        self.settings, self.info, self.num_data = config.baseline, info, num_data
        self.vit = ViT(config.vit, info.channels, info.height, info.width, info.num_classes)
        self.loc = nn.ParameterDict({k: nn.Parameter(w) for k, w in self.vit.initial_weights().items()})
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))
        self.last_penalty: Tensor | None = None

    def weights(self) -> Weights:
        """The matrices that a training step uses."""
        return dict(self.loc.items())

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What stands for a linear layer in training."""
        return linear(x, weight, bias)

    def penalty(self) -> Tensor | None:
        """Nats over all images; None: nothing is added."""
        return None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss, nats per image."""
        loss = F.cross_entropy(self.vit(self.weights(), x, layer_rule=self.layer_rule).float(), y)
        penalty = self.penalty()
        if penalty is None:
            return loss
        self.last_penalty = penalty.detach()
        return loss + penalty / self.num_data

    def terms(self, loss: float) -> dict[str, float]:
        """Nll, and the penalty of methods that have one."""
        if self.last_penalty is None:
            return {"nll": loss}
        penalty = float(self.last_penalty)
        return {"nll": loss - penalty / self.num_data, "penalty": penalty}

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """Weight matrices with decay, parameters of the noise at their own rate, everything else without."""
        names = ("loc", *self.fast)
        matrices, noise = list(self.loc.parameters()), [p for n in self.fast for p in getattr(self, n).parameters()]
        others = [p for name, p in self.named_parameters() if name.split(".")[0] not in names]
        return [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
            {"params": noise, "weight_decay": 0.0, "lr": settings.lr * settings.scale_lr_factor},
        ]

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Draws ``count`` networks for prediction, after ``first`` others where there is a fixed set."""
        weights = stack([self.draw_weights() for _ in range(count)])
        return lambda x: self.vit(weights, x).float().view(count, len(x), -1)

    def noisy_networks(self, count: int, rule: Layer) -> Networks:
        """``count`` passes whose noise is drawn in the layers, every image's own."""
        weights = dict(self.loc.items())
        return lambda x: torch.stack([self.vit(weights, x, layer_rule=rule).float() for _ in range(count)])

    def draw_weights(self) -> Weights:
        """The matrices of one network for prediction."""
        return dict(self.loc.items())

    def kept(self) -> Weights:
        """Probability that each weight is kept, kind -> (layers, out, in); 1 where nothing is selected."""
        return {kind: torch.ones_like(weight) for kind, weight in self.loc.items()}


def check_baseline(config: BaselineConfig) -> None:
    """Raises UserError where a setting is out of its range."""
    if not 0 < config.drop_rate < 1:
        raise UserError(f"drop_rate must lie strictly between 0 and 1, not {config.drop_rate}.")
    if not 0 <= config.sparsity < 1:
        raise UserError(f"sparsity must lie in [0, 1), not {config.sparsity}.")
    if config.members < 1:
        raise UserError(f"an ensemble needs at least 1 of members, not {config.members}.")
    for name in ("l0_penalty", "kl_weight", "length_scale"):
        if not getattr(config, name) >= 0:
            raise UserError(f"{name} must not be negative, but is {getattr(config, name)}.")
