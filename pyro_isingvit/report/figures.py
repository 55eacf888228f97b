"""Figures of training and predictions, one function each: plain arrays in, a matplotlib ``Figure`` out.

Every function takes ``narrow``: the same content, laid out for a phone.

Shapes: S samples, B images, C classes, L layers, H heads. Probabilities sum to 1 over C; entropies in nats.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_isingvit.predictive.metrics import ECE_BINS, entropy
from pyro_isingvit.report.style import (
    BLUE,
    GREEN,
    GREY,
    HALF,
    NARROW,
    ORANGE,
    READABLE_CLASSES,
    RED,
    SKY,
    WIDE,
    label,
    naming_step,
    percent,
    styled,
)

PHASES = {  # name -> title, background
    "pilot": ("pilot phase", "#E8EDF2"),
    "ising": ("Ising phase", "#FFFFFF"),
    "finetune": ("fine-tuning", "#F6EBD9"),
}


# -- training ------------------------------------------------------------------------------------------------


@styled
def training_curves(history: Sequence[Mapping[str, Any]], narrow: bool = False) -> Figure:
    """Loss terms, retention and validation scores by epoch, the phases shaded.

    Args:
        history: a record per epoch, as in metrics.jsonl; columns may be missing.
        narrow: lay out for a phone.
    """
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("NLL (nats per image)", [("nll", "training", BLUE), ("val_nll", "validation", RED)]),
        ("KL to the prior (nats)", [("weight_kl", "weights", BLUE), ("mask_kl", "masks", ORANGE)]),
        (
            "share of weights",
            [
                ("retention", "mean retention", BLUE),
                ("pruned_fraction", "pruned", ORANGE),
                ("max_keep", "max_keep, the clip", GREEN),
            ],
        ),
        ("validation accuracy", [("val_accuracy", "accuracy", RED)]),
    ]
    epochs = np.array([record.get("epoch", i + 1) for i, record in enumerate(history)])
    values = {name: _column(history, name) for _, lines in panels for name, _, _ in lines}
    panels = [panel for panel in panels if any(np.isfinite(values[name]).any() for name, _, _ in panel[1])]
    columns = 1 if narrow else min(2, max(len(panels), 1))
    rows = max(math.ceil(len(panels) / columns), 1)
    figure = Figure((NARROW, 2.1 * rows + 0.4) if narrow else (WIDE, 2.7 * rows), layout="constrained")
    for i, (title, lines) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, i + 1)
        handles = _shade_phases(ax, epochs, [str(record.get("phase", "")) for record in history])
        for name, text, colour in lines:
            if np.isfinite(values[name]).any():
                style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(epochs) <= 40 else {}
                ax.plot(epochs, values[name], color=colour, label=text, **style)
        shown = np.concatenate([values[name] for name, _, _ in lines])
        shown = shown[np.isfinite(shown)]
        if title.startswith("KL") and shown.min() > 0 and shown.max() > 30 * shown.min():
            ax.set_yscale("log")
        if title.startswith(("share", "validation")):
            percent(ax.yaxis)
        ax.set(ylabel=title, xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.grid(axis="y", color="#E3E3E3", linewidth=0.6)
        if i >= len(panels) - columns:
            ax.set_xlabel("epoch")
        if len(lines) > 1:
            ax.legend()
        if i == 0 and handles:
            figure.legend(*handles, loc="outside upper center", ncols=len(handles[0]))
    return figure


def _column(history: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    values = [record.get(name) for record in history]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _shade_phases(ax: Axes, epochs: np.ndarray, phases: list[str]) -> tuple[list[Any], list[str]] | None:
    """Shades each phase and marks where it ends; handles and titles for a legend, None for one phase."""
    names = list(dict.fromkeys(phases))
    spans = {}
    for name in names:
        inside = epochs[[phase == name for phase in phases]]
        spans[name] = ax.axvspan(
            inside.min() - 0.5,
            inside.max() + 0.5,
            facecolor=PHASES.get(name, (name, "white"))[1],
            edgecolor="none",
            zorder=0,
        )
        if inside.max() < epochs.max():
            ax.axvline(inside.max() + 0.5, color=GREY, linewidth=0.8, linestyle=":")
    if len(names) < 2:
        return None
    for span in spans.values():
        span.set_edgecolor("#BBBBBB")
        span.set_linewidth(0.4)
    return list(spans.values()), [PHASES.get(name, (name, ""))[0] for name in names]


# -- calibration ---------------------------------------------------------------------------------------------


def reliability_bins(
    probs: np.ndarray, labels: np.ndarray, bins: int = ECE_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Images, accuracy and mean confidence of equal-width bins (0 where there is no image), and the ECE.

    Args:
        probs: (B, C) mean class probabilities.
        labels: (B,) class numbers.
        bins: number of bins of the top probability; bin b is (b / bins, (b + 1) / bins].
    """
    confidence, right = probs.max(-1).astype(float), (probs.argmax(-1) == labels).astype(float)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    divisor = np.maximum(counts, 1)
    accuracy, mean = np.bincount(which, right, bins) / divisor, np.bincount(which, confidence, bins) / divisor
    ece = float((counts / counts.sum() * np.abs(accuracy - mean)).sum())  # sum_b |B_b| / B * |accuracy - confidence|
    return counts, accuracy, mean, ece


