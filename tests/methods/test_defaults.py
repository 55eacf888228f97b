"""What methods do by default beyond their own settings (docs/regularisers.md), and where they do not."""

import json
from dataclasses import asdict, replace

import pytest

from inference.regularisers import NONE, make_cells
from inference.search_trials import Trial, same_settings
from pyro_isingvit.core.regularise import REGULARISERS, regularised
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.methods.registry import HELPS, METHODS, WITHOUT, row, started, with_defaults

AS_PUBLISHED = {"ising-paper", "mean-field"}  # as they were published


@pytest.mark.parametrize("name", METHODS)
def test_what_helps_is_on_but_for_methods_as_published_and_trained_networks(name: str) -> None:
    usual = {field: getattr(row(name).train, field) for field in HELPS}
    assert usual == (WITHOUT if name in AS_PUBLISHED else HELPS)
    assert not any(getattr(started(row(name), "timm:x").train, field) for field in HELPS)


def test_it_is_the_usual_strength_of_a_regulariser_and_off_in_runs_that_do_not_say() -> None:
    strengths = {each.setting: each.strength for each in REGULARISERS.values()}
    assert {field: strengths[field] for field in HELPS} == HELPS
    assert not any(getattr(TrainConfig(), field) for field in HELPS)
    old = json.loads(RunConfig(train=METHODS["dropout"].train).to_json()) | {"version": "0.18.0"}
    for field in HELPS:
        del old["train"][field]
    assert RunConfig.from_json(json.dumps(old)).train == TrainConfig()
    assert regularised(METHODS["ising"].train, ["mhe:0.5"]).hyperspherical_energy == 0.5
    assert regularised(METHODS["ising"].train, ["mhe"]) == METHODS["ising"].train


@pytest.mark.parametrize("method", ["ising", "dropout", "temperature"])
def test_the_ablation_measures_it_against_none(method: str) -> None:
    """And its cells are those that were measured before it was a default."""
    config = with_defaults(method, RunConfig(method=method))
    cells = make_cells([("d", method, config)], ["mhe", "vne"], 0.0)
    assert [cell.config.train.hyperspherical_energy for cell in cells] == [0.0, 1.0, 0.0]
    assert [cell.trial["sets"] for cell in cells] == [{}, {"hyperspherical_energy": 1.0}, {"feature_entropy": 0.01}]
    assert cells[0].trial["regulariser"] == NONE and not HELPS.keys() & cells[0].trial["settings"].keys()


def test_a_record_that_does_not_know_it_is_of_a_training_without() -> None:
    config = with_defaults("dropout", RunConfig(method="dropout"))
    now = Trial({}, config, 0).resolved()
    without = Trial({}, replace(config, train=replace(config.train, **WITHOUT)), 0).resolved()
    older = {"resolved": {key: value for key, value in json.loads(json.dumps(now)).items() if key not in HELPS}}
    assert same_settings(without, older) and not same_settings(now, older)
    assert same_settings(now, {"resolved": now}) and same_settings(now, {})  # before 0.12 nothing was recorded
    assert set(HELPS) <= set(asdict(TrainConfig()))
