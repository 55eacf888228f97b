"""Predictions of any number of images in bounded memory: part by part, from files to a table.

Shapes: n draws, B images of a part, C classes.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.images import VALUES
from pyro_isingvit.data.info import digest
from pyro_isingvit.data.streamed import ImageStream, Part
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.stopping import Stopping
from pyro_isingvit.predictive.sums import metrics_of, score_sums, together
from pyro_isingvit.predictive.table import Column, summary_columns
from pyro_isingvit.runs.parts import Parts, Sums, listed_beside
from pyro_isingvit.runs.predict import CHUNK, are_numbers, why_no_numbers
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.sequential import Drawn, SequentialDraws
from pyro_isingvit.version import __version__

PART = 2048  # images of a part, and fewer where they or their draws are large
NUMBERS = 2**25  # probabilities of all draws of a part
FORMAT = 2  # raised when a part becomes another than before
# Draws of some images and their labels, or None -> the draws to be shown, more columns, more sums.
Decide = Callable[[PredictiveDraws, Tensor | None], tuple[PredictiveDraws, dict[str, Column], Mapping[str, float]]]


@dataclass(frozen=True)
class Streamed:
    """What was predicted.

    Attributes:
        images: how many were predicted.
        unreadable: file and reason of those that were not.
        listed: where they are listed.
        totals: sums over all images: draws, confidence, entropy and mutual_information (nats), unsettled (images that
            had not reached the bound), and what ``decide`` counts.
        scores: where there are labels, what ``predictive.sums.metrics_of`` gives; otherwise None.
        mc_error: the largest of any image.
        classes: (C,) how often each was predicted.
        new: images that were predicted now, not by an earlier call that was interrupted.
        seconds: that it took, reading included.
        waited: of these, seconds in which the network waited for images.
    """

    images: int
    unreadable: list[tuple[str, str]]
    listed: Path
    totals: dict[str, float]
    scores: dict[str, Any] | None
    mc_error: float
    classes: list[int]
    new: int
    seconds: float
    waited: float


def stream_predictions(
    run: Run,
    stream: ImageStream,
    out: Path,
    samples: int | Stopping = 100,
    *,
    seed: int = 0,
    chunk: int = CHUNK,
    part: int = PART,
    all_classes: bool = False,
    decide: Decide | None = None,
    settings: Mapping[str, str] | None = None,
    max_unreadable: float = 0.5,
    overwrite: bool = False,
    progress: bool = False,
) -> Streamed:
    """Predicts images into a table, part by part; the next part is decoded while the network is busy.

    Every part is kept once it is done (``runs/parts.py``), so that the same call goes on where it was killed, with the
    same table in the end, bit for bit. Draw s is the same network for all images, and the one of ``draw_predictive``.

    Args:
        run: a trained run.
        stream: the images.
        out: a .parquet or .csv file: one row for each image that could be read, in the order of the stream, with the
            columns of ``summary_columns``, ``draws`` and ``mc_error``.
        samples: S draws of every image, or when to stop. Quantiles and mutual information then rest on fewer draws.
        seed: of the draws.
        chunk: at most this many images pass through the network at a time.
        part: images of a part.
        all_classes: add a column ``prob_NAME`` for each class.
        decide: corrects the draws and adds columns.
        settings: of ``decide``, and what else the table depends on, in words.
        max_unreadable: share of the images that may be unreadable, in [0, 1).
        overwrite: replace the table.
        progress: show a progress bar.

    Raises:
        UserError: numbers out of their range, a table that is there already, a disk that is full, or too many images
            that cannot be read; finished parts stay.
    """
    need(part >= 1, f"`part` must be at least 1 image, not {part}.")
    need(0 <= max_unreadable < 1, f"`max_unreadable` must lie in [0, 1), not {max_unreadable}.")
    draws = SequentialDraws(run, samples, seed, chunk)
    most = VALUES // int(np.prod(run.info.image_shape)), NUMBERS // draws.most // run.info.num_classes
    size = max(1, min(part, *most))
    until = {"samples": samples} if isinstance(samples, int) else {"samples": "auto", **asdict(samples)}
    plan = {
        "version": f"{__version__}, {FORMAT}", "run": run_digest(run), "images": stream.digest.hex(), **_words(until),
        **_words({"seed": seed, "chunk": draws.chunk, "part": size, "all_classes": all_classes}),
        "device": run.device.type, "labels and names": _digest(stream),
        **(settings or {}),
    }  # fmt: skip
    start, waited, new = time.monotonic(), 0.0, 0
    with Parts(out, plan, -(-len(stream) // size), overwrite) as parts:
        left = parts.missing()
        bar = tqdm(total=len(stream), desc="predicting", unit="image", disable=not progress, dynamic_ncols=True)
        bar.update(len(stream) - sum(min(size, len(stream) - k * size) for k in left))
        with bar, closing(stream.parts(size, left)) as coming:
            took = time.monotonic()
            for each in coming:
                waited += time.monotonic() - took
                groups = draws.predict(each.images, each.number) if len(each.rows) else []
                each, groups = _numbers_alone(each, groups, stream)
                columns, sums = _table(run, stream, each, groups, all_classes, decide, draws.stopping)
                parts.write(each.number, columns, sums)
                new += sum(len(group.rows) for group in groups)
                bar.update(min(size, len(stream) - each.number * size))
                took = time.monotonic()
        found, listed = parts.sums(), listed_beside(out)
        unreadable = [(name, reason) for sums in found for name, reason in sums.pop("unreadable")]
        if len(unreadable) > max_unreadable * len(stream) or len(unreadable) == len(stream):
            parts.list_unreadable(unreadable)
            need(
                False,
                f"{len(unreadable)} of {len(stream)} images cannot be read, such as {unreadable[0][0]} "
                f"({unreadable[0][1]}); {listed} lists them. Repair or remove them, or raise `max_unreadable`.",
            )
        parts.finish(unreadable, {"pyro_isingvit": json.dumps(plan)})
    worst, counts = max(sums.pop("mc_error") for sums in found), [sums.pop("classes") for sums in found]
    known = [scores for sums in found if (scores := sums.pop("scores")) is not None]
    scores = metrics_of(functools.reduce(together, known), run.info.classes) if known else None
    totals: dict[str, float] = {}
    for sums in found:
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value
    return Streamed(
        len(stream) - len(unreadable), unreadable, listed, totals, scores, worst, np.sum(counts, axis=0).tolist(), new,
        time.monotonic() - start, waited,
    )  # fmt: skip


def run_digest(run: Run) -> str:
    """A digest of all settings and tensors that a run's predictions depend on."""
    found = blake2b(run.config.to_json().encode(), digest_size=16)
    for part, state in run.method.state().items():
        for name, value in state.items():
            found.update(f"{part}.{name}".encode())
            if isinstance(value, Tensor):
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                found.update(repr(value).encode())
    return found.hexdigest()


