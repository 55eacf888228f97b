"""The records of ``inference.compare --regularisers`` as tables: changes against none, paired by seed, in Markdown.

The file may be untrusted: names are made harmless when they are read.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.comparison_tables import MISSING, to_table
from analysis.grid_settings import minor
from inference.search_trials import key_of, read_records
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.untrusted import plain

PLACE = ["dataset", "train_size", "flipped", "epochs"]  # what has a table of its own
METRICS = {  # of a record -> heading, factor, decimals, +1: more is better, -1: less
    "accuracy": ("accuracy, %", 100, 2, 1), "nll": ("NLL", 1, 4, -1), "ece": ("ECE, %", 100, 2, -1),
    "corrupted_nll": ("NLL, corrupted", 1, 3, -1), "prunable": ("prunable, %", 100, 0, 1),
}  # fmt: skip
STEP = "step"  # seconds of a step, as a multiple of those without a regulariser
TOLD = {"refused": "refused", "error": "diverged"}  # key of a record without scores -> how it is said


def load(path: Path) -> pd.DataFrame:
    """All records, one row each: place, method, regulariser, seed, metrics, and ``told`` where something went wrong.

    Raises:
        UserError: no such file, a damaged one, or two records of one cell that differ in further settings.
    """
    need(path.is_file(), f"there is no {path}; `results` takes a folder of inference.compare with `regularisers`.")
    records = {key_of(record["trial"]): record for record in read_records(path)}  # the last one of a cell counts
    try:
        frame = pd.DataFrame([_row(record) for record in records.values()])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r:.100}); take that line out, and its cell runs again.") from error
    need(len(frame), f"{path} has no finished cell yet.")
    twice = frame[frame.duplicated([*PLACE, "method", "regulariser", "seed"])]
    if len(twice):
        first = ", ".join(f"{twice.iloc[0][name]}" for name in (*PLACE, "method", "regulariser", "seed"))
        raise UserError(f"{path} has records of different settings for {first}; keep those in folders of their own.")
    return frame


def _row(record: dict[str, Any]) -> dict[str, Any]:
    trial, numbers = record["trial"], [*METRICS, "seconds_per_step"]
    for name in numbers:
        if not isinstance(record.get(name), int | float | None):
            raise TypeError(f"{name} is no number")
    same = {name: value for name, value in trial.items() if name not in ("regulariser", "sets")}
    told = next((f"{word}: {plain(str(record[key]))}" for key, word in TOLD.items() if key in record), "")
    return {
        "dataset": plain(trial["dataset"]), "train_size": int(trial["train_size"] or 0),
        "flipped": float(trial["flipped"]), "epochs": int(trial["epochs"]), "method": plain(trial["method"]),
        "regulariser": plain(trial["regulariser"]), "seed": int(trial["seed"]), "told": told,
        "setup": json.dumps(same, sort_keys=True), "machine": str(record.get("machine")),
        "version": plain(minor(str(record.get("version", "?")))),
        **{name: math.nan if record.get(name) is None else float(record[name]) for name in numbers},
    }  # fmt: skip


def changes(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of regularisers with ``change_`` of each metric, and ``change_step``; those without a partner are dropped.

    The partner has no regulariser and is the same otherwise; steps are compared on one machine.
    """
    bare = frame[(frame.regulariser == "none") & (frame.told == "")]
    kept = [*METRICS, "seconds_per_step", "machine"]
    pairs = frame[(frame.regulariser != "none") & (frame.told == "")].merge(
        bare[["setup", *kept]], on="setup", suffixes=("", "_none")
    )
    for name in METRICS:
        pairs[f"change_{name}"] = pairs[name] - pairs[f"{name}_none"]
    ratio = pairs["seconds_per_step"] / pairs["seconds_per_step_none"]
    pairs[f"change_{STEP}"] = ratio.where(pairs["machine"] == pairs["machine_none"])
    return pairs


def beyond_noise(values: pd.Series) -> bool:
    """Whether the 95% interval of Student's t of a mean over seeds leaves 0 out."""
    count = len(values)
    return count > 1 and abs(values.mean()) > stats.t.ppf(0.975, count - 1) * values.std() / math.sqrt(count)


