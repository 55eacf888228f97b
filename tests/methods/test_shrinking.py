"""HyperSparse and LOBSTER: value and gradient by hand, the schedule, decay at a zero gradient, and the cut."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import INFO, TINY

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import BaselineConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.plain import check_baseline
from pyro_isingvit.methods.registry import METHODS, with_defaults
from pyro_isingvit.methods.shrinking import HyperSparse, Lobster, hypersparse
from pyro_isingvit.nets.vit import Weights
from pyro_isingvit.runs.steps import total
from pyro_isingvit.runs.trainer import Trainer

BOTH = ["hypersparse", "lobster"]


def config(method: str, train: dict | None = None, **baseline: float) -> RunConfig:
    chosen = {"epochs": 6, "finetune_epochs": 2, "batch_size": 20, "lr": 1e-2, "device": "cpu", "samples": 4}
    settings = replace(METHODS[method].train, **(chosen | (train or {})))
    return RunConfig("custom", method, vit=TINY, train=settings, baseline=replace(BaselineConfig(), **baseline))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 1, 4, 4), torch.arange(8) % 3


def matrices() -> Weights:
    torch.manual_seed(1)
    return {"a": torch.randn(2, 5, 4).requires_grad_(), "b": (0.1 * torch.randn(1, 3, 7)).requires_grad_()}


# HyperSparse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_value_and_gradient_by_hand(share: float) -> None:
    """0, and sum abs(w) / sum t * s / cosh(s abs(w))^2 * sign(w); the formula with both sums says the same."""
    weights = matrices()
    w = torch.cat([weight.flatten() for weight in weights.values()]).detach()
    s = 0.6585 / w.abs().sort().values[math.floor(share * len(w))]
    by_hand = w.abs().sum() / (s * w.abs()).tanh().sum() * s / (s * w.abs()).cosh() ** 2 * w.sign()
    value = hypersparse(weights, share)
    assert float(value.detach()) == 0.0
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, weights.values())])
    torch.testing.assert_close(gradient, by_hand)
    w = w.requires_grad_()
    t = (s * w.abs()).tanh()
    told = (w.abs() * t.sum() / t.sum().detach()).sum() - w.abs().sum()
    (gradient,) = torch.autograd.grad(told, w)
    assert float(told.detach()) == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(gradient, by_hand)


def test_small_weights_are_pulled_harder_than_large_ones() -> None:
    w = {"a": (torch.arange(-200, 201) / 100).requires_grad_()}
    (gradient,) = torch.autograd.grad(hypersparse(w, 0.9), w["a"])
    pull = (gradient * w["a"].detach().sign()).detach()
    assert pull[200] == 0 and bool((pull[201:400] > pull[202:]).all()) and pull[400] < 0.7 * pull[201]
    assert bool((pull >= 0).all())


def test_nothing_is_divided_by_weights_of_0() -> None:
    zero = {"a": torch.zeros(3, 4, requires_grad=True)}
    (gradient,) = torch.autograd.grad(hypersparse(zero, 0.5), zero["a"])
    assert not gradient.isinf().any()


def test_the_weight_grows_after_the_warm_up() -> None:
    network = HyperSparse(config("hypersparse", {"epochs": 10}), INFO, 50)
    steps = [network.weight_at(step / 70) for step in range(70)]  # 7 steps an epoch
    assert set(steps[:28]) == {0.0}
    for epoch in range(4, 10):
        for weight in steps[7 * epoch : 7 * epoch + 7]:
            assert weight == pytest.approx(5e-6 * 1.05 ** (epoch - 4))
    x, y = batch()
    network.before_step(x, y, "finetune", 0, 0.9)
    assert network.weight == 0.0 and float(network(x, y)["penalty"].detach()) == 0.0
    network.before_step(x, y, "train", 0, 0.9)
    assert network.weight == steps[63] > 5e-6


def test_its_loss_is_added_to_the_others() -> None:
    """The gradient of a step is that of the plain network, and weight times the one by hand."""
    network, (x, y) = HyperSparse(config("hypersparse", sparsity=0.7, hypersparse_weight=0.1), INFO, 50), batch()
    found = []
    for progress in (0.0, 0.5):
        network.before_step(x, y, "train", 0, progress)
        network.zero_grad()
        total(network(x, y)).backward()
        found.append({kind: weight.grad.clone() for kind, weight in network.loc.items()})
    weights = dict(network.loc.items())
    pulls = torch.autograd.grad(hypersparse(weights, 0.7), weights.values())
    for kind, pull in zip(weights, pulls, strict=True):
        torch.testing.assert_close(found[1][kind], found[0][kind] + network.weight * pull, rtol=1e-4, atol=1e-6)


def test_it_concentrates_the_weights_before_the_cut(data: ImageData) -> None:
    """The share of the sum of sizes that the cut takes is smaller with the loss than without."""
    lost = []
    for weight in (0.0, 0.01):
        run = Trainer(
            config("hypersparse", {"finetune_epochs": 0, "epochs": 20}, hypersparse_weight=weight), data, None, False
        ).fit()
        assert isinstance(run.method, HyperSparse)
        kept = {kind: mask.bool() for kind, mask in run.method.kept().items()}
        sizes = {kind: loc.abs().detach() for kind, loc in run.method.loc.items()}
        lost.append(
            sum(float(sizes[k][~kept[k]].sum()) for k in kept) / sum(float(each.sum()) for each in sizes.values())
        )
    assert lost[1] < 0.8 * lost[0]


# LOBSTER --------------------------------------------------------------------------------------------------------------


def test_a_step_by_hand() -> None:
    """w - lr g - weight w max(0, 1 - abs(g)), with the gradient of the step and SGD as in the source."""
    network, (x, y) = Lobster(config("lobster", lobster_weight=0.1), INFO, 50), batch()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    before = {kind: weight.detach().clone() for kind, weight in network.loc.items()}
    (30 * total(network(x, y))).backward()  # so that some gradients are above 1
    gradients = {kind: weight.grad.clone() for kind, weight in network.loc.items()}
    assert any(bool((g.abs() > 1).any()) for g in gradients.values())
    network.before_step(x, y, "train", 0, 0.0)
    network.settle(torch.arange(8))
    optimizer.step()
    for kind, g in gradients.items():
        w = before[kind]
        wanted = w - 0.5 * g - 0.1 * w * (1 - g.abs()).clamp(min=0)
        torch.testing.assert_close(network.loc[kind].detach(), wanted)


def test_at_a_zero_gradient_it_is_weight_decay() -> None:
    network, (x, y) = Lobster(config("lobster", lobster_weight=0.02), INFO, 50), batch()
    decayed = {kind: weight.detach().clone().requires_grad_() for kind, weight in network.loc.items()}
    decay = torch.optim.AdamW(decayed.values(), lr=0.1, weight_decay=0.2)  # rate times decay: 0.02
    plain = torch.optim.AdamW(network.loc.values(), lr=0.1, weight_decay=0.0)
    network.before_step(x, y, "train", 0, 0.0)
    for _ in range(5):
        for weight in (*network.loc.values(), *decayed.values()):
            weight.grad = torch.zeros_like(weight)
        network.settle(torch.arange(8))
        plain.step()
        decay.step()
    for kind, weight in network.loc.items():
        torch.testing.assert_close(weight.detach(), decayed[kind].detach())


def test_fine_tuning_is_without_it() -> None:
    network, (x, y) = Lobster(config("lobster", lobster_weight=0.5), INFO, 50), batch()
    before = network.loc["fc1"].detach().clone()
    total(network(x, y)).backward()
    network.before_step(x, y, "finetune", 0, 0.0)
    network.settle(torch.arange(8))
    assert torch.equal(network.loc["fc1"].detach(), before)


# Both -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("finetune_epochs", [0, 2])
def test_they_end_with_the_share_that_was_asked_for(data: ImageData, method: str, finetune_epochs: int) -> None:
    run = Trainer(config(method, {"finetune_epochs": finetune_epochs}, sparsity=0.7), data, None, False).fit()
    summary = run.mask_summary()
    assert summary["pruned_fraction"] == pytest.approx(int(0.7 * summary["masked_weights"]) / summary["masked_weights"])
    assert [record["phase"] for record in run.history] == ["train"] * 6 + ["finetune"] * finetune_epochs
    dropped = [record["pruned_fraction"] for record in run.history]
    assert dropped == [0.0] * 6 + [summary["pruned_fraction"]] * finetune_epochs


@pytest.mark.parametrize("method", BOTH)
def test_micro_batches_and_half_precision(method: str, data: ImageData) -> None:
    strong = {"hypersparse_weight": 0.01, "lobster_weight": 0.01}
    made = config(method, **strong)
    histories = [
        Trainer(replace(made, train=replace(made.train, **more)), data, None, False).fit().history
        for more in ({}, {"accumulate": 2}, {"precision": "bf16"})
    ]
    for whole, parts, half in zip(*histories, strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert half["loss"] == pytest.approx(whole["loss"], rel=0.1)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("at", [2, 4, 7])
def test_resumes_bit_for_bit(method: str, at: int, data: ImageData, tmp_path: Path) -> None:
    strong = {"hypersparse_weight": 0.01, "lobster_weight": 0.01}
    whole = Trainer(config(method, **strong), data, None, False).fit()
    broken = Trainer(config(method, **strong), data, tmp_path, False)

    def stop(trainer: Trainer) -> None:
        if trainer.epoch == at:
            raise KeyboardInterrupt

    broken.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    resumed = Trainer(config(method, **strong), data, tmp_path, False)
    resumed.restore()
    again = resumed.fit()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    assert whole.history == again.history


def test_they_train_as_long_as_the_others_and_take_a_share() -> None:
    for method in BOTH:
        train = METHODS[method].train
        assert train.epochs + train.finetune_epochs == TrainConfig().epochs
        short = with_defaults(f"{method}:0.9", RunConfig(), 10)
        assert short.baseline.sparsity == 0.9 and short.train.epochs + short.train.finetune_epochs == 10
        assert issubclass(method_class(method), HyperSparse if method == "hypersparse" else Lobster)


@pytest.mark.parametrize(
    "bad", [{"hypersparse_weight": -1.0}, {"hypersparse_growth": math.nan}, {"lobster_weight": 2.0}]
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        check_baseline(replace(BaselineConfig(), **bad))
