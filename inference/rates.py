"""Train networks of several widths and depths at several learning rates, and say which rate is best for each.

python -m inference.rates --dataset npz:cifar10-dev.npz --rates 1e-3 2e-3 4e-3 8e-3 16e-3 --out runs/rates

The widths have the first depth, and the depths the first width. Validation images judge; the test part is never used.
Re-run the same command to resume. Another command with the same folder adds its records.
"""

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from inference.cli import check_place, earlier_records, run_script
from pyro_isingvit.core.errors import need
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.settings import DataConfig, RunConfig, ViTConfig
from pyro_isingvit.methods.registry import spec_of, with_defaults
from pyro_isingvit.version import __version__

RESULTS = "rates.json"
ELSEWHERE = ("dataset", "data_root", "download", "cache", "train_size")  # that do not say how images are read
HEAD = 16  # channels of an attention head, whatever the width
DRAWS = 8  # of methods that can be drawn from
log = logging.getLogger(f"pyro_isingvit.{__name__}")


@dataclass(frozen=True)
class RatesArguments:
    """What to train."""

    out: Path
    """Folder for rates.json, of one data set: files of one name count as the same."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
    """Learning rates, each tried with every network."""
    rules: tuple[Literal["transfer", "uniform"], ...] = ("transfer",)
    """Values of rate_rule."""
    methods: tuple[str, ...] = ("deterministic", "ising")
    """Methods with their own default settings."""
    widths: tuple[int, ...] = (64, 128, 192, 384)
    """D of the networks, multiples of 16."""
    depths: tuple[int, ...] = (2, 4, 6, 12)
    """L of the networks."""
    patch_size: int = 8
    """Side of a patch in pixels."""
    epochs: int = 8
    """Of each training."""
    seed: int = 0
    """Seed of split, initial weights, batches and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    data: DataConfig = field(default_factory=DataConfig)


def make_cells(arguments: RatesArguments) -> Iterator[RunConfig]:
    """The settings of every training.

    Raises:
        UserError: nothing to train, an unknown method, or a width without whole heads.
    """
    for name in ("rates", "rules", "methods", "widths", "depths"):
        values = getattr(arguments, name)
        need(0 < len(values) == len(set(values)), f"`{name}` needs distinct values, and one at least.")
    for width in arguments.widths:
        need(width > 0 and width % HEAD == 0, f"`widths` must be multiples of {HEAD}, and {width} is none.")
    first = arguments.widths[0], arguments.depths[0]
    shapes = dict.fromkeys([*product(arguments.widths, first[1:]), *product(first[:1], arguments.depths)])
    for rule, method, (width, depth) in product(arguments.rules, arguments.methods, shapes):
        vit = ViTConfig(arguments.patch_size, width, width // HEAD, depth, mlp_ratio=2)
        for rate in arguments.rates:
            base = RunConfig("custom", method, arguments.data, vit, version=__version__)
            config = with_defaults(method, base, arguments.epochs)
            train = replace(
                config.train, lr=rate, rate_rule=rule, seed=arguments.seed, device=arguments.device, calibrate=False
            )
            config = replace(config, train=train)
            check_fields(config)
            yield config


def find_rates(arguments: RatesArguments) -> None:
    """Find the best learning rate for networks of several widths and depths."""
    cells, path = [*make_cells(arguments)], arguments.out / RESULTS
    check_place(arguments.out)
    from inference.search_trials import same_settings
    from pyro_isingvit.core.checkpoint import write_json

    records = read_records(path)  # of this command and of others
    for number, config in enumerate(cells):
        asked = settings(config)
        known = [record for record in records if record["settings"] == asked]
        if not any(same_settings(resolved(config), record) for record in known):
            found = {"settings": asked, "version": __version__, "resolved": resolved(config), **score(config)}
            records = [record for record in read_records(path) if record["settings"] != asked]  # others' of meanwhile
            records.append(found)
            write_json(path, records)
            log.info("%d of %d", number + 1, len(cells))
    print(f"records: {path}\nfigure: python -m analysis.rates --results {arguments.out}")


def settings(config: RunConfig) -> dict[str, Any]:
    """What a record says of a training; where its images lie does not matter."""
    vit, train, usual = config.vit, config.train, DataConfig()
    read = {n: v for n, v in asdict(config.data).items() if n not in ELSEWHERE and v != getattr(usual, n)}
    place = config.data.dataset.rpartition(":")[2]
    return {
        "data": Path(place).name, "train_size": config.data.train_size, "method": spec_of(config),
        "width": vit.width, "depth": vit.depth, "patch_size": vit.patch_size, "rate": train.lr,
        "rule": train.rate_rule, "epochs": train.epochs, "average": train.average, "seed": train.seed,
        **({"read": read} if read else {}),
    }  # fmt: skip


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every setting of a training, those that are defaults today too, as JSON has them."""
    from inference.search_trials import Trial

    found: dict[str, Any] = Trial({}, config, 0).resolved()
    return found


def score(config: RunConfig) -> dict[str, float]:
    """Trains; accuracy and NLL (nats per image, at the fitted temperature) of the validation images.

    A training that diverges has the accuracy and the NLL of a guess.
    """
    from pyro_isingvit.data.load import load_data
    from pyro_isingvit.predictive.calibration import fit_temperature, temper
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.runs.predict import draw_predictive
    from pyro_isingvit.runs.trainer import Trainer, TrainingDiverged

    data = load_data(**asdict(config.data), seed=config.train.seed)
    need(len(data.val), "a rate is judged by validation images; set `val_fraction` above 0.")
    trainer = Trainer(config, data, None, True)
    try:
        run = trainer.fit()
    except TrainingDiverged:
        classes = len(data.info.classes)
        return {"accuracy": 1 / classes, "nll": math.log(classes)}
    draws = draw_predictive(run, data.val.images, DRAWS)
    probs = temper(draws.probs, fit_temperature(draws.probs, data.val.labels, run.moved_prior)).mean(0)
    metrics = classification_metrics(probs, data.val.labels)
    return {
        "accuracy": metrics["accuracy"], "nll": metrics["nll"], "train_nll": run.history[-1]["nll"],
        "seconds": sum(trainer.epoch_seconds),
    }  # fmt: skip


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of earlier calls; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """

    def check(record: dict[str, Any]) -> None:
        float(record["settings"]["rate"]), float(record["nll"]), float(record["accuracy"])

    return earlier_records(path, check)


def best_rate(rates: list[float], nlls: list[float]) -> float:
    """The rate at the lowest point of the parabola through the best and its neighbours, in log rate.

    At an end, that end.

    Args:
        rates: ascending.
        nlls: of each.

    Examples:
        >>> round(best_rate([1e-3, 2e-3, 4e-3], [2.0, 1.0, 2.0]), 6)
        0.002
        >>> best_rate([1e-3, 2e-3, 4e-3], [1.0, 2.0, 3.0])
        0.001
    """
    best = nlls.index(min(nlls))
    if best in (0, len(nlls) - 1):
        return rates[best]
    below, above = (math.log(rates[other] / rates[best]) for other in (best - 1, best + 1))
    falls, rises = (nlls[other] - nlls[best] for other in (best - 1, best + 1))  # none is negative
    curve = falls * above - rises * below
    lowest = 0.5 * (falls * above**2 - rises * below**2) / curve if curve else 0.0
    return rates[best] * math.exp(min(max(lowest, below), above))


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(find_rates, RatesArguments, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
