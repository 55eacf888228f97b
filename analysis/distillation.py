"""Distilled networks beside their teachers, what they were cut from, and Torch-Pruning's: a table over seeds.

python -m analysis.distillation --pruned runs/small-0 runs/small-1 --teacher runs/quality-0 runs/quality-1

The folders are those of inference.prune --distil, with --peers where others shall be in the table. With --page the
table goes between the page's two markers, with --out the numbers into a JSON file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.cli import run_script
from pyro_isingvit.core.errors import UserError, need

MARKERS = ("<!-- distillation: made by analysis.distillation -->", "<!-- end of distillation -->")
METRICS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
PEERS = {"plain, dense": "plain (`deterministic`), dense", "magnitude": "plain, group magnitude, distilled alike",
         "GroupTaylor": "plain, GroupTaylor, distilled alike"}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Which networks to show."""

    pruned: tuple[Path, ...]
    """Folders that inference.prune wrote; seeds of the same data set and size share a row."""
    teacher: tuple[Path, ...] = ()
    """The run that taught each of them, in the same order."""
    label: str | None = None
    """Name of the data set in the table; by default that of the run."""
    page: Path | None = None
    """Markdown page to write the table into."""
    out: Path | None = None
    """JSON file of every network's numbers; those of other data sets that it holds stay, and are in the table."""


def records(arguments: Arguments) -> list[dict[str, Any]]:
    """One record per network: data set, size, seed, what it is, multiply-accumulates and scores.

    Raises:
        UserError: a folder without metrics, or not as many teachers as networks.
    """
    pruned, teachers = arguments.pruned, arguments.teacher
    need(len(teachers) in (0, len(pruned)), "--teacher names one run for each folder of --pruned, in the same order.")
    found = []
    for number, folder in enumerate(pruned):
        own = _read(folder)
        try:
            found += _rows(own, _read(teachers[number]) if teachers else None, arguments.label)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder} or its teacher lacks {error} in metrics.json; name folders of inference.prune and of runs."
            ) from None
    return found


def _rows(own: dict[str, Any], teacher: dict[str, Any] | None, label: str | None) -> list[dict[str, Any]]:
    shared = {"dataset": label or own["dataset"], "train_size": own["train_size"], "seed": own["seed"]}
    rows: dict[str, tuple[int, dict[str, Any]]] = {}
    if teacher is not None:
        rows[f"teacher, {teacher['samples']} draws"] = teacher.get("macs", own["dense_macs"]), teacher
    macs = own.get("run_macs", own["macs"])  # before version 0.13 not written
    rows[f"the run that was cut, {own['samples']} draws"] = macs, {metric: own[f"full_{metric}"] for metric in METRICS}
    rows["cut and distilled, one pass" if own.get("distil_epochs", 1) else "cut, one pass"] = own["macs"], own
    rows |= {PEERS.get(name, name): (peer["macs"], peer) for name, peer in own.get("peers", {}).items()}
    return [
        {**shared, "what": name, "macs": macs} | {metric: scores[metric] for metric in METRICS}
        for name, (macs, scores) in rows.items()
    ]


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); name a folder that was trained or pruned to its end."
        ) from None


def table(found: list[dict[str, Any]]) -> str:
    """A row for each data set, size and kind of network: means and deviations over seeds."""
    import pandas as pd

    from analysis.comparison_tables import to_table, with_spread

    rows = [["", "", "MACs", *METRICS.values(), "seeds"]]
    for (dataset, size, what), cells in pd.DataFrame(found).groupby(["dataset", "train_size", "what"], sort=False):
        row = [f"{dataset}, {size:,}", str(what), f"{cells['macs'].mean():,.0f}"]
        rows.append([*row, *(with_spread(cells[metric]) for metric in METRICS), str(len(cells))])
    return to_table(rows)


def show(arguments: Arguments) -> None:
    """Print, or put into a page, what distilled networks are worth."""
    from analysis.comparison_tables import show_table
    from pyro_isingvit.core.checkpoint import write_json

    found = records(arguments)
    if arguments.out is not None:
        new = {(each["dataset"], each["train_size"]) for each in found}
        try:
            before = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
            found = [each for each in before if (each["dataset"], each["train_size"]) not in new] + found
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{arguments.out} is damaged ({error}); move it away and run again.") from None
        write_json(arguments.out, found)
    show_table(table(found), arguments.page, MARKERS)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(show, Arguments, argv)


if __name__ == "__main__":
    main()
