"""Every method by name: its class, its own default settings, and what the grid and the command line must know of it.

No torch here, so that a command line is read before anything heavy is loaded. A new method is a class
(``methods/base.py`` has the interface) and a row in ``METHODS``.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import BaselineConfig, IsingConfig, TrainConfig


@dataclass(frozen=True)
class Row:
    """One method."""

    home: str
    """Its class, as "module:Class"; imported when first used."""
    ising: IsingConfig = field(default_factory=IsingConfig)
    """Default settings of the masks."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Default settings of the training."""
    knob: tuple[Literal["ising", "baseline"], str] | None = None
    """Part and field that the number after the colon sets, as in dropout:0.1."""
    derived_from: str | None = None
    """A method whose training this one shares: it adds something afterwards, and can take over a finished run."""
    networks: str | None = None
    """Field of BaselineConfig that says how many networks are trained and stored; None: one."""

    def with_number(self, text: str) -> tuple[IsingConfig, BaselineConfig]:
        """The settings with the knob at a number.

        Args:
            text: the number; "" leaves the defaults.

        Raises:
            UserError: the method has no knob, or the text is no number.
        """
        if not text:
            return self.ising, BaselineConfig()
        takers = ", ".join(name for name, row in METHODS.items() if row.knob)
        need(self.knob is not None, f"the method takes no number; those that do: {takers}.")
        assert self.knob is not None
        part, knob = self.knob
        try:
            value = (int if knob == "members" else float)(text)
        except ValueError as error:
            raise UserError(f"{text!r} is no number for `{knob}`.") from error
        if part == "ising":
            return replace(self.ising, **{knob: value}), BaselineConfig()  # type: ignore[arg-type]
        return self.ising, replace(BaselineConfig(), **{knob: value})  # type: ignore[arg-type]


# The paper's equation (3) as its authors' code has it; docs/paper.md says what differs and why.
PAPER_ISING = IsingConfig(
    coupling="nearest", kappa_mask="batch_mean", kappa_weights="no_kl", delta=0.1, J=2.0, omega=0.0,
    tau_0=0.01831563888873418, posterior_scale="shared", init_scale=0.01831563888873418, max_keep=1.0, mask_damping=1.0,
    curvature_batch=64,
)  # fmt: skip
PAPER_TRAIN = TrainConfig(
    epochs=71, pilot_fraction=1 / 71, batch_size=20, lr=1e-3, schedule="halving", warmup_fraction=0.0, samples=100,
    calibrate=False, draws=1, average=0.0, rate_rule="uniform",
)  # fmt: skip
PLAIN = TrainConfig(weight_decay=0.05, calibrate=False)
HERE = "pyro_isingvit.methods"
# Learning rates: of 2e-3, 4e-3 and 6e-3 the one with the lowest NLL on validation images (docs/tuning.md).
METHODS: dict[str, Row] = {
    "ising": Row(f"{HERE}.ising:IsingMethod", knob=("ising", "target_retention")),
    "ising-paper": Row(f"{HERE}.ising:IsingMethod", PAPER_ISING, PAPER_TRAIN),
    # Gaussian VI is the pilot phase throughout: every mask at one, a learned scale per weight.
    "mean-field": Row(
        f"{HERE}.ising:IsingMethod",
        IsingConfig(posterior_scale="learned", kappa_weights=5.0),
        TrainConfig(pilot_fraction=1.0, calibrate=False, lr=2e-3),
        knob=("ising", "kappa_weights"),
    ),
    "deterministic": Row(f"{HERE}.plain:Plain", train=PLAIN),
    "temperature": Row(f"{HERE}.plain:Plain", train=replace(PLAIN, calibrate=True), derived_from="deterministic"),
    "dropout": Row(f"{HERE}.dropout:Dropout", train=replace(PLAIN, lr=4e-3), knob=("baseline", "drop_rate")),
    "dropconnect": Row(f"{HERE}.dropout:DropConnect", train=PLAIN, knob=("baseline", "drop_rate")),
    "concrete-dropout": Row(
        f"{HERE}.dropout:ConcreteDropout",
        train=replace(PLAIN, weight_decay=0.0, lr=2e-3),
        knob=("baseline", "length_scale"),
    ),
    "sparse-vd": Row(
        f"{HERE}.sparse:SparseVD", train=replace(PLAIN, weight_decay=0.0), knob=("baseline", "kl_weight")
    ),
    "l0": Row(f"{HERE}.sparse:L0", train=replace(PLAIN, lr=4e-3), knob=("baseline", "l0_penalty")),
    "magnitude": Row(
        f"{HERE}.sparse:Magnitude",
        train=replace(PLAIN, epochs=24, finetune_epochs=6, lr=4e-3),
        knob=("baseline", "sparsity"),
    ),
    "ensemble": Row(f"{HERE}.ensemble:Ensemble", train=PLAIN, knob=("baseline", "members"), networks="members"),
    "laplace": Row(f"{HERE}.laplace:LastLayerLaplace", train=PLAIN, derived_from="deterministic"),
}  # fmt: skip
OURS = "ising"  # the method that comparisons hold against the others


def row(name: str) -> Row:
    """The row of a method.

    Raises:
        UserError: there is none of that name.
    """
    need(name in METHODS, f"unknown `method` {name!r}; known: {', '.join(METHODS)}.")
    return METHODS[name]
