"""Train an Ising-ViT, evaluate it once on the test part, and keep everything in one folder.

python -m inference.train --dataset digits --preset digits --out runs/digits
python -m inference.train --resume runs/digits
torchrun --nproc-per-node 2 -m inference.train --dataset digits --preset digits --out runs/digits
"""

import argparse
import functools
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from inference.cli import REPORTS, print_table, resumes, run_script, with_clear_errors, with_interval
from pyro_isingvit.core.errors import ProcessLost, UserError, need
from pyro_isingvit.core.launcher import by_torchrun
from pyro_isingvit.core.presets import PRESETS, default_preset, preset
from pyro_isingvit.core.regularise import regularised
from pyro_isingvit.core.settings import BaselineConfig, DataConfig, IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.methods.registry import METHODS, OURS, epochs_in_all, row_of
from pyro_isingvit.version import __version__

SHAPED = "--init brings the shape of the network with it; leave --preset and the flags of the shape out."


@dataclass(frozen=True)
class TrainArguments:
    """What to train, and where to keep it."""

    out: Path
    """Folder of the run."""
    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))]
    """Network shape to start from; by default the preset for the data set."""
    method: Annotated[str, tyro.conf.arg(metavar="|".join(METHODS))] = OURS
    """What to train: the library's Ising posterior, the paper's literal setting, or a method to compare with; those
    with a number take it after a colon, as in dropout:0.1."""
    init: str | None = None
    """Trained network to start from: timm:NAME or torchvision:NAME (--download fetches it), either with @FILE for a
    file of yours, a .safetensors file of inference.pretrain, or the folder of a run or of a pruned network."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    full_posterior: bool = False
    """Keep every mask and weight draw in posterior.nc."""
    regularise: tuple[str, ...] = ()
    """Regularisers, each NAME or NAME:STRENGTH, several at once (docs/regularisers.md has all names)."""
    teacher: tuple[Path, ...] = ()
    """With --regularise distillation, folders of trained runs whose mean prediction is learned too."""
    data: DataConfig = field(default_factory=DataConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    ising: IsingConfig = field(default_factory=IsingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)


@dataclass(frozen=True)
class ResumeArguments:
    """Continue an interrupted run with its own settings."""

    resume: Path
    """Folder of the run."""
    full_posterior: bool = False
    """Keep every mask and weight draw in posterior.nc."""


def train(arguments: TrainArguments) -> None:
    """Train an Ising-ViT by stochastic variational inference, or a baseline. To continue a run: --resume DIR alone."""
    from pyro_isingvit.runs.folder import CONFIG, holds_run

    config = RunConfig(
        arguments.preset, arguments.method.partition(":")[0], arguments.data, arguments.vit, arguments.ising,
        regularised(arguments.train, arguments.regularise), __version__, arguments.baseline, init=arguments.init,
        teacher=tuple(map(str, arguments.teacher)),
    )  # fmt: skip
    usual = replace(preset(arguments.preset), head=arguments.vit.head)
    if arguments.init is not None:
        need(arguments.vit == usual, SHAPED)
        config = replace(config, preset="custom")
    if holds_run(arguments.out) and not arguments.overwrite:
        kept = (arguments.out / CONFIG).is_file()
        need(kept, f"{arguments.out} holds a run whose {CONFIG} is lost; replace it with --overwrite.")
        raise UserError(
            f"{arguments.out} already holds a run; continue it with --resume {arguments.out} alone, or replace it with "
            "--overwrite."
        )
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"{arguments.out} is a file; --out takes a folder.")
    _train_and_report(config, arguments.out, resume=False, full=arguments.full_posterior)


def resume(arguments: ResumeArguments) -> None:
    """Continue an interrupted run; its folder holds the settings."""
    from pyro_isingvit.runs.folder import read_config

    config = read_config(arguments.resume)
    _train_and_report(config, arguments.resume, resume=True, full=arguments.full_posterior)


def _train_and_report(config: RunConfig, folder: Path, resume: bool, full: bool) -> None:
    from pyro_isingvit.experiment import train_run

    try:
        metrics = train_run(config, folder, resume=resume, full_posterior=full)
    except (KeyboardInterrupt, ProcessLost) as stop:
        if stop.args:  # the library's message says what is kept
            stop.args = (f"{stop}{_how_to_go_on(folder)}",)
        raise
    if not REPORTS:
        return
    shown = {
        "accuracy": "accuracy", "balanced accuracy": "balanced_accuracy", "AUROC, macro": "auroc_macro",
        "sensitivity": "sensitivity", "specificity": "specificity", "macro F1": "f1_macro", "NLL (nats)": "nll",
        "Brier": "brier", "ECE (15 bins)": "ece", "mean retention": "retention_mean",
        "share of weights pruned": "pruned_fraction", "masked weights": "masked_weights",
        "training images": "train_size", "seconds of training": "train_seconds",
    }  # fmt: skip
    print_table(
        f"{config.data.dataset}, test part, {metrics['samples']} draws",
        {k: with_interval(metrics, v) for k, v in shown.items() if metrics.get(v) is not None},
    )
    print(f"run: {folder}\nreport: python -m analysis.report --run {shlex.quote(str(folder))}")


def _how_to_go_on(folder: Path) -> str:
    from pyro_isingvit.runs.folder import CHECKPOINT

    if (folder / CHECKPOINT).exists():
        return f"; go on with: python -m inference.train --resume {folder}"
    return ": start again with the same command and --overwrite"


def main(argv: list[str] | None = None) -> None:
    """Parses the command line. The preset sets the defaults of the shape, the method those of the training."""
    argv = sys.argv[1:] if argv is None else argv
    if resumes(argv):
        run_script(resume, ResumeArguments, argv)
        return
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default=DataConfig.dataset)
    peek.add_argument("--preset", default=None)
    peek.add_argument("--method", default=OURS)
    peek.add_argument("--init", default=None)
    peek.add_argument("--epochs", default=None)
    peek.add_argument("--finetune-epochs", "--finetune_epochs", default=None)
    known, _ = peek.parse_known_args(argv)
    name = known.preset or default_preset(known.dataset)

    def check() -> None:
        need(not (known.init and known.preset), SHAPED)
        preset(name), row_of(known.method)

    with_clear_errors(check, TrainArguments)
    usual = row_of(known.method, known.init)
    default = TrainArguments(
        out=tyro.MISSING, preset=name, method=known.method, vit=preset(name), ising=usual.ising, train=usual.train,
        baseline=usual.baseline,
    )  # fmt: skip
    shares = known.epochs is not None and known.finetune_epochs is None

    @functools.wraps(train)
    def all_in(arguments: TrainArguments) -> None:
        asked = epochs_in_all(usual.train, {"epochs": arguments.train.epochs}) if shares else {}
        train(replace(arguments, train=replace(arguments.train, **asked)))

    run_script(all_in, TrainArguments, argv, default)


if __name__ == "__main__":
    main()
    if by_torchrun():
        from pyro_isingvit.core.processes import part_ways

        part_ways()
