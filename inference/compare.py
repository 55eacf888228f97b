"""Train several methods on the same network, data and seeds, and compare them.

python -m inference.compare --dataset digits --train-sizes 300 1000 --methods ising dropout:0.1 ensemble:5 \
    --seeds 0 1 2 --out runs/compare

Re-run the same command to resume an interrupted grid: cells that results.json has with the same settings are done, even
where their runs are on another machine. The number after a method sets its main knob.

With --regularisers the grid is another: every regulariser against none, on development images of the training files
(inference/regularisers.py).
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from inference.cli import in_flags, run_script, show_results
from inference.workers import outcomes, threads_of
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.presets import default_preset, preset
from pyro_isingvit.core.settings import DataConfig, RunConfig, ViTConfig
from pyro_isingvit.methods.registry import OURS, READS, row, with_defaults
from pyro_isingvit.version import __version__

RESULTS = "results.json"
DONE, FAILED = "done", "failed"  # of a cell
ASIDE = "set aside"  # it has other settings than the cells it would be averaged with
Results = dict[tuple[Any, ...], dict[str, Any]]
log = logging.getLogger("pyro_isingvit.compare")


@dataclass(frozen=True)
class CompareArguments:
    """The grid: every method at every size with every seed."""

    out: Path
    """Folder of the grid: runs/, results.json, table.md, table.csv and figures."""
    methods: tuple[str, ...] = ("ising", "deterministic", "dropout:0.1", "dropconnect:0.1", "ensemble:5")
    """Methods of inference.train, each with an optional number after a colon."""
    train_sizes: tuple[int, ...] = (300,)
    """Numbers of training images; each seed draws its own subset of each size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; the same for all methods."""
    epochs: tuple[int, ...] = (30,)
    """Epochs of every method: one number for all sizes, or one for each; fine-tuning is counted."""
    preset: str | None = None
    """Network shape; by default the preset for the data set."""
    depth: int | None = None
    """Number of blocks; by default the preset's."""
    patch_size: int | None = None
    """Side of a patch in pixels; by default the preset's."""
    width: int | None = None
    """D, the width; by default the preset's."""
    batch_size: int = 64
    """Images per step."""
    augment: Literal["none", "crop", "crop-flip", "randaugment"] = "none"
    """New views of the training images, the same kind for all methods."""
    margin: int | None = None
    """Pixels that a random crop shifts an image at most; by default an eighth of its side."""
    samples: int = 50
    """Posterior draws of the evaluation; methods without draws ignore it, ensembles have one of each member or more."""
    jobs: int = 1
    """Cells trained at the same time, each in its own process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    init: str | None = None
    """Trained network that every method starts from, as inference.train takes it; the shape is then its own."""
    label: str | None = None
    """Name of the data set in the tables; by default that of --dataset."""
    data: DataConfig = field(default_factory=DataConfig)
    regularisers: tuple[str, ...] = ()
    """Compare these with none, for every method, on images of the training files alone: NAME, NAME:STRENGTH, NAME+NAME
    for several at once, or all."""
    flipped: float = 0.0
    """With regularisers: share of the training and validation labels that are moved to another class."""
    overwrite: bool = False
    """Train finished cells of the folder anew where their settings are others now; their runs are replaced."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    dataset: str
    train_size: int
    method: str  # as given, with its number
    seed: int
    config: RunConfig
    folder: Path

    @property
    def derived_from(self) -> str | None:
        """The method whose training this one shares, if any."""
        return row(self.config.method).derived_from

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What distinguishes the cell from the others."""
        return self.dataset, self.train_size, self.method, self.seed


def method_config(spec: str, epochs: int, base: RunConfig) -> RunConfig:
    """The settings of one method, ``name`` or ``name:number``, trained for ``epochs`` in all.

    Raises:
        UserError: unknown method, an invalid number, or a number for a method without a knob.
    """
    config, own = with_defaults(spec, base, epochs), base.train
    shared = ("batch_size", "samples", "device", "seed", "augment", "margin")
    train = replace(config.train, **{name: getattr(own, name) for name in shared})
    return replace(config, train=train)


def make_cells(arguments: CompareArguments) -> list[Cell]:
    """All cells, checked; methods that build on deterministic training come last.

    Raises:
        UserError: an invalid size, seed, method or preset.
    """
    from pyro_isingvit.methods.plain import check_baseline
    from pyro_isingvit.runs.checks import check_asked, check_training

    for name in ("methods", "train_sizes", "seeds"):
        values = getattr(arguments, name)
        need(len(values) > 0 and len(set(values)) == len(values), f"--{name.replace('_', '-')} needs distinct values.")
    need(0 <= arguments.flipped < 1, f"`flipped` is a share, at least 0 and below 1, not {arguments.flipped}.")
    need(not arguments.flipped or arguments.regularisers, "`flipped` goes with `regularisers`.")
    need(not (arguments.overwrite and arguments.regularisers), "`overwrite` is not for `regularisers`, whose cells are "
         "measured again where their settings are others.")  # fmt: skip
    need(arguments.data.train_size is None, "--train-size is not for a grid; give the numbers to --train-sizes.")
    shaped = [key for key in ("preset", "depth", "patch_size", "width") if getattr(arguments, key) is not None]
    told = ", ".join("--" + key.replace("_", "-") for key in shaped)
    need(arguments.init is None or not shaped, f"--init brings the shape of its network; leave out {told}.")
    need(len(arguments.epochs) in (1, len(arguments.train_sizes)), "--epochs takes one number, or one for each size.")
    need(min(*arguments.epochs, arguments.jobs, *arguments.train_sizes, arguments.samples) >= 1,
         "epochs, jobs, train sizes and samples must be at least 1.")  # fmt: skip
    name = arguments.preset or default_preset(arguments.data.dataset)
    vit = preset(name, **{key: getattr(arguments, key) for key in ("depth", "patch_size", "width")})
    label = arguments.label or arguments.data.dataset
    epochs = arguments.epochs * (len(arguments.train_sizes) if len(arguments.epochs) == 1 else 1)
    cells = []
    for size, count in zip(arguments.train_sizes, epochs, strict=True):
        for spec in sorted(arguments.methods, key=lambda spec: row(spec.partition(":")[0]).derived_from is not None):
            for seed in arguments.seeds:
                data = replace(arguments.data, train_size=size)
                base = RunConfig(name, OURS, data, vit, version=__version__, init=arguments.init)
                train = replace(
                    base.train, seed=seed, batch_size=arguments.batch_size, samples=arguments.samples,
                    device=arguments.device, augment=arguments.augment, margin=arguments.margin,
                )  # fmt: skip
                config = with_all_members(method_config(spec, count, replace(base, train=train)))
                check_training(config.train)
                check_asked(config.train)
                check_baseline(config.baseline)
                check_fields(config)
                cells.append(Cell(label, size, spec, seed, config, _folder(arguments.out, label, size, spec, seed)))
    return cells


def with_all_members(config: RunConfig) -> RunConfig:
    """The settings of a cell; an ensemble predicts with all its networks, for which it is charged."""
    if config.method not in READS["members"]:
        return config
    samples = max(config.train.samples, config.baseline.members)
    return replace(config, train=replace(config.train, samples=samples))


def _folder(out: Path, label: str, size: int, spec: str, seed: int) -> Path:
    safe = "".join(c if c.isalnum() or c in "-.:" else "_" for c in f"{label}-n{size}-{spec}-s{seed}")
    return out / "runs" / safe.replace(":", "=")


def _same_settings(cell: Cell) -> bool:
    """Whether the cell's folder holds a run with the cell's settings, whichever version wrote it."""
    from pyro_isingvit.runs.folder import read_config

    found = read_config(cell.folder).portable()
    if cell.config.init is not None:  # the start has brought its own shape
        found = replace(found, vit=cell.config.vit)
    return found == cell.config.portable()


def finished(cell: Cell) -> dict[str, Any] | None:
    """The metrics of a cell that is finished with the same settings, or None."""
    from pyro_isingvit.runs.folder import METRICS

    try:
        metrics = json.loads((cell.folder / METRICS).read_text())
        same = _same_settings(cell)
    except (OSError, ValueError, UserError):
        return None
    return metrics if same and isinstance(metrics, dict) else None


def recorded(cell: Cell, results: Results) -> bool:
    """Whether results.json has the cell, finished with the same settings; its run may be on another machine."""
    found = results.get(cell.key, {})
    if found.get("status") not in (DONE, ASIDE) or "config" not in found or _of_other_data(cell):
        return False
    try:
        config = RunConfig.from_json(found["config"], RESULTS)
    except UserError:  # of a version that had other settings
        return False
    return config.portable() == anywhere(cell)


def _of_other_data(cell: Cell) -> bool:
    """Whether the cell's folder holds a run of another file or folder: labels may be the same."""
    from inference.search_trials import source_of
    from pyro_isingvit.runs.folder import read_config

    try:
        found = read_config(cell.folder).data.dataset
    except UserError:
        return False
    return source_of(found) != source_of(cell.config.data.dataset)


