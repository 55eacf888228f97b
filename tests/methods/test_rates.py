"""Rates of the weight matrices: factors by hand, every method's groups, and steps that do not grow with the width."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import INFO, TINY, trainer
from kills import same
from torch import nn

from pyro_isingvit.core.presets import PRESETS, preset
from pyro_isingvit.core.settings import BaselineConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.methods.rates import rate_factors
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.runs.folder import read_config
from pyro_isingvit.runs.optimiser import make_optimizer
from pyro_isingvit.runs.run import build_run
from pyro_isingvit.runs.trainer import Trainer

WIDE = ViTConfig(patch_size=2, width=128, heads=2, depth=6, mlp_ratio=2)


def factors(config: ViTConfig) -> dict[str, float]:
    return rate_factors(ViT(config, 3, 32, 32, 10).readers)


@pytest.mark.parametrize("name", ["digits", "small"])
def test_narrow_presets_have_the_rates_of_the_methods(name: str) -> None:
    assert set(factors(PRESETS[name]).values()) == {1.0}


def test_wide_and_deep_networks() -> None:
    inner = dict.fromkeys(["qkv", "attn_out", "fc1", "fc2"], pytest.approx(1 / 3 * 2 / 3))
    assert factors(preset("cifar-linear")) == inner | {"patch": 1.0, "head": pytest.approx(1 / 3)}
    paper = factors(preset("paper-32"))  # 16 hidden units for each channel
    assert paper.pop("patch") == 1.0 and paper.pop("fc2") == 0.5 / 8
    assert set(paper.values()) == {0.5} and "head_hidden" in paper
    assert factors(replace(TINY, width=16, depth=1))["qkv"] == 4.0


def groups(method: str, vit: ViTConfig, **train: Any) -> tuple[nn.Module, TrainConfig, list[dict[str, Any]]]:
    settings = replace(METHODS[method].train, **train)
    config = RunConfig("custom", method, vit=vit, train=settings, baseline=BaselineConfig(members=2))
    made = build_run(config, INFO, 50).method
    return made, settings, made.parameter_groups(settings)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_rule(method: str) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    made, settings, found = groups(method, WIDE, weight_decay=0.3)
    rates = {id(p): group.get("lr", settings.lr) / settings.lr for group in found for p in group["params"]}
    assert sum(len(group["params"]) for group in found) == len(rates)  # nothing twice
    assert {id(p) for p in made.parameters() if p.requires_grad} == set(rates)
    transfers = settings.rate_rule == "transfer"
    assert transfers == (method != "ising-paper")
    seen = set()
    for name, parameter in made.named_parameters():
        if not parameter.requires_grad:
            continue
        *_, part, kind = name.split(".")
        if part == "loc":
            expected = {"patch": 1.0, "head": 0.5}.get(kind, 0.5 * 2 / 3) if transfers else 1.0
        else:
            expected = 1.0 if part in ("bias", "vit") else settings.scale_lr_factor
        assert rates[id(parameter)] == pytest.approx(expected), name
        seen.add(part)
    assert {"loc", "bias", "vit"} <= seen


@pytest.mark.parametrize("rule", ["transfer", "uniform"])
def test_decay_shrinks_all_matrices_alike(rule: str) -> None:
    made, settings, found = groups("deterministic", WIDE, weight_decay=0.3, rate_rule=rule)
    matrices = {*map(id, made.loc.values())}
    shrinks = [g["lr"] * g["weight_decay"] for g in found for p in g["params"] if id(p) in matrices]
    assert len(shrinks) == 6 and shrinks == pytest.approx([settings.lr * 0.3] * 6)
    assert len(found) == (5 if rule == "transfer" else 3)


def test_one_rate_is_one_group() -> None:
    """What a checkpoint of an earlier version holds of the optimiser still fits."""
    for vit, rule in ((WIDE, "uniform"), (replace(WIDE, width=64, depth=4), "transfer")):
        made, settings, found = groups("ising", vit, rate_rule=rule)
        assert [*map(id, found[0]["params"])] == [*map(id, made.guide.loc.values())]
        assert found[0]["lr"] == settings.lr and len(found) == 2


def test_a_run_of_an_earlier_version_resumes_at_its_rates(data, tmp_path: Path) -> None:
    changes = {"average": 0.0, "rate_rule": "uniform"}
    whole = trainer(data, tmp_path / "whole", **changes)
    whole.fit()
    broken = trainer(data, tmp_path / "old", **changes)
    broken.on_epoch = lambda at: at.epoch == 3 and (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    path = tmp_path / "old" / "config.json"
    raw = json.loads(path.read_text()) | {"version": "0.4.0"}
    for name in changes:
        del raw["train"][name]
    path.write_text(json.dumps(raw))
    resumed = Trainer(read_config(tmp_path / "old"), data, tmp_path / "old", progress=False)
    resumed.restore()
    resumed.fit()
    states = [{**t.session.state(), "seconds": 0} for t in (whole, resumed)]
    assert same(*states)


def moved(data, width: int, rule: str) -> float:
    """By how much three steps on the matrices behind the patch embedding change the logits, root mean square."""
    torch.manual_seed(0)
    vit = replace(TINY, width=width, heads=width // 16)
    made, settings, found = groups("deterministic", vit, rate_rule=rule, lr=4e-3)
    kept = {id(p) for kind, p in made.loc.items() if kind != "patch"}
    alone = [{**group, "params": [p for p in group["params"] if id(p) in kept]} for group in found]
    optimizer = make_optimizer([group for group in alone if group["params"]], settings)
    x, y = INFO.normalise(data.train.images), data.train.labels
    before = made.vit(made.weights(), x).detach()
    for _ in range(3):
        optimizer.zero_grad()
        made(x, y)["nll"].backward()
        optimizer.step()
    return float((made.vit(made.weights(), x).detach() - before).pow(2).mean().sqrt())


def test_steps_do_not_grow_with_the_width(data) -> None:
    """What the same rate does to the logits of a network that is eight times as wide."""
    transfer, uniform = (moved(data, 512, rule) / moved(data, 64, rule) for rule in ("transfer", "uniform"))
    assert 0.5 < transfer < 2 and uniform > 3
