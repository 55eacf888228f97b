"""Figures of a grid: accuracy and NLL against size, pruned share, reliability, entropy of predictions."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis.comparison_tables import paired
from pyro_isingvit.core.untrusted import file_stem
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.report.figures import entropy_of, reliability_bins
from pyro_isingvit.report.style import BLUE, GREY, ORANGE, RED, SKY, WIDE, percent, save_png, styled
from pyro_isingvit.runs.folder import POSTERIOR

PALETTE = (BLUE, ORANGE, "#009E73", RED, "#CC79A7", SKY, "#000000", GREY)
DASHES = ("-", "--", ":", "-.")
MARKS = "os^Dv<>PX*"
PLAIN_MARKS, ARROWS = "s^DvoPX*ph" * 3, "<>"
OURS_WIDTH = 2.6
PANELS = 12  # reliability and entropy panels of one figure
Predictions = dict[str, tuple[np.ndarray, np.ndarray]]  # method -> probabilities (B, C), labels (B,)


def looks(methods: list[str], ours: str) -> dict[str, dict[str, Any]]:
    """Colour, dash and mark of each method, ours first and thickest."""
    styles = itertools.product(DASHES, PALETTE)
    ordered = sorted(methods, key=lambda m: (m != ours, m))
    return {
        method: {"color": colour, "linestyle": dash, "marker": MARKS[i % len(MARKS)], "markersize": 5,
                 "linewidth": OURS_WIDTH if method == ours else 1.3, "zorder": 3 if method == ours else 2}
        for i, (method, (dash, colour)) in enumerate(zip(ordered, styles, strict=False))
    }  # fmt: skip


def _legend_of_all(figure: Figure) -> None:
    """One legend below, with each method once."""
    pairs = [pair for ax in figure.axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in pairs}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5)


@styled
def curves(frame: pd.DataFrame, ours: str) -> Figure:
    """Accuracy and NLL against training size: one row each, one column per data set; bars: deviation over seeds.

    Args:
        frame: a row per finished cell.
        ours: the method drawn thickest.
    """
    datasets = sorted(frame.dataset.unique())
    figure = Figure((max(WIDE, 3.6 * len(datasets)), 7.0), layout="constrained")
    axes = figure.subplots(2, len(datasets), squeeze=False)
    style = looks(list(frame.method.unique()), ours)
    rows = [("accuracy", "accuracy"), ("nll", "NLL (nats per image)")]
    for (metric, name), row in zip(rows, axes, strict=True):
        for dataset, ax in zip(datasets, row, strict=True):
            part = frame[frame.dataset == dataset]
            for method, look in style.items():
                group = part[part.method == method].groupby("train_size")[metric].agg(["mean", "std"])
                if len(group):
                    ax.errorbar(group.index, group["mean"], group["std"].fillna(0), capsize=2, label=method, **look)
            sizes = sorted(part.train_size.unique())
            ax.set_xscale("log")
            ax.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
            ax.set_xticks([], minor=True)
            ax.set(title=dataset, xlabel="training images", ylabel=name)
            if metric == "accuracy":
                percent(ax.yaxis)
            else:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))  # all nine labels would overlap
                ax.yaxis.set_minor_locator(NullLocator())
                ax.yaxis.set_major_formatter("{x:g}")
    _legend_of_all(figure)
    return figure


def gaps(cell: pd.DataFrame, metric: str, ours: str, relative: bool) -> dict[str, tuple[float, float]]:
    """Mean and standard error over the shared seeds of each other method's difference to ours.

    Args:
        cell: of one data set and size.
        metric: a column.
        ours: the method that is subtracted.
        relative: divide by ours: a share, not a number.
    """
    found = {}
    for method, pair in paired(cell, metric, ours).items():
        gap = pair[method] / pair[ours] - 1 if relative else pair[method] - pair[ours]
        found[method] = float(gap.mean()), float(gap.std() / np.sqrt(len(gap))) if len(gap) > 1 else 0.0
    return found


@styled
def differences(frame: pd.DataFrame, ours: str) -> Figure:
    """How far each method is from ours, a line for each data set and size; bars: standard error over shared seeds.

    What is too far away to be drawn is an arrow at the edge.

    Args:
        frame: a row per finished cell.
        ours: the method that is 0.
    """
    cells = list(frame.groupby(["dataset", "train_size"]))
    others = {m: look for m, look in looks(list(frame.method.unique()), ours).items() if m != ours}
    figure = Figure((WIDE, 1.3 + 0.55 * len(cells)), layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), (("accuracy", False, 0.025), ("nll", True, 0.15)), strict=True)
    for ax, (metric, relative, most) in panels:
        for line, (_, cell) in enumerate(cells):
            found = gaps(cell, metric, ours, relative)
            for place, (method, look) in enumerate(others.items()):
                if method not in found:
                    continue
                value, error = found[method]
                y = line + 0.6 * ((place + 0.5) / len(others) - 0.5)
                far, shown = abs(value) > most, {"color": look["color"], "markersize": look["markersize"]}
                shown |= {"marker": ARROWS[value > 0]} if far else {"marker": PLAIN_MARKS[place], "label": method}
                ax.errorbar(np.clip(value, -most, most), y, xerr=None if far else error, linestyle="", **shown)
        for line in range(1, len(cells)):
            ax.axhline(line - 0.5, color=GREY, linewidth=0.4, alpha=0.5)
        ax.axvline(0, color=looks([ours], ours)[ours]["color"], linewidth=OURS_WIDTH, zorder=1)
        ax.set(xlim=(-1.05 * most, 1.05 * most), ylim=(len(cells) - 0.5, -0.5))
        unit = " %" if relative else ""
        ax.xaxis.set_major_formatter(lambda x, _, unit=unit: f"{100 * x:+.3g}{unit}" if abs(x) > 1e-9 else "0")
        sides = ("worse", "better") if metric == "nll" else ("better", "worse")
        for x, word in zip((0.25, 0.75), sides, strict=True):
            ax.text(x, 1.01, f"{ours} is {word}", transform=ax.transAxes, ha="center", va="bottom", fontsize=9)
    left, right = figure.axes
    left.set_yticks(range(len(cells)), [f"{dataset} {size:,}" for (dataset, size), _ in cells])
    left.set(xlabel=f"accuracy above that of {ours}, points")
    right.set(xlabel=f"NLL above that of {ours}")
    _legend_of_all(figure)
    return figure


@styled
def pruning(frame: pd.DataFrame, ours: str) -> Figure:
    """Accuracy against the share of weights pruned: one point per method, one panel per data set and size."""
    cells = list(frame.groupby(["dataset", "train_size"]))
    columns = min(4, len(cells))
    lines = -(-len(cells) // columns)
    figure = Figure((max(WIDE, 2.9 * columns), 3.1 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    style = looks(list(frame.method.unique()), ours)
    for ax, ((dataset, size), cell) in zip(axes, cells, strict=False):
        for method, look in style.items():
            points = cell[cell.method == method]
            if len(points):
                deviation = points.accuracy.std() if len(points) > 1 else 0
                bars = {name: look[name] for name in ("color", "marker", "zorder")}
                ax.errorbar(
                    points.pruned_fraction.mean(), points.accuracy.mean(), deviation, label=method,
                    linestyle="", markersize=9 if method == ours else 6, capsize=2, **bars,
                )  # fmt: skip
        ax.set(title=f"{dataset}, n = {size:,}", xlabel="weights pruned", ylabel="accuracy", xlim=(-0.05, 1.05))
        percent(ax.xaxis)
        percent(ax.yaxis)
    for ax in axes[len(cells) :]:
        ax.set_visible(False)
    _legend_of_all(figure)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, np.ndarray]:
    columns = min(4, count)
    lines = -(-count // columns)
    figure = Figure((max(8.0, 2.9 * columns), height * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes


@styled
def reliability(predictions: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Accuracy against confidence of several methods, one panel each.

    Args:
        predictions: method -> mean probabilities (B, C) and labels (B,).
        title: what they predict.
    """
    figure, axes = _panels(len(predictions), 2.8)
    for ax, (method, (probs, labels)) in zip(axes, predictions.items(), strict=False):
        counts, accuracy, mean, ece = reliability_bins(probs, labels)
        full = counts > 0
        ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        ax.scatter(mean[full], accuracy[full], s=8 + 140 * counts[full] / counts.sum(), color=BLUE, zorder=3)
        ax.plot(mean[full], accuracy[full], color=BLUE, linewidth=1.2)
        ax.set(title=f"{method}: ECE {100 * ece:.1f} %", xlim=(0, 1), ylim=(0, 1))
        percent(ax.xaxis)
        percent(ax.yaxis)
    figure.suptitle(f"{title}: accuracy (up) against confidence (right); the area of a dot is its share of the images")
    return figure