def anywhere(cell: Cell) -> RunConfig:
    """The settings of a cell as results.json has them, whichever machine trained it."""
    return replace(cell.config, data=replace(cell.config.data, dataset=cell.dataset)).portable()


def _version(cell: Cell) -> str:
    """The version that trained a finished cell."""
    from pyro_isingvit.runs.folder import read_config

    return read_config(cell.folder).version


def _set_aside(results: Results, cells: list[Cell]) -> None:
    """Takes seeds of earlier calls out of the tables where they were trained otherwise than those of this call.

    They stay in results.json, and count again once a call asks for them.
    """
    asked = {(cell.dataset, cell.train_size, cell.method): cell for cell in cells}
    keys = {cell.key for cell in cells}
    for key, earlier in results.items():
        cell = asked.get(key[:3])
        if cell is None or key in keys or earlier["status"] != DONE or "config" not in earlier:
            continue
        wanted = replace(cell, seed=key[3], config=replace(cell.config, train=replace(cell.config.train, seed=key[3])))
        if not recorded(wanted, results):
            earlier["status"] = ASIDE
            log.warning("set aside: %s n=%s %s seed %s was trained with other settings", *key)


def run_cell(cell: Cell, threads: int) -> dict[str, Any]:
    """Trains one cell, or resumes it; returns its metrics."""
    import torch

    from pyro_isingvit.experiment import train_run
    from pyro_isingvit.runs.folder import CHECKPOINT, read_config

    torch.set_num_threads(threads)
    trained, config = sibling(cell), cell.config
    resume = trained is None and (cell.folder / CHECKPOINT).exists() and _same_settings(cell)
    if resume and config.init is not None:
        config = replace(config, vit=read_config(cell.folder).vit)
    return train_run(config, cell.folder, resume=resume, progress=False, trained=trained)


