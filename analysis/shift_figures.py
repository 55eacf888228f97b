"""Figures of shifted images, one function each: plain arrays in, a matplotlib ``Figure`` out.

Shapes: B images. Entropies in nats. Runs differ by colour, and by line style beyond six.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve
from torch import Tensor

from pyro_isingvit.report.style import BLUE, GREEN, GREY, ORANGE, RED, SKY, WIDE, label, percent, styled

COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, GREY)
LINES = ("-", "--", ":", "-.")
TITLES = {"accuracy": "accuracy", "nll": "NLL (nats per image)", "ece": "ECE"}
Scores = Mapping[str, Mapping[str, np.ndarray]]  # run -> score -> (B,)


def _look(number: int) -> dict[str, Any]:
    line = LINES[number // len(COLOURS) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": line, "linewidth": 1.6}


def _head(figure: Figure, title: str, ax: Axes, columns: int) -> None:
    """Puts the legend of ``ax`` above everything, under the title: a suptitle and an outer legend would overlap."""
    bold: Any = {"size": 11, "weight": "bold"}
    handles = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=columns, title=title, title_fontproperties=bold)


@styled
def ood_figure(
    inside: Scores, outside: Scores, found: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    title: str, classes: int,
) -> Figure:  # fmt: skip
    """Histograms of three scores on test and out-of-distribution images, one row per run; ROC curves below.

    Args:
        inside: (B,) scores of the test images, by run and score.
        outside: (B',) scores of the out-of-distribution images.
        found: auroc of each.
        title: of the figure.
        classes: C; the entropy is log C at most.
    """
    names = {
        "entropy": f"entropy (nats; at most log {classes} = {math.log(classes):.2f})",
        "mutual_information": "mutual information (nats)",
        "max_probability": "1 - largest probability",
    }
    largest = max(float(by["mutual_information"].max()) for side in (inside, outside) for by in side.values())
    ends = {"entropy": math.log(classes), "mutual_information": max(largest, 1e-3), "max_probability": 1 - 1 / classes}
    figure = Figure((WIDE, 2.3 * len(inside) + 4.1), layout="constrained")
    axes = figure.subplots(len(inside) + 1, 3, height_ratios=[2.3] * len(inside) + [3.3], squeeze=False)
    for row, run in zip(axes, inside, strict=False):
        for ax, (score, name) in zip(row, names.items(), strict=True):
            edges = np.linspace(0, ends[score], 31)
            groups = [(inside[run][score], "test part", BLUE), (outside[run][score], "out of distribution", RED)]
            for values, text, colour in groups:
                share = np.histogram(np.clip(values, 0, ends[score]), edges)[0] / len(values)
                ax.stairs(share, edges, fill=True, color=colour, alpha=0.25)
                ax.stairs(share, edges, color=colour, linewidth=1.4, label=f"{text} ({len(values)} images)")
            ax.set(xlabel=name, xlim=(0, ends[score]), ylim=(0, None))
            percent(ax.yaxis)
        row[0].set_ylabel(f"{label(run, 0, 26)}\nshare of the images")
    for ax, (score, name) in zip(axes[-1], names.items(), strict=True):
        for i, run in enumerate(inside):
            positive = np.repeat([False, True], [len(inside[run][score]), len(outside[run][score])])
            false, true, _ = roc_curve(positive, np.concatenate([inside[run][score], outside[run][score]]))
            ax.plot(false, true, label=f"{label(run, i, 26)}: {found[run][score]['auroc']:.3f}", **_look(i))
        ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        ax.axhline(0.95, color=GREY, linewidth=0.6)
        ax.set(xlim=(-0.01, 1), ylim=(0, 1.01), aspect="equal", title=f"ROC by {name.split(' (')[0]}")
        ax.set(xlabel="share of the test part flagged", ylabel="share of the others flagged")
        ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 0.95])  # FPR95 is read where a curve crosses the last
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), title="AUROC", ncols=min(2, len(inside)))
        percent(ax.xaxis)
        percent(ax.yaxis)
    _head(figure, title, axes[0, 0], 2)
    return figure


@styled
def corruption_curves(found: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """One metric per row, one corruption per column, against the severity; severity 0 is the clean image.

    Args:
        found: of each run: clean[metric], corrupted[corruption][metric] by severity, and mean[metric].
        title: of the figure.
    """
    corruptions = list(next(iter(found.values()))["corrupted"])
    figure = Figure((WIDE, 7.2), layout="constrained")
    axes = figure.subplots(len(TITLES), len(corruptions), sharex=True, sharey="row", squeeze=False)
    for row, (metric, name) in zip(axes, TITLES.items(), strict=True):
        for ax, corruption in zip(row, corruptions, strict=True):
            for i, (run, scores) in enumerate(found.items()):
                values = [scores["clean"][metric], *scores["corrupted"][corruption][metric]]
                ax.axhline(values[0], color=COLOURS[i % len(COLOURS)], linewidth=0.6, linestyle=":")
                ax.plot(range(len(values)), values, marker="o", markersize=3.5, label=label(run, i, 26), **_look(i))
            ax.grid(axis="y", color="#E3E3E3", linewidth=0.6)
        row[0].set_ylabel(name)
        row[0].set_ylim(0, 1.02 if metric == "accuracy" else None)
        if metric != "nll":
            percent(row[0].yaxis)
    for ax, corruption in zip(axes[0], corruptions, strict=True):
        ax.set_title(corruption, weight="bold")
    for ax in axes[-1]:
        ax.set(xlabel="severity", xticks=range(6), xticklabels=["clean", *"12345"])
    _head(figure, title, axes[0, 0], min(4, len(found)))
    return figure


@styled
def corruption_examples(
    clean: Tensor, rows: Mapping[str, Sequence[Tensor]], values: Mapping[str, tuple[str, Sequence[float]]]
) -> Figure:
    """One image, clean and under every corruption: one row each, the severities from left to right.

    Args:
        clean: (C, H, W) uint8.
        rows: (C, H, W) uint8 of severity 1 to 5, by corruption.
        values: unit and value of each severity, by corruption.
    """
    figure = Figure((WIDE * 0.75, 1.55 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 6, squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        unit, numbers = values[name]
        row[0].set_ylabel("\n".join([name, *textwrap.wrap(unit, 20)]), fontsize=8.5)
        for ax, image, text in zip(row, [clean, *images], ["clean", *(f"{x:g}" for x in numbers)], strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")  # one scale for all
            ax.set_title(text, fontsize=8.5, pad=3)
            ax.set(xticks=[], yticks=[])
    return figure
