"""Every regulariser against none: the cells of ``inference.compare --regularisers``, and what is measured in each.

As in inference.search, all images are of the training files: training, validation and 5,000 development images. The
test part is never looked at. Every finished cell is a line of JSON in records.jsonl: ``trial`` says which, ``resolved``
has all its settings (a cell whose defaults have changed since is measured again), the rest is

accuracy, nll, brier, ece      of the development images, after the temperature that fits the validation part
nll_uncalibrated               without it
corrupted_accuracy, _nll       of ``CORRUPTED`` of them, mean over the corruptions of inference.spoil at severity 3
prunable                       share of the weights that can be cut at equal accuracy (inference.prunable)
seconds_per_step               of training, the lower quartile over the epochs: of the processor, or on a GPU wall time;
                               to be compared on one ``machine``
refused, error                 alone: the method does not go with the regulariser; the training diverged
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.cli import in_flags, show_results
from inference.workers import outcomes, threads_of
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.regularise import REGULARISERS, regularised
from pyro_isingvit.core.settings import DataConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.version import __version__

if TYPE_CHECKING:
    from pyro_isingvit.data.split import ImageData, Split
    from pyro_isingvit.runs.run import Run

RECORDS = "records.jsonl"
NONE = "none"
ALL = "all"
CORRUPTED = 1000  # development images that are corrupted
SEVERITY = 3  # of 5
DRAWS = 8  # of the predictions of corrupted images, at most
PLACE = ("dataset", "data_root", "download", "cache")  # settings of the data that do not say which images
log = logging.getLogger("pyro_isingvit.regularisers")


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        trial: what distinguishes it, as its record says it.
        config: its settings, the regulariser among them.
    """

    trial: dict[str, Any]
    config: RunConfig

    @property
    def key(self) -> str:
        """What distinguishes the cell, as text."""
        return json.dumps(self.trial, sort_keys=True)

    def resolved(self) -> dict[str, Any]:
        """Every setting of the training, those that are defaults today too."""
        from inference.search_trials import Trial

        return Trial({}, self.config, 0).resolved()

    @property
    def name(self) -> str:
        """For messages."""
        told = self.trial
        wrong = f", {told['flipped']:g} flipped" if told["flipped"] else ""
        where = f"{told['dataset']} n={told['train_size']}{wrong}, {told['method']}"
        return printable(f"{where}, {told['regulariser']}, seed {told['seed']}")


def chosen(names: Sequence[str]) -> list[str]:
    """Regularisers as NAME:STRENGTH, none first; ``all`` is every one of the registry at its usual strength.

    Raises:
        UserError: an unknown name, a strength out of its range, or names in one sum that contradict each other.

    Examples:
        >>> chosen(["mhe", "mhe+attention-log:0.1"])
        ['none', 'mhe:1', 'attention-log:0.1+mhe:1']
    """
    every = [*REGULARISERS] if ALL in names else []
    given = [*every, *(name for name in names if name not in (ALL, NONE))]
    settings = RunConfig().train
    strengths: dict[str, None] = {}  # each once
    for name in given:
        train, kinds = regularised(settings, several(name)), sorted(each.partition(":")[0] for each in several(name))
        strengths["+".join(f"{kind}:{getattr(train, REGULARISERS[kind].setting):g}" for kind in kinds)] = None
    return [NONE, *strengths]


def several(name: str) -> list[str]:
    """The terms of NAME:STRENGTH+NAME:STRENGTH, whose numbers may be like 1e+6."""
    return re.split(r"\+(?=[a-z])", name)


