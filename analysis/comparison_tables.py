"""The cells of a grid that inference.compare ran, as tables: means, paired tests, Markdown.

The file may be untrusted: names are made harmless when they are read.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.grid_settings import unequal
from pyro_isingvit.core.checkpoint import write_text
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.untrusted import plain
from pyro_isingvit.methods.registry import METHODS, OURS

SHORT = ("temperature", "dropout", "laplace", "ensemble")  # what the README shows in addition to ours
SEVERAL = tuple(name for name, row in METHODS.items() if row.networks)  # methods that need several networks
UNITS = {"macs": 1e6}  # metrics that are shown in such units
SHOWN = {  # metrics.json -> heading, decimals, +1: more is better, -1: less, 0: neither
    "accuracy": ("accuracy", 4, 1), "nll": ("NLL", 4, -1), "brier": ("Brier", 4, -1), "ece": ("ECE", 4, -1),
    "nll_calibrated": ("NLL, T fitted", 4, -1), "aurc": ("AURC", 4, -1), "pruned_fraction": ("pruned", 2, 0),
    "macs": ("MMACs", 3, 0), "ms_per_image": ("ms", 4, 0), "train_seconds": ("train s", 0, 0),
}  # fmt: skip
TARGET = ("accuracy", "nll", "brier")
COSTS = ("pruned_fraction", "macs", "ms_per_image")  # of which a page shows the mean over all cells
MISSING = "-"
SINGLE_FIELDS = ("dataset", "train_size", "method", "seed", "epochs", "run")
MARKERS = ("<!-- comparison: made by analysis.comparison -->", "<!-- end of comparison -->")


def load_results(path: Path) -> pd.DataFrame:
    """The finished cells, one row each, with their metrics as columns; ``attrs["unequal"]``: settings that differ.

    Raises:
        UserError: the file is missing or damaged, or has no finished cell.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}; `results` takes a folder that inference.compare wrote.")
    try:
        cells: list[dict[str, Any]] = json.loads(path.read_text())
        rows = [
            {**{name: cell[name] for name in SINGLE_FIELDS}, **{k: cell["metrics"].get(k) for k in SHOWN}}
            for cell in cells
            if cell["status"] == "done"
        ]
        for row in rows:
            names = {name: plain(row[name]) for name in ("dataset", "method", "run")}
            if not all(type(row[name]) is int and row[name] > 0 for name in ("train_size", "epochs")):
                raise TypeError("sizes and epochs are whole numbers")
            if not all(row[name] is None or type(row[name]) in (int, float) for name in SHOWN):
                raise TypeError("metrics are numbers")
            row |= names
        differ = unequal(cells)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); run inference.compare again: finished cells are kept."
        ) from error
    if not rows:
        raise UserError(f"{path} has no finished cell yet.")
    frame = pd.DataFrame(rows)
    frame[list(SHOWN)] = frame[list(SHOWN)].astype(float)  # a metric that older cells lack is NaN
    frame.attrs["unequal"] = differ
    return frame


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds: index (dataset, train_size, method), columns (metric, mean|std|count)."""
    numbers = frame.groupby(["dataset", "train_size", "method"])[list(SHOWN)]
    return numbers.agg(["mean", "std", "count"])


def paired(cell: pd.DataFrame, metric: str, ours: str) -> dict[str, pd.DataFrame]:
    """A metric of ours and of each other method, on the seeds that both have: method -> (seeds, 2).

    Args:
        cell: of one data set and size.
        metric: a column.
        ours: the method that the others are held against; where the cell lacks it, there is nothing.
    """
    table = cell.pivot_table(index="seed", columns="method", values=metric)
    pairs = {str(m): table[[ours, m]].dropna() for m in table if m != ours and ours in table}
    return {method: pair for method, pair in pairs.items() if len(pair)}


def is_several(method: str) -> bool:
    """Whether a method, with its number or without, needs several networks."""
    return method.split(":", maxsplit=1)[0] in SEVERAL


def against_best(frame: pd.DataFrame, ours: str = OURS) -> pd.DataFrame:
    """Our method against the best other single network, by data set, size and metric.

    The best is that of the largest mean lead over ours, or least distance behind it, on the same seeds, among those
    that share most seeds with it. ``difference`` is ours minus best. Its standard error and the p-value are those of a
    paired t-test over these seeds.
    """
    rows = []
    for (dataset, size), cell in frame.groupby(["dataset", "train_size"]):
        for metric in TARGET:
            pairs = {m: pair for m, pair in paired(cell, metric, ours).items() if not is_several(m)}
            if not pairs:
                continue
            sign = SHOWN[metric][2]
            most = max(map(len, pairs.values()))
            leads = {m: sign * (pair[m] - pair[ours]).mean() for m, pair in pairs.items() if len(pair) == most}
            best = max(leads, key=lambda method: leads[method])
            pair = pairs[best]
            difference = pair[ours] - pair[best]
            several = len(pair) > 1 and difference.std() > 0
            error = float(difference.std() / np.sqrt(len(pair))) if several else float("nan")
            p = float(stats.ttest_rel(pair[ours], pair[best]).pvalue) if several else float("nan")
            rows.append({
                "dataset": dataset, "train_size": size, "metric": SHOWN[metric][0], "ours": pair[ours].mean(),
                "best other": best, "its value": pair[best].mean(), "difference": difference.mean(),
                "standard error": error, "p (paired t)": p,
                "first or within one standard error": bool(sign * difference.mean() >= -(error if several else 0.0)),
            })  # fmt: skip
    return pd.DataFrame(rows)


def against_ensemble(frame: pd.DataFrame, ours: str = OURS) -> pd.DataFrame:
    """NLL of our single network divided by that of the ensemble, by data set and size."""
    rows = []
    for (dataset, size), cell in frame.groupby(["dataset", "train_size"]):
        for method, pair in paired(cell, "nll", ours).items():
            ratio = pair[ours].mean() / pair[method].mean()
            if is_several(method):
                rows.append({"dataset": dataset, "train_size": size, "against": method, "NLL ratio": ratio})
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """All methods and metrics, the best mean of each column and cell in bold."""
    summary = summarise(frame)
    lines = []
    for (dataset, size), cell in summary.groupby(level=["dataset", "train_size"]):
        cell = cell.droplevel(["dataset", "train_size"])
        counts = cell[("accuracy", "count")].astype(int)
        seeds = f"{counts.max()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        epochs = sorted(set(frame[(frame.dataset == dataset) & (frame.train_size == size)].epochs))
        lines += [
            f"### {dataset}, {size:,} training images", "",
            f"{seeds} seeds, {', '.join(map(str, epochs))} epochs; mean ± standard deviation, best mean in bold.", "",
            to_table([
                ["method", *(heading for heading, _, _ in SHOWN.values())],
                *([method, *_row(cell, method)] for method in _order(cell.index)),
            ]), "",
        ]  # fmt: skip
    return "\n".join(lines)


def _order(methods: Any) -> list[str]:
    """Ours first, ensembles last, the others by name."""
    return sorted(map(str, methods), key=lambda m: (is_several(m), m.split(":")[0] != OURS, m))


def _row(cell: pd.DataFrame, method: str) -> list[str]:
    texts = []
    for metric, (_, decimals, sign) in SHOWN.items():
        missing = pd.isna(cell.loc[method, (metric, "mean")])
        texts.append(MISSING if missing else _mean(cell[metric] / UNITS.get(metric, 1.0), method, decimals, sign))
    return texts


def to_markdown(table: pd.DataFrame, decimals: int = 4) -> str:
    """A data frame as a Markdown table."""

    def word(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

    return to_table([list(table.columns), *([word(value) for value in row] for _, row in table.iterrows())]) + "\n"


def short_table(frame: pd.DataFrame, ours: str = OURS) -> str:
    """For the README: ours, customary networks and the ensemble, at the middle size of each data set."""
    summary = summarise(frame)
    names = [ours, *(m for m in _order(frame.method.unique()) if m.split(":")[0] in SHORT and m != ours)]
    sizes = {str(name): sorted(part.train_size.unique()) for name, part in frame.groupby("dataset")}
    middle = {name: each[len(each) // 2] for name, each in sizes.items()}
    cells = {cell: summary.loc[cell].reindex(names) for cell in middle.items()}  # a method may lack a column
    heads = [f"{_cell_name(*cell)}: {metric}" for metric in ("accuracy", "NLL") for cell in cells]
    rows = [["", *heads, "ECE, mean", "pruned"]]
    for method in names:
        row = [_mean(part[key], method, 3, SHOWN[key][2]) for key in ("accuracy", "nll") for part in cells.values()]
        ece, pruned = (
            np.mean([part.loc[method, (key, "mean")] for part in cells.values()]) for key in ("ece", "pruned_fraction")
        )
        means = [
            MISSING if np.isnan(value) else text
            for value, text in ((ece, f"{ece:.3f}"), (pruned, f"{100 * pruned:.0f}%"))
        ]
        rows.append([f"`{method}`", *row, *means])
    return to_table(rows)


def page_tables(frame: pd.DataFrame, ours: str = OURS) -> str:
    """For the comparison's page: accuracy, NLL and cost of every method in every cell, ours against the best."""
    seeds = frame.seed.nunique()
    what = "one seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"
    parts = [f"Accuracy, {what}, best mean in bold:"]
    parts += [_by_cell(frame, "accuracy", COSTS), "NLL, nats per image:", _by_cell(frame, "nll")]
    best, ensemble = against_best(frame, ours), against_ensemble(frame, ours)
    if len(best):
        parts += [f"`{ours}` against the best other single network:", _verdicts(best, ensemble)]
    if frame.attrs.get("unequal"):
        parts += ["Settings that differ:", "\n".join(f"- {line}" for line in frame.attrs["unequal"])]
    return "\n\n".join(parts)


