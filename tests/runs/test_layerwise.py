"""Rates that fall from block to block, and decay towards the weights that training started from."""

from dataclasses import replace

import pytest
import torch
from helpers import INFO, TINY
from torch import nn
from torch.testing import assert_close

from pyro_isingvit import UserError
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.registry import with_defaults
from pyro_isingvit.nets.start import Start
from pyro_isingvit.runs.checks import check_training
from pyro_isingvit.runs.layerwise import LayerwiseAdamW, levels
from pyro_isingvit.runs.optimiser import make_optimizer
from pyro_isingvit.runs.trainer import Trainer

SHAPE = replace(TINY, depth=3, pool="cls", registers=1, norm_pre=True)


def trained(name="dropout", init=None, **train):
    torch.manual_seed(0)
    config = with_defaults(name, RunConfig(vit=SHAPE, init=init))
    config = replace(config, train=replace(config.train, weight_decay=0.3, **train))
    return method_class(name)(config, INFO, 50)


def fill_gradients(method, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_levels_count_from_the_head():
    method = trained()
    [(vit, weights)] = method.trained_networks()
    found = levels(vit, weights)
    assert found[weights["head"]] == [0] and found[weights["patch"]] == [4] and found[weights["fc1"]] == [3, 2, 1]
    assert found[vit.norm_gain] == [3, 3, 2, 2, 1, 1, 0] and found[vit.bias["qkv"]] == [3, 2, 1]
    assert {found[p][0] for p in (vit.position, vit.cls, vit.register_tokens, vit.pre_gain)} == {4}
    assert set(found) == set(vit.parameters()) | set(weights.values())


@pytest.mark.parametrize("name", ["dropout", "ising", "ensemble"])
def test_without_decay_between_layers_it_is_adamw(name):
    """Three steps of both from the same gradients; the views must write to the whole parameters."""
    results = []
    for layered in (False, True):
        method = trained(name)
        groups = method.parameter_groups(method.config.train)
        lr = method.config.train.lr
        optimizer = (
            LayerwiseAdamW(groups, method.trained_networks(), lr, 1.0)
            if layered
            else torch.optim.AdamW(groups, lr=lr, foreach=True)
        )
        for seed in range(3):
            optimizer.zero_grad()
            assert all(p.grad is None for p in method.parameters())
            fill_gradients(method, seed)
            optimizer.step()
        results.append({n: p.detach().clone() for n, p in method.named_parameters()})
    assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_steps_shrink_by_the_factor_of_their_level():
    """Adam's first step is the rate times the gradient's sign."""
    method = trained(layer_decay=0.5, rate_rule="uniform", lr=0.01)
    settings = replace(method.config.train, weight_decay=0.0)
    optimizer = make_optimizer(method.parameter_groups(settings), settings, method.trained_networks())
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    fill_gradients(method)
    optimizer.step()
    moved = {n: (p - before[n]).abs() for n, p in method.named_parameters()}
    for name, wanted in {"loc.head": [1.0], "loc.patch": [0.5**4], "loc.fc2": [0.5**3, 0.5**2, 0.5]}.items():
        for row, factor in zip(moved[name], wanted, strict=True):
            assert_close(row, torch.full_like(row, 0.01 * factor), rtol=1e-3, atol=1e-7)
    assert_close(moved["vit.norm_gain"][-1], torch.full((8,), 0.01), rtol=1e-3, atol=1e-7)
    assert_close(moved["vit.position"], torch.full_like(moved["vit.position"], 0.01 * 0.5**4), rtol=1e-3, atol=1e-7)


def start_of_same_shape():
    method = trained()
    return Start.of(method.vit, dict(method.loc.items()), INFO.scale, "made")


@pytest.mark.parametrize("name", ["dropout", "ising"])
def test_decay_pulls_to_the_start(name):
    """Without a gradient, m - m0 shrinks by 1 - lr decay; a fresh head goes to 0."""
    method = trained(name, init="made", layer_decay=1.0)
    method.start_from(start_of_same_shape())
    settings = method.config.train
    optimizer = make_optimizer(method.parameter_groups(settings), settings, method.trained_networks())
    [(vit, weights)] = method.trained_networks()
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.1)
    gaps = {kind: (weights[kind] - vit.centre(kind)).detach().clone() for kind in weights}
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for kind, weight in weights.items():
        group = next(g for g in optimizer.param_groups if any(p.data_ptr() == weight.data_ptr() for p in g["params"]))
        left = 1 - group["lr"] * group["weight_decay"]
        assert_close((weight - vit.centre(kind)).detach(), left * gaps[kind], rtol=1e-4, atol=1e-6)
        assert left < 1