def to_tables(frame: pd.DataFrame) -> Iterator[str]:
    """Markdown: for each data set a heading, a table, and what was refused or diverged."""
    pairs = changes(frame)
    parts = {place: part for place, part in pairs.groupby(PLACE)}
    heads = ["method", "regulariser", *(heading for heading, *_ in METRICS.values()), STEP, "seeds"]
    for where, cells in frame.groupby(PLACE):
        rows = [heads]
        for method, own in cells.groupby("method", sort=False):
            bare = own[(own.regulariser == "none") & (own.told == "")]
            if len(bare):
                values = [_number(bare[name], *METRICS[name][1:3]) for name in METRICS]
                rows.append([str(method), "`none`", *values, "1", str(len(bare))])
            others = parts.get(where, pairs[:0])
            groups = sorted(
                others[others.method == method].groupby("regulariser"), key=lambda group: group[1].change_nll.mean()
            )
            for name, one in groups:
                values = [_signed(one[f"change_{metric}"].dropna(), *METRICS[metric][1:]) for metric in METRICS]
                step = one[f"change_{STEP}"].dropna()
                times = f"{step.mean():.2f}" if len(step) else MISSING
                rows.append([str(method), f"`{name}`", *values, times, str(len(one))])
        if len(rows) > 1:
            yield f"### {place_name(*where)}"
            yield to_table(rows)
        if notes := [*_notes(cells, pairs)]:
            yield "\n".join(notes)


def to_overview(frame: pd.DataFrame) -> str:
    """Markdown: the change of NLL in percent, regulariser by place, so that what helps everywhere can be seen.

    A place has a column for each method. The last column counts the columns in which the mean is for the better, of
    those that were measured; rows follow the mean of all. "" where fewer than two places are measured.
    """
    pairs = changes(frame)
    pairs["percent"] = 100 * (pairs.nll / pairs.nll_none - 1)
    columns = [*pairs.groupby([*PLACE, "method"]).groups]
    if pairs.groupby(PLACE).ngroups < 2:
        return ""
    found = {key: one.percent.dropna() for key, one in pairs.groupby([*PLACE, "method", "regulariser"])}
    rows = []
    for name in pairs.regulariser.unique():
        cells = [found.get((*column, name), pairs.percent[:0]) for column in columns]
        means = [values.mean() for values in cells if len(values)]
        better = f"{sum(mean < 0 for mean in means)} of {len(means)}"
        rows.append((np.mean(means), [f"`{name}`", *(_signed(values, 1, 1, -1) for values in cells), better]))
    heads = ["regulariser", *(f"{method}, {place_name(*place)}" for *place, method in columns), "better"]
    return to_table([heads, *(row for _, row in sorted(rows, key=lambda row: row[0]))])


def place_name(dataset: str, size: int, flipped: float, epochs: int) -> str:
    """A heading."""
    wrong = f", {flipped:.0%} wrong labels" if flipped else ""
    return f"{dataset}, {f'{size:,}' if size else 'all'} images{wrong}, {epochs} epochs"


def _number(values: pd.Series, factor: float, decimals: int) -> str:
    values = factor * values.dropna()
    if not len(values):
        return MISSING
    spread = f" ± {values.std():.{decimals}f}" if len(values) > 1 else ""
    return f"{round(values.mean(), decimals) + 0.0:.{decimals}f}{spread}"  # + 0.0: no minus in front of a zero


def _signed(values: pd.Series, factor: float, decimals: int, sign: int) -> str:
    """A mean change with its sign and deviation, in bold where it is for the better beyond noise."""
    text = _number(values, factor, decimals)
    if text == MISSING:
        return text
    text = text if text.startswith("-") else f"+{text}"
    return f"**{text}**" if sign * values.mean() > 0 and beyond_noise(values) else text


def _notes(cells: pd.DataFrame, pairs: pd.DataFrame) -> Iterator[str]:
    """What the table of a place cannot show."""
    for (method, name, told), ones in cells[cells.told != ""].groupby(["method", "regulariser", "told"]):
        yield f"- `{name}` with {method}, seed {', '.join(map(str, sorted(ones.seed)))}: {told}"
    versions = {version: sorted({*ones.seed}) for version, ones in cells.groupby("version")}
    if len(versions) > 1:
        told = "; ".join(f"{version} (seed {', '.join(map(str, seeds))})" for version, seeds in versions.items())
        yield f"- Measured with different versions: {told}."
    done = cells[(cells.regulariser != "none") & (cells.told == "")]
    alone = len(done) - int(pairs.setup.isin(cells.setup).sum())
    if alone:
        yield f"- {alone} cells lack their partner without a regulariser, and are left out."