@styled
def reliability_diagram(probs: np.ndarray, labels: np.ndarray, bins: int = ECE_BINS, narrow: bool = False) -> Figure:
    """Accuracy against confidence in equal-width bins, the gap hatched, the images per bin below.

    Args:
        probs: (B, C) mean class probabilities.
        labels: (B,) class numbers.
        bins: number of bins of the top probability.
        narrow: lay out for a phone.
    """
    counts, accuracy, mean_confidence, ece = reliability_bins(probs, labels, bins)
    edges, full = np.linspace(0, 1, bins + 1), counts > 0
    gap = np.abs(accuracy - mean_confidence)

    figure = Figure((NARROW, 4.6) if narrow else (HALF, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = edges[:-1][full], 1 / bins
    style: dict[str, Any] = {"width": width, "align": "edge"}
    top.bar(left, accuracy[full], color=SKY, edgecolor="white", label="accuracy", **style)
    top.bar(
        left, gap[full], bottom=np.minimum(accuracy, mean_confidence)[full], color="none", edgecolor=RED,
        hatch="////", linewidth=0.8, label="gap to the mean confidence", **style,
    )  # fmt: skip
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    top.set_title(f"ECE = {100 * ece:.2f} %", fontsize=11, weight="bold", loc="right")
    bottom.bar(left, counts[full], color=GREY, edgecolor="white", **style)
    bottom.set(yscale="log", xlabel="confidence (probability of the predicted class)", ylabel="images")
    bottom.set_ylim(0.7, 8 * counts.max())
    for x, count in zip(left, counts[full], strict=True):
        bottom.text(x + width / 2, 1.15 * count, f"{count}", ha="center", va="bottom", fontsize=7)
    percent(top.yaxis)
    percent(bottom.xaxis)
    return figure


@styled
def uncertainty_histograms(
    entropy: np.ndarray, mutual_information: np.ndarray, right: np.ndarray, classes: int, narrow: bool = False
) -> Figure:
    """Entropy and mutual information of right and of wrong predictions.

    Args:
        entropy: (B,) of the mean prediction, nats.
        mutual_information: (B,) between label and weights, nats.
        right: (B,) bool.
        classes: C; the entropy is log C at most.
        narrow: lay out for a phone.
    """
    figure = Figure((NARROW, 5.0) if narrow else (WIDE, 3.4), layout="constrained")
    axes = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    largest = max(float(np.nanmax(mutual_information, initial=0.0)), 1e-3)
    panels = [
        (entropy, math.log(classes), f"entropy (nats; at most log {classes} = {math.log(classes):.2f})"),
        (mutual_information, largest, "mutual information (nats)"),
    ]
    groups = [(right, "right", BLUE), (~right, "wrong", RED)]
    for ax, (values, end, title) in zip(axes, panels, strict=True):
        edges = np.linspace(0, end, 31)
        for chosen, name, colour in groups:
            values_here = np.clip(values[chosen], 0, end)
            share = np.histogram(values_here, edges)[0] / max(len(values_here), 1)
            text = f"{name} ({len(values_here)} images)"
            ax.stairs(share, edges, fill=True, color=colour, alpha=0.25)
            ax.stairs(share, edges, color=colour, linewidth=1.4, label=text)
            if len(values_here):
                ax.axvline(float(np.median(values_here)), color=colour, linestyle=":", linewidth=1.4)
        ax.set(xlabel=title, ylabel="share of the group", xlim=(0, end), ylim=(0, None))
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
        percent(ax.yaxis)
    return figure


# -- predictions ---------------------------------------------------------------------------------------------


@styled
def credible_intervals(
    pixels: np.ndarray, probs: np.ndarray, labels: np.ndarray, classes: Sequence[str],
    each: int = 6, narrow: bool = False,
) -> Figure:  # fmt: skip
    """Credible intervals (5 to 95 %) of the class probabilities of the least and the most certain images.

    Args:
        pixels: (B, channels, height, width) uint8, 1 or 3 channels.
        probs: (S, B, C) of every draw.
        labels: (B,) class numbers.
        classes: C names.
        each: images of either sort.
        narrow: lay out for a phone.
    """
    mean = probs.mean(0)
    order = np.argsort(-entropy_of(mean), kind="stable")
    doubtful = order[: min(each, (len(order) + 1) // 2)]
    sure = order[len(doubtful) :][-each:][::-1]
    columns = 1 if narrow else 3
    shown = min(5, len(classes))
    groups = [(f"{len(doubtful)} least certain", doubtful), (f"{len(sure)} most certain", sure)]
    groups = [(title, index) for title, index in groups if len(index)]
    rows = [math.ceil(len(index) / columns) for _, index in groups]
    cell = 0.5 + 0.17 * shown
    figure = Figure((NARROW if narrow else WIDE, cell * sum(rows) + 0.3 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, (title, index), count in zip(parts, groups, rows, strict=True):
        part.suptitle(title, fontsize=10.5, weight="bold")
        grid = part.add_gridspec(count, 2 * columns, width_ratios=[1, 1.9] * columns)
        for place, image in enumerate(index):
            row, column = divmod(place, columns)
            picture = part.add_subplot(grid[row, 2 * column])
            show_image(picture, pixels[image])
            picture.set_title(label(classes[labels[image]], int(labels[image])), fontsize=8.5, pad=3)
            intervals = part.add_subplot(grid[row, 2 * column + 1])
            _show_intervals(intervals, probs[:, image], int(labels[image]), classes, shown)
            if row < count - 1:
                intervals.set_xticklabels([])
            else:
                intervals.set_xlabel("probability", fontsize=8)
    return figure


def entropy_of(probs: np.ndarray) -> np.ndarray:
    """Nats, over the last axis."""
    return entropy(torch.from_numpy(np.asarray(probs))).numpy()


def show_image(ax: Axes, pixels: np.ndarray) -> None:
    """Draws an image of 1 or 3 channels, (channels, height, width) uint8, without axes."""
    if len(pixels) == 1:
        ax.imshow(pixels[0], cmap="gray", interpolation="nearest", vmin=pixels.min(), vmax=max(pixels.max(), 1))
    else:
        ax.imshow(pixels[:3].transpose(1, 2, 0), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def _show_intervals(ax: Axes, probs: np.ndarray, truth: int, classes: Sequence[str], shown: int) -> None:
    """Draws mean and interval of the most probable classes, the true one among them: probs (S, C)."""
    mean = probs.mean(0)
    top = np.argsort(-mean, kind="stable")[:shown]
    if truth not in top:
        top[-1] = truth
    low, high = np.quantile(probs[:, top], [0.05, 0.95], axis=0)
    for y, (number, start, end) in enumerate(zip(top, low, high, strict=True)):
        colour = GREEN if number == truth else GREY
        ax.plot([start, end], [y, y], color=colour, linewidth=3.5, alpha=0.45, solid_capstyle="butt")
        ax.plot(mean[number], y, "o", color=colour, markersize=4.5, clip_on=False)
    ax.set_yticks(range(shown), [label(classes[number], int(number)) for number in top], fontsize=7.5)
    for tick, number in zip(ax.get_yticklabels(), top, strict=True):
        tick.set(color=GREEN if number == truth else "black", weight="bold" if number == truth else "normal")
    ax.set(xlim=(0, 1), ylim=(shown - 0.5, -0.5), xticks=[0, 0.5, 1])
    percent(ax.xaxis)
    ax.tick_params(axis="x", labelsize=7.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#E3E3E3", linewidth=0.6)


@styled
def confusion_matrix(table: np.ndarray, classes: Sequence[str], narrow: bool = False) -> Figure:
    """True against predicted classes: colour is the share of the row, the count is written.

    Args:
        table: (C, C) counts, rows are the truth.
        classes: C names.
        narrow: lay out for a phone.
    """
    number = len(classes)
    side = NARROW if narrow else HALF
    figure = Figure((side, side + 0.2), layout="constrained")
    ax = figure.subplots()
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    step = naming_step(number)
    ticks = list(range(0, number, step))
    names = [label(classes[i], i) for i in ticks]
    upright = max(map(len, names)) <= 2 and number <= READABLE_CLASSES
    small = 8.5 if number <= 12 else 6.5
    ax.set_xticks(ticks, names, rotation=0 if upright else 90, fontsize=small)
    ax.set_yticks(ticks, names, fontsize=small)
    ax.tick_params(length=0 if step == 1 else 2)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="predicted", ylabel="true")
    if number <= READABLE_CLASSES:
        size = (8.5 if number <= 10 else 5.5) * (0.85 if narrow else 1)
        for (row, column), count in np.ndenumerate(table):
            if count:
                ax.text(column, row, f"{count}", ha="center", va="center", fontsize=size,
                        color="white" if share[row, column] > 0.55 else "black")  # fmt: skip
    bar = figure.colorbar(image, ax=ax, location="top", fraction=0.05, aspect=40)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    percent(bar.ax.xaxis)
    return figure
