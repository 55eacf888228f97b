"""The figure of analysis.decisions: calibration under made prevalences, and coverage over splits."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pyro_isingvit.report.style import BLUE, GREEN, GREY, ORANGE, WIDE, percent, styled

WAYS = {
    "before": ("as predicted", GREY),
    "given": ("true prevalence given", BLUE),
    "estimated": ("prevalence estimated", ORANGE),
}


@styled
def decisions_figure(shifted: dict[str, dict[str, float]], kept: dict[str, Any]) -> Figure:
    """Accuracy and ECE by strength of the shift, and how often the sets held the true class.

    Args:
        shifted: strength of the shift -> scores, ``accuracy_before``, ``ece_given``, ...
        kept: ``sets``: kind of sets -> ``asked`` and the coverage of ``every`` split.
    """
    figure = Figure((WIDE, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, metric, title in zip(axes, ("accuracy", "ece"), ("accuracy", "ECE, 15 bins"), strict=False):
        for place, (way, (name, colour)) in enumerate(WAYS.items()):
            values = [scores[f"{metric}_{way}"] for scores in shifted.values()]
            ax.bar(np.arange(len(values)) + (place - 1) * 0.27, values, 0.27, color=colour, label=name)
        ax.set_xticks(range(len(shifted)), list(shifted))
        ax.set(xlabel="shift of the classes' shares", ylabel=title)
        percent(ax.yaxis)
    axes[0].set_ylim(0, 1)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    ax = axes[2]
    for (name, row), colour in zip(kept["sets"].items(), (BLUE, GREEN), strict=False):
        ax.hist(row["every"], bins=20, color=colour, alpha=0.5, label=f"{name}, mean {row['mean']:.1%}")
        ax.axvline(row["asked"], color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="share of the sets that hold the true class", ylabel="splits")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    percent(ax.xaxis)
    return figure
