"""The figures of a run, one function each: plain arrays in, a matplotlib ``Figure`` out.

Every function takes ``narrow``: the same content, laid out for a phone. Colours are Okabe and Ito's, which readers
with any colour vision tell apart; colour maps are cividis and Blues.

Shapes: S samples, B images, C classes, L layers, H heads. Probabilities sum to 1 over C; entropies are in nats.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pyro_isingvit.checkpoint import write_atomically
from pyro_isingvit.metrics import ECE_BINS

BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#595959"
PHASES = {"pilot": "#E8EDF2", "ising": "#FFFFFF", "finetune": "#F6EBD9"}
WIDE, HALF, NARROW = 11.0, 5.4, 4.0  # inches: the page, half of it, a phone
TEXT_CLASSES, NAMED_CLASSES = 20, 25  # more classes than this: no counts in the cells, not every class named
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "hatch.linewidth": 0.7,
    "figure.facecolor": "white", "svg.fonttype": "path", "svg.hashsalt": "pyro-isingvit",
}  # fmt: skip


def styled[**P, T](draw: Callable[P, T]) -> Callable[P, T]:
    """Runs ``draw`` under the figures' style and puts matplotlib's settings back afterwards."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


@styled
def to_svg(figure: Figure) -> str:
    """The figure as SVG, the same text each time."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


@styled
def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, atomically.

    Raises:
        UserError: the folder cannot be written to.
    """
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=144))


def label(name: str, number: int, length: int = 14) -> str:
    """A class name fit for an axis: one line, cut to ``length``, its number where the font cannot draw it."""
    name = " ".join(str(name).split())
    font = get_font(findfont("DejaVu Sans"))
    if not name or any(font.get_char_index(ord(character)) == 0 for character in name):
        name = f"class {number}"
    name = name if len(name) <= length else name[: length - 1] + "…"
    return name.replace("$", r"\$")  # matplotlib would read it as mathematics


def _percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


# ---------------------------------------------------------------------------------------------------- training


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
        ("share of weights", [("retention", "mean retention", BLUE), ("pruned_fraction", "pruned", ORANGE)]),
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
            _percent(ax.yaxis)
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
    """Shades each phase and draws a line where one ends; handles and names for a legend, None for one phase."""
    names = list(dict.fromkeys(phases))
    spans = {}
    for name in names:
        inside = epochs[[phase == name for phase in phases]]
        spans[name] = ax.axvspan(
            inside.min() - 0.5, inside.max() + 0.5, facecolor=PHASES.get(name, "white"), edgecolor="none", zorder=0
        )
        if inside.max() < epochs.max():
            ax.axvline(inside.max() + 0.5, color=GREY, linewidth=0.8, linestyle=":")
    if len(names) < 2:
        return None
    for span in spans.values():
        span.set_edgecolor("#BBBBBB")
        span.set_linewidth(0.4)
    return list(spans.values()), [f"{name} phase" for name in names]


# ------------------------------------------------------------------------------------------------- calibration


@styled
def reliability_diagram(
    probs: np.ndarray, labels: np.ndarray, bins: int = ECE_BINS, narrow: bool = False
) -> Figure:
    """Accuracy against confidence in equal-width bins, the gap hatched, the images per bin below.

    Args:
        probs: (B, C) mean class probabilities.
        labels: (B,) class numbers.
        bins: number of bins of the top probability.
        narrow: lay out for a phone.
    """
    confidence, right = probs.max(-1).astype(float), (probs.argmax(-1) == labels).astype(float)
    edges = np.linspace(0, 1, bins + 1)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bin b is (b / bins, (b + 1) / bins]
    counts = np.bincount(which, minlength=bins)
    full = counts > 0
    divisor = np.maximum(counts, 1)
    accuracy = np.bincount(which, right, bins) / divisor
    mean_confidence = np.bincount(which, confidence, bins) / divisor
    gap = np.abs(accuracy - mean_confidence)
    ece = float((counts / counts.sum() * gap).sum())  # sum_b |B_b| / B * |accuracy - confidence|

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
    top.legend(loc="upper left")
    top.text(0.97, 0.05, f"ECE = {100 * ece:.2f} %", ha="right", fontsize=11, weight="bold", bbox=_paper())
    bottom.bar(left, counts[full], color=GREY, edgecolor="white", **style)
    bottom.set(yscale="log", xlabel="confidence (probability of the predicted class)", ylabel="images")
    bottom.set_ylim(0.7, 8 * counts.max())
    for x, count in zip(left, counts[full], strict=True):
        bottom.text(x + width / 2, 1.15 * count, f"{count}", ha="center", va="bottom", fontsize=7)
    _percent(top.yaxis)
    _percent(bottom.xaxis)
    return figure


