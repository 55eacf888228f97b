"""Regularisers by name: NAME:STRENGTH stands for settings of training, several at once.

A new one is a row in ``REGULARISERS``; what it does is a penalty (nets/penalties.py), a change of the images or labels
(data/augment.py), of the tokens or hidden states of a step (nets/view.py) or of what matrices are
(nets/reparametrise.py), and a field of ``TrainConfig``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.train_settings import TrainConfig


@dataclass(frozen=True)
class Regulariser:
    """One row.

    Attributes:
        setting: field of ``TrainConfig`` that takes the strength.
        strength: where none is given.
        most: the largest strength that makes sense; the least is above 0.
        below: the strength must stay below ``most``.
        sets: further fields and their values.
    """

    setting: str
    strength: float
    most: float = math.inf
    below: bool = False
    sets: dict[str, Any] = field(default_factory=dict)


REGULARISERS: dict[str, Regulariser] = {
    "token-masking": Regulariser("token_masking", 0.25, 1.0, True),
    "sigma-reparam": Regulariser("sigma_reparam", 1.0),
    "weight-compander": Regulariser("weight_compander", 1.0),
    "nested-dropout": Regulariser("nested_dropout", 0.5, 1.0),
    "regmixup": Regulariser("mix_alpha", 10.0, 1e3, sets={"mix": "regmixup"}),
    "mixup": Regulariser("mix_alpha", 0.2, 1e3, sets={"mix": "mixup"}),
    "cutmix": Regulariser("mix_alpha", 0.2, 1e3, sets={"mix": "cutmix"}),
    "manifold-mixup": Regulariser("mix_alpha", 2.0, 1e3, sets={"mix": "manifold"}),
    "label-smoothing": Regulariser("label_smoothing", 0.1, 1.0, True),
    "logit-penalty": Regulariser("logit_penalty", 0.1),
    "ps-kd": Regulariser("self_distillation", 0.8, 1.0),
    "distillation": Regulariser("distillation", 1.0),
    "ttm": Regulariser("distillation", 45.0, sets={"distillation_power": 0.1, "distillation_weighted": False}),
    "early-learning": Regulariser("early_learning", 3.0),
    "car": Regulariser("confusion", 0.3),
    "attention-entropy": Regulariser("attention_entropy", 0.1),
    "sparse-vit": Regulariser("attention_spread", 0.01),
    "attention-log": Regulariser("attention_log", 0.01),
    "log-barrier": Regulariser("log_barrier", 0.02),
    "vne": Regulariser("feature_entropy", 0.01),
    "group-lasso": Regulariser("group_lasso", 0.001, sets={"lasso_groups": "unit"}),
    "group-lasso-heads": Regulariser("group_lasso", 0.001, sets={"lasso_groups": "head"}),
    "group-lasso-blocks": Regulariser("group_lasso", 0.001, sets={"lasso_groups": "block"}),
    "gor": Regulariser("group_orthogonality", 0.01),
    "spectral": Regulariser("spectral", 0.01),
    "mhe": Regulariser("hyperspherical_energy", 1.0),
    "jacobian": Regulariser("jacobian", 0.01),
    "nuclear": Regulariser("nuclear_norm", 0.01),
    "ridg": Regulariser("rationale", 0.01),
    "gradient-norm": Regulariser("gradient_norm", 0.01),
    "amp": Regulariser("weight_perturbation", 0.05),
}


def regularised(train: TrainConfig, names: Sequence[str]) -> TrainConfig:
    """Settings of training with regularisers switched on.

    Args:
        train: settings.
        names: each NAME or NAME:STRENGTH.

    Raises:
        UserError: an unknown name, a strength that is no number or out of its range, or what contradicts another name
            or the settings.

    Examples:
        >>> from pyro_isingvit.core.train_settings import TrainConfig
        >>> from pyro_isingvit.core.regularise import regularised
        >>> train = regularised(TrainConfig(), ["logit-penalty", "token-masking:0.5"])
        >>> train.logit_penalty, train.token_masking
        (0.1, 0.5)
    """
    usual = TrainConfig()
    changes: dict[str, Any] = {}
    by: dict[str, str] = {}
    for text in names:
        name, _, number = text.partition(":")
        need(name in REGULARISERS, f"unknown regulariser {name!r:.40}; known: {', '.join(REGULARISERS)}.")
        row = REGULARISERS[name]
        strength = _number(name, number, row) if number else row.strength
        own = getattr(train, row.setting)
        need(
            number or own in (strength, getattr(usual, row.setting)),
            f"{name} of `regularise` would set `{row.setting}` to {row.strength:g}, and it is {own}: leave out one of "
            f"them, or give the strength, as in {name}:{row.strength:g}.",
        )
        for key, value in row.sets.items():
            own = getattr(train, key)
            need(
                own in (value, getattr(usual, key)),
                f"{name} of `regularise` sets `{key}` to {value}, and it is {own}: leave out one of them.",
            )
        for key, value in {row.setting: strength, **row.sets}.items():
            need(key not in by, f"{by.get(key)} and {name} of `regularise` contradict each other: give one of them.")
            changes[key], by[key] = value, name
    return replace(train, **changes)


def _number(name: str, number: str, row: Regulariser) -> float:
    ends = f"above 0 and {'below' if row.below else 'at most'} {row.most:g}" if math.isfinite(row.most) else "above 0"
    told = f"the strength of {name} must be a number {ends}, not {number!r:.40}; {row.strength:g} is usual."
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    fits = 0 < strength < row.most if row.below else 0 < strength <= row.most
    need(fits and math.isfinite(strength), told)
    return strength
