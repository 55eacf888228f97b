"""The optimiser of a run: the rates of its schedule, and numbers that its fast form does not change."""

import math
from dataclasses import replace

import pytest
import torch

from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.runs.optimiser import make_optimizer, make_schedule, rate_factor, with_decay

SETTINGS = TrainConfig(epochs=30, finetune_epochs=4, lr=0.01, warmup_fraction=0.1)
STEPS = 5


def rates(settings: TrainConfig) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([{"params": [parameter]}], settings)
    schedule = make_schedule(optimizer, settings, STEPS)
    found = []
    for _ in range(STEPS * (settings.epochs + settings.finetune_epochs)):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_with_warm_up_and_fine_tuning() -> None:
    found = rates(SETTINGS)
    warmup, main = 15, 150
    assert found[:warmup] == pytest.approx([0.01 * (i + 1) / warmup for i in range(warmup)])
    middle = (main + warmup) // 2
    assert found[warmup] == 0.01 and max(found) == 0.01
    assert found[middle] == pytest.approx(0.005 * (1 + math.cos(math.pi * (middle - warmup) / (main - warmup))))
    assert found[main - 1] < 1e-5 and found[main] == pytest.approx(0.001) and found[-1] < 1e-4


def test_halving() -> None:
    found = rates(replace(SETTINGS, schedule="halving", warmup_fraction=0.0))
    assert set(found[: 20 * STEPS]) == {0.01} and set(found[20 * STEPS : 30 * STEPS]) == {0.005}
    assert found[30 * STEPS] == pytest.approx(0.001)


@pytest.mark.parametrize("changes", [{}, {"finetune_epochs": 0}, {"schedule": "halving"}, {"epochs": 90, "lr": 2e-3}])
def test_shrinkage_is_what_is_left_of_a_weight_without_a_gradient(changes) -> None:
    settings = with_decay(replace(SETTINGS, shrinkage=2.0, **changes), STEPS)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([{"params": [parameter], "weight_decay": settings.weight_decay}], settings)
    schedule = make_schedule(optimizer, settings, STEPS)
    for _ in range(STEPS * (settings.epochs + settings.finetune_epochs)):
        parameter.grad = torch.zeros(2)
        optimizer.step()
        schedule.step()
    left = parameter.detach()
    torch.testing.assert_close(left, torch.full((2,), math.exp(-2.0)), rtol=0.02, atol=0)
    assert with_decay(replace(settings, weight_decay=0.1), STEPS) == replace(settings, weight_decay=0.1)


def test_the_fast_form_has_the_numbers_of_the_slow_one_up_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((7, 5), (3,), (2, 4, 4))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in starts] for _ in range(20)]
    results = {}
    for form, dtype in (("fast", torch.float32), ("slow", torch.float32), ("exact", torch.float64)):
        parameters = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in starts]
        groups = [
            {"params": parameters[:1], "weight_decay": 0.05},
            {"params": parameters[1:], "weight_decay": 0.0, "lr": 0.1},
        ]
        fast = form == "fast"
        made = make_optimizer(groups, SETTINGS) if fast else torch.optim.AdamW(groups, lr=SETTINGS.lr, foreach=False)
        assert bool(made.param_groups[0]["fused"]) is fast
        for each in gradients:
            for parameter, gradient in zip(parameters, each, strict=True):
                parameter.grad = gradient.to(dtype, copy=True)
            made.step()
        results[form] = torch.cat([p.detach().double().flatten() for p in parameters])
    error = {form: float((results[form] - results["exact"]).abs().max()) for form in ("fast", "slow")}
    assert error["slow"] < 1e-5 and error["fast"] < 2 * error["slow"]


@pytest.mark.parametrize("shrinkage", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12, 40, 400])
def test_few_steps_shrink_as_many_do(steps: int, shrinkage: float) -> None:
    """One step took 1.5 times the weights themselves: they changed their sign."""
    settings = TrainConfig(epochs=1, shrinkage=shrinkage)
    decay, factor = with_decay(settings, steps).weight_decay, rate_factor(settings, steps)
    left = [1 - settings.lr * factor(step) * decay for step in range(steps)]
    assert min(left) >= 0.65 if steps >= 40 else min(left) > 0
    assert math.prod(left) == pytest.approx(math.exp(-shrinkage), rel=0.25)


def test_a_shrinkage_that_leaves_nothing_has_a_decay() -> None:
    settings = TrainConfig(epochs=1, finetune_epochs=3, finetune_lr=5.0, lr=0.009, shrinkage=40.0)
    assert math.isfinite(with_decay(settings, 1).weight_decay)


def test_long_trainings_shrink_in_proportion() -> None:
    def decay(**changes) -> float:
        settings = TrainConfig(**{"shrinkage": 1.5} | changes)
        factor, steps = rate_factor(settings, STEPS), STEPS * (settings.epochs + settings.finetune_epochs)
        return with_decay(settings, STEPS).weight_decay * settings.lr * sum(map(factor, range(steps)))

    for changes, wanted in (
        ({"epochs": 40}, 1.5), ({"epochs": 120}, 1.5), ({"epochs": 240}, 3.0),
        ({"epochs": 200, "finetune_epochs": 40}, 3.0), ({"epochs": 180}, 2.25), ({"epochs": 960}, 3.0),
        ({"epochs": 240, "shrinkage_epochs": None}, 1.5), ({"epochs": 240, "shrinkage": 4.0}, 4.0),
    ):  # fmt: skip
        assert decay(**changes) == pytest.approx(wanted)
