"""An ensemble of any method: members in turn, each with masks and noise of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIG, INFO, trainer

from inference.compare import CompareArguments, make_cells
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import BaselineConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.ensemble import Ensemble
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.methods.registry import METHODS, ensemble_of
from pyro_isingvit.pruning.choose import compact
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import build_run
from pyro_isingvit.trained import TrainedRun


def config(members: int, method: str = "ising-ensemble", **train: Any) -> RunConfig:
    return replace(
        CONFIG, method=method, baseline=BaselineConfig(members=members), train=replace(CONFIG.train, **train)
    )


def ensemble(members: int, method: str = "ising-ensemble", **train: Any) -> Ensemble:
    made = build_run(config(members, method, **train), INFO, 50).method
    assert isinstance(made, Ensemble)
    return made


def masks(member: Any) -> IsingMethod:
    assert isinstance(member, IsingMethod)
    return member


def test_one_member_is_the_method_itself_bit_for_bit(data: ImageData) -> None:
    alone = trainer(data, None, replace(CONFIG, train=replace(CONFIG.train, finetune_epochs=1))).fit()
    together = trainer(data, None, config(1, finetune_epochs=1)).fit()
    assert isinstance(together.method, Ensemble)
    ours, theirs = masks(together.method.networks[0]), masks(alone.method)
    for part, state in theirs.state().items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and name != "temperature":  # the ensemble has one of its own
                assert torch.equal(ours.state()[part][name], value), name
    assert together.history == alone.history and torch.equal(together.temperature, alone.temperature)
    probs = [draw_predictive(run, data.test.images, 5, seed=3).probs for run in (alone, together)]
    assert torch.equal(*probs)


def test_members_differ_and_every_one_passes_through_the_phases(data: ImageData) -> None:
    run = trainer(data, None, config(3, finetune_epochs=1)).fit()
    assert isinstance(run.method, Ensemble)
    assert [record["phase"] for record in run.history] == ["pilot"] * 2 + ["ising"] * 4 + ["finetune"]
    guides = [masks(member).guide for member in run.method.networks]
    assert all(guide.phase == "frozen" and guide.curvature_updates > 0 for guide in guides)
    kept = [torch.cat([guide.field(name).flatten() for name in guide.layout.sites]) > 0 for guide in guides]
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])
    summary = run.mask_summary()
    assert summary["masked_weights"] == 3 * masks(run.method.networks[0]).model.num_masked_weights
    assert 0 < summary["pruned_fraction"] < 1
    last = run.history[-1]
    assert last["weight_kl"] == pytest.approx(
        sum(guide.kl_terms(masks(m).model)[0] for guide, m in zip(guides, run.method.networks, strict=True)) / 3,
        rel=0.3,
    )


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_draws_are_taken_from_the_members_in_turn(data: ImageData, chunk: int) -> None:
    """Member 1 is made to see nothing: every second draw, and no other, is the same for all images."""
    run = build_run(config(2), INFO, 50)
    assert isinstance(run.method, Ensemble)
    blind = masks(run.method.networks[1])
    blind.guide.loc["patch"].data.zero_()
    blind.guide.log_scale["patch"].data.fill_(-30.0)
    probs = draw_predictive(run, data.test.images, num_samples=5, chunk=chunk).probs
    assert len(probs) == 5 and run.max_draws is None
    spread = probs.std(1).amax(-1)
    assert bool((spread[1::2] < 1e-6).all()) and bool((spread[::2] > 1e-4).all())
    assert len(probs.unique(dim=0)) == 5
    torch.testing.assert_close(probs, draw_predictive(run, data.test.images, num_samples=5).probs)


def test_the_noise_is_the_same_for_all_members() -> None:
    together = ensemble(2)
    together.set_noise(0.91)
    assert [masks(member).guide.max_keep for member in together.networks] == [0.91, 0.91] and together.noise == 0.91
    assert ensemble(2, "ensemble").noise is None
    assert ensemble(3).validation_draws(TrainConfig(val_samples=4)) == 12
    assert ensemble(3, "ensemble").validation_draws(TrainConfig(val_samples=4)) == 4


def test_it_is_kept_loaded_and_resumed_bit_for_bit(data: ImageData, tmp_path: Path) -> None:
    whole = trainer(data, tmp_path / "whole", config(2)).fit()
    broken = trainer(data, tmp_path / "broken", config(2))

    def stop(at: Any) -> None:
        if at.epoch == 4:
            raise KeyboardInterrupt

    broken.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    torch.manual_seed(99)
    resumed = trainer(data, tmp_path / "broken", config(2))
    resumed.restore()
    assert resumed.fit().history == whole.history
    expected = draw_predictive(whole, data.test.images, 5, seed=1).probs
    for name in ("whole", "broken"):
        again = open_run(tmp_path / name)
        assert torch.equal(draw_predictive(again, data.test.images, 5, seed=1).probs, expected)
        assert isinstance(again.method, Ensemble)
        assert [masks(m).guide.phase for m in again.method.networks] == ["ising"] * 2


def test_what_needs_one_posterior_is_refused_by_name_and_the_report_works(data: ImageData, tmp_path: Path) -> None:
    run = TrainedRun.of(trainer(data, None, config(2, epochs=2)).fit(), {"num_data": 60})
    assert not run.has_masks
    for ask in (lambda: run.guide, lambda: run.model, lambda: compact(run), lambda: run.prune(keep=0.5)):
        with pytest.raises(UserError, match="method ising-ensemble, which has several networks"):
            ask()
    metrics = run.evaluate(data.test, num_samples=4)
    single = build_run(CONFIG, INFO, 50).method.num_parameters()
    assert metrics["parameters"] == 2 * single and metrics["method"] == "ising-ensemble"
    page = run.report(tmp_path / "run")
    assert "ising-ensemble" in page.read_text()
    with pytest.raises(UserError, match="unlike ising-ensemble"):
        build_run(config(2), INFO, 50, model=masks(ensemble(1).networks[0]).model)


def test_settings_that_a_member_refuses_are_refused() -> None:
    with pytest.raises(UserError, match="`draws` 2 needs the fused engine"):
        ensemble(2, engine="pyro").check(TrainConfig(draws=2, engine="pyro"))
    ensemble(2).check(TrainConfig(draws=2))
    with pytest.raises(UserError, match="`draws` 2 is for method ising; ensemble has one"):
        ensemble(2, "ensemble").check(TrainConfig(draws=2))


def test_learned_masks_train_in_every_member(data: ImageData) -> None:
    learned = replace(config(2), ising=replace(CONFIG.ising, mask_posterior="learned"))
    run = trainer(data, None, learned).fit()
    assert isinstance(run.method, Ensemble) and Ensemble.leaves_unused(learned)
    averaged = run.method.averaged_parameters()  # learned masks are not
    assert set(averaged) == {
        name for name, p in run.method.named_parameters() if p.requires_grad and ".masks." not in name
    }
    assert all(averaged[name] is run.method.get_parameter(name) for name in averaged)
    for member in run.method.networks:
        assert all(float(logit.detach().abs().sum()) > 0 for logit in masks(member).guide.mask_logit.values())


def test_an_ensemble_of_another_method_is_one_row(data: ImageData, monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "dropouts", ensemble_of("dropout"))
    run = trainer(data, None, config(2, "dropouts")).fit()
    assert run.method.image_noise and run.max_draws is None
    assert len(draw_predictive(run, data.test.images, 6).probs.unique(dim=0)) == 6
    assert ensemble_of("temperature").derived_from is None  # its members are trained here
    monkeypatch.setitem(METHODS, "laplaces", ensemble_of("laplace"))
    with pytest.raises(AssertionError, match="after the last epoch"):
        ensemble(2, "laplaces")


def test_the_grid_takes_its_size(tmp_path: Path) -> None:
    (cell,) = make_cells(CompareArguments(tmp_path, ("ising-ensemble:3",), seeds=(0,)))
    assert cell.config.baseline.members == 3 and cell.config.ising == METHODS["ising"].ising
    assert cell.config.train.lr == METHODS["ising"].train.lr