@pytest.mark.parametrize("frozen", [0, 1])
def test_decay_pulls_a_trunk_to_the_start_too(frozen):
    """Two of three blocks have ordinary weights, and the embedding; without a gradient they stay as they started."""
    config = with_defaults("ising", RunConfig(vit=SHAPE, init="made"))
    settings = replace(config.train, weight_decay=30.0, frozen_blocks=frozen)
    config = replace(config, train=settings, ising=replace(config.ising, bayesian_blocks=1))
    method = method_class("ising")(config, INFO, 50)
    method.start_from(start_of_same_shape())
    optimizer = make_optimizer(method.parameter_groups(settings), settings, method.trained_networks())
    [(vit, _)] = method.trained_networks()
    with torch.no_grad():
        vit.trunk["fc1"].add_(0.1)
    before = {kind: weight.detach().clone() for kind, weight in vit.trunk.items()}
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    for kind, weight in vit.trunk.items():
        if kind != "fc1":
            assert_close(weight.detach(), before[kind], rtol=1e-5, atol=1e-7)
    gap = (vit.trunk["fc1"][frozen:] - vit.trunk_centre("fc1")).detach()
    assert float(gap.min()) > 0.05 and float(gap.max()) < 0.0999
    assert torch.equal(vit.trunk["fc1"][:frozen], before["fc1"][:frozen])


def test_a_trunk_of_an_older_version_decays_to_0_as_it_did():
    config = with_defaults("ising", RunConfig(vit=SHAPE, init="made"))
    method = method_class("ising")(replace(config, ising=replace(config.ising, bayesian_blocks=1)), INFO, 50)
    method.start_from(start_of_same_shape())
    older = {name: value for name, value in method.state_dict().items() if "centre_trunk" not in name}
    method.load_state_dict(older)
    assert not method.model.vit.trunk_centre("fc2").any() and method.model.vit.centre("fc2").any()


def test_training_resumes_bit_for_bit(data, tmp_path):
    config = with_defaults("ising", RunConfig(vit=SHAPE, init="made"))
    train = replace(config.train, epochs=4, batch_size=20, layer_decay=0.7, device="cpu", samples=2, val_samples=2)
    config = replace(config, train=train, ising=replace(config.ising, max_keep=0.9))
    whole = Trainer(config, data, None, False, start=start_of_same_shape())
    whole.fit()

    class Stop(Exception):
        pass

    def stop(trainer):
        if trainer.epoch == 2:
            raise Stop

    first = Trainer(config, data, tmp_path, False, on_epoch=stop, start=start_of_same_shape())
    with pytest.raises(Stop):
        first.fit()
    second = Trainer(config, data, tmp_path, False)
    second.restore()
    second.fit()
    for part in ("model", "guide"):
        ours, theirs = (
            {k: v for k, v in t.method.state()[part].items() if isinstance(v, torch.Tensor)} for t in (second, whole)
        )
        assert_close(ours, theirs, rtol=0, atol=0)


def test_factors_that_cannot_be():
    for value in (0.0, 1.2):
        with pytest.raises(UserError, match="`layer_decay` must lie"):
            check_training(TrainConfig(layer_decay=value))


def test_a_plain_network_keeps_plain_adamw():
    method = trained()
    optimizer = make_optimizer(method.parameter_groups(TrainConfig()), TrainConfig(), method.trained_networks())
    assert type(optimizer) is torch.optim.AdamW
    assert isinstance(method.trained_networks()[0][1], nn.ParameterDict)
