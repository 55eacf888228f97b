"""A new baseline is one class and one row: this file makes one and touches no other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, trainer
from torch import Tensor

from inference.compare import CompareArguments, make_cells
from inference.train import main
from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.base import Networks
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.methods.registry import METHODS, Row
from pyro_isingvit.nets.vit import Weights
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import draw_predictive


class GaussianNoise(Plain):
    """Multiplicative Gaussian noise on every weight, at prediction too: w (1 + r eps), r the drop rate."""

    max_draws = None

    def weights(self) -> Weights:
        """One draw of the noise a step."""
        return {kind: w * (1 + self.settings.drop_rate * torch.randn_like(w)) for kind, w in self.loc.items()}

    draw_weights = weights

    def penalty(self) -> Tensor:
        """Nats over all images."""
        return 0.01 * torch.stack([weight.pow(2).sum() for weight in self.loc.values()]).sum()

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Networks under noise of their own."""
        return super().draw_networks(count, first)


@pytest.fixture(autouse=True)
def row(monkeypatch) -> None:
    monkeypatch.setitem(
        METHODS,
        "gaussian-noise",
        Row(f"{__name__}:GaussianNoise", train=TrainConfig(lr=3e-3), knob=("baseline", "drop_rate")),
    )


def test_it_trains_resumes_and_predicts(data: ImageData, tmp_path: Path) -> None:
    config = RunConfig(method="gaussian-noise", vit=TINY, train=TrainConfig(epochs=8, batch_size=20, lr=1e-2))
    run = trainer(data, tmp_path, config).fit()
    assert isinstance(run.method, GaussianNoise) and not run.has_masks
    assert {"nll", "penalty"} <= set(run.history[-1]) and run.history[-1]["nll"] < run.history[0]["nll"]
    draws = draw_predictive(run, data.test.images, 5)
    assert draws.probs.shape == (5, 30, 3) and draws.probs.std(0).max() > 1e-3
    again = open_run(tmp_path)
    assert torch.equal(draw_predictive(again, data.test.images, 5).probs, draws.probs)


def test_the_command_line_knows_it(tmp_path: Path, capsys) -> None:
    made = np.random.default_rng(0)
    path = tmp_path / "x.npz"
    arrays = {
        f"{part}_images": made.integers(0, 255, (n, 8, 8), dtype=np.uint8) for part, n in (("train", 40), ("test", 9))
    }
    np.savez(path, **arrays, train_labels=np.arange(40) % 3, test_labels=np.arange(9) % 3)
    words = f"--dataset npz:{path} --method gaussian-noise --drop-rate 0.2 --epochs 2 --depth 1 --width 8 --heads 2"
    main([*words.split(), "--patch-size", "4", "--device", "cpu", "--samples", "3", "--out", str(tmp_path / "r")])
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["method"] == "gaussian-noise" and config["baseline"]["drop_rate"] == 0.2
    assert config["train"]["lr"] == 3e-3
    assert "accuracy" in capsys.readouterr().out


def test_the_grid_knows_it_and_its_number(tmp_path: Path) -> None:
    arguments = CompareArguments(tmp_path, methods=("gaussian-noise:0.3",), seeds=(0,), data=DataConfig())
    (cell,) = make_cells(replace(arguments, train_sizes=(100,)))
    assert cell.config.method == "gaussian-noise" and cell.config.baseline.drop_rate == 0.3
