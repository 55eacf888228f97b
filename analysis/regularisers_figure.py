"""The figure of analysis.regularisers: change of NLL and accuracy, a row for each regulariser."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.regularisers_table import METRICS, PLACE, beyond_noise, place_name
from pyro_isingvit.report.style import BLUE, GREEN, GREY, ORANGE, RED, SKY, WIDE, styled

SHOWN = ("nll", "accuracy")
COLOURS = (BLUE, ORANGE, GREEN, RED, SKY)
ROW = 0.21  # inches
FAR = 3.0  # times the upper quartile of all changes, beyond which a dot becomes an arrow at the edge


@styled
def changes_figure(pairs: pd.DataFrame) -> Figure:
    """Mean changes with their standard deviation over seeds; filled dots are beyond noise (``beyond_noise``).

    Args:
        pairs: what ``changes`` gives.
    """
    parts = {place: part for place, part in pairs.groupby(PLACE)}
    by_nll = pairs.groupby([*PLACE, "method", "regulariser"]).change_nll.mean().groupby("regulariser").mean()
    names, methods = [*by_nll.sort_values(ascending=False).index], [*dict.fromkeys(pairs.method)]
    rows = 1 if len(parts) <= 2 else 2  # of panels; each place has one of every metric
    height = rows * (ROW * len(names) * max(1, len(methods) / 2) + 1.4) + 0.4
    columns = len(parts) * len(SHOWN) // rows
    figure = Figure((WIDE if columns > 1 else WIDE / 2, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for number, (metric, where) in enumerate((m, w) for m in SHOWN for w in parts):
        _panel(axes[number], parts[where], metric, names, methods)
        axes[number].set_title(place_name(*where).replace(", ", "\n").replace("$", r"\$"))
    handles = [_dot(colour, method) for method, colour in zip(methods, COLOURS, strict=False)]
    handles.append(_dot(GREY, "hollow: 95% interval holds 0", "white"))
    shade = Patch(color=GREY, alpha=0.15, label="shaded: better")
    figure.legend(handles=[*handles, shade], loc="outside upper center", ncols=len(handles) + 1)
    return figure


def _dot(colour: str, label: str, face: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, label=label, linestyle="none", marker="o", markerfacecolor=face or colour)


def _panel(ax: Axes, cells: pd.DataFrame, metric: str, names: list[str], methods: list[str]) -> None:
    heading, factor, _, sign = METRICS[metric]
    found = {key: factor * one[f"change_{metric}"].dropna() for key, one in cells.groupby(["method", "regulariser"])}
    reach = np.array([abs(values.mean()) + _spread(values) for values in found.values()])
    limit = 1.1 * min(reach.max(), FAR * np.quantile(reach, 0.75)) or 1.0
    ax.axvspan(0, sign * limit, color=GREY, alpha=0.07, linewidth=0)  # for the better
    ax.axvline(0, color=GREY, linewidth=0.8)
    for place, method in enumerate(methods):
        shift = 0.4 * (place - (len(methods) - 1) / 2) / max(1, len(methods) - 1)
        for height, name in enumerate(names):
            values = found.get((method, name))
            if values is None or not len(values):
                continue
            mean, y, colour = values.mean(), height - shift, COLOURS[place % len(COLOURS)]
            if abs(mean) > limit:
                ax.plot(np.sign(mean) * 0.97 * limit, y, ">" if mean > 0 else "<", color=colour, markersize=5)
                side = "right" if mean > 0 else "left"
                text = f"{mean:+.2g} " if mean > 0 else f" {mean:+.2g}"
                ax.text(np.sign(mean) * 0.94 * limit, y, text, ha=side, va="center", color=colour, fontsize=7)
                continue
            face = colour if beyond_noise(values) else "white"
            ax.errorbar(mean, y, xerr=_spread(values), fmt="o", color=colour, markerfacecolor=face, markersize=4.5,
                        elinewidth=1.1)  # fmt: skip
    ax.set(
        xlim=(-limit, limit), ylim=(-0.6, len(names) - 0.4), xlabel=f"change in {heading.replace(', %', ', points')}"
    )
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    ax.grid(axis="y", color=GREY, alpha=0.15)


def _spread(values: pd.Series) -> float:
    return float(values.std()) if len(values) > 1 else 0.0
