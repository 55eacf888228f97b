"""Training in phases: for the Ising posterior pilot (masks at one), Ising, optional fine-tuning (METHOD 5).

What is minimised is the method's ``Objective``, an ordinary module; AdamW, schedule, clipping and Lightning Fabric
treat it as any other.
"""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint, write_text
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.processes import averaged, is_first, on_first, world
from pyro_isingvit.core.settings import RunConfig, TrainConfig, check_fields
from pyro_isingvit.data.augment import Augmentation
from pyro_isingvit.data.batches import batches, count_steps
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.base import Objective
from pyro_isingvit.methods.ising import IsingObjective
from pyro_isingvit.nets.divergence import first_not_finite, not_finite
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.predictive.calibration import CALIBRATION_SAMPLES, fit_temperature
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.runs.folder import CHECKPOINT, CONFIG, HISTORY, read_config, to_lines
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run, build_run
from pyro_isingvit.runs.steps import backward, halving_factor, learning_rate_factor, set_up_fabric

log = logging.getLogger(__name__)
CHUNK = 1024  # training images at a time after training
LOOK_EVERY = 10  # steps between looks at the terms of the loss, which wait for the device
TERMS = {"nll": "the likelihood (NLL)", "weight_kl": "the weight KL", "mask_kl": "the mask KL"}
SHORT = {"weight_kl": "klW", "mask_kl": "klM"}
LARGEST = 1e15  # of rates and norms: torch computes with them in single precision


class TrainingDiverged(UserError):
    """The loss was not finite; the message says which term, when, and where the last good state is."""


def check_training(config: TrainConfig) -> None:
    """Raises UserError where a setting is out of its range."""
    check_fields(config)
    for name in ("epochs", "batch_size", "samples", "val_samples", "draws", "accumulate"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}.")
    for name in ("lr", "clip_norm", "scale_lr_factor"):
        if not 0 < getattr(config, name) <= LARGEST:
            raise UserError(f"{name} must be positive and at most {LARGEST:g}, not {getattr(config, name)}.")
    for name in ("pilot_fraction", "warmup_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} must lie in [0, 1], not {getattr(config, name)}.")
    for name in ("finetune_epochs", "weight_decay", "log_barrier"):
        if not getattr(config, name) >= 0:
            raise UserError(f"{name} must not be negative, but is {getattr(config, name)}.")
    # Below, gamma variates underflow, and a share comes out as 1/2 where it should be 0 or 1.
    if not 1e-3 <= config.mix_alpha <= 1e3:
        raise UserError(f"mix_alpha must lie in [0.001, 1000], not {config.mix_alpha}; 0.2 to 1 are usual.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available here; use --device cpu or auto.")