def sibling(cell: Cell) -> Path | None:
    """The finished run in the grid's folder whose weights a derived method takes, found by its settings.

    None if the method is not derived, or there is no such run.
    """
    from pyro_isingvit.runs.folder import METRICS, read_config, trained_alike

    if cell.derived_from is None:
        return None
    for metrics in sorted(cell.folder.parent.glob(f"*/{METRICS}")):
        try:
            config = read_config(metrics.parent)
        except UserError:  # a damaged run cannot be shared
            continue
        if config.method == cell.derived_from and trained_alike(config, cell.config):
            return metrics.parent
    return None


def run_grid(cells: list[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """Runs the cells in ``jobs`` processes; yields each with its metrics or its error (``workers.outcomes``)."""
    work = partial(run_cell, threads=threads_of(jobs))
    for derived in (False, True):
        yield from outcomes(work, [cell for cell in cells if (cell.derived_from is not None) == derived], jobs)


def compare(arguments: CompareArguments) -> None:
    """Train a grid of methods, sizes and seeds, and compare them."""
    from pyro_isingvit.data.load import load_parts
    from pyro_isingvit.runs.folder import METRICS

    cells = make_cells(arguments)
    if arguments.regularisers:
        from inference.regularisers import ablate

        plain = [(cell.dataset, cell.method, cell.config) for cell in cells]
        ablate(plain, arguments.regularisers, arguments.flipped, arguments.out, arguments.jobs)
        return
    results = read_results(arguments.out / RESULTS)
    todo = []
    for cell in cells:
        metrics = finished(cell)
        if metrics is not None:
            _record(results, cell, metrics, _version(cell))
        elif recorded(cell, results):
            results[cell.key]["status"] = DONE
        else:
            earlier = results.get(cell.key, {})
            if earlier.get("status") == DONE and "config" in earlier:
                earlier["status"] = ASIDE  # with other settings, until this call has trained it
            todo.append(cell)
    others = [] if arguments.overwrite else [cell.folder.name for cell in todo if (cell.folder / METRICS).exists()]
    told = f"{len(others)} finished cells of {arguments.out} have other settings than now: {', '.join(others[:3])}"
    need(not others, f"{told}; name another --out, or train them anew with --overwrite.")
    _set_aside(results, cells)
    log.info("%d cells, %d of them done already", len(cells), len(cells) - len(todo))
    if todo:
        load_parts(todo[0].config.data)  # what cannot be read is said here, not by every cell
    _write(arguments.out, results)
    try:
        _run_and_record(todo, arguments, results, cells)
    except KeyboardInterrupt as stop:
        stop.args = ("interrupted; finished cells and epochs are kept; re-run the same command to resume",)
        raise
    if any(row["status"] == DONE for row in results.values()):
        show_results("analysis.comparison", "--results", arguments.out, "tables and figures")
    failed = sum(results[cell.key]["status"] == FAILED for cell in cells)
    print(f"grid: {arguments.out}, {len(cells) - failed} cells done, {failed} failed")
    if failed:
        raise UserError(f"{failed} cells failed (their status is in {arguments.out / RESULTS}); run again to retry.")


def _run_and_record(todo: list[Cell], arguments: CompareArguments, results: Results, cells: list[Cell]) -> None:
    """Runs those cells that are to be done, and writes results.json after each."""
    from tqdm.auto import tqdm

    with tqdm(total=len(todo), desc="cells", unit="cell", dynamic_ncols=True) as bar:
        for cell, outcome in run_grid(todo, arguments.jobs):
            _record(results, cell, outcome)
            _add_others(results, arguments.out, cells)
            _write(arguments.out, results)
            bar.update()
            name = f"{cell.dataset} n={cell.train_size} {cell.method} seed {cell.seed}"
            if isinstance(outcome, Exception):
                bar.write(f"failed: {name}: {in_flags(str(outcome), None)}", file=sys.stderr)
            else:
                bar.write(f"{name}: accuracy {outcome['accuracy']:.4f}, NLL {outcome['nll']:.4f}", file=sys.stderr)


def read_results(path: Path) -> Results:
    """Cells of an earlier call, by dataset, size, method and seed; empty where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {(row["dataset"], row["train_size"], row["method"], row["seed"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away and run again: finished cells are kept.") from error


def _record(results: Results, cell: Cell, outcome: dict[str, Any] | Exception, version: str = __version__) -> None:
    row: dict[str, Any] = {
        "dataset": cell.dataset, "train_size": cell.train_size, "method": cell.method, "seed": cell.seed,
        "run": cell.folder.name, "epochs": cell.config.train.epochs + cell.config.train.finetune_epochs,
        "vit": asdict(_trained_vit(cell)), "config": json.dumps(asdict(replace(anywhere(cell), version=version))),
    }  # fmt: skip
    if isinstance(outcome, Exception):
        text = in_flags(str(outcome), None) or repr(outcome)  # a cell's settings are not flags of the grid
        row |= {"status": FAILED, "error": text.splitlines()[0][:300]}
    else:
        plain = {
            name: value for name, value in outcome.items() if not isinstance(value, dict | list)
        }  # the run has all
        row |= {"status": DONE, "metrics": plain}
    results[cell.key] = row


def _trained_vit(cell: Cell) -> ViTConfig:
    """The shape of a cell's network: where it starts from a trained one, that of the run's folder."""
    from pyro_isingvit.runs.folder import read_config

    if cell.config.init is not None:
        with contextlib.suppress(UserError):  # it failed before there was one
            return read_config(cell.folder).vit
    return cell.config.vit


def _add_others(results: Results, out: Path, cells: list[Cell]) -> None:
    """Takes in what another call with the same folder has finished meanwhile."""
    mine = {cell.key for cell in cells}
    for key, found in read_results(out / RESULTS).items():
        failed_here = results.get(key, {}).get("status") == FAILED  # perhaps because the other call held its run
        if key not in mine or (failed_here and found.get("status") == DONE):
            results[key] = found
    _set_aside(results, cells)


def _write(out: Path, results: Results) -> None:
    from pyro_isingvit.core.checkpoint import write_json

    write_json(out / RESULTS, [results[key] for key in sorted(results)])


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(compare, CompareArguments, argv)


if __name__ == "__main__":
    main()
