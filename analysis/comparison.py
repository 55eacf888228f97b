"""Tables and figures of a grid that inference.compare ran.

python -m analysis.comparison --results runs/compare
python -m analysis.comparison --results analysis/results/grid --page docs/comparison.md --readme README.md

The tables have the mean and standard deviation over seeds. A paired t-test over seeds compares the Ising posterior with
the best other single network.
"""

from dataclasses import dataclass
from pathlib import Path

from inference.cli import run_script
from pyro_isingvit.methods.registry import OURS


@dataclass(frozen=True)
class Arguments:
    """Which grid to show."""

    results: Path
    """Folder with the results.json of inference.compare."""
    page: Path | None = None
    """Markdown file whose tables of all methods are replaced, between its two marker comments."""
    readme: Path | None = None
    """Markdown file whose short table is replaced, between its two marker comments."""
    ours: str = OURS
    """The method to compare with the others."""


def comparison(arguments: Arguments) -> None:
    """Write tables and figures of a grid."""
    import pandas as pd
    from rich.console import Console
    from rich.markdown import Markdown

    from analysis import comparison_figures as figures
    from analysis.comparison_tables import (
        against_best,
        against_ensemble,
        load_results,
        markdown,
        page_tables,
        short_table,
        summarise,
        to_markdown,
        write_between,
    )
    from pyro_isingvit.core.checkpoint import write_text
    from pyro_isingvit.core.errors import UserError
    from pyro_isingvit.core.untrusted import csv_text

    folder = arguments.results
    frame = load_results(folder / "results.json")
    if arguments.ours not in {OURS, *frame.method}:
        raise UserError(f"no cell of {arguments.ours} is done; those that are: {', '.join(sorted({*frame.method}))}.")
    best, ensemble = against_best(frame, arguments.ours), against_ensemble(frame, arguments.ours)
    text = "# Comparison\n\n" + markdown(frame)
    if len(best):
        text += f"\n## {arguments.ours} against the best other single network\n\n" + to_markdown(best)
    if len(ensemble):
        text += f"\n## {arguments.ours} against the ensemble\n\n" + to_markdown(ensemble)
    if frame.attrs["unequal"]:
        text += "\n## Settings that differ\n\n" + "".join(f"- {line}\n" for line in frame.attrs["unequal"])
    write_text(folder / "table.md", text)
    summary = summarise(frame)
    summary.columns = pd.Index([f"{metric}_{what}" for metric, what in summary.columns])
    table = summary.reset_index()
    names = ["dataset", "method"]
    table[names] = table[names].map(csv_text)
    write_text(folder / "table.csv", table.to_csv(index=False))
    made = figures.write_figures(frame, folder, arguments.ours)
    for path, tables in ((arguments.page, page_tables), (arguments.readme, short_table)):
        if path is not None:
            write_between(path, tables(frame, arguments.ours))
    Console(width=160).print(Markdown(text))
    print(f"tables: {folder / 'table.md'}, {folder / 'table.csv'}\nfigures: {', '.join(map(str, made))}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(comparison, Arguments, argv)


if __name__ == "__main__":
    main()
