"""Skewed classes: which shares of the classes a run knows of, and what each way of balancing them computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIG, INFO, trainer

from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.split import DataInfo, ImageData
from pyro_isingvit.runs.load import open_run

# The shares of the classes ---------------------------------------------------------------------------------------


def test_counts_are_those_of_the_training_part_and_are_kept() -> None:
    images, labels = torch.zeros(100, 4, 4, dtype=torch.uint8), torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    data = ImageData.from_arrays(images, labels)
    assert data.info.counts == tuple(torch.bincount(data.train.labels).tolist())
    assert data.info.shares == pytest.approx([count / len(data.train) for count in data.info.counts])
    assert DataInfo.from_dict(data.info.to_dict()) == data.info
    older = {key: value for key, value in data.info.to_dict().items() if key != "counts"}
    assert DataInfo.from_dict(older).counts == () and DataInfo.from_dict(older).shares is None
    assert data.info.is_that_of(older) and not INFO.is_that_of(older) and not INFO.is_that_of(None)
    for wrong in ([1, 2], [-1, 2, 3], [1.0, 2, 3], "abc"):
        with pytest.raises(UserError, match="damaged"):
            DataInfo.from_dict({**data.info.to_dict(), "counts": wrong})


def test_a_run_says_under_which_shares_its_probabilities_are_meant(data: ImageData, tmp_path: Path) -> None:
    assert data.info.counts == (20, 20, 20)
    data = replace(data, train=data.train.take(np.r_[:30, 30:60:3]))
    data = replace(data, info=replace(data.info, counts=()))  # counted again
    run = trainer(data, tmp_path / "run", epochs=2).fit()
    assert run.class_prior == open_run(tmp_path / "run").class_prior == (20 / 40, 10 / 40, 10 / 40)
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["info"]["counts"]  # as version 0.6 kept it
    save_checkpoint(path, state)
    assert open_run(tmp_path / "run").class_prior is None
    again = trainer(data, tmp_path / "run", epochs=2)
    again.restore()  # the data know what the folder does not
    assert again.run.class_prior == (20 / 40, 10 / 40, 10 / 40)


@pytest.mark.parametrize("balance", ["sampler", "loss", "logit"])
def test_a_balanced_run_means_equal_classes(balance: str, data: ImageData) -> None:
    assert trainer(data, config=CONFIG, balance=balance).run.class_prior == (1 / 3, 1 / 3, 1 / 3)
