"""The ONNX files of inference.prune: which are written, how large and fast they are, and what they predict."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from pyro_isingvit.data.split import ImageData
    from pyro_isingvit.pruning.network import CompactViT

CHOSEN = ("accuracy", "nll", "ece")
DEPLOYED = ("members.onnx", "members.int8.onnx", "compact.int8.onnx")


def check_deploy(onnx: bool, members: int | None, int8: bool) -> None:
    """Refuses settings that contradict each other, before any work.

    Raises:
        UserError: members or int8 without ONNX, members out of range, or packages are missing.
    """
    need(onnx or members is None, "--members is for ONNX files; add --export onnx.")
    need(onnx or not int8, "--int8 is for ONNX files; add --export onnx.")
    if members is not None:
        from pyro_isingvit.pruning.onnx_members import check_members

        check_members(members)
    if onnx:
        from pyro_isingvit.pruning.export import need_extras

        need_extras()


def deploy(
    model: "CompactViT",
    bayes: "CompactViT",
    out: Path,
    members: int | None,
    int8: bool,
    repeats: int,
    data: "ImageData",
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Writes the files beyond compact.onnx, and measures all of them beside the draws in Python.

    Args:
        model: the form ``mean``, already exported.
        bayes: the form ``bayes``, already saved.
        out: folder of both.
        members: K of members.onnx; None: it is not written.
        int8: write 8-bit files too.
        repeats: of each time measurement.
        data: calibration images are of the training part.
        metrics: of the draws in Python, under ``bayes_``, ``samples`` and ``seed``.

    Returns:
        ``deploy``: file -> bytes, seconds of a batch of 1 and 256, accuracy, NLL and ECE of the test part and, under
        ``val_``, of the validation part; ``members_difference``.
    """
    from tqdm.auto import tqdm

    from pyro_isingvit.pruning.export import ONNX
    from pyro_isingvit.pruning.merge import spread_rows
    from pyro_isingvit.pruning.onnx_members import MEMBERS, export_members
    from pyro_isingvit.pruning.quantise import CALIBRATION, int8_of, quantise

    result: dict[str, Any] = {}
    files = [out / ONNX]
    if members is not None:
        files.append(out / MEMBERS)
        result["members_difference"] = export_members(bayes, files[-1], members, metrics["seed"])
    if int8:
        images = model.normalise(data.train.images[spread_rows(len(data.train), CALIBRATION)])
        for path in tqdm(files.copy(), desc="int8", dynamic_ncols=True, leave=False):
            quantise(path, int8_of(path), images)
            files.append(int8_of(path))
    rows = {path.name: {"bytes": path.stat().st_size, **_scores(path, data)} for path in files}
    draws = f"{metrics['samples']} draws in Python"
    rows[draws] = {"bytes": (out / "bayes" / "compact.safetensors").stat().st_size}
    rows[draws] |= {name: metrics[f"bayes_{name}"] for name in CHOSEN}
    for name, seconds in _seconds(files, draws, bayes, metrics["samples"], repeats).items():
        rows[name] |= seconds
    return result | {"deploy": rows}


def _scores(path: Path, data: "ImageData") -> dict[str, float]:
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.pruning.onnx_predict import predict_onnx

    scores: dict[str, float] = {}
    for prefix, part in (("val_", data.val), ("", data.test)):
        if len(part):
            found = classification_metrics(predict_onnx(path, part.images).probs, part.labels)
            scores |= {prefix + name: found[name] for name in CHOSEN}
    return scores


def _seconds(
    files: list[Path], draws: str, bayes: "CompactViT", samples: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Median seconds of a batch, repeats interleaved; from raw images to probabilities for the draws."""
    import statistics
    from functools import partial

    import torch

    from pyro_isingvit.pruning.cost import BATCH, interleaved
    from pyro_isingvit.pruning.export import open_onnx

    sessions = {path.name: open_onnx(path) for path in files}
    found: dict[str, dict[str, float]] = {name: {} for name in (*sessions, draws)}
    for batch in (1, BATCH):
        images = torch.zeros(batch, *bayes.config.image_shape, dtype=bayes.config.scale.dtype)
        x = {"images": bayes.normalise(images).numpy()}
        cases = {name: partial(session.run, None, x) for name, session in sessions.items()}
        cases[draws] = partial(bayes.predict, images, samples)
        for name, taken in interleaved(cases, repeats, label=f"ms at batch {batch}").items():
            found[name][f"latency_{batch}"] = statistics.median(taken)
    return found


def print_deploy(rows: dict[str, dict[str, float]]) -> None:
    """The files and the draws as a table, and what the files say of the validation part as another."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from pyro_isingvit.pruning.cost import BATCH

    for prefix, part in (("", f"test part; ms an image at batch 1 and {BATCH}"), ("val_", "validation part")):
        shown = {name: row for name, row in rows.items() if f"{prefix}nll" in row}
        costs = () if prefix else ("bytes", "ms, 1", str(BATCH))
        table = Table(title=f"deployed, {part}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in ("", *costs, "accuracy", "NLL", "ECE"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for name, row in shown.items():
            each = (1e3 * row["latency_1"], 1e3 * row[f"latency_{BATCH}"] / BATCH)
            cells = [] if prefix else [f"{row['bytes']:,}", f"{each[0]:.2f}", f"{each[1]:.3f}"]
            table.add_row(name, *cells, *(f"{row[prefix + metric]:.4f}" for metric in CHOSEN))
        if shown:
            Console().print(table)
