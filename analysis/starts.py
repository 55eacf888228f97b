"""From nothing against from a trained network: a table of two grids of inference.compare that differ in --init alone.

python -m analysis.starts --nothing analysis/results/starts/nothing --started analysis/results/starts/unlabelled

With --page the table goes between the page's two markers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.grid_settings import between
from inference.cli import run_script
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    import pandas as pd

MARKERS = ("<!-- starts: made by analysis.starts -->", "<!-- end of starts -->")
METRICS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


@dataclass(frozen=True)
class Arguments:
    """Which grids to compare."""

    nothing: Path
    """Folder of the grid whose networks start from random weights."""
    started: Path
    """Folder of the grid whose networks start from a trained one."""
    page: Path | None = None
    """Markdown page to write the table into."""


def table(nothing: "pd.DataFrame", started: "pd.DataFrame") -> str:
    """A row for each data set, size and method that both grids have: mean and deviation over the seeds that both have.

    Args:
        nothing: a row for each finished cell, as ``load_results`` gives them.
        started: likewise.

    Raises:
        UserError: the grids share no cell.
    """
    from analysis.comparison_tables import to_table, with_spread

    keys = ["dataset", "train_size", "method", "seed"]
    both = nothing.merge(started, on=keys, suffixes=("_nothing", "_started"))
    need(len(both), "the two grids have no cell in common.")
    rows = [["", "", "", *(f"{name}, {start}" for name in METRICS.values() for start in ("from nothing", "started"))]]
    for (dataset, size, method), cells in both.groupby(keys[:3], sort=True):
        row = [str(dataset), f"{size:,}", f"`{method}`"]
        for metric in METRICS:
            for start in ("nothing", "started"):
                row.append(with_spread(cells[f"{metric}_{start}"]))
        rows.append(row)
    return to_table(rows)


def show(arguments: Arguments) -> None:
    """Print, or put into a page, what starting from a trained network is worth."""
    from analysis.comparison_tables import load_results, show_table

    paths = [folder / "results.json" for folder in (arguments.nothing, arguments.started)]
    made = table(*map(load_results, paths))
    nothing, started = (json.loads(path.read_text()) for path in paths)
    differ = between(nothing, started, ("from nothing", "started"))
    if differ:
        made += "\n\nSettings that differ:\n\n" + "\n".join(f"- {line}" for line in differ)
    show_table(made, arguments.page, MARKERS)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(show, Arguments, argv)


if __name__ == "__main__":
    main()
