"""Find training and validation images whose label is doubtful, by networks that have not learned from them.

python -m analysis.labels --run runs/demo --jobs 2

Writes a page with the doubtful images and a table of all, labels.html and labels.csv, into the run's folder or beside
--out. Re-run the same command to resume; docs/labels.md says how to read them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inference.cli import print_table, run_script
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from pyro_isingvit.core.settings import RunConfig
    from pyro_isingvit.data.split import ImageData

PAGE = "labels.html"


@dataclass(frozen=True)
class Arguments:
    """Whose labels to check."""

    run: Path
    """Folder that inference.train wrote; its settings train the networks, and its images are checked."""
    out: Path | None = None
    """Page to write, ending in .html; table and finished folds lie beside it. By default in the run's folder."""
    folds: int = 5
    """Networks, each trained without one of so many parts of the training images."""
    samples: int | None = None
    """Posterior draws of each network; by default the run's."""
    jobs: int = 1
    """Networks that are trained at the same time."""
    show: int = 200
    """Flagged images on the page, at most."""
    data_root: str | None = None
    """Folder of the torchvision data sets; by default the run's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""


def run_data(config: "RunConfig") -> "ImageData":
    """The parts of a run, divided as in training; an image is named by its file, or its row in the data set's part."""
    from pyro_isingvit.data.load import load_divided

    return load_divided(config.data, config.train.seed, numbered=True)


def find_doubtful(arguments: Arguments) -> None:
    """Find images whose label is doubtful, by networks that have not learned from them."""
    page = arguments.run / PAGE if arguments.out is None else arguments.out
    need(page.suffix == ".html" and not page.is_dir(), f"`out` names a page, such as {PAGE}, not {page}.")
    need(arguments.show >= 0, f"`show` must not be negative, but is {arguments.show}.")
    from functools import partial

    from analysis.crossfit import cross_fit
    from analysis.shift import print_columns
    from pyro_isingvit.core.checkpoint import write_text
    from pyro_isingvit.data.load import is_named
    from pyro_isingvit.predictive.labels import doubt
    from pyro_isingvit.report.labels_report import Checked, to_csv, write_page
    from pyro_isingvit.runs.folder import read_config

    config = read_config(arguments.run)
    told = f"{arguments.run} was trained on images given in memory, so check their labels in Python (docs/labels.md)"
    need(is_named(config.data.dataset), f"unknown data set {config.data.dataset!r}: {told}.")
    data_config = replace(config.data, download=False, data_root=arguments.data_root or config.data.data_root)
    config = replace(config, data=data_config, train=replace(config.train, device=arguments.device))
    samples = config.train.samples if arguments.samples is None else arguments.samples
    source, folds = partial(run_data, config), page.with_name(f"{page.stem}-folds")
    fitted = cross_fit(config, source, folds, folds=arguments.folds, samples=samples, jobs=arguments.jobs)
    data = fitted.data
    found = doubt(fitted.probs, fitted.given, fitted.labels)
    checked = Checked({"train": data.train, "val": data.val}, data.info.classes, found)
    low, high = found.share_interval
    summary: dict[str, object] = {
        "Images": f"{len(fitted.labels):,}", "Flagged": f"{int(found.flagged.sum()):,}",
        "Estimated wrong labels": f"{found.share:.1%} ({low:.1%} to {high:.1%})",
        "Networks": f"{arguments.folds} of {config.method}, {config.train.epochs} epochs, {samples} draws",
    }  # fmt: skip
    table = page.with_suffix(".csv")
    write_text(table, to_csv(checked))
    write_page(page, checked, data.info, summary, arguments.show)
    print_table("labels", summary)
    classes = data.info.classes
    if pairs := found.confused(fitted.labels):
        named = [(classes[given], classes[other], count) for given, other, count in pairs]
        print_columns("most confused", ("given label", "suggested label", "flagged images"), named)
    print(f"page: {page}\ntable: {table}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(find_doubtful, Arguments, argv)


if __name__ == "__main__":
    main()
