"""Accuracy and calibration of a run on corrupted images: five corruptions, five severities.

python -m analysis.corruptions --run runs/digits

``DIR/corruptions`` receives results.json, corruptions.png (curves) and examples.png; docs/shift.md says how to read
them.
"""

from dataclasses import dataclass
from functools import partial

from analysis.shift_arguments import ShiftArguments
from inference.cli import run_script
from pyro_isingvit.core.errors import need

RESULTS, CURVES, EXAMPLES = "results.json", "corruptions.png", "examples.png"


@dataclass(frozen=True, kw_only=True)
class Arguments(ShiftArguments):
    """Which runs to judge on corrupted images."""

    samples: int = 30
    """Posterior predictive draws."""
    max_images: int = 1000
    """Largest number of test images; a random choice of a larger test part is used."""


def corruptions(arguments: Arguments) -> None:
    """Accuracy, NLL and calibration error on the test part under five corruptions of five severities."""
    from tqdm.auto import tqdm

    from analysis import shift_figures
    from analysis.shift import load_runs, mean_of, own_test_part, print_columns
    from inference.spoil import CORRUPTIONS, corrupt, judge, summary_rows
    from pyro_isingvit.core.checkpoint import write_json
    from pyro_isingvit.report import style

    need(arguments.samples >= 1, f"`samples` must be at least 1, not {arguments.samples}.")
    runs = load_runs(arguments.run, arguments.device)
    first = next(iter(runs.values()))
    split = own_test_part(first, arguments.data_root, arguments.max_images, arguments.seed)
    total = len(runs) * (1 + sum(len(corruption.values) for corruption in CORRUPTIONS.values()))
    with tqdm(total=total, desc="predict", dynamic_ncols=True) as bar:
        found = {
            name: judge(partial(mean_of, run, arguments.samples, arguments.seed), split, arguments.seed, bar)
            for name, run in runs.items()
        }

    folder = (arguments.out or arguments.run[0]) / "corruptions"
    title = f"{style.label(first.info.dataset, 0, 30)}, {len(split)} test images, {arguments.samples} draws"
    style.save_png(shift_figures.corruption_curves(found, title), folder / CURVES)
    rows = {name: [corrupt(split.images[:], name, i + 1, arguments.seed)[0] for i in range(5)] for name in CORRUPTIONS}
    values = {name: (corruption.unit, corruption.values) for name, corruption in CORRUPTIONS.items()}
    style.save_png(shift_figures.corruption_examples(split.images[0], rows, values), folder / EXAMPLES)
    summary = {
        "dataset": first.info.dataset, "images": len(split), "samples": arguments.samples, "seed": arguments.seed,
        "severities": {name: {"unit": unit, "values": list(each)} for name, (unit, each) in values.items()},
        "runs": found,
    }  # fmt: skip
    write_json(folder / RESULTS, summary)
    header = ("run", "images", "accuracy", "NLL (nats)", "ECE (15 bins)")
    print_columns(f"{title}; corrupted: mean of five severities", header, summary_rows(found))
    print(f"results: {folder / RESULTS}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(corruptions, Arguments, argv)


if __name__ == "__main__":
    main()
