"""The optimiser of a run and its learning rate, for training and for whatever is timed or compared with it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.runs.layerwise import LayerwiseAdamW, Networks

FEW_STEPS = 0.3  # largest share of a weight that one step may take before exp(-c) is taken at its word
LARGEST_LONGER = 3.0  # shrinkage to which longer trainings may raise it
FORM: dict[str, Any] = {"fused": True}  # one kernel for each parameter


def make_optimizer(groups: list[dict[str, Any]], settings: TrainConfig, networks: Networks = ()) -> torch.optim.AdamW:
    """AdamW at the peak learning rate, in its fastest form on every device; up to rounding, all forms agree.

    Args:
        groups: of parameters, as ``Method.parameter_groups`` gives them.
        settings: ``lr`` is the rate of groups that name none.
        networks: what is trained, as ``Method.trained_networks`` says; those that started from a trained one decay
            towards it (runs/layerwise.py).
    """
    if settings.layer_decay != 1 or any(vit.centred or vit.frozen for vit, _ in networks):
        return LayerwiseAdamW(groups, networks, settings.lr, settings.layer_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, **FORM)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainConfig, steps: int) -> LambdaLR:
    """Warm-up, then cosine to 0, or halving without warm-up; fine-tuning has a cosine of its own.

    Args:
        optimizer: whose rates follow; one call of ``step()`` for each of its own.
        settings: epochs, warm-up and kind of schedule.
        steps: of an epoch.
    """
    return LambdaLR(optimizer, rate_factor(settings, steps))


def rate_factor(settings: TrainConfig, steps: int) -> Callable[[int], float]:
    """The share of the peak rate at each step of a training whose epochs have ``steps``."""
    main = steps * settings.epochs
    total, warmup = main + steps * settings.finetune_epochs, int(settings.warmup_fraction * main)

    def factor(step: int) -> float:
        if settings.schedule == "halving" and step < main:
            return halving_factor(step // steps)
        return learning_rate_factor(step, main, total, warmup, settings.finetune_lr)

    return factor


def with_decay(settings: TrainConfig, steps: int) -> TrainConfig:
    """The settings with a number for `weight_decay`: their own, or what `shrinkage` asks for.

    AdamW multiplies a weight by 1 - rate_t decay at step t, so that all steps together shrink it by exp(-c) where no
    gradient speaks for it:

        c = decay sum_t rate_t         prod_t (1 - rate_t decay) = exp(-c) where steps are few
        c = shrinkage max(1, epochs / shrinkage_epochs), but 3 at most, unless shrinkage is more itself

    Up to 120 epochs the best c hardly depends on the number of steps (Wang & Aitchison 2024), the best decay does;
    longer trainings need more (docs/tuning.md).

    Args:
        settings: of the training; returned as they are where `weight_decay` is a number.
        steps: of an epoch.

    Examples:
        >>> from pyro_isingvit import TrainConfig
        >>> short = with_decay(TrainConfig(epochs=10, lr=6e-3, shrinkage=2.0), steps=50)
        >>> longer = with_decay(TrainConfig(epochs=40, lr=6e-3, shrinkage=2.0), steps=50)
        >>> round(short.weight_decay, 2), round(longer.weight_decay, 2)
        (1.33, 0.33)
    """
    if settings.weight_decay is not None:
        return settings
    epochs, factor = settings.epochs + settings.finetune_epochs, rate_factor(settings, steps)
    longer = settings.shrinkage * max(1.0, epochs / (settings.shrinkage_epochs or epochs))
    shrinkage = min(longer, max(settings.shrinkage, LARGEST_LONGER))
    rates = [settings.lr * factor(step) for step in range(steps * epochs)]
    decay, largest = shrinkage / sum(rates), max(rates)
    if decay * largest > FEW_STEPS:
        from scipy.optimize import brentq

        def beyond(d: float) -> float:
            return math.prod(1 - rate * d for rate in rates) - math.exp(-shrinkage)

        most = 1 / largest  # which leaves nothing, but for rounding
        decay = brentq(beyond, 0, most) if beyond(most) < 0 else most
    return replace(settings, weight_decay=decay)


def halving_factor(epoch: int) -> float:
    """The paper's schedule: the learning rate is halved every 20 epochs."""
    return 0.5 ** (epoch // 20)


def learning_rate_factor(step: int, main_steps: int, total_steps: int, warmup: int, finetune: float) -> float:
    """Share of the peak learning rate: linear warm-up, cosine to 0 over the main phases, and again to fine-tune."""
    if step < warmup:
        return (step + 1) / warmup
    if step < main_steps:
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, main_steps - warmup)))
    if step >= total_steps:
        return 0.0
    done = (step - main_steps) / (total_steps - main_steps)
    return finetune * 0.5 * (1 + math.cos(math.pi * done))
