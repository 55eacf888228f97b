"""Table of what inference.search tried: a row for each choice of settings, a column for each data set and size.

python -m analysis.trials --records analysis/results/dev/records.jsonl --methods ising --cells 8

Settings that all rows share are said once, above the table; epochs and the shape of the network are told where they are
not the usual ones of their column. Numbers are means over the seeds, with the number of seeds where there are several;
rows with few seeds are not strictly comparable with others, which ``--seeds`` cures.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from inference.cli import run_script
from pyro_isingvit.core.errors import UserError, need

Score = Literal[
    "nll_calibrated", "accuracy_calibrated", "brier_calibrated", "ece_calibrated", "macs", "pruned_fraction"
]
BETTER = ("accuracy", "pruned")  # scores of which more is better begin so; the best row comes first
APART = {"dataset", "label", "name", "train_size", "seed", "settings", "method", "vit", "preset"}  # keys of a trial


@dataclass(frozen=True)
class Arguments:
    """Which records to show."""

    records: Path
    """File that inference.search wrote."""
    methods: tuple[str, ...] = ()
    """Show these methods alone; by default all."""
    score: Score = "nll_calibrated"
    """What to show: a score of the development images after the temperature, the cost, or the share pruned."""
    seeds: tuple[int, ...] = ()
    """Count these seeds alone; by default all."""
    cells: int = 1
    """Leave out rows with fewer numbers."""


def place(trial: dict[str, Any]) -> tuple[str, int]:
    """Data set and number of training images."""
    return str(trial.get("label", trial["dataset"])), int(trial.get("train_size") or 0)


def told(trial: dict[str, Any]) -> dict[str, Any]:
    """Everything that the trial sets, besides data, shape and seed."""
    rest = {name: value for name, value in trial.items() if name not in APART}
    return {"method": trial.get("method", "ising"), **rest, **trial.get("settings", {})}


def _by_place(trial: dict[str, Any]) -> dict[str, Any]:
    """What is told only where it is not the usual value of a column: epochs, and the shape of the network."""
    return {"epochs": trial.get("epochs", 0), "preset": trial.get("preset"), "vit": trial.get("vit")}


def table(records: list[dict[str, Any]], score: str, cells: int = 1) -> str:
    """The table in Markdown, below the settings that all rows share.

    Args:
        records: of trials; those that diverged count as not there.
        score: key of a record.
        cells: rows with fewer numbers are left out.

    Raises:
        UserError: no row is left.
    """
    usual: dict[tuple[str, int], dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for record in records:
        for name, value in _by_place(record["trial"]).items():
            usual[place(record["trial"])][name][f"{value}"] += 1
    groups: dict[Any, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.get(score) is not None:
            where, settings = place(record["trial"]), told(record["trial"])
            for name, value in _by_place(record["trial"]).items():
                settings.pop(name, None)
                if f"{value}" != usual[where][name].most_common(1)[0][0]:
                    settings[name] = value
            key = tuple(sorted((name, f"{value}") for name, value in settings.items()))
            groups[key][where].append(float(record[score]))
    kept = {key: row for key, row in groups.items() if len(row) >= cells}
    need(kept, f"no trials with {score} in {cells} or more columns.")
    shared = set.intersection(*(set(key) for key in kept))
    places = sorted({where for row in kept.values() for where in row})
    heading = ["trial", *(f"{label} {size:,}" for label, size in places)]
    lines = [heading, ["---"] * len(heading)]
    sign = -1 if score.startswith(BETTER) else 1
    for key, row in sorted(kept.items(), key=lambda item: (-len(item[1]), sign * mean(map(mean, item[1].values())))):
        name = " ".join(f"{setting}={value}" for setting, value in key if (setting, value) not in shared) or "as above"
        lines.append([name, *(_cell(row.get(where, []), score) for where in places)])
    common = ", ".join(f"{setting} {value}" for setting, value in sorted(shared))
    return f"all: {common or 'nothing in common'}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: list[float], score: str) -> str:
    if not values:
        return ""
    text = f"{mean(values):,.0f}" if score == "macs" else f"{mean(values):.4f}"
    return text if len(values) == 1 else f"{text} ({len(values)})"


def show(arguments: Arguments) -> None:
    """Print a table of the trials of a search."""
    from inference.search_trials import key_of, read_records

    if not arguments.records.is_file():
        raise UserError(f"{arguments.records} is not there; --records takes a file that inference.search wrote.")
    last = {key_of(record["trial"]): record for record in read_records(arguments.records)}  # of trials done again
    records = [
        record
        for record in last.values()
        if (not arguments.methods or record["trial"].get("method", "ising").partition(":")[0] in arguments.methods)
        and (not arguments.seeds or record["trial"].get("seed", 0) in arguments.seeds)
    ]
    need(records, f"{arguments.records} has no trials of these methods and seeds.")
    print(table(records, arguments.score, arguments.cells))


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(show, Arguments, argv)


if __name__ == "__main__":
    main()
