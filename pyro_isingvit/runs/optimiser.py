"""The optimiser of a run and its learning rate, for training and for whatever is timed or compared with it."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from pyro_isingvit.core.settings import TrainConfig

FINETUNE_LR = 0.1  # peak learning rate of fine-tuning, as a share of lr


def make_optimizer(groups: list[dict[str, Any]], settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW at the peak learning rate, in its fast form on every device; the numbers are those of the slow one.

    Args:
        groups: of parameters, as ``Method.parameter_groups`` gives them.
        settings: ``lr`` is the rate of groups that name none.
    """
    return torch.optim.AdamW(groups, lr=settings.lr, foreach=True)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainConfig, steps: int) -> LambdaLR:
    """Warm-up, then cosine to 0 or halving; fine-tuning has a cosine of its own.

    Args:
        optimizer: whose rates follow; one call of ``step()`` for each of its own.
        settings: epochs, warm-up and kind of schedule.
        steps: of an epoch.
    """
    main = steps * settings.epochs
    total, warmup = main + steps * settings.finetune_epochs, int(settings.warmup_fraction * main)

    def factor(step: int) -> float:
        if settings.schedule == "halving" and step < main:
            return halving_factor(step // steps)
        return learning_rate_factor(step, main, total, warmup)

    return LambdaLR(optimizer, factor)


def halving_factor(epoch: int) -> float:
    """The paper's schedule: the learning rate is halved every 20 epochs."""
    return 0.5 ** (epoch // 20)


def learning_rate_factor(step: int, main_steps: int, total_steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, cosine to 0 over the main phases, and again to fine-tune."""
    if step < warmup:
        return (step + 1) / warmup
    if step < main_steps:
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, main_steps - warmup)))
    done = (step - main_steps) / max(1, total_steps - main_steps)
    return FINETUNE_LR * 0.5 * (1 + math.cos(math.pi * done))
