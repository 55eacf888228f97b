"""The likelihood-guided Ising posterior as a method: pilot, Ising and fine-tuning phases."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.processes import averaged
from pyro_isingvit.core.settings import TrainConfig
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO, fusible
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.base import Objective
from pyro_isingvit.predictive.calibration import fit_temperature


class IsingObjective(Objective):
    """The tempered negative ELBO (METHOD 5), and the alternation of weight and mask updates.

        loss = -(1/N) E_q log p(y | x, W) + (KL of weights + KL of masks) / (kappa_weights N)

    Args:
        model: the generative model.
        guide: its posterior.
        num_data: N.
        settings: of training. ``engine``: "pyro", "fused" (the same numbers without effect handlers), or "auto": fused
            where it can be; ``draws``: posterior draws that a batch is shared out among, the Pyro path takes one.

    Raises:
        UserError: "fused" for a model that has no fused form.
    """

    def __init__(self, model: IsingViT, guide: IsingGuide, num_data: int, settings: TrainConfig) -> None:
        super().__init__()
        if settings.engine == "fused" and not fusible(model):
            raise UserError("engine fused needs likelihood-guided masks and no log-barrier; use --engine auto.")
        fused = fusible(model) and settings.engine != "pyro"
        for name, asked in (("compile", settings.compile), ("noise activations", settings.noise == "activations")):
            need(
                fused or not asked, f"{name} needs --engine fused or auto, likelihood-guided masks and no log-barrier."
            )
        if settings.noise == "activations" and model.ising.granularity != "weight":
            raise UserError("noise activations is for masks on single weights; use --granularity weight.")
        self.elbo: nn.Module = (
            FusedELBO(model, guide, settings.draws, settings.noise, settings.compile)
            if fused
            else ClosedFormELBO()(model, guide)
        )
        self.num_data, self.image_noise = num_data, settings.noise == "activations"
        # Without an Ising phase nobody reads the curvature.
        self.watches = dict(self.phases(settings))["ising"] > 0

    @property
    def model(self) -> IsingViT:
        """The generative model."""
        model = self.elbo.model
        assert isinstance(model, IsingViT)
        return model

    @property
    def guide(self) -> IsingGuide:
        """Its posterior."""
        guide = self.elbo.guide
        assert isinstance(guide, IsingGuide)
        return guide

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss; the guide is drawn from once, or once for each of ``draws`` parts of the batch."""
        return self.elbo(x, y) / self.num_data

    def take_part(self, part: int, parts: int) -> None:
        """Which draws the next batch gets; the Pyro path has one for all."""
        if isinstance(self.elbo, FusedELBO):
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

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """Every ``update_every`` steps a curvature estimate and, in the Ising phase, a mask sweep."""
        if phase == "finetune" or step % self.guide.config.update_every or not self.watches:
            return
        self.guide.observe(self.model, x, y)
        if phase == "ising":
            self.guide.update(self.model, progress)

    def validated(self, probs: Tensor, labels: Tensor, epochs: int, left: int) -> dict[str, float]:
        """With max_keep "auto", fits the masks' noise to the temperature that the predictions want."""
        if self.guide.config.max_keep != "auto":
            return {}
        temperature = fit_temperature(probs, labels)
        if left or self.guide.phase == "pilot":  # after the last update max_keep says where the masks are clipped
            self.guide.fit_mask_noise(temperature, 1.0 / epochs)
        return {"val_temperature": temperature, "max_keep": self.guide.max_keep}

    @torch.no_grad()
    def terms(self, loss: float) -> dict[str, float]:
        """nll, weight_kl, mask_kl, and log_margin (mean log|det| of the last batch) with a log-barrier."""
        weight_kl, mask_kl = self.guide.kl_terms(self.model)
        nll = loss - (weight_kl + mask_kl) / self.guide.kappa_weights / self.num_data
        terms = {"nll": nll, "weight_kl": weight_kl, "mask_kl": mask_kl}
        if self.model.log_barrier > 0:
            terms["log_margin"] = float(averaged(self.model.log_margin))
            terms["nll"] += self.model.log_barrier * terms["log_margin"]
        return terms

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """Weight means with decay, the network's other parameters, scales and mask logits at their own rate."""
        guide = self.guide
        scales = [p for p in guide.log_scale.parameters() if p.requires_grad] + list(guide.mask_logit.parameters())
        groups: list[dict[str, Any]] = [
            {"params": list(guide.loc.parameters()), "weight_decay": settings.weight_decay},
            {"params": list(self.model.parameters()), "weight_decay": 0.0},
        ]
        if scales:
            groups.append({"params": scales, "weight_decay": 0.0, "lr": settings.lr * settings.scale_lr_factor})
        return groups
