"""Reparametrised matrices: against the SVD and by hand, what reads them, every baseline's training, refusals."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, resumed_like_whole, trainer
from torch import nn

from pyro_isingvit import load_run
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.divergence import not_finite
from pyro_isingvit.nets.reparametrise import Compander, SigmaReparam, follow, gains, reparametrise, trained
from pyro_isingvit.runs.checks import check_training

PLAIN = replace(CONFIG, method="deterministic")
NAMES = ("sigma_reparam", "weight_compander")
OURS = [name for name, row in METHODS.items() if "methods.ising:" in row.home or row.members_of == "ising"]
BASELINES = [name for name in METHODS if name not in OURS]


def matrices() -> nn.ParameterDict:
    return nn.ParameterDict({"qkv": nn.Parameter(torch.randn(3, 12, 4)), "head": nn.Parameter(torch.randn(1, 3, 4))})


# The formulas ---------------------------------------------------------------------------------------------------------


def test_it_starts_as_what_it_was_and_its_norm_is_that_of_the_svd() -> None:
    weights = matrices()
    before = {kind: weight.detach().clone() for kind, weight in weights.items()}
    reparametrise(weights, TrainConfig(sigma_reparam=1.0))
    for kind, weight in before.items():
        torch.testing.assert_close(weights[kind], weight)
        torch.testing.assert_close(weights[kind], trained(weights)[kind].detach())
    doubled = matrices()
    reparametrise(doubled, TrainConfig(sigma_reparam=2.0))
    for kind, value in trained(doubled).items():
        torch.testing.assert_close(doubled[kind], 2 * value)


def test_the_power_iteration_comes_to_the_svd_and_the_gain_is_the_norm() -> None:
    weights = matrices()
    reparametrise(weights, TrainConfig(sigma_reparam=1.0))
    with torch.no_grad():
        for value in trained(weights).values():
            value.copy_(torch.randn_like(value))
        for gain in gains(weights):
            gain.fill_(1.7)
    far = max(
        float((torch.linalg.matrix_norm(w, 2) - 1.7).abs().max()) for w in map(torch.Tensor.detach, weights.values())
    )
    for _ in range(300):
        follow(weights)
    for weight in weights.values():
        torch.testing.assert_close(
            torch.linalg.matrix_norm(weight, 2), torch.full((len(weight),), 1.7), rtol=1e-4, atol=0
        )
    assert far > 0.1


def test_its_gradient_is_that_of_the_svd() -> None:
    value = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
    made = SigmaReparam(value, 1.0)
    direction = torch.randn(2, 5, 4, dtype=torch.double)
    gain = made.gain.detach()
    wanted = (gain * value / torch.linalg.matrix_norm(value, 2)[:, None, None] * direction).sum()
    found = (made(value) * direction).sum()
    for ours, theirs in zip(torch.autograd.grad(found, value), torch.autograd.grad(wanted, value), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_scale_of_what_is_trained_changes_nothing() -> None:
    value = torch.randn(2, 5, 4)
    made = SigmaReparam(value, 1.0)
    torch.testing.assert_close(made(3.0 * value), made(value))
    assert bool(made(torch.zeros(2, 5, 4)).isfinite().all())


def test_the_compander_by_hand() -> None:
    value = torch.tensor([[[-0.5, 0.1], [0.0, 0.25]]], requires_grad=True)
    made = Compander(value, 2.0)
    assert float(made.bound) == 1.0
    weight = made(value)
    assert weight.flatten().tolist() == pytest.approx([math.atan(v) for v in (-0.5, 0.1, 0.0, 0.25)])
    (gradient,) = torch.autograd.grad(weight.sum(), value)
    torch.testing.assert_close(gradient, (1 / (1 + value**2)).detach())
    assert float(made(torch.full((1, 1, 1), 1e9))) == pytest.approx(math.pi / 2, rel=1e-6)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_trains_and_loads_with_it(data: ImageData, tmp_path, method: str, name: str) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    train = replace(METHODS[method].train, epochs=3, finetune_epochs=1, batch_size=20, val_samples=1, device="cpu")
    run = trainer(data, tmp_path / "run", replace(CONFIG, method=method, train=train), **{name: 1.0}).fit()
    assert all(math.isfinite(record["loss"]) for record in run.history)
    x, probs = data.info.normalise(data.test.images[:4]), []
    for each in (run, load_run(tmp_path / "run")):
        torch.manual_seed(1)
        probs.append(each.draw_networks(2)(x))
    assert torch.equal(*probs)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_moves_and_nothing_else_of_the_matrices_is_trained(data, name: str) -> None:
    made = trainer(data, None, PLAIN, **{name: 1.0})
    loc = made.method.loc
    groups = {id(p): group for group in made.optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(made.method.parameters()))
    before = copy.deepcopy(loc)
    made.fit()
    for kind, value in trained(loc).items():
        assert id(value) in groups and not torch.equal(value, trained(before)[kind])
    for gain, old in zip(gains(loc), gains(before), strict=True):
        assert groups[id(gain)]["weight_decay"] == 0.0 and not torch.equal(gain, old)
    assert len(gains(loc)) == (len(loc) if name == "sigma_reparam" else 0)
    if name == "weight_compander":
        bound = {kind: loc.parametrizations[kind][0].bound for kind in loc}
        assert all(float(w.detach().abs().max()) < math.pi / 2 * float(bound[kind]) for kind, w in loc.items())


def test_the_norm_follows_the_training(data) -> None:
    """A power iteration a step keeps sigma within a tenth of the SVD in 36 steps."""
    made = trainer(data, None, PLAIN, sigma_reparam=1.0, average=0.0, epochs=12)
    before = copy.deepcopy(made.method.loc)
    made.fit()
    for kind, value in trained(made.method.loc).items():
        parametrisation = made.method.loc.parametrizations[kind][0]
        exact = torch.linalg.matrix_norm(value, 2)[:, None, None]
        torch.testing.assert_close(parametrisation.sigma(value), exact, rtol=0.1, atol=0)
        assert not torch.equal(parametrisation.u, before.parametrizations[kind][0].u)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_leave_the_run_as_it_is(data, name: str) -> None:
    whole, parts = (trainer(data, None, PLAIN, accumulate=n, **{name: 1.0}).fit().history for n in (1, 4))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["deterministic", "ensemble"])
def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path, method: str, name: str) -> None:
    config = replace(CONFIG, method=method)
    state = resumed_like_whole(
        data, tmp_path, lambda *rest, **more: trainer(*rest, config=config, **more), **{name: 1.0}
    )
    assert any("parametrizations.qkv" in key for key in state["model"])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(data, name: str) -> None:
    run = trainer(data, None, PLAIN, precision="bf16", **{name: 1.0}).fit()
    assert math.isfinite(run.history[-1]["loss"])


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_where_it_cannot_be(data, name: str) -> None:
    for method in ("ising", "mean-field", "ising-ensemble"):
        with pytest.raises(UserError, match=f"`{name}` is for ordinary weights"):
            trainer(data, None, replace(CONFIG, method=method), **{name: 1.0})
    for config in (replace(PLAIN, init="somewhere"), replace(PLAIN, train=replace(PLAIN.train, layer_decay=0.5))):
        with pytest.raises(UserError, match=f"`{name}` is for a training from random weights"):
            trainer(data, None, config, **{name: 1.0})
    with pytest.raises(UserError, match="leave one out"):
        check_training(TrainConfig(sigma_reparam=1.0, weight_compander=1.0))
    with pytest.raises(UserError, match=f"`{name}` must not be negative"):
        check_training(TrainConfig(**{name: -1.0}))


def test_a_matrix_that_is_not_finite_is_named(data) -> None:
    method = trainer(data, None, PLAIN, sigma_reparam=1.0).method
    with torch.no_grad():
        trained(method.loc)["fc1"][1, 0, 0] = math.nan
    assert not_finite(method) == "weights of fc1, layer 2"
