"""Measure how many wrong labels analysis.labels finds, and what early-learning regularisation is worth.

python -m analysis.label_noise --data-root data --out analysis/results/labels --page docs/labels.md

A share of the training and validation labels is moved to another class at random. ``detect`` cells check the labels by
cross-fitting; ``train`` cells train on them and predict the clean test part. Re-run the same command to resume.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inference.cli import earlier_records, in_flags, run_script
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.methods.registry import OURS, row, with_defaults
from pyro_isingvit.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from pyro_isingvit.data.split import ImageData
    from pyro_isingvit.predictive.labels import Score

RESULTS = "results.json"
DRAWS = 16  # of the predictions of the test part, which would otherwise take longer than the training
MARKERS = ("<!-- labels: made by analysis.label_noise -->", "<!-- end of labels -->")
SCORES: tuple["Score", ...] = ("given", "margin", "upper")
DETECT = {
    "precision": "precision", "recall": "recall", "precision_confident_learning": "precision, CL",
    "recall_confident_learning": "recall, CL", "precision_at_wrong_given": "precision at n, p",
    "precision_at_wrong_upper": "p, upper end", "precision_at_wrong_margin": "margin", "estimated": "share, CL",
}  # fmt: skip
TRAIN = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
log = logging.getLogger(f"pyro_isingvit.{__name__}")


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    out: Path
    """Folder for results.json."""
    page: Path | None = None
    """Markdown page to write the tables into."""
    datasets: tuple[str, ...] = ("mnist", "fashion-mnist")
    """Data sets."""
    data_root: str = "data"
    """Folder of the torchvision data sets."""
    train_size: int = 2000
    """Training images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of split, wrong labels, initial weights, batches and noise."""
    detect: tuple[float, ...] = (0.05, 0.2)
    """Shares of wrong labels that are looked for."""
    detect_epochs: int = 16
    """Epochs of each of the five networks that look for them."""
    train: tuple[float, ...] = (0.2, 0.4)
    """Shares of wrong labels that networks are trained on."""
    train_epochs: int = 40
    """Epochs of these trainings."""
    methods: tuple[str, ...] = ("ising", "dropout")
    """Methods that are trained on wrong labels; the first one also looks for them."""
    weights: tuple[float, ...] = (0.0, 3.0)
    """Weights of early-learning regularisation; 0 is without."""
    cells: int | None = None
    """Stop after this many new cells; by default when all are there."""
    jobs: int = 1
    """Cells at the same time, in processes of their own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""


@dataclass(frozen=True)
class Cell:
    """One measurement; what distinguishes it from others stands in results.json."""

    kind: Literal["detect", "train"]
    dataset: str
    train_size: int
    share: float
    method: str
    early_learning: float
    epochs: int
    seed: int


def make_cells(arguments: Arguments) -> Iterator[Cell]:
    """All cells, seed by seed.

    Raises:
        UserError: nothing to measure, an unknown method or a share out of its range.
    """
    for name in ("datasets", "seeds", "methods", "weights"):
        need(getattr(arguments, name), f"`{name}` needs at least one value.")
    for name in ("detect", "train"):
        need(all(0 < share < 1 for share in getattr(arguments, name)), f"`{name}` takes shares between 0 and 1.")
    for name in ("jobs", "train_size", "detect_epochs", "train_epochs"):
        need(getattr(arguments, name) >= 1, f"`{name}` must be at least 1, not {getattr(arguments, name)}.")
    need(arguments.cells is None or arguments.cells >= 1, f"`cells` must be at least 1, not {arguments.cells}.")
    for method in arguments.methods:
        row(method)
    for seed, dataset in product(arguments.seeds, arguments.datasets):
        for share in arguments.detect:
            first = arguments.methods[0], 0.0, arguments.detect_epochs, seed
            yield Cell("detect", dataset, arguments.train_size, share, *first)
        for share, method, weight in product(arguments.train, arguments.methods, arguments.weights):
            last = method, weight, arguments.train_epochs, seed
            yield Cell("train", dataset, arguments.train_size, share, *last)