def _paper() -> dict[str, Any]:
    return {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}


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
        ax.legend(loc="upper right")
        _percent(ax.yaxis)
    return figure


# ------------------------------------------------------------------------------------------------------- masks


@styled
def retention_by_layer(means: Mapping[str, np.ndarray], narrow: bool = False) -> Figure:
    """Mean retention of every matrix, as a heat map of layers and kinds, values in per cent.

    Args:
        means: kind -> (layers,) mean retention; layers is 1 for a kind outside the blocks.
        narrow: lay out for a phone.
    """
    depth = max(len(values) for values in means.values())
    blocks = {kind: values for kind, values in means.items() if kind not in OUTSIDE}
    outside = {kind: values for kind, values in means.items() if kind in OUTSIDE}
    tables: list[tuple[np.ndarray, list[str], list[str], str]] = []
    if blocks:
        rows = [str(layer) for layer in range(depth)]
        tables.append((np.stack(list(blocks.values()), -1), rows, list(blocks), "layer"))
    if outside:
        column = np.concatenate(list(outside.values()))[:, None]
        tables.append((column, list(outside), ["outside the blocks"], ""))
    rows_most = max(len(table) for table, *_ in tables)
    figure = Figure((NARROW if narrow else HALF, 1.5 + 0.42 * rows_most), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(tables), width_ratios=[table.shape[1] for table, *_ in tables]))
    largest = max(float(np.nanmax(table)) for table, *_ in tables)
    for ax, (table, rows, columns, ylabel) in zip(axes, tables, strict=True):
        image = _heat_map(ax, table, rows, columns, largest)
        ax.set_ylabel(ylabel)
    _colour_bar(figure, image, list(axes))
    return figure


OUTSIDE = ("patch", "head_hidden", "head")  # kinds of one matrix, before and after the blocks


@styled
def retention_by_head(kept: np.ndarray, narrow: bool = False) -> Figure:
    """Share of each attention head's weights that is kept, as a heat map, values in per cent.

    Args:
        kept: (L, H).
        narrow: lay out for a phone.
    """
    layers, heads = kept.shape
    figure = Figure((NARROW if narrow else HALF, 1.5 + 0.42 * layers), layout="constrained")
    ax = figure.subplots()
    image = _heat_map(ax, kept, [str(i) for i in range(layers)], [str(i) for i in range(heads)], float(kept.max()))
    ax.set(xlabel="head", ylabel="layer")
    _colour_bar(figure, image, [ax])
    return figure


def _heat_map(ax: Axes, table: np.ndarray, rows: list[str], columns: list[str], largest: float) -> Any:
    """Draws shares as colours with the per cent written in the cells."""
    largest = max(largest, 0.01)
    image = ax.imshow(table, cmap="cividis", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    size = 9.5 if len(columns) <= 8 else 7.5 if len(columns) <= 16 else 5.5
    for (row, column), value in np.ndenumerate(table):
        text = f"{100 * value:.0f}" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=size,
                color="black" if value > 0.55 * largest else "white")  # fmt: skip
    return image


def _colour_bar(figure: Figure, image: Any, axes: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=axes, location="top", fraction=0.08, aspect=40)
    bar.set_label("retention")
    bar.outline.set_visible(False)  # type: ignore[operator]
    _percent(bar.ax.xaxis)


