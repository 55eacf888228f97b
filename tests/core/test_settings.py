"""Settings survive the round trip, and damaged or foreign ones are named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import INFO, make_split

from inference import train
from inference.compare import CompareArguments, make_cells
from inference.peers import PeersArguments, make_config
from inference.variance import VarianceArguments
from inference.variance import make_config as variance_config
from pyro_isingvit import experiment
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.presets import PRESETS, default_preset, preset
from pyro_isingvit.core.settings import DataConfig, IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS

CONFIG = RunConfig(
    preset="cifar-linear",
    data=DataConfig("npz:x.npz", train_size=7),
    vit=preset("cifar-linear"),
    ising=IsingConfig(kappa_mask=3.5, granularity="head"),
    train=TrainConfig(epochs=3, precision="bf16"),
    version="0.5.0",
)


def test_round_trip() -> None:
    assert RunConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "data": 3}'])
def test_damaged_settings_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        RunConfig.from_json(text)


def test_another_format_is_named() -> None:
    with pytest.raises(UserError, match=r"format 99.*0\.5\.0"):
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


# Learning rates ---------------------------------------------------------------------------------------------------


def trained_by_script(monkeypatch, *words: str) -> RunConfig:
    """The settings that ``inference.train`` would train with."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(train, "_train_and_report", lambda config, *_, **__: seen.append(config))
    train.main(["--out", "unused/run", *words])
    return seen[0]


def fitted(monkeypatch, vit: str | ViTConfig, **settings: Any) -> RunConfig:
    """The settings that ``fit`` would train with."""
    seen: list[RunConfig] = []

    def caught(config: RunConfig, *_: object, **__: object) -> None:
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(experiment, "Trainer", caught)
    generator = torch.Generator().manual_seed(0)
    parts = [make_split(3, generator) for _ in range(3)]  # of other images than the network's: nothing is trained
    data = ImageData(*parts, replace(INFO, height=32, width=32))
    with pytest.raises(InterruptedError):
        experiment.fit(vit, data, **settings)
    return seen[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PRESETS)
def test_scripts_and_python_train_at_the_same_rate(name: str, method: str, monkeypatch) -> None:
    expected = METHODS[method].train.lr
    words = ["--dataset", "digits", "--preset", name, "--method", method]
    assert trained_by_script(monkeypatch, *words).train.lr == expected
    assert trained_by_script(monkeypatch, *words, "--lr", "0.0123").train.lr == 0.0123
    (cell,) = make_cells(CompareArguments(Path("x"), (method,), (300,), (0,), preset=name))
    assert cell.config.train.lr == expected
    assert fitted(monkeypatch, name, method=method).train.lr == expected
    assert fitted(monkeypatch, preset(name), method=method, lr=0.0123).train.lr == 0.0123
    assert fitted(monkeypatch, name, method=method, train=TrainConfig()).train == TrainConfig()  # all of it is given
    if method == "ising":
        assert variance_config(VarianceArguments(Path("x"), preset=name)).train.lr == expected


def test_peers_share_one_rate_by_the_width(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    for name, lr, expected in (("small", None, 2e-3), ("cifar-linear", None, 2e-3 / 3), ("cifar-linear", 0.01, 0.01)):
        assert make_config(PeersArguments(Path("x"), preset=name, lr=lr)).train.lr == pytest.approx(expected)
