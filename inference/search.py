"""Try settings on development data, which are images of the training files alone.

python -m inference.search --trials trials.json --records trials.jsonl --jobs 2

The training files are divided into training, validation and development images; the test part is never looked at. A
file of trials is a JSON list such as

[{"dataset": "fashion-mnist", "train_size": 2000, "seed": 0, "method": "dropout:0.2", "epochs": 40,
  "preset": "small", "vit": {"depth": 2}, "settings": {"lr": 0.004, "weight_decay": 0.15}}]

``settings`` takes any field of TrainConfig, IsingConfig and BaselineConfig; the rest is as the method has it. A trial
may also have ``label`` (name of the data set in the table), ``name`` (of the trial), ``val_fraction``, ``image_size``
and ``dev_size``. ``epochs`` counts fine-tuning.

Re-run the same command to resume an interrupted search: trials that have a record are skipped.
"""

import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inference.cli import in_flags, run_script
from inference.workers import outcomes
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.version import __version__

if TYPE_CHECKING:  # what stands on torch is imported when a search begins
    from inference.search_trials import Trial
    from pyro_isingvit.core.settings import ViTConfig
    from pyro_isingvit.data.split import ImageData
    from pyro_isingvit.nets.start import Start
    from pyro_isingvit.trained import TrainedRun

SCORES = ("accuracy", "nll", "brier", "ece")
log = logging.getLogger("pyro_isingvit.search")


