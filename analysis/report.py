"""Write one page about a run: its metrics, figures and settings, in a single self-contained HTML file.

python -m analysis.report --run runs/digits
"""

from dataclasses import dataclass
from pathlib import Path

from inference.cli import print_table, run_script
from pyro_isingvit.core.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Which run to report on."""

    run: Path
    """Folder that inference.train or inference.prune wrote."""


def report(arguments: Arguments) -> None:
    """Write one self-contained page about a run: metrics, calibration, uncertainty, masks; or a compact network."""
    from pyro_isingvit.predictive.metric_table import metric_rows
    from pyro_isingvit.report.pruning_report import is_compact, write_pruning_report
    from pyro_isingvit.report.run_report import read_metrics, resume_evaluates, write_report

    if is_compact(arguments.run):
        print(f"report: {write_pruning_report(arguments.run)}")
        return
    try:
        page = write_report(arguments.run)
    except UserError as error:
        if resume_evaluates(arguments.run):
            raise UserError(f"{error}: python -m inference.train --resume {arguments.run}") from error
        raise
    metrics = metric_rows(read_metrics(arguments.run))
    chosen = (
        "Accuracy", "Balanced accuracy", "AUROC, macro", "F1, macro", "NLL", "Brier score", "ECE", "Mean retention",
        "Pruned weights",
    )  # fmt: skip
    print_table("test part", {title: value for title, value, _ in metrics if title in chosen})
    print(f"report: {page}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(report, Arguments, argv)


if __name__ == "__main__":
    main()
