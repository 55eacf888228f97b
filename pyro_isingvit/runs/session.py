"""What a training keeps on disk, and what a resumed one starts from.

After every epoch the checkpoint is written, the one before it is kept, and metrics.jsonl follows.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint, write_text
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.processes import on_first
from pyro_isingvit.runs.averaging import Averaging
from pyro_isingvit.runs.folder import CHECKPOINT, CONFIG, HISTORY, read_config, to_lines, trained_alike
from pyro_isingvit.runs.run import Run


class Session:
    """One training of a run, perhaps one of several: how far it is, and its state in the run's folder.

    Args:
        run: what is trained; a run without a folder lives in memory.
        optimizer: has a ``state_dict``.
        scheduler: of the learning rate.
        averaging: of the weights; whenever the state is asked for, the network holds their average.
        num_data: N, training images.
        steps_per_epoch: optimiser steps of an epoch.
        device: where training runs.
        taught: digest of the teachers' weights; "" without a teacher.

    Attributes:
        epoch: epochs that are finished.
        step: optimiser steps that are done.
        seconds: wall time of training, over all sessions of the run.
        finished: what comes after the last epoch is done too.
        searched: within the search for the noise, level -> NLL of each validation image; otherwise empty.
    """

    def __init__(
        self,
        run: Run,
        optimizer: Any,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        averaging: Averaging,
        num_data: int,
        steps_per_epoch: int,
        device: torch.device,
        taught: str = "",
    ) -> None:
        if run.folder is not None:
            run.config.check_kept()  # here, before an earlier run in the folder is removed
        self.run, self.optimizer, self.scheduler, self.averaging = run, optimizer, scheduler, averaging
        self.num_data, self.steps_per_epoch, self.device = num_data, steps_per_epoch, device
        self.taught = taught
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.finished = False
        self.searched: dict[float, Tensor] = {}

    def keep_config(self) -> None:
        """Writes config.json, unless it is there."""
        folder = self.run.folder
        if folder is not None and not (folder / CONFIG).exists():
            write_text(folder / CONFIG, self.run.config.to_json())

    def keep(self) -> None:
        """Writes checkpoint and history, on the first process."""
        if self.run.folder is not None:
            on_first(self._write)

    def _write(self) -> None:
        assert self.run.folder is not None
        save_checkpoint(self.run.folder / CHECKPOINT, self.state())
        write_text(self.run.folder / HISTORY, to_lines(self.run.history))

    def state(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs; a finished run predicts, and needs no raw weights."""
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        return {
            "info": self.run.info.to_dict(), "num_data": self.num_data, "epoch": self.epoch,
            "step": self.step, **self.run.state(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda,
            "seconds": self.seconds, "finished": self.finished, "taught": self.taught,
            "searched": self.searched, **({} if self.finished else self.averaging.state()),
        }  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """A copy of ``state`` that training does not change."""
        return copy.deepcopy(self.state())

    def put_back(self, snapshot: dict[str, Any]) -> None:
        """Goes back to a snapshot, which may be used again."""
        self._take(copy.deepcopy(snapshot))

    def _take(self, state: dict[str, Any], strict: bool = True) -> None:
        """Raises KeyError, RuntimeError, TypeError or ValueError where the state does not fit."""
        self.run.load_state(state, strict)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.seconds = state["seconds"]
        self.epoch = state["epoch"]
        # Another number of processes may have cut the last batch of the epochs differently.
        self.step = self.scheduler.last_epoch = self.epoch * self.steps_per_epoch
        self.finished = state.get("finished", False)
        self.searched = dict(state.get("searched", {}))  # before version 0.21 none was kept
        if not self.finished:
            self.averaging.load_state(state)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])

    def interrupted(self, epochs: int) -> str:
        """What an interruption leaves, by what is on disk; ``epochs`` of the whole training."""
        done = self.epoch == epochs
        where = "interrupted after the last epoch" if done else f"interrupted in epoch {self.epoch + 1}"
        folder = self.run.folder
        if folder is None:
            return f"{where}; nothing was saved."
        try:
            kept = load_checkpoint(folder / CHECKPOINT)["epoch"]
        except UserError:
            return f"{where}; no epoch is finished"
        finished = "epoch 1 is" if kept == 1 else f"epochs 1 to {kept} are"
        return f"{where}; {finished} kept in {folder}"

    def adopt(self, folder: Path, epochs: int) -> None:
        """Takes the state of a finished run of the same network, data and seed, so that nothing is left to train.

        Raises:
            UserError: the runs differ in what training depends on, or the other has not finished its ``epochs``.
        """
        if not trained_alike(self.run.config, read_config(folder)):
            raise UserError(f"{folder} was trained with other settings; its weights cannot be taken over.")
        self.restore(folder, strict=False)
        self.finished = False  # this run's own work after the last epoch is still to be done
        if self.epoch != epochs:
            raise UserError(f"{folder} is not finished; resume it first.")

    def restore(self, folder: Path | None = None, strict: bool = True) -> None:
        """Continues from a checkpoint, or from the one before where that is damaged.

        Args:
            folder: of the checkpoint; None: the run's own.
            strict: the checkpoint has every tensor of the network.

        Raises:
            UserError: no checkpoint, or one of another network or data set; a teacher has changed since.
        """
        own = self.run.folder
        folder = folder or own
        assert folder is not None
        states: list[dict[str, Any]] = []  # the first process repairs the file, then the others read it
        on_first(lambda: states.append(load_checkpoint(folder / CHECKPOINT, repair=folder == own)))
        state = states[0] if states else load_checkpoint(folder / CHECKPOINT)
        if state.get("num_data") != self.num_data or not self.run.info.is_that_of(state.get("info")):
            raise UserError(f"{folder} was trained on other images than those given; resume with the same data.")
        if state.get("taught", self.taught) != self.taught:
            raise UserError(
                f"a `teacher` has other weights than when {folder} was trained; bring them back, or train anew."
            )
        try:
            self._take(state, strict)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if "optimizer" not in state:
                raise UserError(f"{folder} was shared or saved from a shared run: it has nothing to resume.") from error
            raise UserError(f"{folder / CHECKPOINT} does not fit its {CONFIG}: {error}") from error
        if folder == own:  # a kill between the two files, or a damaged checkpoint, has left another history
            on_first(lambda: write_text(folder / HISTORY, to_lines(self.run.history)))
