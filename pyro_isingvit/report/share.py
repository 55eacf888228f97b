"""A run's folder for others: weights, settings, metrics, figures and a card of all of it."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_isingvit.core.checkpoint import write_atomically, write_json, write_text
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.predictive.intervals import overall_intervals
from pyro_isingvit.report import figures, style
from pyro_isingvit.runs.folder import CHECKPOINT, METRICS, POSTERIOR, SHARED, holds_run, is_shared, need_folder
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.shared import FIGURES, FILES, write_shared
from pyro_isingvit.sharing.card import Card, check_license, write_card
from pyro_isingvit.sharing.folder import README, staged
from pyro_isingvit.sharing.names import is_path_free, shared_metrics, shared_name
from pyro_isingvit.version import __version__

OOD = ("ood", "results.json")  # of strange images, in the run's folder
CALIBRATION = (
    "Each bar collects the test images whose predicted class got a probability in that range; its height is the share "
    "that was right. Hatching is the gap to the mean confidence."
)
OOD_SCORES = ("entropy", "mutual_information")


def share_run(
    run: Run,
    folder: Path,
    *,
    num_data: int,
    metrics: dict[str, Any] | None,
    probs: np.ndarray | None,
    labels: np.ndarray | None,
    license: str | None = None,
    intended_use: str | None = None,
    repo: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the folder; its files appear together.

    Args:
        run: trained.
        folder: where it goes.
        num_data: N, training images.
        metrics: as in metrics.json; None: it was not evaluated.
        probs: (B, C) mean probabilities of the test images; None: not known.
        labels: (B,).
        license: identifier, for the card.
        intended_use: for the card.
        repo: ``owner/name``, which the card shows.
        overwrite: replace an earlier shared run.

    Raises:
        UserError: the folder holds something else or cannot be written to, or files of the run are damaged.
    """
    need_folder(folder)
    check_license(license)
    held = (folder / CHECKPOINT).exists() or (holds_run(folder) and not is_shared(folder))
    need(not held, f"{folder} holds a run that can be resumed; share it into another folder.")
    need(overwrite or not is_shared(folder), f"{folder} holds a shared run; name another folder or pass `overwrite`.")
    theirs = [path.name for pattern in FILES if pattern != README for path in folder.glob(pattern)]
    told = f"{folder} holds {', '.join(theirs[:3])}, which would be replaced; name another folder."
    need(is_shared(folder) or not theirs, told)
    info, known = run.info, dict(metrics or {})
    ood, pictures = _ood(run)
    with staged(folder, FILES) as place:
        write_shared(run, num_data, place)
        shown = []
        if probs is not None and labels is not None:
            both = torch.from_numpy(probs), torch.from_numpy(labels)
            known["intervals"] = known.get("intervals", {}) | overall_intervals(*both)
            style.save_png(figures.reliability_diagram(probs, labels), place / FIGURES / "calibration.png")
            shown.append(("Calibration", f"{FIGURES}/calibration.png", CALIBRATION))
        for number, path in enumerate(pictures):
            target = place / FIGURES / f"ood-{number}.png"
            write_atomically(target, partial(shutil.copyfile, path))
            told = "Uncertainty of test images and of images of another kind; the table below has the numbers."
            shown.append((f"Images of another kind, {number + 1}", f"{FIGURES}/{target.name}", told))
        if metrics is not None:
            write_json(place / METRICS, shared_metrics(known))
        sizes = {part: int(known[f"{key}_size"]) for part, key in (("validation", "val"), ("test", "test"))
                 if isinstance(known.get(f"{key}_size"), int)}  # fmt: skip
        card = Card(
            shared_name(info.dataset), info.classes, info.image_shape, info.kind, "TrainedRun", _kind(run),
            {"training": num_data, **sizes}, run.method.num_parameters(), SHARED, (place / SHARED).stat().st_size,
            known, shown, ood, run.class_prior, run.config.version or __version__, license, intended_use, repo,
        )  # fmt: skip
        write_text(place / README, write_card(card))


def kept_predictions(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean probabilities (B, C) and labels (B,) of the test images, from posterior.nc of a run's folder.

    Raises:
        UserError: missing or damaged.
    """
    tree = load_datatree(folder / POSTERIOR)
    try:
        summary = tree["predictive_summary"].dataset
        return summary["prob_mean"].values, summary["y"].values
    except KeyError as error:
        raise UserError(
            f"{folder / POSTERIOR} lacks the predictions ({why(error)}); evaluate the run again."
        ) from error


def _kind(run: Run) -> str:
    vit = run.config.vit
    blocks, heads = f"{vit.depth} block{'s' * (vit.depth > 1)}", f"{vit.heads} head{'s' * (vit.heads > 1)}"
    shape = f"width {vit.width}, {blocks} of {heads}, patches of {vit.patch_size} pixels"
    what = "with a posterior over weights and selection masks" if run.has_masks else "trained by this method"
    return f"A vision transformer ({shape}), method {run.config.method}, {what}."


def _ood(run: Run) -> tuple[list[tuple[str, int, str, float, float]], list[Path]]:
    """Rows and figures of strange images in the run's folder; a figure whose title may name a folder is left out."""
    path = run.folder and run.folder.joinpath(*OOD)
    if path is None or not path.is_file():
        return [], []
    try:
        rows, pictures, dataset = [], [], run.info.dataset
        for name, result in json.loads(path.read_text())["ood"].items():
            runs = result["runs"]
            own = runs.get(path.parents[1].resolve().name) or next(iter(runs.values()))
            for score in OOD_SCORES:
                found = own[score]
                rows.append((shared_name(name), int(result["images"]), score.replace("_", " "),
                             float(found["auroc"]), float(found["fpr95"])))  # fmt: skip
            figure = path.parent / Path(str(result["figure"])).name
            if figure.is_file() and not figure.is_symlink() and is_path_free(name) and is_path_free(dataset):
                pictures.append(figure)
        return rows, pictures
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({why(error)[:100]}); measure strange images again, or move it away."
        ) from error
