"""Compare ways to draw the posterior in training by the noise of the gradient and the time to a validation NLL.

python -m inference.variance --dataset fashion-mnist --data-root data --train-size 6000 --epochs 14 --depth 2 \
    --out runs/variance

Masks are on single weights. Every way trains the same network from the same seed. The variance of the gradient with
respect to the weight means is measured at one point, the network that the first way has trained. The test part is never
used.
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from inference.cli import results_file, run_script
from pyro_isingvit.core.errors import need
from pyro_isingvit.core.presets import default_preset, preset
from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.methods.registry import METHODS, OURS
from pyro_isingvit.version import __version__

RESULTS = "variance.json"
WAYS: dict[str, dict[str, Any]] = {
    "1 draw": {"draws": 1},
    "4 draws": {"draws": 4},
    "8 draws": {"draws": 8},
    "noise on activations": {"noise": "activations"},
}
MASKS = replace(METHODS[OURS].ising, granularity="weight", tau_0=1e-3, max_keep=0.98)  # where every way can be taken


@dataclass(frozen=True)
class VarianceArguments:
    """What to train, and how often to draw a gradient."""

    out: Path
    """Folder for variance.json."""
    preset: str | None = None
    """Network shape; by default the one made for the data set."""
    depth: int | None = None
    """Number of blocks; by default the preset's."""
    epochs: int = 14
    """Of each way."""
    gradients: int = 100
    """Number of gradients for the variance, at least 2."""
    batch_size: int = 64
    """Images per step."""
    seed: int = 0
    """Seed of split, initial weights, batches and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    overwrite: bool = False
    """Replace the variance.json that the folder holds."""
    data: DataConfig = field(default_factory=DataConfig)


def compare_ways(arguments: VarianceArguments) -> None:
    """Compare ways to draw the posterior in training."""
    path = results_file(arguments.out, RESULTS, arguments.overwrite)
    need(arguments.gradients >= 2, f"gradients must be at least 2, not {arguments.gradients}.")
    from pyro_isingvit.core.checkpoint import write_json

    rows = measure(arguments)
    write_json(path, rows)
    print_rows(rows)
    print(f"rows: {path}")


def make_config(arguments: VarianceArguments) -> RunConfig:
    """The settings that all ways share."""
    name = arguments.preset or default_preset(arguments.data.dataset)
    vit = preset(name, depth=arguments.depth)
    settings = replace(
        METHODS[OURS].train, epochs=arguments.epochs, batch_size=arguments.batch_size, seed=arguments.seed,
        device=arguments.device,
    )  # fmt: skip
    return RunConfig(name, OURS, arguments.data, vit, MASKS, settings, __version__)


def measure(arguments: VarianceArguments) -> list[dict[str, Any]]:
    """A row for each way: its history with seconds, and the variance of its gradient."""
    from pyro_isingvit.data.load import load_data
    from pyro_isingvit.runs.trainer import Trainer

    base = make_config(arguments)
    settings = base.train
    data = load_data(**asdict(arguments.data), seed=arguments.seed)
    need(len(data.val), "time to a validation NLL needs validation images: --val-fraction above 0.")

    rows: list[dict[str, Any]] = []
    point: Trainer | None = None
    for way, change in WAYS.items():
        trainer = Trainer(replace(base, train=replace(settings, **change)), data, None, True)
        trainer.fit()
        point = point or trainer
        history = [record["val_nll"] for record in trainer.run.history]
        rows.append({
            "way": way, "settings": change, "val_nll": history, "val_accuracy": trainer.run.history[-1]["val_accuracy"],
            "seconds": [*accumulate(trainer.epoch_seconds)], **gradient_variance(point, change, arguments.gradients),
        })  # fmt: skip
    goal = max(min(row["val_nll"]) for row in rows)  # an NLL that every way reaches
    for row in rows:
        first = next(i for i, nll in enumerate(row["val_nll"]) if nll <= goal)
        row |= {"goal_nll": goal, "seconds_to_goal": row["seconds"][first], "epochs_to_goal": first + 1}
    return rows


def gradient_variance(trainer: Any, change: dict[str, Any], count: int) -> dict[str, float]:
    """Trace of the covariance of the loss's gradient in the weight means, over draws and over draws and batches.

    Args:
        trainer: provides network, guide and training images, which are left unchanged.
        change: draws or noise of the estimator.
        count: gradients.

    Returns:
        variance_of_draw: one batch, other draws; variance_in_all: other batches too; squared_gradient: of the mean.
    """
    import torch

    from pyro_isingvit.ising.fused import FusedELBO

    run, settings = trainer.run, trainer.settings
    elbo = FusedELBO(run.model, run.guide, change.get("draws", 1), change.get("noise", "weights"))
    loc, size, split = list(run.guide.loc.values()), settings.batch_size, trainer.data.train

    def gradient(start: int) -> torch.Tensor:
        rows = slice(start, start + size)
        loss = elbo(run.info.normalise(split.images[rows]), split.labels[rows]) / len(split)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, loc)])

    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        fixed = torch.stack([gradient(0) for _ in range(count)])
        batches = max(1, len(split) // size)
        fresh = torch.stack([gradient(size * (i % batches)) for i in range(count)])
    return {
        "variance_of_draw": float(fixed.var(0).sum()), "variance_in_all": float(fresh.var(0).sum()),
        "squared_gradient": float((fresh.mean(0) ** 2).sum()),
    }  # fmt: skip


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The closing table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"variance of the gradient, and time to a validation NLL of {rows[0]['goal_nll']:.4f}",
                  title_justify="left")  # fmt: skip
    headings = ("way", "variance, one batch", "variance in all", "s / epoch", "s to the NLL", "last NLL", "accuracy")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        table.add_row(
            row["way"], f"{row['variance_of_draw']:.3g}", f"{row['variance_in_all']:.3g}",
            f"{row['seconds'][-1] / len(row['seconds']):.2f}", f"{row['seconds_to_goal']:.1f}",
            f"{row['val_nll'][-1]:.4f}", f"{row['val_accuracy']:.4f}",
        )  # fmt: skip
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(compare_ways, VarianceArguments, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
