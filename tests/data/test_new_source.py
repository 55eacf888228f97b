"""A new data set, from registry to pruned network, in this file alone: rows are made on demand, never all held."""

from typing import ClassVar

import torch
from helpers import TINY

from pyro_isingvit.core.settings import DataConfig, IsingConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.images import CHUNK, Images, Subset
from pyro_isingvit.data.inputs import load_inputs
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.sources import DATASETS, Parts
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.experiment import train_run
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning.choose import compact
from pyro_isingvit.pruning.finetune import finetune
from pyro_isingvit.pruning.frontier import frontier
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import attention_margins, draw_predictive

TRAIN, TEST = 5500, 120  # more training images than any pass may hold at a time


class Quadrants(Images):
    """Grey noise with a bright quadrant that tells the class, computed from the row number."""

    asked: ClassVar[list[int]] = []  # rows of each request, of all instances

    def __init__(self, count: int, first: int) -> None:
        self.shape = (count, 1, 4, 4)
        self.first = first

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        assert index.dtype == torch.int64 and index.device.type == "cpu" and len(index) > 0
        self.asked.append(len(index))
        number = (index + self.first).view(-1, 1, 1, 1)
        pixel = torch.arange(16).view(1, 1, 4, 4)
        noise = (torch.sin(number * 12.9898 + pixel.double() * 78.233) * 43758.5453).frac().abs() * 90
        bright = (pixel // 8 * 2 + pixel % 4 // 2) == number % 3
        return (noise + 150 * bright).to(torch.uint8)


def quadrants(source: DataConfig) -> Parts:
    sources = Quadrants(TRAIN, 0), Quadrants(TEST, TRAIN)
    train, test = (Split(images, (torch.arange(len(images)) + images.first) % 3) for images in sources)
    return train, None, test, ("a", "b", "c")


def test_from_registry_to_pruned_network(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(DATASETS, "quadrants", quadrants)
    Quadrants.asked.clear()
    train = TrainConfig(epochs=8, batch_size=250, samples=5, val_samples=2, device="cpu", lr=1e-2, pilot_fraction=0.4)
    data = DataConfig("quadrants", val_fraction=0.02)
    config = RunConfig("custom", "ising", data, TINY, IsingConfig(update_every=2), train)
    folder = tmp_path / "run"

    metrics = train_run(config, folder, progress=False)
    assert metrics["accuracy"] > 0.9 and (metrics["train_size"], metrics["val_size"]) == (5390, 110)
    assert metrics["temperature"] != 1.0  # fitted on validation rows
    assert max(Quadrants.asked) <= CHUNK < TRAIN
    assert "copies" not in caplog.text

    loaded = load_data("quadrants", val_fraction=0.02)
    assert isinstance(loaded.train.images, Subset) and isinstance(loaded.val.images, Subset)
    assert loaded.info == open_run(folder).info
    tree = load_datatree(folder / "posterior.nc")
    stored = tree.constant_data["pixels"].values
    tree.close()
    assert torch.equal(torch.from_numpy(stored), loaded.test.images[:])  # what the report shows

    run = open_run(folder)
    inputs = load_inputs("quadrants", run.info)
    draws = draw_predictive(run, inputs.images, 5, seed=0)
    assert classification_metrics(draws.mean, inputs.labels)["accuracy"] == metrics["accuracy"]
    in_memory = draw_predictive(run, inputs.images[:], 5, chunk=50, seed=0)
    torch.testing.assert_close(draws.probs, in_memory.probs)
    assert attention_margins(run, inputs.images, batch=50).shape[0] == TEST

    model = compact(run, val=loaded.val, keep=0.6)
    finetune(model, loaded.train, epochs=1, batch_size=500)
    assert classification_metrics(model.predict(inputs.images)[0], inputs.labels)["accuracy"] > 0.9
    assert frontier(run, loaded.val, repeats=1)
    assert max(Quadrants.asked) <= CHUNK


def test_baselines_and_all_training_rows_after_the_last_epoch(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(DATASETS, "quadrants", quadrants)
    train = TrainConfig(epochs=1, batch_size=500, samples=2, val_samples=2, device="cpu", augment="crop")
    config = RunConfig("custom", "deterministic", DataConfig("quadrants", val_fraction=0), TINY, train=train)
    assert 0 <= train_run(config, tmp_path / "run", progress=False)["accuracy"] <= 1
    # What comes after the last epoch sees the training images in order, a part at a time.
    split = load_data("quadrants", val_fraction=0).train
    seen = [(x, y) for x, y in split.batches(1024, lambda images: images.float())]
    assert len(seen) == 6 and torch.equal(torch.cat([y for _, y in seen]), split.labels)
    torch.testing.assert_close(torch.cat([x for x, _ in seen]), split.images[:].float())


def test_from_arrays_takes_rows_on_demand() -> None:
    images = Quadrants(300, 0)
    data = ImageData.from_arrays(images, torch.arange(300) % 3, classes=("a", "b", "c"), name="made")
    assert (len(data.train), len(data.val), len(data.test)) == (216, 24, 60)
    every = torch.cat([part.images[:] for part in (data.train, data.val, data.test)])
    assert sorted(every.flatten(1).tolist()) == sorted(images[:].flatten(1).tolist())