class Trainer:
    """Runs the epochs of one run and keeps its folder.

    Under torchrun every process has a ``Trainer`` of its own. All hold the same data and stay equal; each computes the
    gradient of its share of every batch, and the first one alone writes, logs and shows the bar. Noise that is drawn
    for a batch as a whole is that of a single process; noise for each image (``Objective.image_noise``) is not.

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
        self.config, self.settings, self.folder = config, config.train, folder
        self.fabric = set_up_fabric(config)
        self.progress = progress and is_first()
        self.parts = world() * self.settings.accumulate  # of every batch
        if self.settings.batch_size % self.parts or len(data.train) < self.parts:
            raise UserError(
                f"{world()} process(es) with --accumulate {self.settings.accumulate} share a batch out in {self.parts} "
                f"parts; --batch-size {self.settings.batch_size} must be a multiple of that, and {len(data.train)} "
                "training images at least as many."
            )
        torch.manual_seed(self.settings.seed)
        self.run = build_run(config, data.info, len(data.train), folder, model)
        self.objective = self._objective(len(data.train))
        self.augmentation = Augmentation(self.settings, self.run.info)
        for module in self.objective.modules():
            if isinstance(module, ViT):
                module.checkpoint_activations = self.settings.checkpoint_activations
        steps = self.steps_per_epoch = count_steps(len(data.train), self.settings.batch_size, self.parts)
        self.main_steps = steps * self.settings.epochs
        self.total_epochs = self.settings.epochs + self.settings.finetune_epochs
        total, warmup = steps * self.total_epochs, int(self.settings.warmup_fraction * self.main_steps)
        optimizer = torch.optim.AdamW(self.objective.parameter_groups(self.settings), lr=self.settings.lr)

        def factor(step: int) -> float:
            if self.settings.schedule == "halving" and step < self.main_steps:
                return halving_factor(step // steps)
            return learning_rate_factor(step, self.main_steps, total, warmup)

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.loss, self.optimizer = self.fabric.setup(self.objective, optimizer)
        device = self.fabric.device
        self.data = replace(data, train=_to(data.train, device), val=_to(data.val, device))
        self.epoch = self.step = 0
        self.seconds = 0.0  # of training, over all sessions of the run
        self.finished = False  # what comes after the last epoch is done too
        self.bar: tqdm = tqdm(disable=True)

    def _objective(self, num_data: int) -> Objective:
        if not self.run.has_masks:
            special = self.settings.compile or self.settings.noise != "weights"
            need(not special, f"compile and noise are for method ising, not {self.config.method}.")
            assert isinstance(self.run.network, Objective)
            return self.run.network
        self.run.model.log_barrier = self.settings.log_barrier
        return IsingObjective(self.run.model, self.run.guide, num_data, self.settings)

    def phase(self, epoch: int) -> tuple[str, int, int]:
        """Name of an epoch's phase, its first epoch and the first one after it."""
        first = 0
        for name, epochs in self.objective.phases(self.settings):
            if first <= epoch < first + epochs:
                return name, first, first + epochs
            first += epochs
        raise IndexError(f"epoch {epoch} lies beyond the last phase")

    def fit(self) -> Run:
        """Trains from the current epoch to the last.

        Raises:
            TrainingDiverged: the loss was not finite.
            KeyboardInterrupt: Ctrl-C; its message says what is kept and how to go on.
        """
        try:
            self._fit()
        except KeyboardInterrupt as stop:
            stop.args = (self._interrupted(),)
            raise
        return self.run

    def _fit(self) -> None:
        on_first(self._keep_config)
        start = time.monotonic() - self.seconds
        self.bar = tqdm(
            total=self.steps_per_epoch * self.total_epochs, initial=self.step, desc="train", unit="step",
            disable=not self.progress, dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        with self.bar:
            for epoch in range(self.epoch, self.total_epochs):
                name, first, _ = self.phase(epoch)
                if epoch == first:
                    self.objective.begin(name)
                record = self._epoch(epoch)
                self.epoch = epoch + 1
                self.run.history.append(record)
                self.seconds = time.monotonic() - start
                self._keep()
        if self.finished:
            return
        for kind, layer in self.run.dropped_layers() if is_first() else []:
            log.warning("%s of layer %d is dropped: skip connections carry the signal past it", kind, layer)
        self.loss.eval()
        self.objective.finish(
            (self.run.info.normalise(self.data.train.images[i : i + CHUNK]), self.data.train.labels[i : i + CHUNK])
            for i in range(0, len(self.data.train), CHUNK)
        )
        if self.settings.calibrate and len(self.data.val):
            self._calibrate()
        self.finished = True
        self._keep()
        self._keep()  # the one before it holds the same: either will do

    def _calibrate(self) -> None:
        """Fits T on the validation part, which took no part in training (calibration.py)."""
        self.run.network.temperature.fill_(1.0)
        draws = draw_predictive(self.run, self.data.val.images, CALIBRATION_SAMPLES, seed=self.settings.seed)
        self.run.network.temperature.fill_(fit_temperature(draws.probs, self.data.val.labels))

    def _epoch(self, epoch: int) -> dict[str, Any]:
        phase, first, last = self.phase(epoch)
        steps = self.steps_per_epoch
        self.loss.train()
        total, count = torch.zeros((), device=self.fabric.device), 0
        terms: list[dict[str, float]] = []  # of every tenth step
        order = batches(self.data.train, self.settings.batch_size, self.settings.seed, epoch, self.parts)
        for images, labels in order:
            x, labels = self.augmentation(images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            progress = (self.step - first * steps) / ((last - first) * steps)
            self.objective.before_step(x, labels, phase, self.step, progress)
            loss = backward(self.fabric, self.loss, self.objective, x, labels, self.settings.accumulate)
            if self.step % LOOK_EVERY == 0 or count == 0:
                value = averaged(loss).item()
                terms.append(self.objective.terms(value))
                self._check_finite(value, terms[-1], epoch)
                self._show(epoch, phase, terms[-1])
            for part in self.objective.clipped():
                torch.nn.utils.clip_grad_norm_(part.parameters(), self.settings.clip_norm)
            self.optimizer.step()
            self.scheduler.step()
            total, count = total + loss, count + 1
            self.step += 1
            self.bar.update()
        # The last step of an epoch has no loss after it that would tell.
        mean_loss = math.nan if not_finite(self.objective) else float(averaged(total)) / count
        self._check_finite(mean_loss, self.objective.terms(mean_loss), epoch)
        mean_terms = {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}
        masks = self.run.mask_summary()
        return {
            "epoch": epoch + 1, "phase": phase, "loss": mean_loss, **mean_terms,
            "lr": self.scheduler.get_last_lr()[0], "retention": masks["retention_mean"],
            "pruned_fraction": masks["pruned_fraction"], **self._validate(epoch),
        }  # fmt: skip

    def _validate(self, epoch: int) -> dict[str, float]:
        val = self.data.val
        if len(val) == 0:
            return {}
        self.loss.eval()
        draws = draw_predictive(self.run, val.images, self.settings.val_samples, seed=epoch)
        self._check_finite(float(draws.probs.sum()), {}, epoch)
        scores = classification_metrics(draws.mean, val.labels)
        _, first, last = self.phase(epoch)
        noise = self.objective.validated(draws.probs, val.labels, last - first, last - epoch - 1)
        return {**{f"val_{name}": scores[name] for name in ("accuracy", "nll", "brier", "ece")}, **noise}

    def _show(self, epoch: int, phase: str, terms: dict[str, float]) -> None:
        if not self.progress:
            return
        shown = {
            "epoch": f"{epoch + 1}/{self.total_epochs}", "phase": phase,
            **{SHORT.get(name, name): f"{value:.3g}" for name, value in terms.items()},
            "keep": f"{self.run.mask_summary()['retention_mean']:.2f}",
        }  # fmt: skip
        if self.run.history and "val_accuracy" in self.run.history[-1]:
            shown["val"] = f"{self.run.history[-1]['val_accuracy']:.3f}"
        self.bar.set_postfix(shown, refresh=False)

    def _check_finite(self, loss: float, terms: dict[str, float], epoch: int) -> None:
        if math.isfinite(loss):
            return
        # The NLL is the rest of the loss, NaN with any other term: another one that is not finite is to blame.
        blame = [name for name, term in terms.items() if not math.isfinite(term) and name != "nll"] or ["nll"]
        names = [TERMS.get(name, name) for name in blame]
        images = self.run.info.normalise(self.data.train.images[: self.settings.batch_size])
        first = first_not_finite(self.objective, images) or "no layer at the mean weights"
        rate = self.scheduler.get_last_lr()[0]
        kept = f"the state after epoch {self.epoch} is kept in {self.folder}" if self.folder else "nothing was saved"
        raise TrainingDiverged(
            f"the loss became {loss} in epoch {epoch + 1}, step {self.step}: {' and '.join(names)} is not finite at "
            f"learning rate {rate:.3g} (first: {first}). "
            f"Lower --lr or --clip-norm; {kept if self.epoch else 'no epoch was finished'}."
        )

    # The folder -------------------------------------------------------------------------------------------------

    def _keep_config(self) -> None:
        if self.folder is not None and not (self.folder / CONFIG).exists():
            write_text(self.folder / CONFIG, self.config.to_json())

    def _keep(self) -> None:
        if self.folder is not None:
            on_first(self._write)

    def _write(self) -> None:
        assert self.folder is not None
        save_checkpoint(self.folder / CHECKPOINT, self._state())
        write_text(self.folder / HISTORY, to_lines(self.run.history))

    def _state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state() if self.fabric.device.type == "cuda" else None
        return {
            "info": self.run.info.to_dict(), "num_data": len(self.data.train), "epoch": self.epoch,
            "step": self.step, **self.run.state(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda,
            "seconds": self.seconds, "finished": self.finished,
        }  # fmt: skip

    def _interrupted(self) -> str:
        """What an interruption leaves, by what is on disk."""
        done = self.epoch == self.total_epochs
        where = "interrupted after the last epoch" if done else f"interrupted in epoch {self.epoch + 1}"
        if self.folder is None:
            return f"{where}; nothing was saved."
        try:
            kept = load_checkpoint(self.folder / CHECKPOINT)["epoch"]
        except UserError:
            return f"{where}; no epoch is finished: start again with the same command and --overwrite."
        epochs = "epoch 1 is" if kept == 1 else f"epochs 1 to {kept} are"
        return f"{where}; {epochs} kept; go on with: python -m inference.train --resume {self.folder}"

    def adopt(self, folder: Path) -> None:
        """Takes the state of a finished run of the same network, data and seed, so that nothing is left to train.

        Raises:
            UserError: the runs differ in what training depends on, or the other is not finished.
        """
        other = read_config(folder)
        ours, theirs = (replace(c.train, calibrate=True, samples=1) for c in (self.config, other))
        if (ours, self.config.vit, self.config.data) != (theirs, other.vit, other.data):
            raise UserError(f"{folder} was trained with other settings; its weights cannot stand for ours.")
        self.restore(folder, strict=False)
        self.finished = False  # what ours does after the last epoch is another thing
        if self.epoch != self.total_epochs:
            raise UserError(f"{folder} is not finished; resume it first.")

    def restore(self, folder: Path | None = None, strict: bool = True) -> None:
        """Continues from the folder's checkpoint, or from the one before where that is damaged.

        Args:
            folder: of the checkpoint; None: the run's own.
            strict: the checkpoint has every tensor of the network.

        Raises:
            UserError: no checkpoint, or one of another network or data set.
        """
        folder = folder or self.folder
        assert folder is not None
        states: list[dict[str, Any]] = []  # the first process repairs the file, then the others read it
        on_first(lambda: states.append(load_checkpoint(folder / CHECKPOINT, repair=folder == self.folder)))
        state = states[0] if states else load_checkpoint(folder / CHECKPOINT)
        if state.get("num_data") != len(self.data.train) or state.get("info") != self.run.info.to_dict():
            raise UserError(f"{folder} was trained on other images than those given; resume with the same data.")
        try:
            self.run.load_state(state, strict)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.seconds = state["seconds"]
            self.epoch = state["epoch"]
            # Another number of processes may have cut the last batch of the epochs differently.
            self.step = self.scheduler.last_epoch = self.epoch * self.steps_per_epoch
            self.finished = state.get("finished", False)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{folder / CHECKPOINT} does not fit its {CONFIG}: {error}") from error
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        if folder == self.folder:  # a kill between the two files, or a damaged checkpoint, has left another history
            on_first(lambda: write_text(folder / HISTORY, to_lines(self.run.history)))


def _to(split: Split, device: torch.device) -> Split:
    return replace(split, images=split.images.to(device), labels=split.labels.to(device))
