"""How well a run's uncertainties tell out-of-distribution images from its own test part.

python -m analysis.ood --run runs/digits --ood mnist noise shuffled --data-root ../shared/data

``DIR/ood`` receives results.json and a figure for each kind of images. docs/shift.md says how to read them.
"""

from dataclasses import dataclass
from typing import Any

from analysis.shift_arguments import ShiftArguments
from inference.cli import run_script
from pyro_isingvit.core.errors import need

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class Arguments(ShiftArguments):
    """Which runs, and which images they were not trained for."""

    ood: tuple[str, ...]
    """Names of data sets (their test parts), noise (uniform pixels), shuffled (the test images' pixels in another
    order), imagefolder:PATH (any folder of images) or npz:PATH (test_images or images)."""
    samples: int = 50
    """Posterior predictive draws."""
    max_images: int = 2000
    """Largest number of images on either side; a random choice of a larger set is used."""


def ood(arguments: Arguments) -> None:
    """How well entropy, mutual information and top probability tell out-of-distribution images from the test part."""
    import torch

    from analysis import shift_figures
    from analysis.shift import load_runs, own_test_part, print_columns
    from analysis.strange import KNOWN, file_names, strange_images
    from pyro_isingvit.core.checkpoint import write_json
    from pyro_isingvit.predictive.detection import ood_metrics, uncertainty_scores
    from pyro_isingvit.report import style
    from pyro_isingvit.runs.predict import draw_predictive

    need(arguments.ood, f"`ood` needs one of: {KNOWN}.")
    need(len(set(arguments.ood)) == len(arguments.ood), "`ood` names the same images twice.")
    runs = load_runs(arguments.run, arguments.device)
    first = next(iter(runs.values()))
    inside = own_test_part(first, arguments.data_root, arguments.max_images, arguments.seed).images[:]
    root = arguments.data_root or first.config.data.data_root
    outside = {
        name: strange_images(name, first.info, inside, root, arguments.max_images, arguments.seed)
        for name in arguments.ood
    }  # all are read before any work, so a misspelt name costs no time

    def scores(images: torch.Tensor) -> dict[str, dict[str, Any]]:
        draws = {
            name: draw_predictive(run, images, arguments.samples, seed=arguments.seed) for name, run in runs.items()
        }
        return {name: uncertainty_scores(each) for name, each in draws.items()}

    folder = (arguments.out or arguments.run[0]) / "ood"
    own, results, rows = scores(inside), {}, []
    for (name, (images, adapted)), file in zip(outside.items(), file_names(list(outside)), strict=True):
        theirs = scores(images)
        found = {run: {score: ood_metrics(own[run][score], theirs[run][score]) for score in own[run]} for run in runs}
        results[name] = {"images": len(images), "adapted": adapted, "figure": file, "runs": found}
        rows += [(name, run, score, *each.values()) for run, by in found.items() for score, each in by.items()]
        title = f"{style.label(first.info.dataset, 0, 30)} against {style.label(name, 0, 30)}: {adapted}"
        figure = shift_figures.ood_figure(own, theirs, found, title, first.info.num_classes)
        style.save_png(figure, folder / file)
    summary: dict[str, Any] = {
        "positive": "out-of-distribution", "in_distribution": first.info.dataset, "images": len(inside),
        "samples": arguments.samples, "seed": arguments.seed, "ood": results,
    }  # fmt: skip
    write_json(folder / RESULTS, summary)
    against = f"{len(inside)} test images against out-of-distribution ones (positive)"
    title = f"{first.info.dataset}, {against}, {arguments.samples} draws"
    print_columns(title, ("images", "run", "score", "AUROC", "FPR95", "AUPR"), rows)
    for name, result in results.items():
        print(f"{name}: {result['images']} images, {result['adapted']}")
    print(f"results: {folder / RESULTS}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(ood, Arguments, argv)


if __name__ == "__main__":
    main()