def _cell_name(dataset: str, size: int) -> str:
    return f"{dataset} {size:,}"


def _by_cell(frame: pd.DataFrame, metric: str, means: tuple[str, ...] = ()) -> str:
    """One metric, one row per method, one column per data set and size; ``means``: metrics to add as means over all."""
    summary = summarise(frame)
    last = summary.xs("mean", axis=1, level=1)[list(means)].groupby("method").mean()
    cells = dict(list(summary[metric].groupby(level=["dataset", "train_size"])))
    rows = [["method", *(_cell_name(*cell) for cell in cells), *(SHOWN[name][0] for name in means)]]
    for method in _order(last.index):
        row = [method]
        for dataset, size in cells:
            here = cells[dataset, size].loc[dataset, size]
            row.append(_mean(here, method, 3, SHOWN[metric][2]) if method in here.index else "")
        rows.append([*row, *(_cost(name, last.loc[method, name]) for name in means)])
    return to_table(rows)


def _cost(name: str, value: Any) -> str:
    if pd.isna(value):
        return MISSING
    return f"{100 * value:.0f}%" if name == "pruned_fraction" else f"{value / UNITS.get(name, 1.0):.{SHOWN[name][1]}f}"


def _mean(cell: pd.DataFrame, method: str, decimals: int, sign: int) -> str:
    """Mean and deviation of a method, in bold if no other mean over as many seeds is better."""
    mean, deviation, most = cell.loc[method, "mean"], cell.loc[method, "std"], cell["count"].max()
    if pd.isna(mean):
        return MISSING
    text = f"{mean:.{decimals}f}" + ("" if pd.isna(deviation) else f" ± {deviation:.{decimals}f}")
    if cell.loc[method, "count"] < most:  # some are not finished, or failed
        return f"{text} ({int(cell.loc[method, 'count'])} of {int(most)} seeds)"
    return f"**{text}**" if sign and sign * mean == (sign * cell["mean"][cell["count"] == most]).max() else text