@styled
def mask_posteriors(retention: Mapping[str, np.ndarray], threshold: float = 0.5, narrow: bool = False) -> Figure:
    """Distribution of the weights' retention probabilities, a panel for each matrix.

    Args:
        retention: kind -> ([L,] out, in) posterior probability that a weight is kept.
        threshold: weights below it are pruned.
        narrow: lay out for a phone.
    """
    blocks = {kind: values for kind, values in retention.items() if values.ndim == 3}
    outside = {kind: values for kind, values in retention.items() if values.ndim == 2}
    depth = max((len(values) for values in blocks.values()), default=0)
    columns = max(len(blocks), len(outside), 1)
    panels: list[tuple[int, int, str, np.ndarray]] = []  # row, column, title, values
    for column, (kind, values) in enumerate(outside.items()):
        panels.append((0, column, kind, values))
    first = 1 if outside else 0
    for column, (kind, values) in enumerate(blocks.items()):
        panels += [(first + layer, column, f"{kind} {layer}", values[layer]) for layer in range(len(values))]
    rows = first + depth
    edges = np.linspace(0, 1, 41)
    counts = [np.histogram(values, edges)[0] for *_, values in panels]
    highest = max(int(count.max()) for count in counts)

    height = 0.95 if narrow else 1.25
    figure = Figure((NARROW if narrow else WIDE, height * rows + 0.6), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    size = 6.5 if narrow else 8.5
    bottom = {column: max(row for row, c, *_ in panels if c == column) for column in range(columns)}
    for (row, column, title, values), count in zip(panels, counts, strict=True):
        ax = figure.add_subplot(grid[row, column])
        centres = (edges[:-1] + edges[1:]) / 2
        for chosen, colour in ((centres < threshold, SKY), (centres >= threshold, BLUE)):
            ax.bar(centres[chosen], count[chosen], width=edges[1], color=colour, linewidth=0)
        ax.axvline(threshold, color=RED, linewidth=1, linestyle="--")
        pruned = float((values < threshold).mean())
        ax.set_title(f"{title}\n{100 * pruned:.0f} % pruned" if narrow else f"{title}: {100 * pruned:.1f} % pruned",
                     fontsize=size, pad=3)  # fmt: skip
        ax.set(yscale="log", xlim=(0, 1), ylim=(0.7, 2 * max(highest, 1)))
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"] if row == bottom[column] else [""] * 3)
        ax.tick_params(labelsize=size, pad=2)
        ax.minorticks_off()
        if column:
            ax.tick_params(labelleft=False)
    figure.supxlabel("retention probability", fontsize=9.5)
    figure.supylabel("weights (log)", fontsize=9.5)
    return figure


# ----------------------------------------------------------------------------------------------- predictions


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
    order = np.argsort(-_entropy(mean), kind="stable")
    doubtful = order[: min(each, (len(order) + 1) // 2)]
    sure = order[len(doubtful) :][-each:][::-1]
    columns = 1 if narrow else 3
    shown = min(5, len(classes))
    groups = [(f"{len(doubtful)} least certain", doubtful), (f"{len(sure)} most certain", sure)]
    groups = [(title, index) for title, index in groups if len(index)]
    rows = [math.ceil(len(index) / columns) for _, index in groups]
    cell = 0.5 + 0.17 * shown
    figure = Figure((NARROW if narrow else WIDE, cell * sum(rows) + 0.3 * len(rows)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(groups), 1, height_ratios=rows))
    for part, (title, index), count in zip(parts, groups, rows, strict=True):
        part.suptitle(title, fontsize=10.5, weight="bold")
        grid = part.add_gridspec(count, 2 * columns, width_ratios=[1, 1.9] * columns)
        for place, image in enumerate(index):
            row, column = divmod(place, columns)
            picture = part.add_subplot(grid[row, 2 * column])
            _show_image(picture, pixels[image])
            picture.set_title(label(classes[labels[image]], int(labels[image])), fontsize=8.5, pad=3)
            intervals = part.add_subplot(grid[row, 2 * column + 1])
            _show_intervals(intervals, probs[:, image], int(labels[image]), classes, shown)
            if row < count - 1:
                intervals.set_xticklabels([])
    return figure


def _entropy(probs: np.ndarray) -> np.ndarray:
    return -(probs * np.log(np.maximum(probs, 1e-12))).sum(-1)


def _show_image(ax: Axes, pixels: np.ndarray) -> None:
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
    ax.set_yticks(range(shown), [label(classes[number], int(number), 11) for number in top], fontsize=7.5)
    for tick, number in zip(ax.get_yticklabels(), top, strict=True):
        tick.set(color=GREEN if number == truth else "black", weight="bold" if number == truth else "normal")
    ax.set(xlim=(0, 1), ylim=(shown - 0.5, -0.5), xticks=[0, 0.5, 1])
    _percent(ax.xaxis)
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
    step = math.ceil(number / NAMED_CLASSES)  # every name has room for up to 25 classes
    ticks = list(range(0, number, step))
    names = [label(classes[i], i) for i in ticks]
    upright = max(map(len, names)) <= 2 and number <= TEXT_CLASSES
    small = 8.5 if number <= 12 else 6.5
    ax.set_xticks(ticks, names, rotation=0 if upright else 90, fontsize=small)
    ax.set_yticks(ticks, names, fontsize=small)
    ax.tick_params(length=0 if step == 1 else 2)
    ax.set(xlabel="predicted", ylabel="true")
    if number <= TEXT_CLASSES:
        size = (8.5 if number <= 10 else 5.5) * (0.85 if narrow else 1)
        for (row, column), count in np.ndenumerate(table):
            if count:
                ax.text(column, row, f"{count}", ha="center", va="center", fontsize=size,
                        color="white" if share[row, column] > 0.55 else "black")  # fmt: skip
    bar = figure.colorbar(image, ax=ax, location="top", fraction=0.05, aspect=40)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)  # type: ignore[operator]
    _percent(bar.ax.xaxis)
    return figure
