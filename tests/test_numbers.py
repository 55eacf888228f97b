"""Numbers that cannot be: in images, labels, settings and training; each is found and explained."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import INFO, TINY, make_pair, pixels, write_npz
from torch import nn

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.images import copies
from pyro_isingvit.data.inputs import load_inputs
from pyro_isingvit.data.load import load_data
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.nets.divergence import first_not_finite, not_finite
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.runs.trainer import Trainer, TrainingDiverged

NAN, INF = float("nan"), float("inf")


def trainer(data, folder=None, **settings) -> Trainer:
    train = replace(TrainConfig(), **{"epochs": 3, "device": "cpu", "val_samples": 2, "calibrate": False} | settings)
    return Trainer(RunConfig(vit=TINY, train=train, preset="custom"), data, folder, progress=False)


# ---- data


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_no_numbers_are_counted(value: float, tmp_path) -> None:
    images = np.full((30, 6, 6), 0.5)
    images[3, 2, 1:4] = value
    with pytest.raises(UserError, match="train_images has 3 NaN or infinite values"):
        load_data(write_npz(tmp_path / "a.npz", train_images=images))
    np.savez(tmp_path / "b.npz", images=images)
    with pytest.raises(UserError, match="images has 3 NaN or infinite values"):
        load_inputs(str(tmp_path / "b.npz"), INFO)
    with pytest.raises(UserError, match="train_labels has 1 NaN or infinite"):
        load_data(write_npz(tmp_path / "a.npz", train_labels=np.r_[np.arange(29.0) % 3, value]))


LABELS = {
    "fractions": (np.arange(30) / 2, "expected integers"), "text": (np.array(["cat"] * 30), "expected integers"),
    "truth": (np.arange(30) % 2 == 0, "expected integers"), "complex": (np.arange(30) * 1j, "expected integers"),
    "negative": (np.arange(30) - 1, "negative labels"), "large": (np.full(30, 2**63, np.uint64), "negative labels"),
    "missing": (np.arange(30) % 2 * 2, "empty class 1"), "one": (np.zeros(30, int), "empty class 1|only the class"),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_cannot_be(name: str, tmp_path) -> None:
    labels, message = LABELS[name]
    with pytest.raises(UserError, match=message):
        load_data(write_npz(tmp_path / "a.npz", train_labels=labels))


def test_inputs_with_labels_that_the_run_lacks(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(4, 4, 4), labels=np.array([0, 1, 2, 3]))
    with pytest.raises(UserError, match="label 3, but the run has 3 classes"):
        load_inputs(str(tmp_path / "a.npz"), INFO)


def test_fewer_images_than_a_batch(data) -> None:
    few = replace(data, train=replace(data.train, images=data.train.images[:5], labels=data.train.labels[:5]))
    run = trainer(few, batch_size=64).fit()
    assert len(run.history) == 3 and math.isfinite(run.history[-1]["loss"])


def test_copies_across_the_parts_are_counted(tmp_path, caplog) -> None:
    train, val, test = pixels(30, 6, 6), pixels(6, 6, 6, seed=1), pixels(9, 6, 6, seed=2)
    with caplog.at_level(logging.WARNING):
        load_data(write_npz(tmp_path / "a.npz"))
    assert "copies" not in caplog.text
    val[0], test[0], test[1] = train[3], train[4], val[2]
    with caplog.at_level(logging.WARNING):
        load_data(write_npz(tmp_path / "a.npz", train_images=train, val_images=val, test_images=test))
    assert "1 validation and 2 test images are copies of images in an earlier part" in caplog.text


def test_copies_among_sixty_thousand_images() -> None:
    """As many as MNIST has, of its size; a copy that differs in one bit of one pixel is none."""
    images = np.random.default_rng(0).integers(0, 256, (60_000, 1, 28, 28), dtype=np.uint8)
    images[59_999] = images[7]
    images[59_998, 0, 0, 0] ^= 1
    assert copies([images[:54_000], images[54_000:], images[:2]]) == [0, 1, 2]
    assert copies([images[:0], images[:1]]) == [0, 0]


# ---- training


@pytest.mark.parametrize("lr", [1e3, 1e8, 1e15])
def test_extreme_learning_rates(lr: float, data) -> None:
    """Explained, or survived with finite numbers."""
    try:
        run = trainer(data, lr=lr, clip_norm=1e15).fit()
        assert not_finite(run.model) is None and math.isfinite(run.history[-1]["loss"])
    except TrainingDiverged as error:
        assert "Lower `lr`" in str(error) and "first: " in str(error)


@pytest.mark.parametrize(("kind", "layer"), [("qkv", 1), ("fc1", 2), ("patch", None), ("head", None)])
def test_the_first_layer_that_is_not_finite_is_named(kind: str, layer: int | None, data, tmp_path) -> None:
    t = trainer(data, tmp_path, average=0.0)  # otherwise the callback would see the average, which is not trained

    def poison(at: Trainer) -> None:
        if at.epoch == 2:
            with torch.no_grad():
                at.run.guide.loc[kind][-1 if layer is None else layer - 1, 0, 0] = NAN
                at.run.guide.loc["head"][0, 0, 0] = NAN

    t.on_epoch = poison
    where = kind if layer is None else f"{kind}, layer {layer}"
    with pytest.raises(TrainingDiverged, match=rf"first: weights of {where}\).*after epoch 2 is kept"):
        t.fit()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 2 and all(torch.isfinite(x).all() for x in state["guide"].values() if torch.is_tensor(x))


def test_a_number_for_each_layer_is_named_too() -> None:
    """Such as the rates of concrete-dropout."""
    network = nn.Module()
    network.drop_logit = nn.ParameterDict({"qkv": nn.Parameter(torch.tensor([0.0, NAN]))})
    found = not_finite(network)
    assert found is not None and "qkv, layer 2" in found


def test_the_last_step_of_an_epoch_is_looked_at_too(data, tmp_path) -> None:
    """Its loss is finite, what it leaves is not; without the look the checkpoint would hold NaN."""
    t = trainer(data, tmp_path, batch_size=60)  # one step an epoch
    step = t.optimizer.step

    def poison() -> None:
        step()
        if t.epoch == 1:
            t.run.guide.loc["fc2"].data[0, 0, 0] = INF

    t.optimizer.step = poison
    with pytest.raises(TrainingDiverged, match=r"epoch 2.*first: weights of fc2, layer 1.*after epoch 1 is kept"):
        t.fit()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 1 and torch.isfinite(state["guide"]["loc.fc2"]).all()


def test_activations_that_overflow_are_found() -> None:
    model, guide = make_pair()
    both, x = torch.nn.ModuleList([model, guide]), torch.randn(3, 1, 4, 4)
    assert first_not_finite(both, x) is None
    with torch.no_grad():
        guide.loc["fc1"][1].fill_(3e38)
    assert not_finite(both) is None
    assert first_not_finite(both, x) == "output of fc1, layer 2"


@pytest.mark.parametrize("name", ["deterministic", "ensemble", "concrete-dropout"])
def test_baselines_are_searched_too(name: str) -> None:
    network = method_class(name)(RunConfig(vit=TINY, method=name), INFO, 50)
    x = torch.randn(3, 1, 4, 4)
    assert first_not_finite(network, x) is None
    with torch.no_grad():
        next(p for n, p in network.named_parameters() if n.endswith("loc.fc2"))[1].fill_(3e38)
    assert first_not_finite(network, x) == "output of fc2, layer 2"
    with torch.no_grad():
        next(p for n, p in network.named_parameters() if n.endswith("bias.attn_out"))[0, 0] = NAN
    assert first_not_finite(network, x) == "biases of attn_out, layer 1"
    with torch.no_grad():
        next(p for n, p in network.named_parameters() if n.endswith("position"))[0, 0] = NAN
    assert first_not_finite(network, x) == "position"


@pytest.mark.parametrize("value", [NAN, INF])
def test_metrics_of_predictions_that_are_no_numbers(value: float) -> None:
    probs = torch.full((4, 3), 1 / 3)
    probs[1, 2] = value
    with pytest.raises(UserError, match="not finite"):
        classification_metrics(probs, torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("setting", [{"lr": NAN}, {"clip_norm": NAN}, {"weight_decay": NAN}, {"pilot_fraction": NAN},
                                     {"lr": INF}, {"scale_lr_factor": INF}, {"lr": 1e38}])  # fmt: skip
def test_settings_that_are_no_numbers(setting: dict, data) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        trainer(data, **setting)


def test_no_training_images(data) -> None:
    none = replace(data, train=replace(data.train, images=data.train.images[:0], labels=data.train.labels[:0]))
    with pytest.raises(UserError, match="no training images"):
        trainer(none)


def test_blocks_above_a_trunk_are_counted_from_the_first() -> None:
    config = RunConfig(vit=replace(TINY, depth=4), ising=IsingConfig(bayesian_blocks=1))
    method = IsingMethod(config, INFO, 50)
    method.guide.loc["fc1"].data[0, 0, 0] = math.nan
    assert not_finite(method) == "weights of fc1, layer 4"
    method.model.vit.trunk["fc1"].data[2, 0, 0] = math.nan
    assert not_finite(method) == "trunk of fc1, layer 3"
