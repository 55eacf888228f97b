"""Figures of the masks, one function each: plain arrays in, a matplotlib ``Figure`` out.

Every function takes ``narrow``: the same content, laid out for a phone.

Shapes: L layers, H heads. Retention is a probability, 0 to 1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_isingvit.report.style import (
    BLUE,
    HALF,
    NARROW,
    RED,
    SKY,
    WIDE,
    percent,
    styled,
)

FLOOR = 0.5  # stands for no weights on a logarithmic axis


@styled
def retention_by_layer(means: Mapping[str, np.ndarray], narrow: bool = False, first: int = 0) -> Figure:
    """Mean retention of every matrix, as a heat map of layers and kinds, values in per cent.

    Args:
        means: kind -> (layers,) mean retention; layers is 1 for a kind outside the blocks.
        narrow: lay out for a phone.
        first: number of the first block that is shown: those before it have no masks.
    """
    depth = max(len(values) for values in means.values())
    blocks = {kind: values for kind, values in means.items() if kind not in OUTSIDE}
    outside = {kind: values for kind, values in means.items() if kind in OUTSIDE}
    tables: list[tuple[np.ndarray, list[str], list[str], str]] = []
    if blocks:
        rows = [str(first + layer) for layer in range(depth)]
        tables.append((np.stack(list(blocks.values()), -1), rows, list(blocks), "layer"))
    if outside:
        column = np.concatenate(list(outside.values()))[:, None]
        tables.append((column, list(outside), ["outside\nblocks"], ""))
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
def retention_by_head(kept: np.ndarray, narrow: bool = False, first: int = 0) -> Figure:
    """Share of each attention head's weights that is kept, as a heat map, values in per cent.

    Args:
        kept: (L, H).
        narrow: lay out for a phone.
        first: number of the first block that is shown: those before it have no masks.
    """
    layers, heads = kept.shape
    figure = Figure((NARROW if narrow else HALF, 1.5 + 0.42 * layers), layout="constrained")
    ax = figure.subplots()
    rows, columns = [str(first + i) for i in range(layers)], [str(i) for i in range(heads)]
    image = _heat_map(ax, kept, rows, columns, float(kept.max()))
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
    ax.spines[:].set_visible(False)
    size = 9.5 if len(columns) <= 8 else 7.5 if len(columns) <= 16 else 5.5
    for (row, column), value in np.ndenumerate(table):
        text = f"{100 * value:.0f}" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=size,
                color="black" if value > 0.55 * largest else "white")  # fmt: skip
    return image


def _colour_bar(figure: Figure, image: Any, axes: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=axes, location="top", fraction=0.08, aspect=40)
    bar.set_label("retention")
    bar.outline.set_visible(False)
    percent(bar.ax.xaxis)


@styled
def mask_posteriors(
    retention: Mapping[str, np.ndarray], threshold: float = 0.5, narrow: bool = False, first: int = 0
) -> Figure:
    """Distribution of the weights' retention probabilities, a panel for each matrix.

    Args:
        retention: kind -> ([L,] out, in) posterior probability that a weight is kept.
        threshold: weights below it are pruned.
        narrow: lay out for a phone.
        first: number of the first block that is shown: those before it have no masks.
    """
    blocks = {kind: values for kind, values in retention.items() if values.ndim == 3}
    outside = {kind: values for kind, values in retention.items() if values.ndim == 2}
    depth = max((len(values) for values in blocks.values()), default=0)
    columns = max(len(blocks), len(outside), 1)
    panels: list[tuple[int, int, str, np.ndarray]] = []  # row, column, title, values
    for column, (kind, values) in enumerate(outside.items()):
        panels.append((0, column, kind, values))
    below = 1 if outside else 0
    for column, (kind, values) in enumerate(blocks.items()):
        panels += [(below + i, column, f"{kind} {first + i}", values[i]) for i in range(len(values))]
    rows = below + depth
    edges = np.linspace(0, 1, 41)
    counts = [np.histogram(values, edges)[0] for *_, values in panels]
    highest = max(int(count.max()) for count in counts)

    width, height = (NARROW if narrow else WIDE), (0.95 if narrow else 1.25) * rows + 0.75
    figure = Figure((width, height))  # margins by hand: the layout engine takes seconds over this many panels
    grid = figure.add_gridspec(
        rows, columns, left=0.62 / width, right=1 - 0.12 / width, bottom=0.6 / height, top=1 - 0.35 / height,
        hspace=0.75 if narrow else 0.4, wspace=0.25 if narrow else 0.1,
    )  # fmt: skip
    size = 7 if narrow else 8.5
    bottom = {column: max(row for row, c, *_ in panels if c == column) for column in range(columns)}
    for (row, column, title, values), count in zip(panels, counts, strict=True):
        ax = figure.add_subplot(grid[row, column])
        heights, kept = np.maximum(count, FLOOR), edges[:-1] + edges[1:] >= 2 * threshold
        for chosen, colour in ((~kept, SKY), (kept, BLUE)):
            ax.stairs(np.where(chosen, heights, FLOOR), edges, baseline=FLOOR, fill=True, color=colour)
        ax.axvline(threshold, color=RED, linewidth=1, linestyle="--")
        pruned = float((values < threshold).mean())
        share = f"{100 * pruned:.0f} % pruned"
        ax.set_title(f"{title}\n{share}" if narrow else f"{title}: {share}", fontsize=size, pad=3)
        ax.set(yscale="log", xlim=(0, 1), ylim=(1.4 * FLOOR, 2 * max(highest, 1)))
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"] if row == bottom[column] else [""] * 3)
        ax.tick_params(labelsize=size, pad=2)
        ax.minorticks_off()
        if column:
            ax.tick_params(labelleft=False)
    figure.supxlabel("retention probability", fontsize=9.5, y=0.08 / height, va="bottom")
    figure.supylabel("weights (log)", fontsize=9.5, x=0.05 / width, ha="left")
    return figure
