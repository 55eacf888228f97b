"""max_keep "auto": noise of the masks fitted to held-out predictions."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CONFIG, make_pair, trainer

from pyro_isingvit import load_run
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.noise import fitted_keep


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_the_closed_form() -> None:
    assert logit(fitted_keep(None, 1.3, 0.7)) == pytest.approx(logit(0.95) - 4 * math.log(1.3))
    assert logit(fitted_keep(0.8, 1.3, 0.25)) == pytest.approx(logit(0.8) - 8 * 0.25 * math.log(1.3))
    assert fitted_keep(0.83, 1.0, 0.5) == pytest.approx(0.83)  # calibrated: nothing to do
    assert fitted_keep(None, 1.0, 0.5) == pytest.approx(0.95)


@pytest.mark.parametrize("keep", [None, 0.9])
def test_it_falls_with_the_temperature_within_its_range(keep: float | None) -> None:
    found = [fitted_keep(keep, t, 1.0) for t in (0.1, 0.7, 1.0, 1.1, 1.5, 10.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(0.995) and found[-1] == pytest.approx(0.6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_no_temperature_is_a_clear_error(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature must be positive"):
        fitted_keep(0.9, temperature, 0.1)


def test_the_guide_clips_its_masks_at_what_was_fitted() -> None:
    model, guide = make_pair(mask_damping=1.0, kappa_mask=1e9)
    assert guide.max_keep == pytest.approx(0.9)
    guide.phase = "pilot"
    guide.fit_mask_noise(1.2, 0.1)
    started = guide.max_keep
    assert started == pytest.approx(fitted_keep(None, 1.2, 0.1))
    guide.start_masks()
    assert guide.retention("fc1").max() == pytest.approx(started)
    guide.fit_mask_noise(1.1, 0.5)
    assert guide.max_keep == pytest.approx(fitted_keep(started, 1.1, 0.5)) and guide.max_keep < started
    guide.observe(model, torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    guide.update(model)
    highest = max(float(guide.retention(name).max()) for name in guide.layout.sites)
    assert highest == pytest.approx(guide.max_keep)
    guide.freeze(model)
    before = guide.max_keep
    guide.fit_mask_noise(2.0, 1.0)
    assert guide.max_keep == before


def test_a_number_stays() -> None:
    _, guide = make_pair(max_keep=0.85)
    guide.fit_mask_noise(2.0, 1.0)
    guide.start_masks()
    guide.fit_mask_noise(2.0, 1.0)
    assert guide.max_keep == 0.85


def test_it_travels_with_the_state_and_older_states_have_none() -> None:
    model, guide = make_pair()
    guide.fit_mask_noise(1.2, 0.1)
    state = guide.state_dict()
    other = IsingGuide(model, 50)
    other.load_state_dict(state)
    assert other.max_keep == guide.max_keep != IsingGuide(model, 50).max_keep
    state["_extra_state"] = {"phase": "ising"}
    old = IsingGuide(model, 50)
    old.load_state_dict(state)
    assert old.phase == "ising" and old.max_keep == pytest.approx(0.9)
    for strange in (2.0, math.nan, -1.0):
        state["_extra_state"] = {"phase": "ising", "max_keep": strange}
        with pytest.raises(UserError, match="max_keep is"):
            old.load_state_dict(state)


def test_training_follows_the_temperature_of_the_validation_part(data, tmp_path) -> None:
    run = trainer(data, tmp_path / "r", epochs=10, pilot_fraction=0.4).fit()
    keep = None
    for record in run.history:
        pilot = record["phase"] == "pilot"
        if record["epoch"] < 10:  # nothing follows that would clip the masks otherwise
            keep = fitted_keep(None if pilot else keep, record["val_temperature"], 1 / (4 if pilot else 6))
        assert record["max_keep"] == pytest.approx(keep)
    assert run.guide.max_keep == load_run(tmp_path / "r").guide.max_keep == run.history[-1]["max_keep"]
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["max_keep"] for line in lines] == [record["max_keep"] for record in run.history]


def test_labels_that_cannot_be_learned_end_in_more_noise(data) -> None:
    """Held-out labels that have nothing to do with the images: whatever certainty is learned is too much."""
    scrambled = replace(data, val=replace(data.val, labels=data.val.labels.roll(1)))
    config = replace(CONFIG, train=replace(CONFIG.train, epochs=30, lr=1e-2))
    plain, wrong = (trainer(each, None, config).fit().guide.max_keep for each in (data, scrambled))
    assert wrong < 0.7 < plain


def test_without_a_validation_part_it_stays_where_it_starts(data) -> None:
    empty = replace(data, val=data.val.take(np.arange(0)))
    run = trainer(empty).fit()
    assert run.guide.max_keep == pytest.approx(0.9) and "max_keep" not in run.history[-1]
