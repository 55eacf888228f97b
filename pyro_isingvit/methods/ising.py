"""The likelihood-guided Ising posterior as a method: pilot, Ising and fine-tuning (docs/method.md, Phases).

The loss is that of docs/method.md, Objective:

loss = -(1/N) E_q log p(y | x, W) + (KL of weights + KL of masks) / (kappa_weights N) + penalties
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import DRAWS, FusedELBO, fusible, overridden
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.base import Method, Networks, Terms
from pyro_isingvit.methods.rates import matrix_groups
from pyro_isingvit.nets.vit import ViT, Weights, stack

LEFT = 0.1
KINDS_OF_SITE = {"xi": "mask_kl", "w": "weight_kl", "y": "nll"}  # first part of a site's name -> the loss term


class IsingMethod(Method):
    """The tempered negative ELBO, and the alternation of weight and mask updates.

    Args:
        config: all settings. ``train.engine``: "pyro", "fused" (the same numbers without effect handlers), or "auto":
            fused where it can be; ``train.draws``: posterior draws that share a batch out, one on the Pyro path.
        info: what the images look like.
        num_data: N, training images.
        model: a model to start from, trained in place; None builds one.
        guide: its posterior; None starts a fresh one.

    Raises:
        UserError: settings of the posterior out of their range.
    """

    max_draws = None

    def __init__(
        self,
        config: RunConfig,
        info: DataInfo,
        num_data: int,
        model: IsingViT | None = None,
        guide: IsingGuide | None = None,
    ) -> None:
        super().__init__(config, info, num_data)
        settings = config.train
        centred, frozen = config.init is not None, settings.frozen_blocks
        self.model = model or IsingViT(config.vit, info, config.ising, centred=centred, frozen=frozen)
        if guide is None:
            self.model.begin_anew()
        self.guide = guide or IsingGuide(self.model, num_data)
        self.model.num_data, self.model.kappa_weights = num_data, self.guide.kappa_weights
        self.model.penalties, self.model.likelihood = self.penalties, self.likelihood
        self.penalties.phase = self._phase
        self.image_noise = settings.noise == "activations"
        self.fused = settings.engine != "pyro" and fusible(self.model, self.guide)
        self._elbo: list[FusedELBO] = []  # a list, not a submodule: its parameters are this module's already
        # Otherwise nobody reads the curvature.
        self.watches = dict(self.phases(settings))["ising"] > 0 or self.guide.config.posterior_scale == "curvature"

    def _phase(self) -> str:
        """For penalties; where the pilot phase is the whole training, it is no pilot to them."""
        return self.guide.phase if dict(self.phases(self.config.train))["ising"] else "ising"

    @property
    def elbo(self) -> FusedELBO:
        """The ELBO without effect handlers, made when first used."""
        if not self._elbo:
            train, usual = self.config.train, DRAWS if self.by_weight else "image"
            draws: Any = train.draws or usual
            mixed = train.mix == "manifold"  # a pair of images, which is mixed under one draw of the masks
            self._elbo.append(FusedELBO(self.model, self.guide, draws, train.noise, train.compile, 2 if mixed else 1))
        return self._elbo[0]

    @property
    def by_weight(self) -> bool:
        """Whether masks are on single weights, which no two images of a step can have their own of."""
        return self.model.ising.granularity == "weight"

    @classmethod
    def leaves_unused(cls, config: RunConfig) -> bool:
        """Masks that are learned have no gradient before the Ising phase."""
        return config.ising.mask_posterior != "likelihood_guided" or super().leaves_unused(config)

    def check(self, settings: TrainConfig) -> None:
        """Refuses settings that only the fused engine can honour where the Pyro path is taken."""
        why = self._not_fused(settings)
        need(self.fused or settings.engine != "fused", f"`engine` fused cannot be used: {why}; set `engine` to auto.")
        saliency, activation = self.model.ising.saliency, self.model.vit.config.activation
        ruled = saliency != "lm" or activation == "gelu"
        need(ruled, f"`saliency` lm has no rule for `activation` {activation}; set `saliency` to gnb.")
        need(
            saliency != "lm" or not settings.frozen_blocks,
            "`saliency` lm has no rule for blocks that stay as they are (`frozen_blocks`); set `saliency` to gnb.",
        )
        for name, asked in (("compile", settings.compile), ("noise", settings.noise == "activations")):
            need(self.fused or not asked, f"`{name}` needs the fused engine, but {why}.")
        need(
            self.fused or settings.draws in (None, 1),
            f"`draws` {settings.draws} needs the fused engine, but {why}; the Pyro path takes 1.",
        )
        need(
            settings.draws != "image" or not self.by_weight,
            "`draws` image is for masks on units, heads or blocks; set `granularity` to unit, or `draws` to a number.",
        )
        need(
            settings.noise != "activations" or self.by_weight,
            "`noise` activations is for masks on single weights; set `granularity` to weight.",
        )
        need(
            settings.mix != "manifold" or settings.noise == "weights",
            "`mix` manifold mixes what one draw of the weights makes of two images; set `noise` to weights.",
        )
        for name in ("sigma_reparam", "weight_compander"):
            need(
                not getattr(settings, name),
                f"`{name}` is for ordinary weights; the posterior of method {self.config.method} has means of its own.",
            )
        changing = {"`mix` manifold": settings.mix == "manifold", "`nested_dropout`": settings.nested_dropout > 0}
        for name, asked in changing.items():
            need(
                not (settings.compile and asked),
                f"{name} changes the network in each step, for which `compile` would compile it again; leave out one.",
            )

    def _not_fused(self, settings: TrainConfig) -> str:
        """Why the Pyro path is taken, where it is."""
        if settings.engine == "pyro":
            return "`engine` is pyro"
        if own := overridden(self.model, self.guide):
            return f"{' and '.join(own)} is overridden, which it does not call"
        return f"`mask_posterior` is {self.model.ising.mask_posterior}"

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Terms:
        """The loss; the guide is drawn from once, or once for each of ``draws`` parts of the batch."""
        if self.fused:
            terms = self.elbo.terms(x, y, rows)
        else:
            terms = {}
            for site, value in ClosedFormELBO().terms(self.model, self.guide, x, y, rows).items():
                name = KINDS_OF_SITE.get(site.partition("_")[0], site)
                name = site if site in self.penalties.weights else name
                terms[name] = terms[name] + value if name in terms else value
        return {name: value / self.num_data for name, value in terms.items()}

    def logged(self, terms: dict[str, float]) -> dict[str, float]:
        """KLs in nats over the network, untempered: what they are, whatever their weight in the loss."""
        scale = self.guide.kappa_weights * self.num_data
        return {name: value * scale if name.endswith("_kl") else value for name, value in terms.items()}

    def take_part(self, part: int, parts: int) -> None:
        """Which draws the next batch gets; the Pyro path has one for all."""
        super().take_part(part, parts)
        if self.fused:
            self.elbo.part = (part, parts)

    def phases(self, settings: TrainConfig) -> list[tuple[str, int]]:
        """Pilot with every mask at one, Ising, and fine-tuning with the masks frozen."""
        pilot = round(settings.pilot_fraction * settings.epochs)
        return [("pilot", pilot), ("ising", settings.epochs - pilot), ("finetune", settings.finetune_epochs)]

    def begin(self, phase: str) -> None:
        """Frees the masks after the pilot phase, freezes them for fine-tuning."""
        if phase == "ising":
            self.guide.start_masks()
        elif phase == "finetune":
            self.guide.freeze(self.model)

    def few_updates(self, settings: TrainConfig, steps: int) -> int | None:
        """The number, where more than a tenth of the way to where the field equation wants the masks would be left."""
        (_, pilot), (_, ising), _ = self.phases(settings)
        config = self.guide.config
        count = math.ceil((pilot + ising) * steps / config.update_every) - math.ceil(
            pilot * steps / config.update_every
        )
        left = (1 - config.mask_damping) ** count
        return count if ising and config.mask_posterior != "learned" and left > LEFT else None

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """Every ``update_every`` steps a curvature estimate, with its scales, and in the Ising phase a mask sweep."""
        if phase == "finetune" or step % self.guide.config.update_every or not self.watches:
            return
        self.guide.observe(self.model, x, y)
        if phase == "ising":
            self.guide.update(self.model, progress)

    @property
    def noise(self) -> float:
        """max_keep."""
        return self.guide.max_keep

    def set_noise(self, level: float) -> None:
        """Sets max_keep."""
        self.guide.set_noise(level)

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """Weight means with decay, the network's other parameters, scales and mask logits at their own rate."""
        guide, vit = self.guide, self.model.vit
        trunk = set(vit.trunk.parameters())
        scales = [p for p in guide.log_scale.parameters() if p.requires_grad] + list(guide.masks.parameters())
        groups: list[dict[str, Any]] = [
            *matrix_groups(guide.loc, vit.all_readers, settings),
            *(matrix_groups(vit.trunk, vit.all_readers, settings) if trunk else ()),
            {"params": [p for p in self.model.parameters() if p not in trunk], "weight_decay": 0.0},
        ]
        if scales:
            groups.append({"params": scales, "weight_decay": 0.0, "lr": settings.lr * settings.scale_lr_factor})
        return groups

    def trained_networks(self) -> Sequence[tuple[ViT, nn.ParameterDict]]:
        """The network and its slab means."""
        return [(self.model.vit, self.guide.loc)]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Weight means, learned scales and the network's other parameters; masks are as last set, learned or not."""
        found = super().averaged_parameters()
        return {name: each for name, each in found.items() if not name.startswith("guide.masks.")}

    # What was trained -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Draws masks and weights from the guide."""
        weights = stack([self.guide.draw() for _ in range(count)])
        return lambda x: self.model.vit(weights, x).float().view(count, len(x), -1)

    @torch.no_grad()
    def kept(self) -> Weights:
        """pi of every weight."""
        return {kind: self.guide.weight_retention(kind) for kind in self.guide.kinds}

    @torch.no_grad()
    def deployed(self) -> Sequence[tuple[ViT, Weights]]:
        """The slab means, where their masks are kept."""
        kept = self.kept()
        weights = {kind: loc * (kept[kind] > 0.5) for kind, loc in self.guide.loc.items()}
        return [self.model.vit.whole(weights)]

    def num_parameters(self) -> int:
        """The guide holds the matrices."""
        return super().num_parameters() + self.model.num_masked_weights

    @property
    def temperature(self) -> Tensor:  # type: ignore[override]
        """T of the predictions, a buffer of the model."""
        return self.model.temperature

    @property
    def network(self) -> nn.Module:
        """The generative model."""
        return self.model

    @property
    def posterior(self) -> tuple[IsingViT, IsingGuide]:
        """Model and guide."""
        return self.model, self.guide

    def state(self) -> dict[str, Any]:
        """Tensors of the model and of the guide, apart."""
        return {"model": self.model.state_dict(), "guide": self.guide.state_dict()}

    def load_state(self, state: dict[str, Any], strict: bool = True) -> None:
        """Takes what ``state`` gave; raises KeyError or RuntimeError where it does not fit."""
        self.model.load_state_dict(state["model"], strict=strict)
        self.guide.load_state_dict(state["guide"])