def settings(cell: Cell, data_root: str, device: str) -> RunConfig:
    """The settings of a cell's trainings."""
    from pyro_isingvit.core.presets import default_preset, preset

    name = default_preset(cell.dataset)
    data = DataConfig(cell.dataset, data_root, train_size=cell.train_size)
    config = with_defaults(cell.method, RunConfig(name, OURS, data, preset(name), version=__version__), cell.epochs)
    changes: dict[str, Any] = {"seed": cell.seed, "device": device, "early_learning": cell.early_learning}
    return replace(config, train=replace(config.train, **changes))


def measure(cell: Cell, data_root: str, device: str, threads: int | None) -> dict[str, float]:
    """The scores of a cell."""
    import torch

    from inference.spoil import noisy
    from pyro_isingvit.data.load import load_data

    if threads is not None:
        torch.set_num_threads(threads)
    start, config = time.process_time(), settings(cell, data_root, device)
    data, wrong = noisy(load_data(**asdict(config.data), seed=cell.seed), cell.share, cell.seed)
    scores = found(config, data, wrong) if cell.kind == "detect" else trained(config, data)
    return {**scores, "cpu_seconds": time.process_time() - start}


def found(config: RunConfig, data: "ImageData", wrong: "np.ndarray") -> dict[str, float]:
    """How well labels that are wrong (N,) are found."""
    from sklearn.metrics import average_precision_score

    from analysis.crossfit import cross_fit
    from pyro_isingvit.predictive.labels import doubt

    fitted, count = cross_fit(config, lambda: data, progress=False), int(wrong.sum())
    scores: dict[str, float] = {"images": len(wrong), "wrong": count}
    for score in SCORES:
        found = doubt(fitted.probs, fitted.given, fitted.labels, score=score)
        top = (-found.suspicion).argsort(kind="stable")[:count]
        scores[f"precision_at_wrong_{score}"] = float(wrong[top].mean())
        scores[f"average_precision_{score}"] = float(average_precision_score(wrong, found.suspicion))
    found = doubt(fitted.probs, fitted.given, fitted.labels)
    flagged, (low, high) = found.flagged, found.share_interval
    for suffix, chosen in (("", flagged), ("_confident_learning", found.off_diagonal)):
        hits = int((chosen & wrong).sum())
        scores[f"flagged{suffix}"] = int(chosen.sum())
        scores[f"precision{suffix}"] = hits / max(int(chosen.sum()), 1)
        scores[f"recall{suffix}"] = hits / max(count, 1)
    return scores | {
        "estimated": found.share, "estimated_low": low, "estimated_high": high,
    }  # fmt: skip


def trained(config: RunConfig, data: "ImageData") -> dict[str, float]:
    """Accuracy, NLL (nats per image) and ECE on the clean test part, after training on wrong labels."""
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.runs.predict import draw_predictive
    from pyro_isingvit.runs.trainer import Trainer

    run = Trainer(config, data, None, False).fit()
    draws = draw_predictive(run, data.test.images, DRAWS, seed=config.train.seed)
    metrics = classification_metrics(draws.mean, data.test.labels)
    return {name: metrics[name] for name in ("accuracy", "nll", "ece")}


