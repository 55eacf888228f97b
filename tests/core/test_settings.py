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
from pyro_isingvit.core.presets import PRESETS, default_preset, fitting_rate, preset
from pyro_isingvit.core.settings import DataConfig, IsingConfig, RunConfig, TrainConfig, ViTConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS, train_defaults

CONFIG = RunConfig(
    preset="cifar",
    data=DataConfig("npz:x.npz", train_size=7),
    vit=preset("cifar"),
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


# Learning rates ---------------------------------------------------------------------------------------------------

WIDE = ["cifar", "paper-32"]  # presets with a rate of their own


def trained_by_script(monkeypatch, *words: str) -> RunConfig:
    """The settings that ``inference.train`` would train with."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(train, "_train_and_report", lambda config, *_, **__: seen.append(config))
    train.main(["--out", "unused/run", *words])
    return seen[0]


def fitted(monkeypatch, vit: str | ViTConfig, **settings: Any) -> RunConfig:
    """The settings that ``fit`` would train with."""
    seen: list[RunConfig] = []

    def caught(config: RunConfig, *_: object) -> None:
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(experiment, "Trainer", caught)
    generator = torch.Generator().manual_seed(0)
    parts = [make_split(3, generator) for _ in range(3)]  # of other images than the network's: nothing is trained
    data = ImageData(*parts, replace(INFO, height=32, width=32))
    with pytest.raises(InterruptedError):
        experiment.fit(vit, data, **settings)
    return seen[0]


@pytest.mark.parametrize("name", ["digits", "small"])
def test_narrow_presets_keep_the_rates_of_the_methods(name: str) -> None:
    for method in METHODS:
        assert train_defaults(method, preset(name)) == METHODS[method].train


@pytest.mark.parametrize("name", WIDE)
def test_wide_presets_have_a_rate_of_their_own(name: str) -> None:
    rate = PRESETS[name].lr
    assert rate is not None and rate < TrainConfig().lr
    for method in METHODS:
        own = METHODS[method].train
        assert train_defaults(method, preset(name)) == replace(own, lr=min(own.lr, rate)), method


def test_the_rate_follows_the_width() -> None:
    for name, row in PRESETS.items():
        assert fitting_rate(1.0, row.vit) == (row.lr or 1.0), name
    assert fitting_rate(1.0, preset("small", width=192)) == fitting_rate(1.0, preset("small", width=768)) == 1e-3
    assert fitting_rate(1.0, preset("cifar", width=64, depth=12)) == 1.0 and fitting_rate(1e-4, preset("cifar")) == 1e-4
    assert fitting_rate(1.0, ViTConfig(width=8)) == 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PRESETS)
def test_scripts_and_python_train_at_the_same_rate(name: str, method: str, monkeypatch) -> None:
    expected = train_defaults(method, preset(name)).lr
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


def test_the_width_of_the_command_line_counts(monkeypatch) -> None:
    wide, narrow = ["--preset", "small", "--width", "192"], ["--preset", "cifar", "--width=48"]
    assert trained_by_script(monkeypatch, *wide).train.lr == fitted(monkeypatch, preset("small", width=192)).train.lr
    assert trained_by_script(monkeypatch, *wide).train.lr == PRESETS["cifar"].lr
    assert trained_by_script(monkeypatch, *narrow).train.lr == TrainConfig().lr


def test_peers_share_one_rate_by_the_width(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    for name, lr, expected in (("small", None, 2e-3), ("cifar", None, 1e-3), ("cifar", 0.01, 0.01)):
        assert make_config(PeersArguments(Path("x"), preset=name, lr=lr)).train.lr == expected
