"""Figures of a benchmark."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pyro_isingvit.report.style import BLUE, GREY, ORANGE, SKY, WIDE, styled

NAMES = {
    "plain_step": "plain", "ising_step": "ours", "ising_step_unregularised": "ours, no regulariser",
    "pyro_engine_step": "ours, Pyro's handlers",
    "plain_step_compiled": "plain, compiled", "ising_step_compiled": "ours, compiled",
}  # fmt: skip
AXES = {"width": "width D", "depth": "depth L", "batch": "batch size B", "draws": "posterior draws S"}


@styled
def steps(repeats: Mapping[str, list[float]]) -> Figure:
    """Milliseconds of every repeat of a training step, one row per case; the bar is the median."""
    names = [name for name in NAMES if name in repeats]
    figure = Figure((WIDE, 0.9 + 0.5 * len(names)), layout="constrained")
    ax = figure.subplots()
    for row, name in enumerate(reversed(names)):
        taken = 1e3 * np.array(repeats[name])
        colour = GREY if name.startswith("plain") else BLUE
        ax.barh(row, np.median(taken), color=colour, alpha=0.35, height=0.6)
        ax.scatter(taken, np.full(len(taken), row), s=10, color=colour, zorder=3)
        ax.annotate(f"{np.median(taken):.1f}", (np.median(taken), row), xytext=(4, 9), textcoords="offset points")
    ax.set_yticks(range(len(names)), [NAMES[name] for name in reversed(names)])
    ax.set(xlabel="milliseconds of a training step, mask updates included", xlim=(0, None))
    return figure


@styled
def scaling(curves: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """Ratio to the plain network over width, depth, batch size and draws; thin lines: quartiles of the repeats."""
    figure = Figure((WIDE, 3.1), layout="constrained")
    panels = [name for name in AXES if curves.get(name)]
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, panels, strict=True):
        rows = curves[name]
        key = "predictive_ratio" if name == "draws" else "step_ratio"
        x, y = [row[name] for row in rows], [row[key] for row in rows]
        ax.plot(x, y, "o-", color=BLUE, markersize=4)
        for row in rows:  # the ratio within each turn: both had the same load
            ising, plain = (np.array(row["repeats_s"][case]) for case in ("ising", "plain"))
            turns = ising / plain + (row[key] - np.median(ising / plain))
            ax.plot([row[name]] * 2, np.quantile(turns, [0.25, 0.75]), color=SKY, linewidth=3, alpha=0.7, zorder=0)
        ax.axhline(1, color=GREY, linestyle="--", linewidth=1)
        ax.set(xlabel=AXES[name], xscale="log", xticks=x, xticklabels=[str(value) for value in x])
        ax.minorticks_off()
        ax.set_title("time of S draws / S passes" if name == "draws" else "time of a step / plain step", loc="left")
    axes[0].set_ylim(0, None)
    return figure


@styled
def memory(measured: Mapping[str, Any]) -> Figure:
    """Peak memory that posterior draws add, against the chunk; the hatched part is the result itself."""
    figure = Figure((0.6 * WIDE, 3.2), layout="constrained")
    ax, rows = figure.subplots(), measured["predictive"]
    chunks, counts = sorted({row["chunk"] for row in rows}), sorted({row["samples"] for row in rows})
    for i, samples in enumerate(counts):
        chosen = {row["chunk"]: row for row in rows if row["samples"] == samples}
        at = np.arange(len(chunks)) + 0.38 * (i - 0.5 * (len(counts) - 1))
        added = [chosen[chunk]["growth_mb"] for chunk in chunks]
        bars = ax.bar(at, added, 0.36, color=(SKY, ORANGE)[i % 2], label=f"{samples} draws")
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
        result = [min(chosen[chunk]["result_mb"], chosen[chunk]["growth_mb"]) for chunk in chunks]
        ax.bar(at, result, 0.36, fill=False, hatch="///", edgecolor=GREY, label="the result itself" if i == 0 else None)
    ax.set_xticks(range(len(chunks)), [f"{chunk:,}" for chunk in chunks])
    ax.set(xlabel="chunk: (draw, image) pairs at a time", ylabel="peak memory added (MB)")
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == "the result itself")
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside upper center", ncols=3)
    return figure
