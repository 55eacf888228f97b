"""Figures of decisions: what is gained where images are handed to a human, and how large prediction sets are."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from pyro_isingvit.report.style import BLUE, GREY, HALF, NARROW, ORANGE, RED, percent, styled

MARKERS = ("o", "s", "^", "D")
LARGEST = 5  # sets of more classes share a bar


@styled
def risk_against_coverage(
    coverage: np.ndarray, risk: np.ndarray, limits: Sequence[tuple[float, float, float]], narrow: bool = False
) -> Figure:
    """Error rate among the predictions that stand, against their share; the area under it is AURC.

    Args:
        coverage: (B,) share of the images that are answered, most confident first.
        risk: (B,) error rate among them.
        limits: limit on the error rate; share of the test images that its threshold accepts; their error rate.
        narrow: lay out for a phone.
    """
    figure = Figure((NARROW, 3.6) if narrow else (HALF, 4.4), layout="constrained")
    ax = figure.subplots()
    ax.fill_between(coverage, risk, color=BLUE, alpha=0.12, linewidth=0)
    label, clipped = f"by confidence, area {risk.mean():.4f}", bool(risk.any())  # without errors, it lies on the axis
    ax.plot(coverage, risk, color=BLUE, linewidth=1.6, clip_on=clipped, zorder=3, label=label)
    ax.axhline(risk[-1], color=GREY, linestyle=":", linewidth=1.2, label="chosen at random")
    for (limit, share, wrong), marker in zip(limits, MARKERS, strict=False):
        ax.plot(
            share, wrong, marker, color=RED, markersize=6.5, clip_on=False,
            label=f"limit {limit:.1%}: {share:.0%} stand, {wrong:.1%} wrong",
        )  # fmt: skip
    top = max(float(risk[len(risk) // 20 :].max()), float(risk[-1]), *(wrong for *_, wrong in limits), 0.01)
    ax.set(xlabel="share of the images that are not handed to a human", ylabel="error rate among them",
           xlim=(0, 1), ylim=(0, 1.15 * top))  # fmt: skip
    percent(ax.xaxis)
    percent(ax.yaxis)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


@styled
def set_sizes(sizes: Mapping[float, np.ndarray], narrow: bool = False) -> Figure:
    """Share of the images by the number of classes in their prediction set.

    Args:
        sizes: coverage that the sets were made for -> (B,) number of classes.
        narrow: lay out for a phone.
    """
    figure = Figure((NARROW, 3.2) if narrow else (HALF, 4.4), layout="constrained")
    ax = figure.subplots()
    largest = min(LARGEST, max(2, *(int(each.max()) for each in sizes.values())))
    width = 0.8 / len(sizes)
    for place, ((coverage, each), colour) in enumerate(zip(sizes.items(), (BLUE, ORANGE, GREY), strict=False)):
        share = np.bincount(np.minimum(each, largest), minlength=largest + 1)[1:] / len(each)
        at = np.arange(1, largest + 1) + (place - (len(sizes) - 1) / 2) * width
        bars = ax.bar(
            at, share, width, color=colour, label=f"coverage {coverage:.0%}, {each.mean():.2f} classes on average"
        )
        ax.bar_label(bars, [f"{100 * value:.3g}" if value else "" for value in share], fontsize=8, padding=2)
    more = largest == LARGEST and any(int(each.max()) > LARGEST for each in sizes.values())
    names = [str(size) for size in range(1, largest + 1)]
    ax.set_xticks(range(1, largest + 1), [*names[:-1], f"{LARGEST} or more"] if more else names)
    ax.set(xlabel="classes in the set", ylabel="share of the test images", ylim=(0, 1.1))
    percent(ax.yaxis)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure
