"""The search for the noise of the masks within one training (max_keep "auto").

When ``FORK`` of the epochs are over, training goes on from the same state at each level for ``SHARE`` of the epochs,
with what is left of the learning rate's schedule run through in that time; so each ends as a training ends. The level
is chosen by the validation part (ising/noise.py), the state is put back, and training goes on at that level as if
nothing had happened. What a level came to is kept as soon as it is over: a training that was interrupted within the
search goes on with the next level.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.processes import averaged, is_first
from pyro_isingvit.data.split import Split
from pyro_isingvit.ising.noise import LEVELS, USUAL_KEEP, chosen_keep
from pyro_isingvit.predictive.calibration import CALIBRATION_SAMPLES, fit_temperature, temper
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.session import Session

log = logging.getLogger(__name__)
FORK, SHARE = 0.5, 0.15  # of the epochs
SHORTEST = 8  # epochs; with fewer there is nothing to be seen
FEW = 20  # training images, of which a tenth is no validation part


class NoiseSearch:
    """The search of one training.

    Args:
        session: the training.
        val: images to choose by.
        take_steps: takes the steps of an epoch, by its number.

    Raises:
        UserError: there are not enough validation images, though there are images enough to give some.

    Attributes:
        at: number of the epoch before which it takes place; None: never, because max_keep is a number or there are
            too few epochs.
        epochs: that each level trains.
        found: mean NLL of the validation images at each level, once the search is over.
    """

    def __init__(self, session: Session, val: Split, take_steps: Callable[[int], Any]) -> None:
        self.session, self.val, self.take_steps = session, val, take_steps
        self.run, config = session.run, session.run.config
        settings = config.train
        phases = dict(self.run.method.phases(settings))
        first = phases.get("pilot", 0)
        last = first + phases.get("ising", 0)
        wanted = self.run.method.noise is not None and config.ising.max_keep == "auto"
        wanted = wanted and settings.epochs >= SHORTEST and first < last
        if wanted and len(val) < 2 and session.num_data < FEW:
            log.warning("max_keep stays %g: so few images leave none to choose it by", USUAL_KEEP)
            wanted = False
        elif wanted and len(val) < 2:
            raise UserError(
                f"`max_keep` auto is chosen by validation images, and there are {len(val)}; give some "
                f"(`val_fraction`), or set `max_keep` to a number: {USUAL_KEEP} suits most data."
            )
        self.at = min(max(first, round(FORK * settings.epochs)), last - 1) if wanted else None
        self.epochs = 0 if self.at is None else max(1, min(round(SHARE * settings.epochs), last - self.at))
        self.found: dict[float, float] = {}

    def left(self, epoch: int) -> int:
        """Epochs that the search adds to a training of which ``epoch`` are over."""
        return 0 if self.at is None or epoch > self.at else self.epochs * (len(LEVELS) - len(self._known()))

    def choose(self) -> None:
        """Tries the levels and sets the best."""
        assert self.at is not None
        nll = self.session.searched = self._known()
        before, start = self.session.snapshot(), time.monotonic() - self.session.seconds
        for level in LEVELS:
            if level in nll:
                continue
            self.run.method.set_noise(level)
            with self._hurried():
                for epoch in range(self.at, self.at + self.epochs):
                    self.take_steps(epoch)
            losses = self._losses()
            self.session.put_back(before)
            nll = self.session.searched = {**nll, level: losses}
            self.session.seconds = time.monotonic() - start
            self.session.keep()
        self.session.searched = {}
        nll = {level: nll[level] for level in LEVELS}
        best = chosen_keep(nll)
        self.run.method.set_noise(best)
        self.found = {level: float(losses.mean()) for level, losses in nll.items()}
        if is_first():
            told = ", ".join(f"{level}: {loss:.4f}" for level, loss in self.found.items())
            log.info("max_keep %g, by the NLL of %d validation images (%s)", best, len(self.val), told)

    def _known(self) -> dict[float, Tensor]:
        """NLL of the levels that are over already, of these validation images."""
        kept = self.session.searched
        return {level: kept[level] for level in LEVELS if level in kept and len(kept[level]) == len(self.val)}

    @contextmanager
    def _hurried(self) -> Iterator[None]:
        """What is left of the learning rate's schedule, within the epochs of the search."""
        assert self.at is not None
        scheduler, per_epoch = self.session.scheduler, self.session.steps_per_epoch
        start, steps = self.at * per_epoch, self.epochs * per_epoch
        left = self.run.config.train.epochs * per_epoch - start
        usual: list[Callable[[int], float]] = scheduler.lr_lambdas

        def hurried(factor: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: factor(start + (step - start) * left // steps)

        scheduler.lr_lambdas = [hurried(factor) for factor in usual]
        try:
            yield
        finally:
            scheduler.lr_lambdas = usual

    @torch.no_grad()
    def _losses(self) -> Tensor:
        """NLL of each validation image at the temperature that fits them all, (n,)."""
        labels, seed = self.val.labels, self.run.config.train.seed
        probs = draw_predictive(self.run, self.val.images, CALIBRATION_SAMPLES, seed=seed).probs
        mean = temper(probs, fit_temperature(probs, labels, self.run.moved_prior)).mean(0)
        mean = self.run.among(labels, mean)
        losses = -mean.gather(1, labels.to(mean.device).unsqueeze(1)).squeeze(1).log()
        return averaged(losses.double().to(self.run.device)).cpu()  # all processes must choose alike
