"""A ViT with ordinary weights and ordinary training: what the other baselines build on.

Shapes: B batch, S samples, T tokens, C classes; x of a layer is (B, T, in), its weight (out, in).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import BaselineConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import Method, Networks, Terms
from pyro_isingvit.methods.rates import matrix_groups
from pyro_isingvit.nets.reparametrise import follow, gains, reparametrise, trained
from pyro_isingvit.nets.vit import Layer, ViT, Weights, linear, stack


class Plain(Method):
    """A ViT with ordinary weights; subclasses add noise, a penalty of their own and what happens after training.

        loss = cross entropy of the noisy network + penalty / N + further penalties

    Args:
        config: ``vit`` shapes the network, ``baseline`` sets the method.
        info: what the images look like.
        num_data: N, training images.
    """

    fast: tuple[str, ...] = ()  # parameters of the noise, on a logarithmic scale: scale_lr_factor times the rate

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        check_baseline(config.baseline)
        self.settings = config.baseline
        self.vit = ViT(
            config.vit,
            info.channels,
            info.height,
            info.width,
            info.num_classes,
            centred=config.init is not None,
            frozen=config.train.frozen_blocks,
        )
        self.loc = nn.ParameterDict({k: nn.Parameter(w) for k, w in self.vit.initial_weights().items()})
        reparametrise(self.loc, config.train)
        self.make_temperature()

    def weights(self) -> Weights:
        """The matrices that a training step uses."""
        return dict(self.loc.items())

    def moving(self, matrices: Weights) -> Weights:
        """Of matrices or what else is stacked over layers, those of the layers that are not frozen."""
        return {kind: each[self.vit.frozen_layers(kind) :] for kind, each in matrices.items()}

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What stands for a linear layer in training."""
        return linear(x, weight, bias)

    def penalty(self) -> Tensor | None:
        """Nats over all images; None: nothing is added."""
        return None

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Terms:
        """Cross entropy, and the method's own penalty as ``penalty``."""
        seen = self.penalties.look(lambda x, watch: self.vit(self.weights(), x, watch, self.layer_rule), x, y, rows)
        terms, own = {"nll": self.likelihood.nll(seen.logits, y)}, self.penalty()
        if own is not None:
            terms["penalty"] = own / self.num_data
        return terms | self.penalties.terms(seen)

    def logged(self, terms: dict[str, float]) -> dict[str, float]:
        """The method's own penalty in nats over all images."""
        return {name: value * self.num_data if name == "penalty" else value for name, value in terms.items()}

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """Weight matrices with decay, parameters of the noise at their own rate, everything else without."""
        names = ("loc", *self.fast)
        noise = [p for n in self.fast for p in getattr(self, n).parameters()]
        others = [p for name, p in self.named_parameters() if name.split(".")[0] not in names] + gains(self.loc)
        return [
            *matrix_groups(trained(self.loc), self.vit.all_readers, settings),
            {"params": others, "weight_decay": 0.0},
            {"params": noise, "weight_decay": 0.0, "lr": settings.lr * settings.scale_lr_factor},
        ]

    def check(self, settings: TrainConfig) -> None:
        """Refuses to start from weights that ``reparametrise`` could not give back."""
        super().check(settings)
        for name in ("sigma_reparam", "weight_compander"):
            need(
                not getattr(settings, name) or (self.config.init is None and settings.layer_decay == 1),
                f"`{name}` is for a training from random weights at one rate for all blocks; leave it out, or leave "
                "out `init` and `layer_decay`.",
            )

    def settle(self, rows: Tensor) -> None:
        """Follows the spectral norms of the matrices, where they count."""
        super().settle(rows)
        follow(self.loc)

    def trained_networks(self) -> Sequence[tuple[ViT, nn.ParameterDict]]:
        """The network and its means."""
        return [(self.vit, self.loc)]

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Draws ``count`` networks for prediction, after ``first`` others where there is a fixed set."""
        weights = stack([self.draw_weights() for _ in range(count)])
        return lambda x: self.vit(weights, x).float().view(count, len(x), -1)

    def noisy_networks(self, count: int, rule: Layer) -> Networks:
        """``count`` passes whose noise is drawn in the layers, separately for every image."""
        weights = dict(self.loc.items())
        return lambda x: torch.stack([self.vit(weights, x, layer_rule=rule).float() for _ in range(count)])

    def num_parameters(self) -> int:
        """Without what only the noise or a reparametrisation has."""
        apart = [p for name in self.fast for p in getattr(self, name).parameters()] + gains(self.loc)
        return super().num_parameters() - sum(p.numel() for p in apart)

    def draw_weights(self) -> Weights:
        """The matrices of one network for prediction."""
        return dict(self.loc.items())

    def kept(self) -> Weights:
        """Probability that each weight is kept, kind -> (layers, out, in); 1 where nothing is selected."""
        return {kind: torch.ones_like(weight) for kind, weight in self.loc.items()}

    @torch.no_grad()
    def deployed(self) -> Sequence[tuple[ViT, Weights]]:
        """The matrices, where they are kept."""
        kept = self.kept()
        return [(self.vit, {kind: weight * (kept[kind] > 0.5) for kind, weight in self.loc.items()})]


def check_baseline(config: BaselineConfig) -> None:
    """Raises UserError where a setting is out of its range."""
    if not 0 < config.drop_rate < 1:
        raise UserError(f"`drop_rate` must lie strictly between 0 and 1, not {config.drop_rate}.")
    if not 0 <= config.sparsity < 1:
        raise UserError(f"`sparsity` must lie in [0, 1), not {config.sparsity}.")
    if config.members < 1:
        raise UserError(f"`members` of an ensemble must be at least 1, not {config.members}.")
    for name in ("l0_penalty", "kl_weight", "length_scale", "hypersparse_weight", "hypersparse_growth"):
        if not getattr(config, name) >= 0:
            raise UserError(f"`{name}` must not be negative, but is {getattr(config, name)}.")
    need(0 <= config.lobster_weight <= 1, f"`lobster_weight` must lie in [0, 1], not {config.lobster_weight}.")