def _numbers_alone(part: Part, groups: list[Drawn], stream: ImageStream) -> tuple[Part, list[Drawn]]:
    """Lists the images whose predictions are not numbers as unreadable, and takes them out of the groups."""
    kept, lost = list[Drawn](), list(part.unreadable)
    for group in groups:
        fine = are_numbers(group.draws.probs)
        for row in group.rows[~fine].tolist():
            reason = f"its predictions are not numbers: {why_no_numbers(part.images[row])}"
            lost.append((stream.name(int(part.rows[row])), reason))
        if fine.all():
            kept.append(group)
        elif fine.any():
            draws = PredictiveDraws(group.draws.probs[:, fine])
            kept.append(Drawn(group.rows[fine], draws, group.mc_error[fine]))
    return replace(part, unreadable=lost), kept


def _digest(stream: ImageStream) -> str:
    labels = torch.empty(0) if stream.labels is None else stream.labels
    return digest(labels, [stream.name(row) for row in range(len(stream))])


def _words(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _table(
    run: Run, stream: ImageStream, part: Part, groups: list[Drawn], all_classes: bool, decide: Decide | None,
    stopping: Stopping | None,
) -> tuple[dict[str, Column] | None, Sums]:  # fmt: skip
    """Columns of a part, in the order of its images, and sums over them."""
    classes = run.info.classes
    sums: Sums = {"unreadable": part.unreadable, "mc_error": 0.0, "classes": [0] * len(classes), "scores": None}
    tables: list[dict[str, Column]] = []
    for group in groups:
        rows, draws, more = part.rows[group.rows], group.draws, dict[str, Column]()
        labels = None if stream.labels is None else stream.labels[rows]
        counted: Mapping[str, float] = {}
        if decide is not None:
            draws, more, counted = decide(draws, labels)
        table = summary_columns(draws, [stream.name(row) for row in rows.tolist()], classes)
        table["draws"] = np.full(len(rows), len(draws.probs), np.int32)
        if draws.weights is None:  # the error is that of the probabilities before they are corrected
            table["mc_error"] = group.mc_error.float().numpy()
        mean, top = draws.mean, draws.mean.argmax(-1)
        if all_classes:
            table |= {f"prob_{printable(name)}": mean[:, c].float().numpy() for c, name in enumerate(classes)}
        tables.append(table | more)
        over = 0 if stopping is None else int((group.mc_error > stopping.bound).sum())
        if labels is not None:
            sums["scores"] = together(sums["scores"], score_sums(mean, labels))
        added = {
            "draws": len(draws.probs) * len(rows), "confidence": _sum(table["probability"]),
            "entropy": _sum(table["entropy"]), "mutual_information": _sum(table["mutual_information"]),
            "unsettled": over, **counted,
        }  # fmt: skip
        sums |= {name: sums.get(name, 0) + value for name, value in added.items()}
        sums["mc_error"] = max(sums["mc_error"], float(group.mc_error.max()))
        counts = torch.bincount(top, minlength=len(classes)).tolist()
        sums["classes"] = [a + b for a, b in zip(sums["classes"], counts, strict=True)]
    if not tables:
        return None, sums
    order = torch.cat([group.rows for group in groups]).argsort().numpy()
    return {name: _ordered([table[name] for table in tables], order) for name in tables[0]}, sums


def _sum(column: Column) -> float:
    return float(np.asarray(column, np.float64).sum())


def _ordered(columns: list[Column], order: np.ndarray) -> Column:
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns)[order]
    texts = [text for column in columns for text in column]
    return [texts[i] for i in order]
