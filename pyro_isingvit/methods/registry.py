"""Every method by name: its class, its own default settings, and what the grid and the command line must know of it.

No torch here, so that a command line is read before anything heavy is loaded. A new method is a class
(``methods/base.py`` has the interface) and a row in ``METHODS``.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, SupportsIndex

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import BaselineConfig, IsingConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig


@dataclass(frozen=True)
class Row:
    """One method."""

    home: str
    """Its class, as "module:Class"; imported when first used."""
    ising: IsingConfig = field(default_factory=IsingConfig)
    """Default settings of the masks."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Default settings of the training."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Default settings of the methods without Ising masks."""
    knob: tuple[Literal["ising", "train", "baseline"], str] | None = None
    """Part and field that the number after the colon sets, as in dropout:0.1."""
    derived_from: str | None = None
    """A method whose training this one shares: it adds something afterwards, and can take over a finished run."""
    networks: str | None = None
    """Field of BaselineConfig that says how many networks are trained and stored; None: one."""
    members_of: str | None = None
    """Ensembles: the method that trains each of the networks."""
    from_number: tuple[float, dict[str, Any]] | None = None
    """A number of the knob, and the settings of the training that differ from there on."""

    def with_number(self, text: str) -> "Row":
        """The row with the knob at a number.

        Args:
            text: the number; "" leaves the defaults.

        Raises:
            UserError: the method has no knob, or the text is no number.
        """
        if not text:
            return self
        takers = ", ".join(name for name, row in METHODS.items() if row.knob)
        need(self.knob is not None, f"the method takes no number; those that do: {takers}.")
        assert self.knob is not None
        part, knob = self.knob
        try:
            value = (int if knob == "members" else float)(text)
        except ValueError as error:
            raise UserError(f"{text!r} is no number for `{knob}`.") from error
        chosen = replace(self, **{part: replace(getattr(self, part), **{knob: value})})
        if self.from_number is not None and value >= self.from_number[0]:
            chosen = replace(chosen, train=replace(chosen.train, **self.from_number[1]))
        return chosen


# The paper's equation (3) as its authors' code has it; docs/paper.md says what differs and why.
PAPER_ISING = IsingConfig(
    granularity="weight", target_retention=0.5, tau_1=0.3, coupling="nearest", kappa_mask="batch_mean",
    kappa_weights="no_kl", delta=0.1, J=2.0, omega=0.0, tau_0=0.01831563888873418, posterior_scale="shared",
    init_scale=0.01831563888873418, max_keep=1.0, mask_damping=1.0, curvature_batch=64,
)  # fmt: skip
PAPER_TRAIN = TrainConfig(
    epochs=71, pilot_fraction=1 / 71, batch_size=20, lr=1e-3, schedule="halving", warmup_fraction=0.0, samples=100,
    calibrate=False, draws=1, average=0.0, rate_rule="uniform", shrinkage=0.0,
)  # fmt: skip
# On for every method that is not held to its publication, so that all that are compared have the same: it lowers the
# NLL of ising and dropout in every column of docs/regularisers.md, and with twice the epochs (The default).
HELPS: dict[str, Any] = {"hyperspherical_energy": 1.0}
WITHOUT: dict[str, Any] = dict.fromkeys(HELPS, 0.0)
PLAIN = TrainConfig(**HELPS)
BARE = replace(PLAIN, shrinkage=3.0)  # nothing but the decay holds these back
CUT = replace(PLAIN, epochs=48, finetune_epochs=32, finetune_lr=0.5)  # trained on after one cut
RARELY = BaselineConfig(drop_rate=0.05)
HERE = "pyro_isingvit.methods"
# Rates, shrinkage and the number after the colon: the best of 4 to 16 settings at 40 epochs on development images, of
# which those of the plain networks and dropout were tried again at 80 (docs/tuning.md).
METHODS: dict[str, Row] = {
    "ising": Row(f"{HERE}.ising:IsingMethod", train=PLAIN, knob=("ising", "target_retention")),
    # A quarter of the units, frozen for the last two fifths of the epochs: about a third of the multiply-accumulates.
    "ising-sparse": Row(
        f"{HERE}.ising:IsingMethod",
        IsingConfig(target_retention=0.25),
        replace(CUT, pilot_fraction=0.4),
        knob=("ising", "target_retention"),
    ),
    "ising-paper": Row(f"{HERE}.ising:IsingMethod", PAPER_ISING, PAPER_TRAIN),
    # Gaussian VI is the pilot phase throughout: every mask at one, a learned scale per weight.
    "mean-field": Row(
        f"{HERE}.ising:IsingMethod",
        IsingConfig(granularity="weight", posterior_scale="learned", kappa_weights=60.0, tau_1=0.3),
        TrainConfig(pilot_fraction=1.0, lr=4e-3, shrinkage=0.0),
        knob=("ising", "kappa_weights"),
    ),
    # Without the temperature of its predictions, which every other method has; temperature is the same with it.
    "deterministic": Row(f"{HERE}.plain:Plain", train=replace(BARE, calibrate=False)),
    "temperature": Row(f"{HERE}.plain:Plain", train=BARE, derived_from="deterministic"),
    "label-smoothing": Row(
        f"{HERE}.plain:Plain", train=replace(PLAIN, label_smoothing=0.02), knob=("train", "label_smoothing")
    ),
    "cutmix": Row(
        f"{HERE}.plain:Plain", train=replace(PLAIN, mix="cutmix", mix_alpha=0.1), knob=("train", "mix_alpha")
    ),
    "dropout": Row(
        f"{HERE}.dropout:Dropout",
        train=PLAIN,
        baseline=RARELY,
        knob=("baseline", "drop_rate"),
        from_number=(0.1, {"shrinkage": 3.0}),  # better than 1.5 in five of six columns (docs/tuning.md)
    ),
    "dropconnect": Row(
        f"{HERE}.dropout:DropConnect", train=replace(PLAIN, lr=9e-3), baseline=RARELY, knob=("baseline", "drop_rate")
    ),
    "concrete-dropout": Row(f"{HERE}.dropout:ConcreteDropout", train=PLAIN, knob=("baseline", "length_scale")),
    "sparse-vd": Row(
        f"{HERE}.sparse:SparseVD",
        train=replace(PLAIN, shrinkage=0.5),
        baseline=BaselineConfig(kl_weight=0.03),
        knob=("baseline", "kl_weight"),
    ),
    "l0": Row(
        f"{HERE}.sparse:L0", train=PLAIN, baseline=BaselineConfig(l0_penalty=0.01), knob=("baseline", "l0_penalty")
    ),
    "magnitude": Row(
        f"{HERE}.sparse:Magnitude",
        train=replace(PLAIN, epochs=64, finetune_epochs=16),
        knob=("baseline", "sparsity"),
    ),
    "gradual-magnitude": Row(
        f"{HERE}.sparse:GradualMagnitude", train=PLAIN, knob=("baseline", "sparsity")
    ),
    # Epochs before and after the cut, as for the other methods that cut once.
    "hypersparse": Row(
        f"{HERE}.shrinking:HyperSparse",
        train=CUT,
        knob=("baseline", "sparsity"),
    ),
    "lobster": Row(
        f"{HERE}.shrinking:Lobster",
        train=replace(CUT, shrinkage=0.0),
        knob=("baseline", "sparsity"),
    ),
    "laplace": Row(f"{HERE}.laplace:LastLayerLaplace", train=BARE, derived_from="deterministic"),
}  # fmt: skip


def ensemble_of(name: str) -> Row:
    """The row of an ensemble whose members are trained as a method's networks are, with the same defaults.

    Args:
        name: a method in ``METHODS``; one that works on after the last epoch cannot be a member.
    """
    return replace(
        METHODS[name], home=f"{HERE}.ensemble:Ensemble", knob=("baseline", "members"), derived_from=None,
        networks="members", members_of=name,
    )  # fmt: skip


# What a training that starts from a trained network does otherwise, whatever the method (docs/starting.md).
STARTED: dict[str, Any] = {"lr": 4e-3, "layer_decay": 0.75} | WITHOUT


def started(chosen: Row, init: str | None) -> Row:
    """A method's row for a training that starts from a trained network; as it is where ``init`` is None.

    Args:
        chosen: the row.
        init: where training starts.
    """
    if init is None:
        return chosen
    return replace(chosen, train=replace(chosen.train, **STARTED))


METHODS["ensemble"] = replace(ensemble_of("deterministic"), train=BARE)
METHODS["ising-ensemble"] = ensemble_of("ising")
OURS = "ising"  # the method that comparisons hold against the others


def row(name: str) -> Row:
    """The row of a method.

    Raises:
        UserError: there is none of that name.
    """
    need(isinstance(name, str), f"`method` must be the name of a method, not {name!r:.60}.")
    alone, _, number = name.partition(":")
    if number and (known := METHODS.get(alone)) and known.knob:
        raise UserError(f"unknown `method` {name!r}: give {alone!r}, and the number as `{known.knob[1]}`.")
    need(name in METHODS, f"unknown `method` {name!r}; known: {', '.join(METHODS)}.")
    return METHODS[name]


def row_of(spec: str, init: str | None = None) -> Row:
    """The row of ``name`` or ``name:number``; the number sets the method's knob.

    Args:
        spec: the method.
        init: where training starts (``started``).

    Raises:
        UserError: an unknown method, no number, or a number for a method without a knob.
    """
    name, _, number = spec.partition(":")
    try:
        return started(row(name), init).with_number(number)
    except UserError as error:
        raise UserError(f"{spec!r}: {error}" if number else str(error)) from error


def with_defaults(spec: str, base: RunConfig, epochs: int | None = None) -> RunConfig:
    """A run's settings with everything that a method has defaults for.

    Args:
        spec: ``name`` or ``name:number``; the number sets the method's knob.
        base: data, preset, shape of the network and where it starts from, which stay.
        epochs: of the training in all; a method that fine-tunes has its own share of them for it. None: its own number.

    Raises:
        UserError: an unknown method, no number, or a number for a method without a knob.
    """
    chosen = row_of(spec, base.init)
    train = chosen.train
    if epochs is not None:
        train = shared_out(train, epochs)
    return replace(base, method=spec.partition(":")[0], ising=chosen.ising, train=train, baseline=chosen.baseline)


def spec_of(config: RunConfig) -> str:
    """The method as it was asked for: with its number, where that is not the default."""
    usual = row(config.method)
    if usual.knob is None:
        return config.method
    part, knob = usual.knob
    value = getattr(getattr(config, part), knob)
    return config.method if value == getattr(getattr(usual, part), knob) else f"{config.method}:{value:g}"


def epochs_in_all(train: TrainConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What ``epochs`` mean to a method that trains on after a cut: all of them, where nobody says how long that takes.

    Args:
        train: the method's defaults.
        chosen: settings by name.

    Returns:
        ``epochs`` and ``finetune_epochs``, or nothing where what is chosen stays as it is.

    Examples:
        >>> epochs_in_all(METHODS["ising-sparse"].train, {"epochs": 20})
        {'epochs': 12, 'finetune_epochs': 8}
        >>> epochs_in_all(METHODS["ising-sparse"].train, {"epochs": 20, "finetune_epochs": 3})
        {}
    """
    epochs = chosen.get("epochs")
    if not isinstance(epochs, SupportsIndex) or not train.finetune_epochs or "finetune_epochs" in chosen:
        return {}
    shared = shared_out(train, operator.index(epochs))
    return {"epochs": shared.epochs, "finetune_epochs": shared.finetune_epochs}


