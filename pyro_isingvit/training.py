"""Stochastic variational inference in phases: pilot (masks at one), Ising, optional fine-tuning (METHOD 5).

    loss = mean NLL + [weight KL + mask KL] / (kappa_weights N) [- log_barrier mean log|det|]      nats per image

The loss is ``ClosedFormELBO()(model, guide)``, an ordinary module; AdamW, schedule, clipping and Lightning
Fabric treat it as any other.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning_fabric as lf
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_isingvit.calibration import fit_temperature
from pyro_isingvit.checkpoint import load_checkpoint, save_checkpoint, write_text
from pyro_isingvit.config import DataConfig, RunConfig, TrainConfig
from pyro_isingvit.data import ImageData, Split
from pyro_isingvit.elbo import ClosedFormELBO
from pyro_isingvit.errors import UserError
from pyro_isingvit.guide import IsingGuide
from pyro_isingvit.history import to_lines
from pyro_isingvit.metrics import classification_metrics
from pyro_isingvit.model import IsingViT
from pyro_isingvit.predictive import draw_predictive
from pyro_isingvit.run import CHECKPOINT, CONFIG, HISTORY, Run, build
from pyro_isingvit.version import __version__

log = logging.getLogger(__name__)
PRECISION = {"32": "32-true", "bf16": "bf16-mixed"}
CALIBRATION_SAMPLES = 50
FINETUNE_LR = 0.1  # peak learning rate of fine-tuning, as a share of lr


class TrainingDiverged(UserError):
    """The loss was not finite; the message says which term, when, and where the last good state is."""


def check_training(config: TrainConfig) -> None:
    """Raises UserError where a setting is out of its range."""
    for name in ("epochs", "batch_size", "samples", "val_samples"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}.")
    for name in ("lr", "clip_norm", "scale_lr_factor"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be positive, not {getattr(config, name)}.")
    for name in ("pilot_fraction", "warmup_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} must lie in [0, 1], not {getattr(config, name)}.")
    for name in ("finetune_epochs", "weight_decay", "log_barrier"):
        if not getattr(config, name) >= 0:
            raise UserError(f"{name} must not be negative, but is {getattr(config, name)}.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available here; use --device cpu or auto.")


def halving_factor(epoch: int) -> float:
    """The paper's schedule: the learning rate is halved every 20 epochs."""
    return 0.5 ** (epoch // 20)


def learning_rate_factor(step: int, main_steps: int, total_steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, cosine to 0 over the main phases, and again to fine-tune."""
    if step < warmup:
        return (step + 1) / warmup
    if step < main_steps:
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, main_steps - warmup)))
    done = (step - main_steps) / max(1, total_steps - main_steps)
    return FINETUNE_LR * 0.5 * (1 + math.cos(math.pi * done))


def batches(split: Split, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of an epoch; the order depends on seed and epoch alone. The last short batch is kept."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    for start in range(0, len(order), size):
        rows = order[start : start + size].to(split.images.device)
        yield split.images[rows], split.labels[rows]


class Trainer:
    """Runs the epochs of one run and keeps its folder.

    Args:
        config: all settings.
        data: training and validation parts, and what the images look like.
        folder: where to keep the run; None keeps it in memory.
        progress: show a progress bar.
        model: trained in place; None builds a fresh one.
    """

    def __init__(
        self, config: RunConfig, data: ImageData, folder: Path | None, progress: bool, model: IsingViT | None = None
    ) -> None:
        check_training(config.train)
        if len(data.train) < 1:
            raise UserError("there are no training images.")
        self.config, self.settings, self.folder, self.progress = config, config.train, folder, progress
        self.fabric = lf.Fabric(
            accelerator=self.settings.device, devices=1, precision=PRECISION[self.settings.precision]  # type: ignore[arg-type]
        )  # fmt: skip
        torch.manual_seed(self.settings.seed)
        model, guide = build(config, data.info, len(data.train), model)
        model.log_barrier = self.settings.log_barrier
        elbo = ClosedFormELBO()(model, guide)
        steps = math.ceil(len(data.train) / self.settings.batch_size)
        self.main_steps = steps * self.settings.epochs
        self.total_epochs = self.settings.epochs + self.settings.finetune_epochs
        self.pilot_epochs = round(self.settings.pilot_fraction * self.settings.epochs)
        total, warmup = steps * self.total_epochs, int(self.settings.warmup_fraction * self.main_steps)
        optimizer = self._optimizer(model, guide)

        def factor(step: int) -> float:
            if self.settings.schedule == "halving" and step < self.main_steps:
                return halving_factor(step // steps)
            return learning_rate_factor(step, self.main_steps, total, warmup)

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.elbo, self.optimizer = self.fabric.setup(elbo, optimizer)
        device = self.fabric.device
        self.data = replace(data, train=_to(data.train, device), val=_to(data.val, device))
        self.run = Run(config, model, guide, folder, [])
        self.epoch = self.step = 0
        self.seconds = 0.0  # of training, over all sessions of the run
        self.bar: tqdm = tqdm(disable=True)

    def _optimizer(self, model: IsingViT, guide: IsingGuide) -> torch.optim.Optimizer:
        scales = [p for p in guide.log_scale.parameters() if p.requires_grad] + list(guide.mask_logit.parameters())
        means = list(guide.loc.parameters())
        groups = [
            {"params": means, "weight_decay": self.settings.weight_decay},
            {"params": list(model.parameters()), "weight_decay": 0.0},
        ]
        if scales:
            lr = self.settings.lr * self.settings.scale_lr_factor
            groups.append({"params": scales, "weight_decay": 0.0, "lr": lr})
        return torch.optim.AdamW(groups, lr=self.settings.lr)

    def phase(self, epoch: int) -> str:
        """pilot, ising or finetune."""
        if epoch < self.pilot_epochs:
            return "pilot"
        return "ising" if epoch < self.settings.epochs else "finetune"

    def fit(self) -> Run:
        """Trains from the current epoch to the last.

        Raises:
            TrainingDiverged: the loss was not finite.
        """
        if self.folder is not None and not (self.folder / CONFIG).exists():
            write_text(self.folder / CONFIG, self.config.to_json())
        steps = math.ceil(len(self.data.train) / self.settings.batch_size)
        start = time.monotonic() - self.seconds
        self.bar = tqdm(
            total=steps * self.total_epochs, initial=self.step, desc="train", unit="step",
            disable=not self.progress, dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        with self.bar:
            for epoch in range(self.epoch, self.total_epochs):
                if epoch == self.pilot_epochs and self.phase(epoch) == "ising":
                    self.run.guide.start_masks()
                if epoch == self.settings.epochs:
                    self.run.guide.freeze(self.run.model)
                record = self._epoch(epoch)
                self.epoch = epoch + 1
                self.run.history.append(record)
                self.seconds = time.monotonic() - start
                self._keep()
        for kind, layer in self.run.dropped_layers():
            log.warning("%s of layer %d is dropped: skip connections carry the signal past it", kind, layer)
        if self.settings.calibrate and len(self.data.val):
            self._calibrate()
            self._keep()
        return self.run

    def _calibrate(self) -> None:
        """Fits T on the validation part, which took no part in training (calibration.py)."""
        self.elbo.eval()
        self.run.model.temperature.fill_(1.0)
        draws = draw_predictive(self.run, self.data.val.images, CALIBRATION_SAMPLES, seed=self.settings.seed)
        self.run.model.temperature.fill_(fit_temperature(draws.probs, self.data.val.labels))

    def _epoch(self, epoch: int) -> dict[str, Any]:
        phase, model, guide = self.phase(epoch), self.run.model, self.run.guide
        scale = 1.0 / guide.kappa_weights / len(self.data.train)
        self.elbo.train()
        total, count = 0.0, 0
        terms: list[tuple[float, float, float]] = []  # NLL, weight KL, mask KL where the masks were updated
        for images, labels in batches(self.data.train, self.settings.batch_size, self.settings.seed, epoch):
            x = self.run.info.normalise(images)
            update = self.step % self.run.config.ising.update_every == 0
            if update and phase != "finetune":
                guide.observe(model, x, labels)
                if phase == "ising":
                    guide.update(model, self._ising_progress())
            loss = self.elbo(x, labels) / len(self.data.train)
            self.optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(loss)
            if update or count == 0:
                value = loss.item()
                weight_kl, mask_kl = guide.kl_terms(model)
                nll = value - scale * (weight_kl + mask_kl) + model.log_barrier * float(model.log_margin)
                terms.append((nll, weight_kl, mask_kl))
                self._check_finite(value, terms[-1], epoch)
                self._show(epoch, phase, terms[-1])
            self.fabric.clip_gradients(
                self.elbo, self.optimizer, max_norm=self.settings.clip_norm, error_if_nonfinite=False
            )
            self.optimizer.step()
            self.scheduler.step()
            total, count = total + loss.detach(), count + 1
            self.step += 1
            self.bar.update()
        mean_loss = float(total) / count
        nll, weight_kl, mask_kl = (sum(column) / len(terms) for column in zip(*terms, strict=True))
        self._check_finite(mean_loss, (nll, *guide.kl_terms(model)), epoch)
        record = {
            "epoch": epoch + 1, "phase": phase, "loss": mean_loss, "nll": nll, "weight_kl": weight_kl,
            "mask_kl": mask_kl, "lr": self.scheduler.get_last_lr()[0], "retention": self.run.mask_summary(),
        }  # fmt: skip
        record["pruned_fraction"] = record["retention"]["pruned_fraction"]
        record["retention"] = record["retention"]["retention_mean"]
        if model.log_barrier > 0:
            record["log_margin"] = float(model.log_margin)  # mean log|det| of the last batch
        return record | self._validate(epoch)

    def _ising_progress(self) -> float:
        """Share of the Ising phase behind us, in [0, 1]."""
        pilot = self.main_steps * self.pilot_epochs // self.settings.epochs
        return (self.step - pilot) / max(1, self.main_steps - pilot)

    def _validate(self, epoch: int) -> dict[str, float]:
        val = self.data.val
        if len(val) == 0:
            return {}
        self.elbo.eval()
        draws = draw_predictive(self.run, val.images, self.settings.val_samples, seed=epoch)
        scores = classification_metrics(draws.mean, val.labels)
        return {f"val_{name}": scores[name] for name in ("accuracy", "nll", "brier", "ece")}

    def _show(self, epoch: int, phase: str, terms: tuple[float, float, float]) -> None:
        if not self.progress:
            return
        shown = {
            "epoch": f"{epoch + 1}/{self.total_epochs}", "phase": phase, "nll": f"{terms[0]:.3f}",
            "klW": f"{terms[1]:.2g}", "klM": f"{terms[2]:.2g}",
            "keep": f"{self.run.mask_summary()['retention_mean']:.2f}",
        }  # fmt: skip
        if self.run.history and "val_accuracy" in self.run.history[-1]:
            shown["val"] = f"{self.run.history[-1]['val_accuracy']:.3f}"
        self.bar.set_postfix(shown, refresh=False)

    def _check_finite(self, loss: float, terms: tuple[float, float, float], epoch: int) -> None:
        if math.isfinite(loss):
            return
        names = ("the likelihood (NLL)", "the weight KL", "the mask KL")
        blame = [name for name, term in zip(names, terms, strict=True) if not math.isfinite(term)] or [names[0]]
        if "the weight KL" in blame or "the mask KL" in blame:
            blame = [name for name in blame if name != names[0]]  # the NLL is the rest of the loss: NaN with it
        rate = self.scheduler.get_last_lr()[0]
        kept = f"the state after epoch {self.epoch} is kept in {self.folder}" if self.folder else "nothing was saved"
        raise TrainingDiverged(
            f"the loss became {loss} in epoch {epoch + 1}, step {self.step}: {' and '.join(blame)} is not finite at "
            f"learning rate {rate:.3g}. Lower --lr or --clip-norm; {kept if self.epoch else 'no epoch was finished'}."
        )

    # The folder -------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        if self.folder is None:
            return
        save_checkpoint(self.folder / CHECKPOINT, self._state())
        write_text(self.folder / HISTORY, to_lines(self.run.history))

    def _state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state() if self.fabric.device.type == "cuda" else None
        return {
            "info": self.run.info.to_dict(), "num_data": len(self.data.train), "epoch": self.epoch,
            "step": self.step, "history": self.run.history, "model": self.run.model.state_dict(),
            "guide": self.run.guide.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda,
            "seconds": self.seconds,
        }  # fmt: skip

    def restore(self) -> None:
        """Continues from the folder's checkpoint.

        Raises:
            UserError: no checkpoint, or one of another network or data set.
        """
        assert self.folder is not None
        state = load_checkpoint(self.folder / CHECKPOINT)
        if state.get("num_data") != len(self.data.train) or state.get("info") != self.run.info.to_dict():
            raise UserError(f"{self.folder} was trained on other images than those given; resume with the same data.")
        try:
            self.run.model.load_state_dict(state["model"])
            self.run.guide.load_state_dict(state["guide"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.seconds = state["seconds"]
            self.epoch, self.step, self.run.history[:] = state["epoch"], state["step"], state["history"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder / CHECKPOINT} does not fit its {CONFIG}: {error}") from error
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])


def _to(split: Split, device: torch.device) -> Split:
    return replace(split, images=split.images.to(device), labels=split.labels.to(device))


def fit(
    model: IsingViT,
    data: ImageData,
    *,
    train: TrainConfig | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Fits the likelihood-guided Ising posterior of a model in memory.

    The model's own parameters are trained in place.

    Args:
        model: an ``IsingViT``.
        data: what ``load_data`` returns.
        train: training settings; None takes the defaults.
        progress: show a progress bar.
        **settings: single fields of ``TrainConfig``, such as ``epochs=60``.

    Raises:
        UserError: data that do not fit the model, or a setting out of its range.
        TrainingDiverged: the loss was not finite.
    """
    try:
        chosen = replace(train or TrainConfig(), **settings)
    except TypeError as error:
        raise UserError(f"{error}; the training settings are the fields of TrainConfig.") from error
    config = RunConfig(
        data=DataConfig(dataset=data.info.dataset), vit=model.vit.config, ising=model.ising, train=chosen,
        version=__version__, preset="custom",
    )  # fmt: skip
    return Trainer(config, data, None, progress, model).fit()
