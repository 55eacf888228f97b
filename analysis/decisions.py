"""Do the promises hold? Other prevalences, prediction sets and limits on the error rate, over many splits.

python -m analysis.decisions --run runs/fashion

The predictions are those of ``posterior.nc``; neither the network nor the images are needed. ``DIR/decisions`` receives
results.json and decisions.png; docs/decisions.md says how to read them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.cli import results_file, run_script
from pyro_isingvit.core.errors import UserError, need

if TYPE_CHECKING:
    import numpy as np

    from pyro_isingvit.predictive.validation import Validation

RESULTS, FIGURE = "results.json", "decisions.png"
SHIFTS = {"mild": 10.0, "middle": 1.0, "strong": 0.1}  # shares from a Dirichlet law of this concentration
WAYS = ("before", "given", "estimated")
CERTAINTY = 0.95


@dataclass(frozen=True)
class Arguments:
    """Which predictions to try the promises on."""

    run: Path
    """Folder of an evaluated run."""
    out: Path | None = None
    """Folder to write into; by default decisions in the run's."""
    shifts: int = 40
    """Made prevalences of each strength."""
    images: int = 1000
    """Test images of each made prevalence, drawn with replacement."""
    splits: int = 200
    """Splits of the test part into calibration and new images."""
    calibration: int | None = None
    """Calibration images of a split; by default as many as the validation part has, at most half of the test part."""
    coverage: float = 0.9
    """Of the prediction sets."""
    max_error: float = 0.05
    """Limit on the error rate."""
    seed: int = 0
    """Of shifts and splits."""
    overwrite: bool = False
    """Replace earlier results."""


def decisions(arguments: Arguments) -> None:
    """Measure corrected prevalences, coverage of prediction sets, and kept limits on the error rate."""
    from analysis.decisions_figure import decisions_figure
    from analysis.shift import print_columns
    from pyro_isingvit.core.checkpoint import write_json
    from pyro_isingvit.report import style

    for name in ("shifts", "images", "splits"):
        need(getattr(arguments, name) >= 1, f"`{name}` must be at least 1, not {getattr(arguments, name)}.")
    need(arguments.seed >= 0, f"`seed` must not be negative, got {arguments.seed}.")
    for name in ("coverage", "max_error"):
        need(0 < getattr(arguments, name) < 1, f"`{name}` must lie in (0, 1), not {getattr(arguments, name)}.")
    folder = arguments.out or arguments.run / "decisions"
    results = results_file(folder, RESULTS, arguments.overwrite)
    probs, y, val, prior = stored(arguments.run)
    shifted = made_shifts(probs, y, val, prior, arguments)
    kept = many_splits(probs, y, val, arguments)
    write_json(results, {"shifts": shifted, "splits": kept})
    style.save_png(decisions_figure(shifted, kept), folder / FIGURE)
    rows = [
        (name, way, *(row[f"{metric}_{way}"] for metric in ("accuracy", "ece", "nll")))
        for name, row in shifted.items() for way in WAYS
    ]  # fmt: skip
    print_columns(
        f"made prevalences, mean of {arguments.shifts}, {arguments.images} test images each",
        ("shift", "probabilities", "accuracy", "ECE (15 bins)", "NLL (nats)"), rows,
    )  # fmt: skip
    print_columns(
        "estimated prevalences", ("shift", "error (L1)", "of predicted shares (L1)", "95% intervals that hold"),
        [(name, row["l1_estimated"], row["l1_predicted"], row["interval_coverage"]) for name, row in shifted.items()],
    )  # fmt: skip
    wide = [
        (name, row["asked"], row["mean"], row["sd"], row["sd_expected"], row["size"])
        for name, row in kept["sets"].items()
    ]
    print_columns(
        f"prediction sets over {arguments.splits} splits, {kept['calibration']} calibration images",
        ("sets", "asked", "coverage, mean", "sd", "sd expected", "mean size"), wide,
    )  # fmt: skip
    limit = kept["limit"]
    print_columns(
        f"error rate limited to {limit['max_error']:g} with certainty {CERTAINTY:g}",
        ("splits", "share accepted", "error rate among them", "splits above the limit"),
        [(arguments.splits, limit["accepted"], "-" if limit["error"] is None else limit["error"], limit["broken"])],
    )  # fmt: skip
    print(f"results: {results}")


def stored(folder: Path) -> "tuple[np.ndarray, np.ndarray, Validation, np.ndarray]":
    """Test predictions (B, C), their labels (B,), the validation part, and the prior (C,) of an evaluated run.

    Raises:
        UserError: no evaluated run, or one that does not know these.
    """
    import numpy as np

    from pyro_isingvit.predictive.datatree import load_datatree
    from pyro_isingvit.predictive.draws import labelled_probs
    from pyro_isingvit.predictive.validation import Validation
    from pyro_isingvit.runs.folder import POSTERIOR
    from pyro_isingvit.runs.load import open_run
    from pyro_isingvit.runs.validation import prior_of

    run, tree = open_run(folder), load_datatree(folder / POSTERIOR)
    val = Validation.from_tree(tree)
    need(
        val is not None or run.config.data.val_fraction > 0,
        f"{folder} was trained without a validation part (`val_fraction` 0), which this needs; train anew with one.",
    )
    if val is None or "predictive_summary" not in tree.children:
        raise UserError(f"{folder / POSTERIOR} keeps no predictions for the validation part; evaluate the run again.")
    summary = tree["predictive_summary"].dataset
    probs, y = labelled_probs(summary["prob_mean"].values, summary["y"].values)
    return probs, y, val, np.array(prior_of(run))


