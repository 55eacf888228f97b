"""Figures of pruning, one function each: plain numbers in, a matplotlib ``Figure`` out.

Every function takes ``narrow``: the same content, laid out for a phone.

Shapes: H heads, F hidden units.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pyro_isingvit.report.style import BLUE, GREY, NARROW, ORANGE, RED, SKY, WIDE, percent, styled

EMPTY = "#ECECEC"
TALLEST = 8  # rows of units in a strip


@styled
def kept_structure(layers: Sequence[Mapping[str, Sequence[float]]], narrow: bool = False, first: int = 0) -> Figure:
    """The network block by block: heads with the channels left in them, and the units of the MLP that are left.

    Args:
        layers: for each block ``value`` and ``score``, shares of the value and of the query-key channels left of each
            head (H,), and ``hidden``, 1 for each unit that is left (F,).
        narrow: lay out for a phone.
        first: number of the first block that is shown: those before it have no masks.
    """
    heads, units = len(layers[0]["value"]), len(layers[0]["hidden"])
    rows = min(TALLEST, max(2, units // 32))
    columns = -(-units // rows)
    width, height = (NARROW if narrow else WIDE), (1.05 if narrow else 0.95) * len(layers) + 0.85
    figure = Figure((width, height), layout="constrained")
    grid: Any = figure.subplots(len(layers), 2, width_ratios=[1, 1.3 if narrow else 2], squeeze=False)
    size = 7.5 if narrow else 9.5
    for number, (layer, (left, right)) in enumerate(zip(layers, grid, strict=True), first):
        value, score = np.asarray(layer["value"]), np.asarray(layer["score"])
        _heads(left, value, score)
        kept = int((value > 0).sum())
        left.set_title(f"{kept} of {heads} heads", fontsize=size, pad=3)
        left.set_ylabel(f"{number}" if narrow else f"block {number}", rotation=0, ha="right", va="center")
        strip = np.full(rows * columns, np.nan)
        strip[:units] = layer["hidden"]
        _units(right, strip.reshape(rows, columns))
        right.set_title(f"{int(np.sum(layer['hidden']))} of {units} units", fontsize=size, pad=3)
        for ax in (left, right):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
    colours = {"value channels": BLUE, "query and key channels": SKY, "hidden units": ORANGE, "dropped": EMPTY}
    figure.legend(
        handles=[Patch(facecolor=colour, label=name) for name, colour in colours.items()], loc="outside lower center",
        ncols=2 if narrow else 4,
    )  # fmt: skip
    return figure


def _heads(ax: Axes, value: np.ndarray, score: np.ndarray) -> None:
    """Two columns a head, filled by the share of the channels that is left."""
    for h, shares in enumerate(zip(value, score, strict=True)):
        for side, (share, colour) in enumerate(zip(shares, (BLUE, SKY), strict=True)):
            x = h + 0.06 + 0.44 * side
            ax.add_patch(Rectangle((x, 0), 0.42, 1, facecolor=EMPTY))
            ax.add_patch(Rectangle((x, 0), 0.42, share, facecolor=colour))
    ax.set(xlim=(0, len(value)), ylim=(0, 1))


def _units(ax: Axes, strip: np.ndarray) -> None:
    lines = {"edgecolors": "white", "linewidth": 0.8} if strip.size <= 512 else {"linewidth": 0}
    colours = ListedColormap([EMPTY, ORANGE])
    ax.pcolormesh(np.ma.masked_invalid(strip)[::-1], cmap=colours, vmin=0, vmax=1, **lines)


@styled
def frontier(
    points: Sequence[Mapping[str, Any]],
    full: Mapping[str, float],
    chosen: Mapping[str, float],
    dense: Mapping[str, float],
    narrow: bool = False,
) -> Figure:
    """Cost and quality of smaller networks, against the share of the weights that is kept.

    Args:
        points: ``kept``, ``parameters``, ``macs``, ``latency_1`` and ``latency_256`` (seconds), ``accuracy``, ``nll``,
            ``ece`` of each network, and these three once more in ``unmerged``, or None there.
        full: accuracy, nll, ece of the full posterior.
        chosen: ``kept`` of the network that was taken.
        dense: ``parameters`` and ``macs`` with nothing removed.
        narrow: lay out for a phone.
    """
    shape = (6, 1) if narrow else (2, 3)
    figure = Figure((NARROW, 11.5) if narrow else (WIDE, 5.2), layout="constrained")
    axes = figure.subplots(*shape, sharex=True).flatten()
    order = sorted(points, key=lambda point: point["kept"])
    kept = [point["kept"] for point in order]

    def line(ax: Axes, name: str, colour: str, factor: float = 1.0, label: str | None = None) -> None:
        ax.plot(kept, [factor * point[name] for point in order], "o-", color=colour, markersize=4, label=label)

    line(axes[0], "parameters", BLUE, 1 / dense["parameters"], "parameters")
    line(axes[0], "macs", ORANGE, 1 / dense["macs"], "multiply-accumulates")
    axes[0].set(title="size, of the dense network", ylim=(0, None))
    axes[0].axvline(chosen["kept"], color=RED, linewidth=1, label="taken")
    axes[0].legend(loc="upper left")
    percent(axes[0].yaxis)
    for ax, name, title in ((axes[1], "latency_1", "batch of 1"), (axes[2], "latency_256", "batch of 256")):
        line(ax, name, GREY, 1e3)
        ax.set(title=f"{title}, ms", ylim=(0, None))
    for ax, name, title in ((axes[3], "accuracy", "accuracy"), (axes[4], "nll", "NLL, nats"), (axes[5], "ece", "ECE")):
        plain = [(point["kept"], point["unmerged"][name]) for point in order if point.get("unmerged")]
        line(ax, name, BLUE, label="refitted" if plain else None)
        if plain:
            ax.plot(*zip(*plain, strict=True), "o:", color=ORANGE, markersize=3, linewidth=1, label="only dropped")
        ax.axhline(full[name], color=GREY, linestyle="--", linewidth=1, label="full posterior")
        ax.set(title=title)
        if name != "nll":
            percent(ax.yaxis)
    axes[3].legend(loc="best")
    for ax in axes:
        if ax is not axes[0]:
            ax.axvline(chosen["kept"], color=RED, linewidth=1)
        percent(ax.xaxis)
        ax.grid(color="#E6E6E6", linewidth=0.6)
    for ax in axes[-1:] if narrow else axes[3:]:
        ax.set_xlabel("weights kept")
    return figure
