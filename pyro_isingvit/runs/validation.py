"""What a run predicts for its validation part: from its folder, or anew from the data it was trained on."""

from dataclasses import asdict, replace
from pathlib import Path

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.data.load import is_named, load_data
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.predictive.validation import Validation
from pyro_isingvit.runs.folder import POSTERIOR
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run


def validation_of(run: Run, val: Split | None = None, data_root: str | Path | None = None) -> Validation:
    """Predictions for a run's validation part.

    The run's posterior.nc has them since version 0.7. Where it lacks them, they are drawn anew, from the images that
    the settings and the seed of the run lead to.

    Args:
        run: a trained run.
        val: its validation part, where it is at hand; it is then asked anew.
        data_root: folder of the torchvision data sets; None: the run's own.

    Raises:
        UserError: the folder does not have them and the data cannot be loaded, or the run has no validation part.
    """
    if val is None and run.folder is not None and (run.folder / POSTERIOR).is_file():
        from pyro_isingvit.predictive.datatree import load_datatree

        kept = Validation.from_tree(load_datatree(run.folder / POSTERIOR))
        if kept is not None:
            return kept
    part = _validation_part(run, data_root) if val is None else val
    need(len(part) > 0, "the run was trained without a validation part (`val_fraction` 0), which this needs.")
    samples, seed = run.config.train.samples, run.config.train.seed
    draws = draw_predictive(run, part.images, samples, seed=seed)
    return Validation(draws.mean, part.labels.cpu(), len(draws.probs), seed)


def prior_of(run: Run, data_root: str | Path | None = None) -> tuple[float, ...]:
    """Shares of the classes that a run's probabilities stand for, (C,), sum 1.

    A run of version 0.6 or earlier did not count its training images: they are counted now.

    Args:
        run: a trained run.
        data_root: folder of the torchvision data sets; None: the run's own.

    Raises:
        UserError: the run does not know them and its data cannot be loaded.
    """
    if run.class_prior is not None:
        return run.class_prior
    given = (
        f"{run.folder or 'this run'} does not know how frequent the classes were in training; give their shares "
        "(`training_prevalence`)"
    )
    shares = _own_data(run, data_root, given).info.shares
    assert shares is not None  # no class of a training part is empty
    return shares


def _validation_part(run: Run, data_root: str | Path | None) -> Split:
    again = (
        f"{run.folder or 'this run'} keeps no predictions for its validation part; evaluate it again with the data it "
        "was trained on and save it: `run.evaluate(data)`, `run.save(folder, overwrite=True)`"
    )
    return _own_data(run, data_root, again).val


def _own_data(run: Run, data_root: str | Path | None, told: str) -> ImageData:
    """The parts that the run was trained on, from its settings and seed; ``told`` is what is said where that fails."""
    source = run.config.data
    need(
        is_named(source.dataset),
        f"{told}. It was shared, or trained on images given in memory, and does not say where they are.",
    )
    try:
        root = source.data_root if data_root is None else str(data_root)
        data = load_data(**asdict(replace(source, download=False, data_root=root)), seed=run.config.train.seed)
    except UserError as error:
        raise UserError(f"{told}. Its data cannot be loaded: {error}") from error
    same = (data.info.classes, data.info.image_shape) == (run.info.classes, run.info.image_shape)
    same = same and data.info.has_images_of(run.info)
    need(same, f"{told}. {source.dataset} has other classes or images now than in training.")
    return data