def made_shifts(
    probs: "np.ndarray", y: "np.ndarray", val: "Validation", prior: "np.ndarray", arguments: Arguments
) -> dict[str, dict[str, float]]:
    """Scores before and after the correction, with the true and an estimated prevalence, by strength of the shift."""
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from pyro_isingvit.predictive.draws import PredictiveDraws
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.predictive.prevalence import estimate_prevalence, with_prevalence

    classes, found = probs.shape[1], {}
    present = [np.flatnonzero(y == c) for c in range(classes)]
    need(all(map(len, present)), "the test part lacks a class: no prevalence can be made from it.")
    total = len(SHIFTS) * arguments.shifts
    with tqdm(total=total, desc="prevalences", dynamic_ncols=True) as bar:
        for number, (name, concentration) in enumerate(SHIFTS.items()):
            rows: list[dict[str, float]] = []
            for shift in range(arguments.shifts):
                rng = np.random.default_rng([arguments.seed, number, shift])
                shares = rng.dirichlet(np.full(classes, concentration))
                labels = rng.choice(classes, arguments.images, p=shares)
                drawn = probs[[rng.choice(present[c]) for c in labels]]
                estimate = estimate_prevalence(
                    drawn, val.probs, val.labels, replicates=300, seed=arguments.seed, quiet=bar.n > 0
                )
                one = PredictiveDraws(torch.from_numpy(drawn)[None])  # the mean's correction needs the mean alone
                ways = {
                    "before": one,
                    "given": with_prevalence(one, shares, prior),
                    "estimated": with_prevalence(one, estimate.shares, prior),
                }
                scores: dict[str, float] = {
                    "l1_estimated": float(np.abs(estimate.shares - shares).sum()),
                    "l1_predicted": float(
                        np.abs(np.bincount(drawn.argmax(1), minlength=classes) / len(drawn) - shares).sum()
                    ),
                    "interval_coverage": float(((estimate.low <= shares) & (shares <= estimate.high)).mean()),
                }
                for way, draws in ways.items():
                    judged = classification_metrics(draws.mean, torch.from_numpy(labels))
                    scores |= {f"{metric}_{way}": judged[metric] for metric in ("accuracy", "ece", "nll")}
                rows.append(scores)
                bar.update()
            found[name] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return found


def many_splits(probs: "np.ndarray", y: "np.ndarray", val: "Validation", arguments: Arguments) -> dict[str, Any]:
    """Coverage and errors where the test part itself is split at random; and once with the run's validation part."""
    import numpy as np
    from scipy.stats import betabinom
    from tqdm.auto import tqdm

    from pyro_isingvit.predictive.conformal import conformal_sets, coverage_band
    from pyro_isingvit.predictive.selective import acceptance

    size = min(len(val), len(y) // 2) if arguments.calibration is None else arguments.calibration
    need(1 <= size < len(y), f"`calibration` must be between 1 and {len(y) - 1}, the test images, not {size}.")
    wrong, level = probs.argmax(1) != y, arguments.coverage
    held: dict[str, list[float]] = {"plain": [], "class-wise": []}
    sizes: dict[str, list[float]] = {"plain": [], "class-wise": []}
    accepted, errors, told = [], [], ""
    for split in tqdm(range(arguments.splits), desc="splits", dynamic_ncols=True):
        order = np.random.default_rng([arguments.seed, split]).permutation(len(y))
        known, new = order[:size], order[size:]
        for name, every in held.items():
            try:
                sets = conformal_sets(probs[new], probs[known], y[known], level, classwise=name != "plain").numpy()
            except UserError as error:
                need(name != "plain", str(error))
                told = str(error)
                continue
            every.append(float(sets[np.arange(len(new)), y[new]].mean()))
            sizes[name].append(float(sets.sum(1).mean()))
        stands = acceptance(probs[known], y[known], arguments.max_error, CERTAINTY).accepts(probs[new]).numpy()
        accepted.append(float(stands.mean()))
        if stands.any():
            errors.append(float(wrong[new][stands].mean()))
    rank = int(np.ceil(round((size + 1) * level, 9)))
    expected = float(betabinom.std(len(y) - size, rank, size + 1 - rank) / (len(y) - size))
    low, high = coverage_band(len(val), level, len(y))
    own = conformal_sets(probs, val.probs, val.labels, level).numpy()
    return {
        "calibration": size,
        "sets": {
            name: {"asked": level, "mean": float(np.mean(values)), "sd": float(np.std(values)),
                   "sd_expected": expected if name == "plain" else None, "size": float(np.mean(sizes[name])),
                   "every": values}
            for name, values in held.items() if values
        },
        "class_wise_left_out": told,
        "validation_to_test": {"coverage": float(own[np.arange(len(y)), y].mean()), "low": low, "high": high},
        "limit": {
            "max_error": arguments.max_error, "accepted": float(np.mean(accepted)),
            "error": float(np.mean(errors)) if errors else None,  # of the splits in which something is accepted
            "broken": sum(error > arguments.max_error for error in errors) / arguments.splits,
        },
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(decisions, Arguments, argv)


if __name__ == "__main__":
    main()
