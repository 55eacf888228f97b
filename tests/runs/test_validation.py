"""A run keeps what it predicts for its validation part, and later decisions find it again."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, TINY, trainer

from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.experiment import fit
from pyro_isingvit.predictive.datatree import load_datatree, save_datatree
from pyro_isingvit.predictive.validation import GROUP, Validation
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.validation import prior_of, validation_of
from pyro_isingvit.trained import TrainedRun, load_run


def without_group(folder: Path) -> None:
    """The folder as version 0.6 left it: no predictions for the validation part, no counts of the classes."""
    tree = load_datatree(folder / "posterior.nc")
    del tree[GROUP]
    save_datatree(tree, folder / "posterior.nc")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        state = load_checkpoint(folder / name)
        state["info"].pop("counts")
        save_checkpoint(folder / name, state)


def same(first: Validation, second: Validation) -> bool:
    numbers = (first.samples, first.seed) == (second.samples, second.seed)
    return numbers and torch.equal(first.labels, second.labels) and torch.allclose(first.probs, second.probs, atol=1e-6)


def test_it_is_kept_and_is_what_the_same_networks_say(digits_run: Path, tmp_path: Path) -> None:
    run = load_run(digits_run)
    kept = run.validation()
    assert (len(kept), kept.samples, kept.seed) == (10, 5, 3)  # one image of each class
    folder = tmp_path / "old"
    shutil.copytree(digits_run, folder)
    without_group(folder)
    old = open_run(folder)
    assert Validation.from_tree(load_datatree(folder / "posterior.nc")) is None and old.class_prior is None
    assert same(validation_of(old), kept)  # from the data, anew
    assert prior_of(old) == run.class_prior == pytest.approx([1 / 10] * 10, abs=0.02)


def test_the_test_part_saw_the_same_networks(data: ImageData) -> None:
    """Draw s of the validation part is draw s of the test part, however many the calibration takes."""
    run = TrainedRun.of(trainer(data).fit(), {"num_data": len(data.train)}, data.val)
    assert same(run.validation(), validation_of(run, data.val))
    for samples in (3, 60):
        run.evaluate(data.test, num_samples=samples)
        kept = run.validation()
        alone = draw_predictive(run, data.val.images, samples, seed=kept.seed)
        assert kept.samples == samples and torch.allclose(kept.probs, alone.mean, atol=1e-6)


def test_images_in_memory_are_gone_after_loading(data: ImageData, tmp_path: Path) -> None:
    run = fit(TINY, data, train=CONFIG.train, ising=CONFIG.ising, progress=False)
    folder = run.save(tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.evaluate\(data\).*given in memory"):
        load_run(folder).validation()
    run.evaluate(data.test)
    run.save(folder)
    assert same(load_run(folder).validation(), run.validation())
    without_group(folder)
    with pytest.raises(UserError, match=r"`training_prevalence`.*given in memory"):
        prior_of(open_run(folder))


def test_without_a_validation_part_and_without_data_it_is_refused(data: ImageData, tmp_path: Path) -> None:
    empty = replace(data, val=data.val.take(torch.arange(0).numpy()))
    run = trainer(empty, config=replace(CONFIG, ising=replace(CONFIG.ising, max_keep=0.9))).fit()
    with pytest.raises(UserError, match="without a validation part"):
        validation_of(run, empty.val)
    gone = replace(run.config, data=DataConfig("mnist", data_root=str(tmp_path)))
    run.config = gone
    with pytest.raises(UserError, match="cannot be loaded"):
        validation_of(run)
    run.config = replace(gone, data=DataConfig("digits"))
    with pytest.raises(UserError, match="other classes or images"):
        validation_of(run)


def test_a_damaged_group_is_not_used(digits_run: Path) -> None:
    tree = load_datatree(digits_run / "posterior.nc")
    tree[GROUP]["y"][:] = 12
    assert Validation.from_tree(tree) is None
    tree = load_datatree(digits_run / "posterior.nc")
    del tree[GROUP].attrs["draw_seed"]
    assert Validation.from_tree(tree) is None
