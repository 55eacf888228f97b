"""Settings of a training that cannot be: numbers out of their range, and pairs that contradict each other."""

from pyro_isingvit.core.device import checked_device
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.nets.penalties import PENALTIES
from pyro_isingvit.nets.smoothness import check_smoothness
from pyro_isingvit.runs.flatness import check_flatness

REPARAMETRISED = ("sigma_reparam", "weight_compander")
LARGEST = 1e15  # of rates and norms: torch computes with them in single precision


NEEDS = {  # settings that do nothing without another
    "mix_alpha": "mix", "lasso_groups": "group_lasso", "early_learning_momentum": "early_learning",
    "distillation_power": "distillation", "distillation_weighted": "distillation", "teacher_draws": "distillation",
    "finetune_lr": "finetune_epochs",
}  # fmt: skip


def idle(config: TrainConfig, usual: TrainConfig) -> list[tuple[str, str]]:
    """Settings that differ from a method's usual ones and do nothing, each with the one that it needs.

    Examples:
        >>> from pyro_isingvit.core.train_settings import TrainConfig
        >>> idle(TrainConfig(mix_alpha=0.4), TrainConfig())
        [('mix_alpha', 'mix')]
        >>> idle(TrainConfig(mix="mixup", mix_alpha=0.4), TrainConfig())
        []
    """
    asked = ((name, needed) for name, needed in NEEDS.items() if getattr(config, name) != getattr(usual, name))
    return [(name, needed) for name, needed in asked if getattr(config, needed) in (0, "none")]


def check_asked(config: TrainConfig) -> None:
    """Raises UserError where a setting of a new training would do nothing, or not what it says.

    Earlier versions trained with them, and such a training can still be resumed.
    """
    need(
        config.margin is None or config.augment != "none",
        f"`margin` {config.margin} does nothing where `augment` is none; set `augment` too.",
    )
    need(
        config.noise != "activations" or config.draws is None,
        f"`draws` {config.draws} does nothing where `noise` activations draws for every token; leave it out.",
    )
    for name, kind in PENALTIES.items():
        need(
            not (getattr(config, name, 0) and config.checkpoint_activations and "attention" in kind.watches),
            f"`{name}` looks at attention, which `checkpoint_activations` does not keep; leave out one of them.",
        )
    for name in ("early_learning", "self_distillation"):
        need(
            not getattr(config, name) or config.balance != "sampler",
            f"`{name}` remembers what is said of each image once a step, and `balance` sampler shows some more often; "
            "set `balance` to loss.",
        )


def check_training(config: TrainConfig) -> None:
    """Raises UserError where a setting is out of its range."""
    check_fields(config)
    for name in (
        "epochs",
        "batch_size",
        "samples",
        "val_samples",
        "accumulate",
        "draws",
        "teacher_draws",
        "shrinkage_epochs",
    ):
        if isinstance(getattr(config, name), int) and getattr(config, name) < 1:
            raise UserError(f"`{name}` must be at least 1, not {getattr(config, name)}.")
    for name in ("lr", "finetune_lr", "clip_norm", "scale_lr_factor"):
        if not 0 < getattr(config, name) <= LARGEST:
            raise UserError(f"`{name}` must be positive and at most {LARGEST:g}, not {getattr(config, name)}.")
    need(config.seed >= 0, f"`seed` must not be negative, but is {config.seed}.")
    need(config.frozen_blocks >= 0, f"`frozen_blocks` must not be negative, but is {config.frozen_blocks}.")
    need(0 < config.layer_decay <= 1, f"`layer_decay` must lie in (0, 1], not {config.layer_decay}.")
    for name in ("pilot_fraction", "warmup_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"`{name}` must lie in [0, 1], not {getattr(config, name)}.")
    passes = ("gradient_norm", "weight_perturbation")
    for name in ("finetune_epochs", "weight_decay", "shrinkage", "margin", *passes, *REPARAMETRISED, *PENALTIES):
        if not (getattr(config, name, None) or 0.0) >= 0:
            raise UserError(f"`{name}` must not be negative, but is {getattr(config, name)}.")
    for name in ("average", "token_masking", "label_smoothing", "early_learning_momentum"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"`{name}` must be at least 0 and below 1, not {getattr(config, name)}.")
    need(
        0 < config.distillation_power <= LARGEST,
        f"`distillation_power` must be positive, not {config.distillation_power}.",
    )
    need(0 <= config.nested_dropout <= 1, f"`nested_dropout` must lie in [0, 1], not {config.nested_dropout}.")
    both = all(getattr(config, name) for name in REPARAMETRISED)
    need(not both, f"`{REPARAMETRISED[0]}` and `{REPARAMETRISED[1]}` both make the matrices; leave one out.")
    _check_mixes(config)
    check_smoothness(config)
    check_flatness(config)
    checked_device(config.device)


def _check_mixes(config: TrainConfig) -> None:
    # Below, gamma variates underflow, and a share comes out as 1/2 where it should be 0 or 1.
    if config.mix_alpha is not None and not 1e-3 <= config.mix_alpha <= 1e3:
        raise UserError(
            f"`mix_alpha` must lie in [0.001, 1000], not {config.mix_alpha}; 0.2 to 2 are usual, 10 to 20 for regmixup."
        )
    need(
        config.mix != "manifold" or not config.token_masking,
        "`mix` manifold sums the tokens of two images place by place, and with `token_masking` they show other places; "
        "leave one of them out.",
    )
    for name in ("early_learning", "self_distillation"):
        need(
            not getattr(config, name) or config.mix == "none",
            f"`{name}` remembers what is said of each image, which `mix` {config.mix} does not show by itself; set "
            "`mix` to none.",
        )
    share = config.self_distillation
    need(share <= 1, f"`self_distillation` is the share of a prediction in the target, at most 1, not {share}.")
    need(
        not share or config.balance != "logit",
        "`self_distillation` compares with the cross entropy of the network's own logits, which `balance` logit "
        "adjusts; take another `balance`.",
    )
