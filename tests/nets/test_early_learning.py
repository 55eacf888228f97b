"""Early-learning regularisation: its formula by hand, what it remembers, and labels of which many are wrong."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, TINY, here, refused, trainer
from kills import same

from pyro_isingvit import IsingViT, ViTConfig, fit, load_data, load_run
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.early_learning import FLOOR, early_learning, first_targets
from pyro_isingvit.nets.penalties import Penalties, Seen, Settling, exchange_rows

KEY = "penalties.early_learning.targets"


def test_two_steps_by_hand() -> None:
    """t after each step, R, and the gradient -p (t - <t, p>) / ((1 - <t, p>) B) of the logits."""
    targets, rows = first_targets(4, 3)["targets"], torch.tensor([2, 0])
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]])
    p = logits.softmax(-1)
    assert targets.shape == (4, 3) and not targets.any()
    early_learning(logits, targets, rows, 0.7)
    torch.testing.assert_close(targets[rows], 0.3 * p)
    assert not targets[[1, 3]].any()  # images that the batch does not have
    z = logits.clone().requires_grad_()
    value = early_learning(z, targets, rows, 0.7)
    t = 0.7 * 0.3 * p + 0.3 * p
    inner = (t * p).sum(-1)
    torch.testing.assert_close(value.detach(), (1 - inner).log().mean())
    torch.testing.assert_close(targets[rows], t)
    (grad,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(grad, -p * (t - inner[:, None]) / (1 - inner[:, None]) / 2)


def test_the_logarithm_is_held_above_its_floor() -> None:
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = torch.tensor([[40.0, -40.0], [0.3, -0.3]], requires_grad=True)
    value = early_learning(logits, targets, torch.tensor([0, 1]), 0.9)
    (grad,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and grad.isfinite().all()
    assert not grad[0].any() and grad[1].any()
    inner = float((targets[1] * logits[1].softmax(-1)).sum().detach())
    assert float(value.detach()) == pytest.approx((math.log(FLOOR) + math.log(1 - inner)) / 2)


def test_samples_have_terms_of_their_own_and_move_the_targets_together() -> None:
    logits, rows = torch.randn(5, 4, 3), torch.arange(4)
    targets = first_targets(4, 3)["targets"]
    value = early_learning(logits, targets, rows, 0.5)
    p = logits.softmax(-1)
    torch.testing.assert_close(targets, 0.5 * p.mean(0))
    torch.testing.assert_close(value, (1 - (0.5 * p.mean(0) * p).sum(-1)).log().mean(-1))


def test_one_process_has_nothing_to_exchange() -> None:
    memory = {"targets": torch.rand(6, 3)}
    before = memory["targets"].clone()
    exchange_rows(Settling(torch.tensor([4, 1]), None, memory))
    assert torch.equal(memory["targets"], before)


def test_row_numbers_are_needed() -> None:
    penalties = Penalties(TrainConfig(early_learning=1.0), 4, 3)
    with pytest.raises(ValueError, match="row numbers"):
        penalties.terms(Seen(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))


@pytest.mark.parametrize("engine", ["fused", "pyro"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_image_remembers_its_own_predictions(engine: str, accumulate: int, data: ImageData) -> None:
    """Without noise and learning, t is the prediction times 1 - b^epochs, whatever the engine and the micro-batches."""
    ising = replace(CONFIG.ising, granularity="unit", tau_0=0.0, init_scale=1e-9, posterior_scale="shared")
    config = replace(CONFIG, ising=ising)
    train = {"early_learning": 3.0, "engine": engine, "accumulate": accumulate, "pilot_fraction": 1.0, "epochs": 3}
    run = trainer(data, config=config, lr=1e-12, calibrate=False, **train).fit()
    logits = run.draw_networks(1)(run.info.normalise(data.train.images[:])).detach()[0]
    torch.testing.assert_close(run.model.state_dict()[KEY], (1 - 0.7**3) * logits.softmax(-1), rtol=1e-3, atol=1e-5)
    assert run.history[-1]["early_learning"] < run.history[0]["early_learning"] < 0


def test_micro_batches_give_the_same_run(data: ImageData) -> None:
    config = replace(CONFIG, method="deterministic")
    runs = [trainer(data, config=config, early_learning=3.0, accumulate=pieces).fit() for pieces in (1, 4)]
    for record, expected in zip(runs[0].history, runs[1].history, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    torch.testing.assert_close(runs[0].method.state_dict()[KEY], runs[1].method.state_dict()[KEY], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "laplace"])  # which needs an extra
def test_every_method_takes_it(method: str, data: ImageData) -> None:
    run = trainer(data, config=replace(CONFIG, method=method), early_learning=2.0, epochs=2).fit()
    assert all(record["early_learning"] < 0 and math.isfinite(record["loss"]) for record in run.history)
    # A member of ising-ensemble names its table twice.
    tables = {value.data_ptr(): value for name, value in run.state()["model"].items() if name.endswith(KEY)}
    members = CONFIG.baseline.members if METHODS[method].members_of else 1
    assert len(tables) == members  # a table for each member, and none for the ensemble itself
    for table in tables.values():
        torch.testing.assert_close(table.sum(1), torch.full((60,), 1 - 0.7**2))
    first, *others = tables.values()
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("method", ["ising", "dropout", "ensemble"])
def test_resumed_equals_uninterrupted_bit_for_bit(method: str, data: ImageData, tmp_path: Path) -> None:
    config = replace(CONFIG, method=method)
    whole = trainer(data, tmp_path / "whole", config, early_learning=3.0).fit()

    def stop(at) -> None:
        if at.epoch == 3:
            raise KeyboardInterrupt

    cut = trainer(data, tmp_path / "cut", config, early_learning=3.0)
    cut.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = trainer(data, tmp_path / "cut", config, early_learning=3.0)
    again.restore()
    again.fit()
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("cut", "whole"))
    assert same({**ours, "seconds": 0}, {**theirs, "seconds": 0})
    assert any(name.endswith(KEY) for name in theirs["model"])
    assert torch.equal(load_run(tmp_path / "cut").predict(data.test.images, 3).probs,
                       load_run(tmp_path / "whole").predict(data.test.images, 3).probs)  # fmt: skip
    assert whole.history == again.run.history


def test_without_it_nothing_is_remembered(data: ImageData) -> None:
    assert not [name for name in trainer(data).method.state()["model"] if "penalties" in name]
    assert not IsingViT.for_data(data, TINY).penalties


def test_settings_that_cannot_be_are_refused(data: ImageData, tmp_path: Path) -> None:
    for settings, words in (
        ({"early_learning": -1.0}, "`early_learning` must not be negative"),
        ({"early_learning_momentum": 1.0}, "`early_learning_momentum` must be at least 0 and below 1"),
        ({"early_learning": 3.0, "mix": "regmixup"}, "`mix` regmixup does not show by itself"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(data, **settings)
    flags = ["--dataset", "digits", "--early-learning", 3, "--mix", "mixup", "--out", tmp_path / "r"]
    refused(here("inference.train", *flags), "--early-learning remembers", "set --mix to none")


@pytest.mark.parametrize("method", ["ising", pytest.param("dropout", marks=pytest.mark.slow)])
def test_two_fifths_of_the_labels_are_wrong(method: str) -> None:
    """600 digits, 40% of whose labels name another class."""
    data = load_data("digits", train_size=600, val_fraction=0.0)
    torch.manual_seed(0)
    wrong, labels = torch.randperm(600)[:240], data.train.labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (240,))) % 10
    noisy = replace(data, train=Split(data.train.images, labels))
    vit, accuracy = ViTConfig(patch_size=4, width=32, heads=4, depth=1), []
    for weight in (0.0, 3.0):
        settings = {"max_keep": 0.98} if method == "ising" else {}
        run = fit(vit, noisy, method=method, epochs=50, early_learning=weight, progress=False, **settings)
        accuracy.append(float((run.predict(data.test.images, 10).mean.argmax(-1) == data.test.labels).float().mean()))
    assert accuracy[1] > 0.85 and accuracy[1] > accuracy[0] + 0.1, accuracy
