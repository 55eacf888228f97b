"""The cost of a posterior around a pretrained network, at a size that a test can afford."""

import json

import pytest
from helpers import here, refused

from inference import start_cost
from inference.start_cost import CostArguments
from pyro_isingvit.runs.trainer import Trainer


@pytest.fixture
def small(monkeypatch):
    """Cases run here, on a network that is small."""
    from torchvision.models import VisionTransformer

    def network(spec):
        return VisionTransformer(16, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)

    monkeypatch.setattr(start_cost, "_network", network)
    monkeypatch.setattr(start_cost, "_apart", lambda function, *args: function(*args))
    monkeypatch.setattr(start_cost, "_reset_peak", lambda: 0.0)


def test_a_table_and_a_file(small, tmp_path):
    done = here("inference.start_cost", "--out", tmp_path / "a.json", "--repeats", "1", "--draws", "2",
                "--bayesian-blocks", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert list(found["training"]) == [
        "plain AdamW", "ising", "ising, last 1 blocks", "ising, last 1 blocks, others frozen",
    ]  # fmt: skip
    assert found["training"]["plain AdamW"]["step_s_ratio"] == 1.0
    assert all(row["step_s"] > 0 and row["peak_mb"] > 0 for row in found["training"].values())
    assert len(found["predictions"]) == 3 and "one trunk" in done.stdout
    refused(here("inference.start_cost", "--out", tmp_path / "a.json"), "exists; add --overwrite")


@pytest.mark.parametrize("words", [
    ["--repeats", "0"], ["--init", "nope"], ["--init", "timm:nope"], ["--init", "torchvision:nope"], ["--classes", "1"],
])  # fmt: skip
def test_what_cannot_be_measured(words, tmp_path, monkeypatch):
    monkeypatch.setattr(start_cost, "_apart", lambda function, *args: function(*args))
    refused(here("inference.start_cost", "--out", tmp_path / "a.json", *words))
    assert not (tmp_path / "a.json").exists()


def test_steps_are_those_of_the_trainer(small, monkeypatch):
    taken = []
    monkeypatch.setattr(Trainer, "take_steps", lambda trainer, epoch: taken.append((epoch, trainer.steps_per_epoch)))
    ten_steps = start_cost._ising_steps(CostArguments(out=None, batch_size=4), 1, True)  # type: ignore[arg-type]
    ten_steps()
    ten_steps()
    assert taken == [(0, 10), (1, 10)]