@styled
def entropies(predictions: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Entropy of right and of wrong predictions of several methods, one panel each."""
    figure, axes = _panels(len(predictions), 2.4)
    for ax, (method, (probs, labels)) in zip(axes, predictions.items(), strict=False):
        entropy = entropy_of(probs)
        edges = np.linspace(0, np.log(probs.shape[-1]), 26)
        right = probs.argmax(-1) == labels
        for chosen, name, colour in ((right, "right", BLUE), (~right, "wrong", RED)):
            share = np.histogram(entropy[chosen], edges)[0] / max(int(chosen.sum()), 1)
            ax.stairs(share, edges, fill=True, color=colour, alpha=0.25)
            ax.stairs(share, edges, color=colour, linewidth=1.3, label=name)
        ax.set(title=method, xlim=(0, edges[-1]), ylim=(0, None))
        percent(ax.yaxis)
    axes[0].legend(loc="upper center")
    figure.suptitle(f"{title}: entropy (nats) of right and of wrong predictions, share of each group")
    return figure


def load_predictions(folder: Path, cell: pd.DataFrame) -> Predictions:
    """Test predictions of the cell's first seed, by the runs that still exist."""
    found: Predictions = {}
    for _, row in cell.sort_values(["method", "seed"]).drop_duplicates("method").iterrows():
        path = folder / "runs" / Path(str(row.run)).name / POSTERIOR  # never outside the grid's folder
        if path.is_file():
            tree = load_datatree(path)
            summary = tree["predictive_summary"]
            found[str(row.method)] = (np.asarray(summary["prob_mean"], float), np.asarray(summary["y"]))
            tree.close()
    return found


def write_figures(frame: pd.DataFrame, folder: Path, ours: str) -> list[Path]:
    """Writes all figures as PNG; reliability and entropies for each cell whose runs still exist.

    Args:
        frame: a row per finished cell.
        folder: of the grid.
        ours: the method drawn thickest.

    Returns:
        the files written.
    """
    made = {"accuracy-nll": curves(frame, ours), "pruned-accuracy": pruning(frame, ours)}
    if frame.method.nunique() > 1 and ours in set(frame.method):
        made["differences"] = differences(frame, ours)
    for (dataset, size), cell in frame.groupby(["dataset", "train_size"]):
        predictions = load_predictions(folder, cell)
        shown = dict(sorted(predictions.items(), key=lambda item: item[0] != ours)[:PANELS])
        if shown:
            name, title = f"{file_stem(str(dataset))}-n{size:.0f}", f"{dataset}, n = {size:,}"
            made[f"reliability-{name}"] = reliability(shown, title)
            made[f"entropy-{name}"] = entropies(shown, title)
    paths = []
    for name, figure in made.items():
        save_png(figure, folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths
