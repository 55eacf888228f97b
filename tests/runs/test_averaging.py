"""Averaged weights: the formula by hand, where the average is used, and that raw weights train on untouched."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, tensors, trainer
from kills import same
from torch import Tensor, nn

from pyro_isingvit import draw_predictive, load_run
from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.runs.averaging import Averaging
from pyro_isingvit.runs.trainer import Trainer

FIXED = IsingConfig(update_every=2, max_keep=0.9)  # the validation part then has no say in training


def averaged(steps: list[Tensor], share: float) -> Tensor:
    """The average of the steps, by its weights instead of step by step: the later, the more."""
    gamma, weights = 2 / share - 2, torch.ones(len(steps), dtype=torch.double)
    for t in range(1, len(steps) + 1):
        rate = (gamma + 1) / (t + gamma)
        weights[: t - 1] *= 1 - rate
        weights[t - 1] = rate
    return torch.einsum("t,t...->...", weights, torch.stack(steps).double()).float()


class Recorded:
    """A trainer's raw weights of one parameter after every step."""

    def __init__(self, t: Trainer, name: str) -> None:
        self.steps: list[Tensor] = []
        real, parameter = t.averaging.follow, t.method.get_parameter(name)

        def follow() -> None:
            self.steps.append(parameter.detach().clone())
            real()

        t.averaging.follow = follow


def stopped(t: Trainer, epoch: int) -> Trainer:
    """Trains until an epoch is kept, as a user who presses Ctrl-C."""

    def stop(at: Trainer) -> None:
        if at.epoch == epoch:
            raise KeyboardInterrupt

    t.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        t.fit()
    return t


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
def test_the_average_of_a_ramp(share: float) -> None:
    """Of w_t = t the average is t minus the mean age (t - 1) share / 2, that of a uniform window."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.double))
    averaging = Averaging({"w": weight}, share)
    for t in range(1, 41):
        with torch.no_grad():
            weight.fill_(t)
        averaging.follow()
        averaging.show()
        assert weight.tolist() == pytest.approx([t - (t - 1) * share / 2] * 3)
        averaging.hide()
        assert weight.tolist() == [t] * 3 and averaging.steps == t


def test_three_steps_by_hand() -> None:
    weight = nn.Parameter(torch.zeros(()))
    averaging = Averaging({"w": weight}, 0.5)  # gamma 2: rates 1, 3/4, 3/5
    for value in (1.0, 5.0, 0.0):
        weight.data.fill_(value)
        averaging.follow()
    averaging.show()
    assert weight.item() == pytest.approx(0.4 * (1 + 0.75 * 4))
    averaging.hide()
    averaging.restart()
    weight.data.fill_(7.0)
    averaging.follow()
    averaging.show()
    assert weight.item() == 7.0  # a new average starts from its first step


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_run_holds_the_average_of_its_steps(data, share: float) -> None:
    t = trainer(data, average=share)
    loc, bias = Recorded(t, "guide.loc.fc1"), Recorded(t, "model.vit.bias.fc1")
    run = t.fit()
    torch.testing.assert_close(run.guide.loc["fc1"].detach(), averaged(loc.steps, share))
    torch.testing.assert_close(run.model.vit.bias["fc1"].detach(), averaged(bias.steps, share))
    assert not torch.allclose(run.guide.loc["fc1"], loc.steps[-1])


def test_averaging_leaves_training_alone(data) -> None:
    """Masks, curvature and raw weights are those of a run without averaging, where nothing looks at predictions."""
    config = replace(CONFIG, ising=FIXED)
    plain = trainer(data, config=config, average=0.0).fit()
    t = trainer(data, config=config, average=0.3)
    recorded = Recorded(t, "guide.loc.qkv")
    run = t.fit()
    assert torch.equal(recorded.steps[-1], plain.guide.loc["qkv"])
    ours, theirs = tensors(run.guide), tensors(plain.guide)
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {f"loc.{k}" for k in run.guide.kinds}


def test_learned_scales_are_averaged_and_masks_are_not(data) -> None:
    ising = IsingConfig(mask_posterior="hybrid", posterior_scale="learned", update_every=2)
    names = trainer(data, config=replace(CONFIG, ising=ising)).averaging.parameters
    assert {"guide.loc.fc1", "guide.log_scale.fc1", "model.vit.norm_gain"} <= set(names)
    assert not any("mask" in name for name in names)
    assert "guide.log_scale.fc1" not in trainer(data).averaging.parameters  # frozen: nothing to average


def test_validation_checkpoint_and_callback_see_the_average(data, tmp_path: Path) -> None:
    t = trainer(data, tmp_path, average=0.5)
    recorded = Recorded(t, "guide.loc.fc2")
    seen: list[Tensor] = []

    def look(at: Trainer) -> None:
        expected = averaged(recorded.steps, 0.5)
        kept, raw = load_checkpoint(tmp_path / "checkpoint.pt"), recorded.steps[-1]
        torch.testing.assert_close(at.run.guide.loc["fc2"].detach(), expected)
        assert torch.equal(kept["guide"]["loc.fc2"], at.run.guide.loc["fc2"])
        assert torch.equal(kept["raw"]["weights"]["guide.loc.fc2"], raw) and kept["raw"]["steps"] == len(recorded.steps)
        draws = draw_predictive(at.run, data.val.images, at.settings.val_samples, seed=at.epoch - 1)
        if at.run.history[-1]["phase"] == "ising":
            assert at.run.history[-1]["val_nll"] == classification_metrics(draws.mean, data.val.labels)["nll"]
            seen.append(draws.probs)

    t.on_epoch = look
    t.fit()
    assert len(seen) == 4
    finished = load_checkpoint(tmp_path / "checkpoint.pt")
    assert finished["finished"] and "raw" not in finished


def test_an_unfinished_run_predicts_with_the_average(data, tmp_path: Path) -> None:
    t = stopped(trainer(data, tmp_path), 4)
    expected = draw_predictive(t.run, data.test.images, 5).probs
    run = load_run(tmp_path)
    assert torch.equal(run.predict(data.test.images, 5).probs, expected)
    run.save(tmp_path / "copy")  # what training goes on from travels with it
    assert same(load_checkpoint(tmp_path / "copy" / "checkpoint.pt")["raw"], t.session.state()["raw"])


@pytest.mark.parametrize("stop", [3, 7])
@pytest.mark.parametrize("method", ["ising", "dropout", "magnitude", "ensemble"])
def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path: Path, method: str, stop: int) -> None:
    hybrid = IsingConfig(mask_posterior="hybrid", posterior_scale="learned", update_every=2)
    config = replace(CONFIG, method=method, ising=hybrid)
    changes = {"finetune_epochs": 2, "average": 0.4}
    whole = trainer(data, tmp_path / "whole", config, **changes)
    whole.fit()
    stopped(trainer(data, tmp_path / "broken", config, **changes), stop)
    resumed = trainer(data, tmp_path / "broken", config, **changes)
    resumed.restore()
    resumed.fit()
    states = [{**t.session.state(), "seconds": 0} for t in (whole, resumed)]
    assert same(*states) and states[0]["finished"]


def test_fine_tuning_starts_a_new_average_and_dropped_weights_stay_zero(data, tmp_path: Path) -> None:
    config = replace(CONFIG, method="magnitude")
    t = trainer(data, tmp_path, config, finetune_epochs=3, average=0.7, lr=1e-2)
    recorded = Recorded(t, "loc.fc1")
    run = t.fit()
    tuned = recorded.steps[-3 * t.steps_per_epoch :]
    torch.testing.assert_close(run.method.loc["fc1"].detach(), averaged(tuned, 0.7))
    for source in (run, load_run(tmp_path)):
        weights, kept = source.method.draw_weights(), source.kept()
        share = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
        assert share == pytest.approx(config.baseline.sparsity, abs=0.01)
        assert all(torch.equal(weights[kind] == 0, kept[kind] == 0) for kind in weights)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0])
def test_shares_out_of_range_are_refused(data, value: float) -> None:
    with pytest.raises(UserError, match="`average` must be at least 0 and below 1"):
        trainer(data, average=value)


def test_raw_weights_of_another_shape_are_refused(data, tmp_path: Path) -> None:
    stopped(trainer(data, tmp_path), 2)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    for bad in ({"raw": {**state["raw"], "weights": {}}}, {"raw": 3}):
        save_checkpoint(tmp_path / "checkpoint.pt", state | bad)
        with pytest.raises(UserError, match="does not fit"):
            trainer(data, tmp_path).restore()
    state["raw"]["weights"]["guide.loc.fc1"] = torch.zeros(1)
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UserError, match=r"raw\.guide\.loc\.fc1 has the shape \(1,\)"):
        trainer(data, tmp_path).restore()


def test_which_methods_average() -> None:
    assert {name for name, row in METHODS.items() if row.train.average == 0} == {"ising-paper"}
    raw = RunConfig(ising=IsingConfig(granularity="weight")).to_json().replace('    "average": 0.2,\n', "")
    assert '"average"' not in raw
    assert RunConfig.from_json(raw).train == replace(TrainConfig(), average=0.0)  # a run of an earlier version