@dataclass(frozen=True)
class SearchArguments:
    """Which trials to run, and where to keep what came of them."""

    trials: Path
    """JSON file with a list of trials."""
    records: Path
    """File for a line of JSON per finished trial; more are added to those that it has."""
    jobs: int = 1
    """Trials at the same time, each in a process of its own with one thread."""
    data_root: str = "data"
    """Folder of the torchvision data sets."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""


def search(arguments: SearchArguments) -> None:
    """Try settings on development data from the training files."""
    need(arguments.jobs >= 1, f"`jobs` must be at least 1, not {arguments.jobs}.")
    from inference.search_trials import key_of, read_records, read_trials

    trials = read_trials(arguments.trials, arguments.data_root, arguments.device)
    records = {key_of(record["trial"]): record for record in read_records(arguments.records)}
    todo = [trial for trial in trials if not trial.is_that_of(records.get(trial.key))]
    log.info("%d trials, %d of them done already", len(trials), len(trials) - len(todo))
    if again := sum(trial.key in records for trial in todo):
        log.warning("%d of them were done with defaults that have changed since; they are done again", again)
    try:
        arguments.records.parent.mkdir(parents=True, exist_ok=True)
        arguments.records.open("ab").close()  # refuses a place that cannot be written to before anything is trained
    except OSError as error:
        raise UserError(f"cannot write to {arguments.records}: {error.strerror or error}.") from error
    try:
        failed = _run_and_record(todo, arguments, records)
    except KeyboardInterrupt as stop:
        stop.args = ("interrupted; finished trials are kept; re-run the same command to resume",)
        raise
    print_tables([(trial, records[trial.key]) for trial in trials if trial.is_that_of(records.get(trial.key))])
    print(f"records: {arguments.records}, {len(trials) - failed} trials done, {failed} failed")
    if failed:
        raise UserError(f"{failed} trials failed, which are not recorded; run again to retry.")


def _run_and_record(todo: "list[Trial]", arguments: SearchArguments, records: dict[str, dict[str, Any]]) -> int:
    """Runs the trials and writes a record after each; returns how many failed for a reason outside of training."""
    from tqdm.auto import tqdm

    from inference.search_trials import append_record

    failed = 0
    with tqdm(total=len(todo), desc="trials", unit="trial", dynamic_ncols=True) as bar:
        for trial, outcome in outcomes(run_trial, todo, arguments.jobs):
            bar.update()
            name = printable(f"{place(trial.given)}, {title(trial.given)}, seed {trial.config.train.seed}")
            if isinstance(outcome, Exception):
                failed += 1
                bar.write(f"failed: {name}: {in_flags(str(outcome), None) or repr(outcome)}", file=sys.stderr)
                continue
            record = {
                "trial": trial.given, "settings": trial.changes(), "version": __version__, **outcome,
                "resolved": trial.resolved(),
            }  # fmt: skip
            append_record(arguments.records, record)
            records[trial.key] = record
            said = outcome["error"] if "error" in outcome else f"NLL {outcome['nll_calibrated']:.4f} after temperature"
            bar.write(f"{name}: {said}", file=sys.stderr)
    return failed


def run_trial(trial: "Trial") -> dict[str, Any]:
    """Trains one trial in memory and judges it: what its record has besides the settings.

    A training that diverged gives ``error`` alone.

    Raises:
        UserError: data that cannot be read, or settings that do not fit them.
    """
    import torch

    from pyro_isingvit.data.load import development_data
    from pyro_isingvit.experiment import fit
    from pyro_isingvit.runs.trainer import TrainingDiverged
    from pyro_isingvit.starts import load_start

    torch.set_num_threads(1)
    config = trial.config
    data = development_data(config.data, trial.dev_size, config.train.seed)
    start = time.monotonic()
    try:
        shape: ViTConfig | Start = config.vit
        if config.init is not None:  # which brings all but the head
            begun = load_start(config.init)
            shape = replace(begun, vit=replace(begun.vit, head=config.vit.head))
        run = fit(
            shape, data, method=config.method,
            train=config.train, ising=config.ising, baseline=config.baseline, progress=False,
        )  # fmt: skip
    except TrainingDiverged as error:
        return {"error": in_flags(str(error), None).splitlines()[0][:300]}
    return {"seconds": time.monotonic() - start, **judge(run, data)}


def judge(run: "TrainedRun", data: "ImageData") -> dict[str, Any]:
    """Scores of a trained run.

    Args:
        run: what ``fit`` gave.
        data: its images; ``data.test`` has the development images.

    Returns:
        accuracy, nll (nats per image), brier and ece of the development images: ``*_uncalibrated`` at T = 1 and
        ``*_calibrated`` at the temperature that fits the validation part; ``temperature``, ``val_nll_calibrated``,
        ``retention_mean``, ``pruned_fraction``, counts of images and draws, and multiply-accumulates where
        ``TrainedRun.evaluate`` has them.
    """
    from pyro_isingvit.predictive.calibration import CALIBRATION_SAMPLES, fit_temperature, temper
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.runs.predict import draw_predictive

    run.val = None  # its metrics of the validation part are not needed, and take many draws
    metrics = run.evaluate(data.test)
    assert run.evaluation is not None
    own = temperature = float(run.temperature)
    scores: dict[str, Any] = {"val_nll_calibrated": None}
    if len(data.val):
        val = draw_predictive(run, data.val.images, CALIBRATION_SAMPLES, seed=run.config.train.seed).probs
        if not run.config.train.calibrate:
            temperature = fit_temperature(temper(val, 1 / own), data.val.labels, run.moved_prior)
        tempered = temper(val, temperature / own).mean(0)
        scores["val_nll_calibrated"] = classification_metrics(tempered, data.val.labels)["nll"]
    for suffix, wanted in (("uncalibrated", 1.0), ("calibrated", temperature)):
        probs = temper(run.evaluation.draws.probs, wanted / own).mean(0)
        found = classification_metrics(probs, data.test.labels)
        scores |= {f"{name}_{suffix}": found[name] for name in SCORES}
    kept = ("retention_mean", "pruned_fraction", "samples")
    return {
        **scores, "temperature": temperature, **{name: metrics[name] for name in kept},
        **{name: value for name, value in metrics.items() if "macs" in name},
        "train_size": len(data.train), "val_size": len(data.val), "dev_size": len(data.test),
    }  # fmt: skip


# The closing tables ------------------------------------------------------------------------------------------------

COLUMNS = {  # key of a record -> heading and decimals
    "accuracy_calibrated": ("accuracy", 4), "nll_calibrated": ("NLL, T", 4), "nll_uncalibrated": ("NLL", 4),
    "brier_calibrated": ("Brier, T", 4), "ece_calibrated": ("ECE, T", 4), "temperature": ("T", 2),
    "val_nll_calibrated": ("val NLL, T", 4), "pruned_fraction": ("pruned", 2), "macs": ("MACs", 0), "seconds": ("s", 0),
}  # fmt: skip
SPREAD = ("accuracy_calibrated", "nll_calibrated")  # shown with their standard deviation over the seeds
WIDTH = 160  # of a table that goes to a file


def place(given: dict[str, Any]) -> str:
    """Data set and number of training images, which have a table of their own."""
    size = given.get("train_size")
    return f"{given.get('label', given['dataset'])}, n = {'all' if size is None else f'{size:,}'}"


def title(given: dict[str, Any], preset: bool = False) -> str:
    """The name of a trial, or its method and settings; ``preset``: that too."""
    if "name" in given:
        return str(given["name"])
    told = {"dataset", "label", "train_size", "seed", "method", "vit", "settings", *(() if preset else ("preset",))}
    rest = {name: value for name, value in given.items() if name not in told}
    words = {**given.get("vit", {}), **given.get("settings", {}), **rest}
    return " ".join([given.get("method", "ising"), *(f"{name}={value}" for name, value in words.items())])


def print_tables(done: "list[tuple[Trial, dict[str, Any]]]") -> None:
    """A table for each data set and size: trials by their NLL after the temperature, means over seeds."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    several = len({trial.given.get("preset") for trial, _ in done}) > 1
    for trial, record in done:
        rows = tables.setdefault(place(trial.given), {})
        same = {name: value for name, value in trial.given.items() if name != "seed"}
        rows.setdefault(repr(sorted(same.items())), []).append({"title": title(trial.given, several), **record})
    for where, rows in tables.items():
        shown = [name for name in COLUMNS if any(name in record for records in rows.values() for record in records)]
        table = Table(title=printable(where), title_justify="left")
        table.add_column("trial", overflow="fold")
        for heading in ("seeds", *(COLUMNS[name][0] for name in shown)):
            table.add_column(heading, justify="right", no_wrap=True)
        for records in sorted(rows.values(), key=_order):
            table.add_row(printable(records[0]["title"]), *_cells(records, shown))
        console.print(table)


def _order(records: list[dict[str, Any]]) -> tuple[bool, float]:
    """By the mean NLL; what diverged with some seed comes last."""
    import math

    found = [record["nll_calibrated"] for record in records if "error" not in record]
    return len(found) < len(records), sum(found) / len(found) if found else math.inf


def _cells(records: list[dict[str, Any]], shown: list[str]) -> list[str]:
    import statistics

    trained = [record for record in records if "error" not in record]
    diverged = len(records) - len(trained)
    cells = [f"{len(trained)}, {diverged} diverged" if diverged else str(len(trained))]
    for name in shown:
        values = [record[name] for record in trained if record.get(name) is not None]
        text = f"{statistics.mean(values):,.{COLUMNS[name][1]}f}" if values else ""
        spread = len(values) > 1 and name in SPREAD
        cells.append(f"{text} ± {statistics.stdev(values):.4f}" if spread else text)
    return cells


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(search, SearchArguments, argv)


if __name__ == "__main__":
    main()
