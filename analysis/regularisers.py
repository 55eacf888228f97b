"""What each regulariser changes, from the records of ``inference.compare --regularisers``: tables and a figure.

python -m analysis.regularisers --results analysis/results/regularisers --page docs/regularisers.md

A change is the difference to the training without a regulariser of the same data, method and seed; tables have mean
and standard deviation over the seeds that are there, and how many those are.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from inference.cli import run_script

FIGURE = "changes.png"
MARKERS = ("<!-- regularisers: made by analysis.regularisers -->", "<!-- end of regularisers -->")


@dataclass(frozen=True)
class Arguments:
    """Which records to show."""

    results: Path
    """Folder with the records.jsonl of inference.compare --regularisers."""
    page: Path | None = None
    """Markdown page to write the tables into, between its two marker comments; the figure goes beside the records."""


def show(arguments: Arguments) -> None:
    """Write tables and a figure of what each regulariser changes."""
    from analysis.comparison_tables import show_table
    from analysis.regularisers_figure import changes_figure
    from analysis.regularisers_table import changes, load, to_overview, to_tables
    from inference.regularisers import RECORDS
    from pyro_isingvit.report.style import save_png

    frame, page = load(arguments.results / RECORDS), arguments.page
    text, pairs = "\n\n".join(to_tables(frame)), changes(frame)
    if overview := to_overview(frame):
        text = f"### NLL on all data, change in %\n\n{overview}\n\n{text}"
    if len(pairs):
        figure = arguments.results / FIGURE
        save_png(changes_figure(pairs), figure)
        print(f"figure: {figure}")
        if page is not None:
            link = Path(os.path.relpath(figure, page.parent)).as_posix()
            text = f"![Change of NLL and accuracy by each regulariser]({link})\n\n{text}"
    show_table(text, page, MARKERS)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(show, Arguments, argv)


if __name__ == "__main__":
    main()