def make_cells(plain: Iterable[tuple[str, str, RunConfig]], names: Sequence[str], flipped: float) -> list[Cell]:
    """All cells: seed by seed, the smallest size first, and for each method none and all regularisers in a row.

    Combinations that the settings alone rule out are left out and told.

    Args:
        plain: label of the data set, method with its number, and settings of each training without a regulariser.
        names: regularisers, or ``all``.
        flipped: share of wrong labels in the training and validation part.
    """
    from inference.search_trials import Trial
    from pyro_isingvit.methods.registry import WITHOUT
    from pyro_isingvit.runs.checks import check_asked, check_training

    cells = []
    for dataset, method, config in sorted(plain, key=lambda one: (one[2].train.seed, one[2].data.train_size or 0)):
        config = replace(config, train=replace(config.train, calibrate=True))
        data = {n: v for n, v in differing(config.data, DataConfig()).items() if n not in (*PLACE, "train_size")}
        trial = {
            "dataset": dataset, "train_size": config.data.train_size, "flipped": flipped, "method": method,
            "seed": config.train.seed, "epochs": config.train.epochs + config.train.finetune_epochs,
            "settings": Trial({}, config, 0).changes() | {"vit": differing(config.vit, ViTConfig())},
            **({"init": config.init} if config.init else {}), **({"data": data} if data else {}),
        }  # fmt: skip
        config = replace(config, train=replace(config.train, **WITHOUT))  # what is a default by now is measured too
        for name in chosen(names):
            try:
                train = config.train if name == NONE else regularised(config.train, several(name))
                check_training(train)
                check_asked(train)
            except UserError as error:
                left_out = Cell(trial | {"regulariser": name}, config).name
                log.warning("left out: %s: %s", left_out, in_flags(str(error), None))
                continue
            sets = {"regulariser": name, "sets": differing(train, config.train)}
            cells.append(Cell(trial | sets, replace(config, train=train)))
    return cells


def differing[T: (DataConfig, TrainConfig, ViTConfig)](settings: T, others: T) -> dict[str, Any]:
    """Fields that differ; settings that later versions add leave it as it is."""
    theirs = asdict(others)
    return {name: value for name, value in asdict(settings).items() if value != theirs[name]}


def ablate(
    plain: Iterable[tuple[str, str, RunConfig]], names: Sequence[str], flipped: float, out: Path, jobs: int
) -> None:
    """Measures all cells that have no record yet, and shows what was found.

    Args:
        plain: trainings without a regulariser, as ``make_cells`` takes them.
        names: regularisers, or ``all``.
        flipped: share of wrong labels.
        out: folder of the records.
        jobs: cells at the same time, in processes of their own.

    Raises:
        UserError: records that cannot be read or written, or cells that failed for another reason than their training.
    """
    from inference.search_trials import key_of, read_records, same_settings, source_of
    from pyro_isingvit.data.load import load_parts

    cells, path = make_cells(plain, names, flipped), out / RECORDS
    records = {key_of(record["trial"]): record for record in read_records(path)}
    todo = [
        cell for cell in cells
        if "refused" in (known := records.get(cell.key, {"refused": ""})) or not same_settings(cell.resolved(), known)
    ]  # fmt: skip
    for cell in cells:
        source = source_of(cell.config.data.dataset)
        other = records.get(cell.key, {}).get("source", source)
        told = f"{path} has records of {other} under the label {cell.trial['dataset']}, not of {source}"
        need(other == source, f"{told}; give another `label`, or another folder.")
    log.info("%d cells, %d of them done already", len(cells), len(cells) - len(todo))
    if todo:
        load_parts(todo[0].config.data)  # what cannot be read is said here, not by every cell
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()  # refuses a place that cannot be written to before anything is trained
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}.") from error
    try:
        failed = _run_and_record(todo, path, records, jobs)
    except KeyboardInterrupt as stop:
        stop.args = ("interrupted; finished cells are kept; re-run the same command to resume",)
        raise
    if any("accuracy" in record for record in records.values()):
        show_results("analysis.regularisers", "--results", out, "the table")
    print(f"records: {path}, {len(cells) - failed} cells done, {failed} failed")
    if failed:
        raise UserError(f"{failed} cells failed, which are not recorded; run again to retry.")


def _run_and_record(todo: Sequence[Cell], path: Path, records: dict[str, dict[str, Any]], jobs: int) -> int:
    """Runs the cells and adds a line after each; returns how many failed for a reason outside of training."""
    from tqdm.auto import tqdm

    from inference.search_trials import append_record, source_of

    failed = 0
    work = partial(measure, threads=threads_of(jobs))
    with tqdm(total=len(todo), desc="cells", unit="cell", dynamic_ncols=True) as bar:
        for cell, outcome in outcomes(work, todo, jobs):
            bar.update()
            if isinstance(outcome, Exception):
                failed += 1
                bar.write(f"failed: {cell.name}: {in_flags(str(outcome), None) or repr(outcome)}", file=sys.stderr)
                continue
            for reason in outcome.keys() & {"refused", "error"}:
                bar.write(f"{cell.name}: {reason}: {outcome[reason]}", file=sys.stderr)
            known = records.get(cell.key, {})
            if "refused" not in outcome or outcome["refused"] != known.get("refused"):
                told = {"version": __version__, "source": source_of(cell.config.data.dataset)}
                record = {"trial": cell.trial, **told, "resolved": cell.resolved(), **outcome}
                append_record(path, record)
                records[cell.key] = record
    return failed


