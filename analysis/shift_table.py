"""Methods, compact networks and ONNX files under shift, in one table: corrupted and strange images.

python -m analysis.shift_table --run runs/a runs/b runs/small runs/small/compact.onnx --ood mnist noise

Entries of one kind (a method; a compact network; an ONNX file of as many networks) are seeds of the same and share a
row: mean and deviation. All are asked about the same images. ``DIR/shift/results.json`` has every entry's scores.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.shift_arguments import ShiftArguments
from inference.cli import run_script
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_isingvit.runs.run import Run

RESULTS = "results.json"
MARKERS = ("<!-- shift: made by analysis.shift_table -->", "<!-- end of shift -->")
METRICS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


@dataclass(frozen=True, kw_only=True)
class Arguments(ShiftArguments):
    """What to judge: runs, folders of compact networks, ONNX files; the first must be a run."""

    ood: tuple[str, ...] = ("shuffled",)
    """Out-of-distribution images, as analysis.ood takes them."""
    samples: int = 50
    """Posterior predictive draws of runs, and of compact networks of the form bayes."""
    max_images: int = 1000
    """Largest number of images of any kind; a random choice of a larger set is used."""
    page: Path | None = None
    """Markdown page to write the table into."""


@dataclass(frozen=True)
class Entry:
    """Something that predicts."""

    name: str
    """Of the file or folder."""
    kind: str
    """What it shares a row of the table with."""
    predict: "Callable[[Tensor], Tensor]"
    """Images (B, C, H, W) uint8 -> class probabilities (B, K)."""
    classes: tuple[str, ...]
    """Their names."""
    settings: Any = None
    """Of a run, but for its seed: runs of one row have the same."""


def shift_table(arguments: Arguments) -> None:
    """Accuracy, NLL and ECE on corrupted images, and detection of strange ones, for everything that predicts."""
    from tqdm.auto import tqdm

    from analysis.comparison_tables import show_table, to_table
    from analysis.shift import load_runs, own_test_part
    from analysis.strange import strange_images
    from inference.spoil import CORRUPTIONS, judge
    from pyro_isingvit.core.checkpoint import write_json

    need(arguments.samples >= 1, f"`samples` must be at least 1, not {arguments.samples}.")
    need(len(set(arguments.ood)) == len(arguments.ood), "`ood` names the same images twice.")
    need(arguments.run and (arguments.run[0] / "config.json").is_file(), "`run` starts with the folder of a run.")
    [first] = load_runs(arguments.run[:1], arguments.device).values()
    split = own_test_part(first, arguments.data_root, arguments.max_images, arguments.seed)
    root = arguments.data_root or first.config.data.data_root
    strange = {
        name: strange_images(name, first.info, split.images[:], root, arguments.max_images, arguments.seed)[0]
        for name in arguments.ood
    }
    entries = [open_entry(path, arguments, first) for path in arguments.run]
    check_rows(entries)
    found, total = {}, len(entries) * (1 + len(strange) + sum(len(c.values) for c in CORRUPTIONS.values()))
    with tqdm(total=total, desc="predict", dynamic_ncols=True) as bar:
        for path, entry in zip(arguments.run, entries, strict=True):
            scores = judge(entry.predict, split, arguments.seed, bar)
            own, scores["strange"] = entry.predict(split.images[:]), {}
            for name, images in strange.items():
                scores["strange"][name] = detected(own, entry.predict(images))
                bar.update()
            found[str(path)] = {"kind": entry.kind, **scores}
    folder = (arguments.out or arguments.run[0]) / "shift"
    shared = {"dataset": first.info.dataset, "images": len(split), "samples": arguments.samples, "seed": arguments.seed}
    write_json(folder / RESULTS, shared | {"entries": found})
    show_table(to_table(table(list(found.values()))), arguments.page, MARKERS)
    print(f"results: {folder / RESULTS}")


def check_rows(entries: list[Entry]) -> None:
    """Raises UserError where runs that would share a row differ in more than their seeds."""
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.kind, entry)
        told = f"{other.name} and {entry.name} would be seeds of one row, {entry.kind}, but their settings differ"
        need(other.settings == entry.settings, f"{told}; show them in calls of their own.")


def open_entry(path: Path, arguments: Arguments, first: "Run") -> Entry:
    """A run, a compact network or an ONNX file.

    Raises:
        UserError: none of them, one of other classes, or a run that was trained on other data.
    """
    entry = _open(path, arguments, first)
    need(entry.classes == first.info.classes, f"{path} has other classes than {arguments.run[0]}.")
    return entry


def _open(path: Path, arguments: Arguments, first: "Run") -> Entry:
    from analysis.shift import data_of, load_runs, mean_of
    from pyro_isingvit.methods.registry import spec_of
    from pyro_isingvit.pruning.network import CompactViT
    from pyro_isingvit.pruning.shapes import CONFIG

    if path.suffix == ".onnx":
        from pyro_isingvit.pruning.export import open_onnx
        from pyro_isingvit.pruning.onnx_predict import predict_onnx

        texts = open_onnx(path).get_modelmeta().custom_metadata_map
        need("classes" in texts, f"{path} does not name its classes; it was not exported by this library.")
        count = texts.get("members")
        kind = f"ONNX, {count} networks" if count else "ONNX, one network"
        kind += ", int8" if path.stem.endswith("int8") else ""
        classes = tuple(map(str, json.loads(texts["classes"])))
        return Entry(path.name, kind, lambda images: predict_onnx(path, images).probs, classes)
    if (path / CONFIG).is_file():
        model = CompactViT.from_pretrained(path)
        samples, seed = arguments.samples, arguments.seed
        kind = f"compact, {samples} draws" if model.config.form == "bayes" else _compact_kind(path)
        return Entry(path.name, kind, lambda images: model.predict(images, samples, seed).mean(0), model.config.classes)
    [run] = load_runs([path], arguments.device).values()
    told = f"{path} was trained on other data than {arguments.run[0]}, or on data that were read or divided otherwise."
    need(data_of(run) == data_of(first), told)
    return Entry(
        path.name,
        f"`{spec_of(run.config)}`",
        partial(mean_of, run, arguments.samples, arguments.seed),
        run.info.classes,
        replace(run.config.portable(), train=replace(run.config.train, seed=0, device="auto")),
    )


def _compact_kind(path: Path) -> str:
    """Whether the network was distilled, by what the folder says."""
    try:
        metrics = json.loads((path / "metrics.json").read_text())
        return "compact, distilled" if metrics.get("distil_epochs") else "compact"
    except (OSError, ValueError, AttributeError):
        return "compact"


def detected(own: "Tensor", theirs: "Tensor") -> dict[str, float | None]:
    """How well the entropy of the mean prediction tells strange images from the test part: AUROC and FPR95."""
    from pyro_isingvit.predictive.detection import ood_metrics
    from pyro_isingvit.predictive.metrics import entropy

    scores = ood_metrics(*(entropy(probs).double().numpy() for probs in (own, theirs)))
    return {name: scores[name] for name in ("auroc", "fpr95")}


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each kind: clean and mean corrupted scores, then AUROC and FPR95 for each strange set."""
    import pandas as pd

    from analysis.comparison_tables import with_spread

    records = []
    for each in found:
        record = {"kind": each["kind"]}
        for part, scores in (("clean", each["clean"]), ("corrupted", each["mean"])):
            record |= {f"{name}, {part}": scores[metric] for metric, name in METRICS.items()}
        for name, scores in each["strange"].items():
            record |= {f"AUROC, {name}": scores["auroc"], f"FPR95, {name}": scores["fpr95"]}
        records.append(record)
    frame = pd.DataFrame(records)
    rows = [list(map(str, frame.columns))]
    for kind, cells in frame.groupby("kind", sort=False):
        rows.append([str(kind), *(with_spread(cells[name].astype(float)) for name in frame.columns[1:])])
    rows[0][0] = ""
    return rows


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(shift_table, Arguments, argv)


if __name__ == "__main__":
    main()
