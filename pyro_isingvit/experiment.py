"""A run from settings to metrics: load, train or continue, evaluate once."""

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyro_isingvit.core.checkpoint import previous_of, remove_leftovers
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.processes import launched, on_first
from pyro_isingvit.core.settings import DataConfig, RunConfig, TrainConfig
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.evaluation import evaluate
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.registry import train_defaults
from pyro_isingvit.runs.folder import CHECKPOINT, CONFIG, HISTORY, METRICS, POSTERIOR
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.trainer import Trainer
from pyro_isingvit.version import __version__

PREVIOUS = previous_of(Path(CHECKPOINT)).name
FILES = (CONFIG, CHECKPOINT, PREVIOUS, HISTORY, METRICS, POSTERIOR)  # first what makes the folder a run


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return any((folder / name).exists() for name in (CONFIG, CHECKPOINT, PREVIOUS))


def clear_run(folder: Path) -> None:
    """Removes an earlier run's files, and those alone.

    Raises:
        UserError: they cannot be removed.
    """
    try:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        remove_leftovers(folder, FILES)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}.") from error
    shutil.rmtree(folder / "report", ignore_errors=True)


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    full_posterior: bool = False,
    progress: bool = True,
    trained: Path | None = None,
) -> dict[str, Any]:
    """Trains and evaluates one run, and keeps it in a folder.

    Args:
        config: all settings; when resuming, those of the folder.
        folder: where the run is kept; an earlier run in it is replaced unless ``resume``.
        resume: continue from the folder's checkpoint.
        full_posterior: keep every mask and weight draw in posterior.nc.
        progress: show progress bars.
        trained: a finished run of the same network, data and seed whose weights are taken instead of training
            (methods that add something after ordinary training: temperature, laplace).

    Returns:
        what metrics.json holds.

    Raises:
        UserError: data, settings or folder that cannot be used; an earlier run is then untouched.
        TrainingDiverged: the loss was not finite.
        KeyboardInterrupt: Ctrl-C; its message says what is kept and how to go on.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a run needs a folder.")
    if config.data.download and launched() != (1, 1):
        raise UserError("several processes would fetch the data at once; do that before, by a run without torchrun.")
    data = load_data(**dataclasses.asdict(config.data), seed=config.train.seed)
    trainer = Trainer(config, data, folder, progress)
    if trained is not None:
        trainer.adopt(trained)
    elif resume:
        trainer.restore()
        on_first(lambda: remove_leftovers(folder, FILES))
    if not resume:
        on_first(lambda: clear_run(folder))
    run = trainer.fit()
    try:
        return evaluate(run, data, trainer.seconds, full_posterior, progress)
    except KeyboardInterrupt as stop:
        stop.args = (f"interrupted in the evaluation; the trained network is kept in {folder}",)
        raise


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
        train: training settings; None takes the defaults of the method for a network of this width.
        progress: show a progress bar.
        **settings: single fields of ``TrainConfig``, such as ``epochs=60``.

    Raises:
        UserError: data that do not fit the model, or a setting out of its range.
        TrainingDiverged: the loss was not finite.
    """
    try:
        chosen = replace(train or train_defaults("ising", model.vit.config), **settings)
    except TypeError as error:
        raise UserError(f"{error}; the training settings are the fields of TrainConfig.") from error
    config = RunConfig(
        data=DataConfig(dataset=data.info.dataset), vit=model.vit.config, ising=model.ising, train=chosen,
        version=__version__, preset="custom",
    )  # fmt: skip
    return Trainer(config, data, None, progress, model).fit()