def measure(cell: Cell, threads: int) -> dict[str, Any]:
    """Trains a cell and judges it: what its record has besides the settings.

    Raises:
        UserError: data that cannot be read.
    """
    import torch

    from inference.spoil import noisy
    from pyro_isingvit.data.load import development_data
    from pyro_isingvit.experiment import begun
    from pyro_isingvit.runs.trainer import Trainer, TrainingDiverged
    from pyro_isingvit.starts import load_start

    torch.set_num_threads(threads)
    begin, config, start = time.monotonic(), cell.config, None
    data = development_data(config.data, seed=config.train.seed)
    if cell.trial["flipped"]:
        data, _ = noisy(data, cell.trial["flipped"], config.train.seed)
    if config.init is not None:
        config, data, start = begun(config, data, load_start(config.init, download=config.data.download))
    teachers = []
    if config.train.distillation:  # learns from the same training without it
        usual = {name: getattr(type(config.train)(), name) for name in cell.trial["sets"]}
        alone = replace(config, train=replace(config.train, **usual))
        teachers = [Trainer(alone, data, None, False, start=start).fit()]
    try:
        trainer = Trainer(config, data, None, False, start=start, teachers=teachers)
    except UserError as error:
        if cell.trial["regulariser"] == NONE:
            raise
        return {"refused": first_line(error)}
    try:
        run = trainer.fit()
    except TrainingDiverged as error:
        return {"error": first_line(error)}
    seconds = sorted(trainer.epoch_seconds if run.device.type == "cuda" else trainer.cpu_seconds)
    quick = seconds[len(seconds) // 4] / trainer.steps_per_epoch
    scores = judge(run, data) | {"seconds_per_step": quick, "machine": place_of_work(threads, run.device.type)}
    return {**scores, "seconds": time.monotonic() - begin}


def place_of_work(threads: int, device: str) -> str:
    """What the time of a step depends on: processor or GPU, threads and PyTorch."""
    from inference.benchmark import machine

    told = machine(threads, device)
    cpu = f"{told['processor']}, {told['cores']} cores, {threads} threads"
    return f"{told['gpu'] or cpu}, torch {told['torch']}"


def first_line(error: UserError) -> str:
    """What went wrong, in words without flags."""
    return in_flags(str(error), None).splitlines()[0][:300]


def judge(run: "Run", data: "ImageData") -> dict[str, Any]:
    """Scores of a trained run on ``data.test``, the development images (the module says which)."""
    import numpy as np

    from inference.prunable import prunable
    from pyro_isingvit.predictive.calibration import temper
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.runs.predict import draw_predictive

    dev, train = data.test, run.config.train
    some = np.linspace(0, len(dev), min(len(dev), CORRUPTED), endpoint=False).astype(int)
    draws = draw_predictive(run, dev.images, train.samples, seed=train.seed)
    found = classification_metrics(draws.mean, dev.labels)
    raw = classification_metrics(temper(draws.probs, 1 / float(run.temperature)).mean(0), dev.labels)
    spoilt = [*corrupted(run, dev.take(some))]
    masks = run.mask_summary()
    return {
        **{name: found[name] for name in ("accuracy", "nll", "brier", "ece")}, "nll_uncalibrated": raw["nll"],
        "temperature": float(run.temperature),
        **{f"corrupted_{name}": sum(each[name] for each in spoilt) / len(spoilt) for name in ("accuracy", "nll")},
        "prunable": prunable(run, dev), "retention_mean": masks["retention_mean"],
        "pruned_fraction": masks["pruned_fraction"], "samples": len(draws.probs),
        "train_size": len(data.train), "val_size": len(data.val), "dev_size": len(dev),
    }  # fmt: skip


def corrupted(run: "Run", split: "Split") -> Iterator[dict[str, float]]:
    """Scores under each corruption at ``SEVERITY``; the same corrupted images for every run."""
    from inference.spoil import CORRUPTIONS, corrupt
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.runs.predict import draw_predictive

    samples = min(DRAWS, run.config.train.samples)
    for name in CORRUPTIONS:
        spoilt = corrupt(split.images[:], name, SEVERITY)
        draws = draw_predictive(run, spoilt, samples, seed=run.config.train.seed)
        yield classification_metrics(draws.mean, split.labels)
