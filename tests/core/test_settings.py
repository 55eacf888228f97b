"""Settings survive the round trip, and damaged or foreign ones are named."""

import json
from dataclasses import replace

import pytest

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import PRESETS, DataConfig, IsingConfig, RunConfig, TrainConfig, default_preset, preset

CONFIG = RunConfig(
    preset="cifar",
    data=DataConfig("npz:x.npz", train_size=7),
    vit=PRESETS["cifar"],
    ising=IsingConfig(kappa_mask=3.5, granularity="head"),
    train=TrainConfig(epochs=3, precision="bf16"),
    version="0.0.1",
)


def test_round_trip() -> None:
    assert RunConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "data": 3}'])
def test_damaged_settings_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        RunConfig.from_json(text)


def test_another_format_is_named() -> None:
    with pytest.raises(UserError, match=r"format 99.*0\.0\.1"):
        RunConfig.from_json(replace(CONFIG, format=99).to_json())


def test_unknown_settings_are_named() -> None:
    raw = json.loads(CONFIG.to_json())
    raw["vit"]["colour"] = 1
    with pytest.raises(UserError, match="colour"):
        RunConfig.from_json(json.dumps(raw))


def test_presets() -> None:
    assert default_preset("digits") == "digits" and default_preset("cifar100") == "cifar"
    assert default_preset("imagefolder:x") == "small"
    with pytest.raises(UserError, match="paper-28"):
        preset("nope")