def _verdicts(best: pd.DataFrame, ensemble: pd.DataFrame) -> str:
    """One row per data set and size: difference ± standard error, the other's name, NLL over the ensemble's."""
    names = [SHOWN[metric][0] for metric in TARGET]
    several = list(dict.fromkeys(ensemble.get("against", [])))
    rows = [["", *names, *(f"NLL / that of {method}" for method in several)]]
    for (dataset, size), part in best.groupby(["dataset", "train_size"]):
        row = [_cell_name(dataset, size)]
        for _, one in part.set_index("metric").reindex(names).iterrows():
            if pd.isna(one["difference"]):
                row.append(MISSING)
                continue
            error = "" if pd.isna(one["standard error"]) else f" ± {one['standard error']:.3f}"
            row.append(f"{one['difference']:+.3f}{error} ({one['best other']})")
        if several:
            here = ensemble[(ensemble.dataset == dataset) & (ensemble.train_size == size)]
            ratios = dict(zip(here["against"], here["NLL ratio"], strict=True))
            row += [f"{ratios[method]:.2f}" if method in ratios else MISSING for method in several]
        rows.append(row)
    return to_table(rows)


def to_table(rows: list[list[str]]) -> str:
    """Markdown of a table, the first row its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " --- |" * (len(rows[0]) - 1), *lines[1:]])


def with_spread(values: pd.Series, decimals: int = 3) -> str:
    """Mean and standard deviation of numbers, the mean alone of a single one."""
    spread = f" ± {values.std():.{decimals}f}" if len(values) > 1 else ""
    return f"{values.mean():.{decimals}f}{spread}"


def show_table(table: str, page: Path | None, markers: tuple[str, str]) -> None:
    """Prints a table, or puts it between the markers of a page and says so."""
    if page is None:
        print(table)
        return
    write_between(page, table, markers)
    print(f"page: {page}")


def write_between(path: Path, table: str, markers: tuple[str, str] = MARKERS) -> None:
    """Puts a table between two markers.

    Args:
        path: of the page.
        table: in Markdown.
        markers: lines of the page; what stands between them is replaced.

    Raises:
        UserError: the file has no such markers.
    """
    text = path.read_text() if path.is_file() else ""
    start, end = (re.escape(marker) for marker in markers)
    if not re.search(f"{start}.*{end}", text, re.S):
        raise UserError(f"{path} lacks the lines {markers[0]} and {markers[1]}, between which the table goes.")
    block = f"{markers[0]}\n\n{table}\n\n{markers[1]}"
    write_text(path, re.sub(f"{start}.*{end}", lambda _: block, text, flags=re.S))