def label_noise(arguments: Arguments) -> None:
    """Measure how many wrong labels are found, and what early-learning regularisation is worth."""
    from pyro_isingvit.data.load import load_parts

    cells, path = [*make_cells(arguments)], arguments.out / RESULTS
    records = read_records(path)
    known = [record["cell"] for record in records]
    todo = [cell for cell in cells if asdict(cell) not in known][: arguments.cells]
    log.info("%d cells, %d to do", len(cells), len(todo))
    for dataset in dict.fromkeys(cell.dataset for cell in todo):
        load_parts(DataConfig(dataset, arguments.data_root))  # what cannot be read is said here, not by every cell
    if todo:
        try:
            failed = _measure_all(todo, arguments, records, path)
        except KeyboardInterrupt as stop:
            stop.args = ("interrupted; finished cells are kept; re-run the same command to resume",)
            raise
        need(not failed, f"{failed} cells failed; re-run the same command to try them again.")
    tables = to_tables(records)
    print(tables)
    if arguments.page is not None:
        from analysis.comparison_tables import write_between

        write_between(arguments.page, tables, MARKERS)
        print(f"page: {arguments.page}")
    print(f"results: {path}")


def _measure_all(todo: list[Cell], arguments: Arguments, records: list[dict[str, Any]], path: Path) -> int:
    """Measures the cells and writes results.json after each; returns how many failed."""
    from tqdm.auto import tqdm

    from inference.workers import outcomes, threads_of
    from pyro_isingvit.core.checkpoint import write_json

    threads, failed = None if arguments.jobs == 1 else threads_of(arguments.jobs), 0
    work = partial(measure, data_root=arguments.data_root, device=arguments.device, threads=threads)
    with tqdm(total=len(todo), desc="cells", unit="cell", dynamic_ncols=True) as bar:
        for cell, outcome in outcomes(work, todo, arguments.jobs) if arguments.jobs > 1 else here(work, todo):
            if isinstance(outcome, Exception):
                failed += 1
                log.warning("failed: %s: %s", cell, in_flags(str(outcome), None) or repr(outcome))
            else:
                records[:] = read_records(path)  # those that another command has added meanwhile too
                records.append({"cell": asdict(cell), "version": __version__, "scores": outcome})
                records.sort(key=lambda record: [str(value) for value in record["cell"].values()])
                write_json(path, records)
            bar.update()
    return failed


def here[T, R](work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R | Exception]]:
    """``outcomes`` in this process: nothing has to be imported anew."""
    for item in items:
        try:
            yield item, work(item)
        except UserError as error:
            yield item, error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Cells of earlier calls; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """

    def check(record: dict[str, Any]) -> None:
        Cell(**record["cell"])
        if not all(isinstance(value, int | float) for value in record["scores"].values()):
            raise TypeError("scores are numbers")

    return earlier_records(path, check)


def to_tables(records: list[dict[str, Any]]) -> str:
    """Two tables in Markdown: wrong labels that are found, and trainings on wrong labels; means over the seeds."""
    import pandas as pd

    from analysis.comparison_tables import to_table, with_spread
    from analysis.grid_settings import minor
    from pyro_isingvit.core.untrusted import plain

    tables = []
    for kind, scores in (("detect", DETECT), ("train", TRAIN)):
        chosen = [{**each["cell"], **each["scores"]} for each in records if each["cell"]["kind"] == kind]
        if not chosen:
            continue
        frame = pd.DataFrame(chosen)
        keys = ["dataset", "train_size", "share", "method", "early_learning", "epochs"]
        own = ["early learning"] if kind == "train" else []
        rows = [["data", "images", "wrong", "method", *own, *scores.values(), "epochs", "seeds"]]
        for (dataset, size, share, method, weight, epochs), cells in frame.groupby(keys, sort=True):
            own = [f"{weight:g}"] * len(own)
            numbers = [with_spread(cells[name]) for name in scores]
            rows.append([
                plain(str(dataset)), f"{size:,}", f"{share:.0%}", f"`{plain(str(method))}`", *own, *numbers,
                f"{epochs}", f"{len(cells)}",
            ])  # fmt: skip
        tables.append(to_table(rows))
    versions = sorted({plain(minor(str(each.get("version", "?")))) for each in records})
    if len(versions) > 1:
        tables.append(f"Measured with versions {', '.join(versions)}, each with its own defaults.")
    return "\n\n".join(tables)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(label_noise, Arguments, argv)


if __name__ == "__main__":
    main()
