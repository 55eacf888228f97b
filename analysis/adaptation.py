"""Test-time adaptation on corrupted images and under another prevalence, with and without.

python -m analysis.adaptation --run runs/first runs/second --page docs/adaptation.md

Every cell starts from the run as it was trained. ``DIR/adaptation/results.json`` has the scores of each cell.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.shift_arguments import ShiftArguments
from inference.cli import run_script
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_isingvit.data.split import Split
    from pyro_isingvit.runs.adapt import Adaptation

RESULTS = "results.json"
MARKERS = ("<!-- adaptation: made by analysis.adaptation -->", "<!-- end of adaptation -->")
METRICS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
SKEW = 10  # times as many images of the most frequent class as of the rarest, under the other prevalence


@dataclass(frozen=True, kw_only=True)
class Arguments(ShiftArguments):
    """Which runs to adapt."""

    samples: int = 20
    """Posterior predictive draws."""
    max_images: int = 1000
    """Largest number of test images; a random choice of a larger test part is used."""
    lr: float | None = None
    """Learning rate of every adaptation; by default each kind's own."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities of the corruptions."""
    page: Path | None = None
    """Markdown page to write the table into."""


def variants(lr: float | None, seed: int) -> "dict[str, Adaptation | None]":
    """The adaptations that are compared, by name."""
    from pyro_isingvit.runs.adapt import KINDS, Adaptation

    rate: dict[str, Any] = {} if lr is None else {"lr": lr}
    found: dict[str, Adaptation | None] = {"none": None}
    for kind in KINDS:
        found[kind] = Adaptation(kind, seed=seed, **rate)
        found[f"{kind}, crowd"] = Adaptation(kind, crowd=True, seed=seed, **rate)
    return found


def skewed(split: "Split", seed: int) -> "Split":
    """Part of the images: classes in a random order, from 1 to ``SKEW`` times as frequent as the last one."""
    import numpy as np

    random, labels = np.random.default_rng(seed), split.labels.numpy()
    classes = random.permutation(np.unique(labels))
    shares = SKEW ** -np.linspace(0, 1, len(classes))
    found = [np.flatnonzero(labels == each) for each in classes]
    most = min(len(rows) / share for rows, share in zip(found, shares, strict=True))
    counts = [max(1, int(most * share)) for share in shares]
    rows = [random.choice(each, count, replace=False) for each, count in zip(found, counts, strict=True)]
    return split.take(np.sort(np.concatenate(rows)))


def cells(split: "Split", severities: tuple[int, ...], seed: int) -> "Iterator[tuple[str, Tensor, Tensor]]":
    """(name, images, labels) of every cell."""
    from inference.spoil import CORRUPTIONS, corrupt

    yield "clean", split.images[:], split.labels
    few = skewed(split, seed)
    yield f"prevalence, 1 to {SKEW}", few.images[:], few.labels
    for name in CORRUPTIONS:
        for severity in severities:
            yield name, corrupt(split.images[:], name, severity, seed), split.labels


def adaptation(arguments: Arguments) -> None:
    """Accuracy, NLL and ECE with and without test-time adaptation."""
    from tqdm.auto import tqdm

    from analysis.comparison_tables import show_table, to_table
    from analysis.shift import load_runs, own_test_part
    from inference.spoil import CORRUPTIONS, check_severity
    from pyro_isingvit.core.checkpoint import write_json
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.runs.adapt import adapted
    from pyro_isingvit.runs.predict import draw_predictive

    need(arguments.samples >= 1, f"`samples` must be at least 1, not {arguments.samples}.")
    need(arguments.severities, "`severities` names none.")
    for severity in arguments.severities:
        check_severity(severity)
    runs, records = load_runs(arguments.run, arguments.device), []
    hows = variants(arguments.lr, arguments.seed)
    total = len(runs) * len(hows) * (2 + len(CORRUPTIONS) * len(arguments.severities))
    with tqdm(total=total, desc="adapt", dynamic_ncols=True) as bar:
        for run_name, run in runs.items():
            split = own_test_part(run, arguments.data_root, arguments.max_images, arguments.seed)
            for cell, images, labels in cells(split, arguments.severities, arguments.seed):
                for name, how in hows.items():
                    with nullcontext() if how is None else adapted(run, images, how) as done:
                        draws = draw_predictive(run, images, arguments.samples, seed=arguments.seed)
                    scores = classification_metrics(draws.mean, labels)
                    used = None if done is None else done.used / done.images
                    records.append({"run": run_name, "cell": cell, "adaptation": name, "used": used}
                                   | {metric: scores[metric] for metric in METRICS})  # fmt: skip
                    bar.update()
    folder = (arguments.out or arguments.run[0]) / "adaptation"
    settings = {name: None if how is None else asdict(how) for name, how in hows.items()}
    write_json(folder / RESULTS, {"images": len(split), "adaptations": settings, "records": records})
    show_table(to_table(table(records)), arguments.page, MARKERS)
    print(f"results: {folder / RESULTS}")


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each kind of images and adaptation: mean over severities and runs, and deviation over the runs."""
    import pandas as pd

    from analysis.comparison_tables import with_spread

    frame = pd.DataFrame(records)
    corrupted = frame[~frame["cell"].str.startswith(("clean", "prevalence"))].assign(cell="all corrupted")
    frame = pd.concat([frame, corrupted])
    rows = [["images", "adaptation", *METRICS.values(), "images used"]]
    for cell in dict.fromkeys(frame["cell"]):
        for name in dict.fromkeys(frame["adaptation"]):
            part = frame[(frame["cell"] == cell) & (frame["adaptation"] == name)]
            each = part.groupby("run")[[*METRICS]].mean()
            used = "" if pd.isna(share := part["used"].mean()) else f"{100 * share:.0f}%"
            rows.append([cell, name, *(with_spread(each[metric]) for metric in METRICS), used])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(adaptation, Arguments, argv)


if __name__ == "__main__":
    main()
