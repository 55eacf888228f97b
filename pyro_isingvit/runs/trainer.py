"""Training: the phases of a method, epoch by epoch, with AdamW, a schedule, clipping and Lightning Fabric.

What is minimised is the sum of the terms that the method gives (methods/base.py). What is kept on disk, and what a
resumed training starts from, is in session.py.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_isingvit.core.errors import ProcessLost, UserError, need, why
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.core.processes import averaged, is_first, is_lost, on_first, world
from pyro_isingvit.core.random_state import seed_devices
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.augment import Augmentation, group_size
from pyro_isingvit.data.batches import batches, count_steps
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.base import Terms
from pyro_isingvit.nets.divergence import first_not_finite, not_finite
from pyro_isingvit.nets.penalties import PENALTIES
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.predictive.calibration import CALIBRATION_SAMPLES, fit_temperature
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.runs.averaging import Averaging
from pyro_isingvit.runs.checks import check_training
from pyro_isingvit.runs.flatness import step_gradient
from pyro_isingvit.runs.noise_search import NoiseSearch
from pyro_isingvit.runs.optimiser import make_optimizer, make_schedule, with_decay
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run, build_run
from pyro_isingvit.runs.session import Session
from pyro_isingvit.runs.steps import set_up_fabric, total
from pyro_isingvit.runs.views import Views

log = logging.getLogger(__name__)
CHUNK = 1024  # training images at a time after training
LOOK_EVERY = 10  # steps between looks at the terms of the loss, which wait for the device
TERMS = {"nll": "the likelihood (NLL)", "weight_kl": "the weight KL", "mask_kl": "the mask KL"}
SHORT = {"weight_kl": "klW", "mask_kl": "klM"}


class TrainingDiverged(UserError):
    """The loss was not finite; the message says which term, when, and where the last good state is."""


class Trainer:
    """Runs the epochs of one run and keeps its folder.

    Under torchrun every process has a ``Trainer`` of its own. All hold the same data and stay equal; each computes the
    gradient of its share of every batch, and the first one alone writes, logs and shows the bar. Noise that is drawn
    for a batch as a whole is that of a single process; noise for each image (``Method.image_noise``) is not.

    Args:
        config: all settings.
        data: training and validation parts, and what the images look like.
        folder: where to keep the run; None keeps it in memory.
        progress: show a progress bar.
        model: trained in place; None builds a fresh one.
        on_epoch: called with the trainer after every epoch, when the epoch is kept.
        start: a trained network to begin from, for these images; None: random weights, or those of ``model``.
        teachers: trained runs of which `distillation` learns.

    Attributes:
        run: what is trained.
        method: its method.
        session: what is kept, and how far training is.
        epoch_seconds: wall time of the steps of each epoch of this call of ``fit``, validation left out.
        cpu_seconds: processor time of the steps of each epoch, those of the search for the noise included.
        on_epoch: may be set until ``fit`` is called.
    """

    @single_precision()
    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        folder: Path | None,
        progress: bool,
        model: IsingViT | None = None,
        on_epoch: Callable[["Trainer"], object] | None = None,
        start: Start | None = None,
        teachers: Sequence[Run] = (),
    ) -> None:
        check_fields(config)
        check_training(config.train)
        if len(data.train) < 1:
            raise UserError("there are no training images.")
        self.config, self.settings, self.on_epoch = config, config.train, on_epoch
        self.fabric = set_up_fabric(config)
        self.progress = progress and is_first()
        self.parts = world() * self.settings.accumulate  # of every batch
        self.multiple = self.parts * group_size(self.settings)  # of which a batch has as many images
        if self.settings.batch_size % self.multiple or len(data.train) < self.multiple:
            pairs = "" if self.multiple == self.parts else f", each with pairs of images for `mix` {self.settings.mix}"
            raise UserError(
                f"{world()} process(es) with `accumulate` {self.settings.accumulate} share a batch out in {self.parts} "
                f"part(s){pairs}; `batch_size` {self.settings.batch_size} must be a multiple of {self.multiple}, and "
                f"{len(data.train)} training images at least as many."
            )
        need(
            self.settings.balance == "none" or min(data.info.counts, default=0) > 0,
            f"`balance` {self.settings.balance} needs a training image of every class at least.",
        )
        for name, kind in PENALTIES.items():
            need(
                self.parts == 1 or not (kind.whole and getattr(self.settings, name, None)),
                f"`{name}` looks at a batch as a whole; train in one process and set `accumulate` to 1.",
            )
        seed_devices(self.settings.seed, self.fabric.device)
        self.run = build_run(config, data.info, len(data.train), folder, model)
        self.method = self.run.method
        self.method.check(self.settings)
        need(
            data.train.weights is None or self.method.weighs_images,
            f"method {config.method} measures its posterior on the training images as they are and cannot weigh them; "
            "leave out the weights.",
        )
        need(
            not self.settings.frozen_blocks or config.init is not None,
            "`frozen_blocks` would keep random weights; it is for a training that starts from a trained network.",
        )
        if start is not None:
            self.method.start_from(start)
        self.method.to(self.fabric.device)  # before there is an optimiser, which may hold views of the parameters
        self.augmentation = Augmentation(self.settings, self.run.info)
        self.views = Views(self.settings, self.run, teachers)
        for module in self.method.modules():
            if isinstance(module, ViT):
                module.checkpoint_activations = self.settings.checkpoint_activations
        steps = self.steps_per_epoch = count_steps(len(data.train), self.settings.batch_size, self.multiple)
        self.total_epochs = self.settings.epochs + self.settings.finetune_epochs
        few = self.method.few_updates(self.settings, steps)
        if few is not None and is_first():
            log.warning(
                "%d updates of the masks in the whole training are too few for them to get where they should: train "
                "longer, or set `update_every` lower (%d)", few, config.ising.update_every,
            )  # fmt: skip
        groups = self.method.parameter_groups(with_decay(self.settings, steps))
        optimizer = make_optimizer(groups, self.settings, self.method.trained_networks())
        self.scheduler = make_schedule(optimizer, self.settings, steps)
        self.loss, self.optimizer = self.fabric.setup(self.method, optimizer)
        device = self.fabric.device
        self.averaging = Averaging(self.method.averaged_parameters(), self.settings.average)
        self.data = replace(data, train=data.train.to(device), val=data.val.to(device))
        self.session = Session(
            self.run, self.optimizer, self.scheduler, self.averaging, len(data.train), steps, device,
            self.views.teacher.digest(),
        )  # fmt: skip
        self.noise_search = NoiseSearch(self.session, self.data.val, self.take_steps)
        self.epoch_seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.bar: tqdm = tqdm(disable=True)

    @property
    def epoch(self) -> int:
        """Epochs that are finished."""
        return self.session.epoch

    @property
    def seconds(self) -> float:
        """Wall time of training, over all sessions of the run."""
        return self.session.seconds

    def restore(self, folder: Path | None = None, strict: bool = True) -> None:
        """Continues from a checkpoint (``Session.restore``)."""
        self.session.restore(folder, strict)

    def adopt(self, folder: Path) -> None:
        """Takes the state of a finished run of the same network, data and seed (``Session.adopt``)."""
        self.session.adopt(folder, self.total_epochs)

    def phase(self, epoch: int) -> tuple[str, int, int]:
        """Name of an epoch's phase, its first epoch and the first one after it."""
        first = 0
        for name, epochs in self.method.phases(self.settings):
            if first <= epoch < first + epochs:
                return name, first, first + epochs
            first += epochs
        raise IndexError(f"epoch {epoch} lies beyond the last phase")

    @single_precision()
    def fit(self) -> Run:
        """Trains from the current epoch to the last.

        Raises:
            UserError: torch records no gradients here.
            TrainingDiverged: the loss was not finite.
            KeyboardInterrupt: Ctrl-C; its message says what is kept.
            ProcessLost: another process of this training is gone.
        """
        recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        need(recorded, "training needs gradients: leave `torch.no_grad()` or `torch.inference_mode()` first.")
        try:
            self._fit()
        except KeyboardInterrupt as stop:
            stop.args = (self.session.interrupted(self.total_epochs),)
            raise
        except RuntimeError as error:
            if not is_lost(error):
                raise
            told = self.session.interrupted(self.total_epochs)
            raise ProcessLost(f"another process of this training was lost ({why(error)[:120]}); {told}") from error
        return self.run

    def _fit(self) -> None:
        session = self.session
        on_first(session.keep_config)
        start = time.monotonic() - session.seconds
        epochs = self.total_epochs + self.noise_search.left(session.epoch)
        self.bar = tqdm(
            total=self.steps_per_epoch * epochs, initial=session.step, desc="train", unit="step",
            disable=not self.progress, dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        with self.bar:
            for epoch in range(session.epoch, self.total_epochs):
                if epoch == self.noise_search.at:
                    self.noise_search.choose()
                record, seconds = self.train_epoch(epoch)
                self.run.history.append(record)
                self.epoch_seconds.append(seconds)
                session.epoch = epoch + 1
                session.seconds = time.monotonic() - start
                session.keep()
                if self.on_epoch is not None:
                    self.on_epoch(self)
        if session.finished:
            return
        for kind, layer in self.run.dropped_layers() if is_first() else []:
            log.warning("%s of layer %d is dropped: skip connections carry the signal past it", kind, layer)
        self.loss.eval()
        train, held_out = (
            part.batches(min(CHUNK, part.images.chunk), self.run.info.normalise)
            for part in (self.data.train, self.data.val)
        )
        self.method.finish(train, held_out if self.settings.calibrate else ())
        if self.settings.calibrate and len(self.data.val):
            self._calibrate()
        session.finished = True
        session.keep()
        session.keep()  # checkpoint.previous.pt holds the same state: either will do

    def _calibrate(self) -> None:
        """Fits T on the validation part, which took no part in training (predictive/calibration.py)."""
        self.run.temperature.fill_(1.0)
        draws = draw_predictive(self.run, self.data.val.images, CALIBRATION_SAMPLES, seed=self.settings.seed)
        self.run.temperature.fill_(fit_temperature(draws.probs, self.data.val.labels, self.run.moved_prior))

    def train_epoch(self, epoch: int) -> tuple[dict[str, Any], float]:
        """The steps of an epoch, and its validation.

        Returns:
            its record for the history, and the seconds of its steps; neither is kept yet.
        """
        trained, seconds = self.take_steps(epoch)
        masks = self.run.mask_summary()
        noise = {} if self.method.noise is None else {"max_keep": self.method.noise}
        record = {
            "epoch": epoch + 1, "phase": self.phase(epoch)[0], **trained, "lr": self.scheduler.get_last_lr()[0],
            "retention": masks["retention_mean"], "pruned_fraction": masks["pruned_fraction"], **noise,
            **self._validate(epoch),
        }  # fmt: skip
        return record, seconds

    def take_steps(self, epoch: int) -> tuple[dict[str, float], float]:
        """The steps of an epoch; the network holds the averaged weights afterwards.

        Returns:
            the mean loss and its terms, and the seconds that the steps took.
        """
        phase, first, last = self.phase(epoch)
        self.averaging.hide()
        if epoch == first:
            if phase == "finetune":  # the masks are others from now on
                self.averaging.restart()
            self.method.begin(phase)
        steps, session, start, worked = self.steps_per_epoch, self.session, time.monotonic(), time.process_time()
        self.loss.train()
        sums, count = torch.zeros((), device=self.fabric.device), 0
        looks: list[dict[str, float]] = []  # at the terms, of every tenth step
        sampled = self.settings.balance == "sampler"
        order = batches(self.data.train, self.settings.batch_size, self.settings.seed, epoch, self.multiple, sampled)
        for images, classes, rows in order:
            weights = self.data.train.weights
            x, labels = self.augmentation(images, classes, None if weights is None else weights[rows])
            view = self.views.draw(x, session.step)
            self.optimizer.zero_grad(set_to_none=True)
            progress = (session.step - first * steps) / ((last - first) * steps)
            clean = self.augmentation.clean
            self.method.before_step(x[clean], labels[clean], phase, session.step, progress)
            y = self.views.labels(labels, view)
            terms = step_gradient(self.fabric, self.loss, self.method, self.settings, x, y, rows, view)
            if session.step % LOOK_EVERY == 0 or count == 0:
                looks.append(self._look(terms, epoch))
                self._show(epoch, phase, looks[-1])
            for part in self.method.clipped():
                torch.nn.utils.clip_grad_norm_(part.parameters(), self.settings.clip_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.averaging.follow()
            sums, count = sums + total(terms), count + 1
            session.step += 1
            self.bar.update()
        # No later loss of the epoch would show that its last step spoiled the weights.
        mean_loss = math.nan if not_finite(self.method) else float(averaged(sums)) / count
        self._check_finite(mean_loss, {}, epoch)
        seconds = time.monotonic() - start
        self.cpu_seconds.append(time.process_time() - worked)
        self.averaging.show()
        means = {name: sum(look[name] for look in looks) / len(looks) for name in looks[0]}
        return {"loss": mean_loss, **means}, seconds

    def _look(self, terms: Terms, epoch: int) -> dict[str, float]:
        """The terms as numbers, averaged over the processes, in the units of metrics.jsonl; all must be finite."""
        values = averaged(torch.stack([*terms.values()])).tolist()
        numbers = dict(zip(terms, values, strict=True))
        self._check_finite(sum(values), numbers, epoch)
        return self.method.logged(numbers)

    def _validate(self, epoch: int) -> dict[str, float]:
        val = self.data.val
        if len(val) == 0:
            return {}
        self.loss.eval()
        draws = draw_predictive(self.run, val.images, self.method.validation_draws(self.settings), seed=epoch)
        self._check_finite(float(draws.probs.sum()), {}, epoch)
        labels = val.labels.cpu()
        scores = classification_metrics(self.run.among(labels, draws.mean), labels)
        return {f"val_{name}": scores[name] for name in ("accuracy", "nll", "brier", "ece")}

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
        # Weights that are not finite spoil the NLL too: another term that is not finite is to blame.
        blame = [name for name, term in terms.items() if not math.isfinite(term) and name != "nll"] or ["nll"]
        names = [TERMS.get(name, name) for name in blame]
        images, _ = next(self.data.train.batches(self.settings.batch_size, self.run.info.normalise))
        first = first_not_finite(self.method, images) or "no layer at the mean weights"
        rate = self.scheduler.get_last_lr()[0]
        folder, done = self.run.folder, self.session.epoch
        kept = f"the state after epoch {done} is kept in {folder}" if folder else "nothing was saved"
        raise TrainingDiverged(
            f"the loss became {loss} in epoch {epoch + 1}, step {self.session.step}: {' and '.join(names)} is not "
            f"finite at learning rate {rate:.3g} (first: {first}). "
            f"Lower `lr` or `clip_norm`; {kept if done else 'no epoch was finished'}."
        )
