"""Every method by name: its own default settings, and where its class is. No torch here."""

from dataclasses import replace

from pyro_isingvit.core.settings import IsingConfig, TrainConfig

# The paper's equation (3) as its authors' code has it; docs/paper.md says what differs and why.
PAPER_ISING = IsingConfig(
    coupling="nearest", kappa_mask="batch_mean", kappa_weights="no_kl", delta=0.1, J=2.0, omega=0.0,
    tau_0=0.01831563888873418, posterior_scale="shared", init_scale=0.01831563888873418, max_keep=1.0, mask_damping=1.0,
    curvature_batch=64,
)  # fmt: skip


PAPER_TRAIN = TrainConfig(
    epochs=71, pilot_fraction=1 / 71, batch_size=20, lr=1e-3, schedule="halving", warmup_fraction=0.0, samples=100,
    calibrate=False, draws=1,
)  # fmt: skip


PLAIN_TRAIN = TrainConfig(weight_decay=0.05, calibrate=False)


# Learning rates: of 2e-3, 4e-3 and 6e-3 the one with the lowest NLL on validation images (docs/method.md).
METHODS: dict[str, tuple[IsingConfig, TrainConfig]] = {
    "ising": (IsingConfig(), TrainConfig()),
    "ising-paper": (PAPER_ISING, PAPER_TRAIN),
    # Gaussian VI is the pilot phase throughout: every mask at one, a learned scale per weight.
    "mean-field": (
        IsingConfig(posterior_scale="learned", kappa_weights=5.0),
        TrainConfig(pilot_fraction=1.0, calibrate=False, lr=2e-3),
    ),
    "deterministic": (IsingConfig(), PLAIN_TRAIN),
    "temperature": (IsingConfig(), replace(PLAIN_TRAIN, calibrate=True)),
    "dropout": (IsingConfig(), replace(PLAIN_TRAIN, lr=4e-3)),
    "dropconnect": (IsingConfig(), PLAIN_TRAIN),
    "concrete-dropout": (IsingConfig(), replace(PLAIN_TRAIN, weight_decay=0.0, lr=2e-3)),
    "sparse-vd": (IsingConfig(), replace(PLAIN_TRAIN, weight_decay=0.0)),
    "l0": (IsingConfig(), replace(PLAIN_TRAIN, lr=4e-3)),
    "magnitude": (IsingConfig(), replace(PLAIN_TRAIN, epochs=24, finetune_epochs=6, lr=4e-3)),
    "ensemble": (IsingConfig(), PLAIN_TRAIN),
    "laplace": (IsingConfig(), PLAIN_TRAIN),
}  # fmt: skip


ISING_METHODS = ("ising", "ising-paper", "mean-field")  # Pyro models with an IsingGuide; the rest are in baselines.py
OURS = "ising"  # the method that comparisons hold against the others