def shared_out(train: TrainConfig, epochs: int) -> TrainConfig:
    """Settings of training with so many epochs in all, of which fine-tuning keeps its share."""
    last = round(epochs * train.finetune_epochs / (train.epochs + train.finetune_epochs))
    return replace(train, epochs=epochs - last, finetune_epochs=last)


READS: dict[str, tuple[str, ...]] = {  # fields of BaselineConfig, and the methods that read them
    "drop_rate": ("dropout", "dropconnect", "concrete-dropout", "l0"),
    "members": ("ensemble", "ising-ensemble"),
    "sparsity": ("magnitude", "gradual-magnitude", "hypersparse", "lobster"),
    "l0_penalty": ("l0",),
    "kl_weight": ("sparse-vd",),
    "length_scale": ("concrete-dropout",),
    "hypersparse_weight": ("hypersparse",),
    "hypersparse_growth": ("hypersparse",),
    "lobster_weight": ("lobster",),
}


def unread(config: RunConfig) -> list[str]:
    """Settings of other methods, which differ from this one's defaults and do nothing.

    Examples:
        >>> from pyro_isingvit.core.settings import BaselineConfig, RunConfig
        >>> unread(RunConfig(method="ising", baseline=BaselineConfig(members=3)))
        ['members']
    """
    own = row(config.method)
    rows = {name: METHODS[name] for name in (config.method, own.members_of) if name}
    read = {each.knob[1] for each in rows.values() if each.knob} | ({own.networks} if own.networks else set())
    masked = any(each.home.endswith(":IsingMethod") for each in rows.values())
    names = [name for name, readers in READS.items() if not rows.keys() & {*readers} and name not in read]
    found = [name for name in names if getattr(config.baseline, name) != getattr(own.baseline, name)]
    names = [] if masked else [each.name for each in fields(IsingConfig)]
    return found + [name for name in names if getattr(config.ising, name) != getattr(own.ising, name)]
