"""Accuracies of a grid on the paper's networks and data sizes, beside those that the paper's authors archived.

python -m analysis.paper_table --results analysis/results/paper

With --page the table goes between the page's two markers. docs/paper.md says how the grid is run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference.cli import run_script
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    import pandas as pd

MARKERS = ("<!-- paper: made by analysis.paper_table -->", "<!-- end of paper -->")
SIZES = {"mnist": (300, 6000, 18000), "fashion-mnist": (300, 6000, 18000), "cifar10": (250, 5000, 15000)}
# Percent, in the order of SIZES. Their split lets some test images into training, so they are flattered.
ARCHIVED: dict[str, tuple[float, ...]] = {
    "Ising 0.1": (46.6, 91.1, 95.5, 58.3, 82.8, 87.9, 25.4, 45.9, 57.7),
    "Ising 0.5": (28.9, 84.9, 92.2, 37.6, 77.7, 83.5, 23.9, 42.8, 55.8),
    "Dropout 0.1": (48.9, 90.7, 95.8, 56.0, 82.3, 88.1, 22.4, 43.5, 59.1),
    "Dropout 0.5": (45.3, 89.5, 95.4, 54.7, 81.2, 87.5, 22.0, 42.0, 55.2),
    "DropConnect 0.1": (54.9, 92.3, 96.7, 60.5, 84.1, 90.2, 25.7, 49.7, 66.1),
    "DropConnect 0.5": (27.6, 79.6, 90.6, 37.7, 75.5, 81.8, 22.5, 39.5, 47.9),
}


@dataclass(frozen=True)
class Arguments:
    """Which grid to show."""

    results: Path
    """Folder that inference.compare wrote."""
    page: Path | None = None
    """Markdown page to write the table into."""


def table(frame: "pd.DataFrame") -> str:
    """Accuracy in percent: a row for each method of the grid, mean and deviation of its seeds, then the archived rows.

    Args:
        frame: a row for each finished cell, as ``load_results`` gives them. A data set whose name begins with cifar10
            stands in the columns of CIFAR-10.

    Raises:
        UserError: the grid has no cell at the paper's sizes.
    """
    from analysis.comparison_tables import MISSING, to_table, with_spread

    frame = frame.assign(dataset=frame.dataset.str.replace(r"^cifar10(?!0).*", "cifar10", regex=True))
    columns = [(name, size) for name, sizes in SIZES.items() for size in sizes]
    cells = {key: part.accuracy * 100 for key, part in frame.groupby(["method", "dataset", "train_size"])}
    methods = dict.fromkeys(method for method in frame.method if any((method, *each) in cells for each in columns))
    need(methods, "the grid has no cell at the paper's data sets and sizes.")
    rows = [["", *(f"{name} {size:,}" for name, size in columns)]]
    for method in methods:
        found = [cells.get((method, *each)) for each in columns]
        rows.append([f"`{method}`", *(MISSING if each is None else with_spread(each, 1) for each in found)])
    rows += [[f"archived: {name}", *(f"{value:.1f}" for value in values)] for name, values in ARCHIVED.items()]
    return to_table(rows)


def show(arguments: Arguments) -> None:
    """Print the accuracies beside the archived ones, or put them into a page."""
    from analysis.comparison_tables import load_results, show_table

    show_table(table(load_results(arguments.results / "results.json")), arguments.page, MARKERS)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(show, Arguments, argv)


if __name__ == "__main__":
    main()
