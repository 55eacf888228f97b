"""Figures of attention, one function each: plain arrays in, a matplotlib ``Figure`` out.

Every function takes ``narrow``: the same content, laid out for a phone.

Shapes: B images, L layers, T tokens.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from pyro_isingvit.nets.shape import patch_grid
from pyro_isingvit.report.figures import show_image
from pyro_isingvit.report.style import BLUE, NARROW, ORANGE, RED, WIDE, styled


@styled
def attention_margins(
    margins: np.ndarray,
    pixels: np.ndarray,
    names: np.ndarray,
    patch: int,
    shown: int = 6,
    narrow: bool = False,
    stride: int | None = None,
    cls: bool = True,
) -> Figure:
    """Distribution of the attention margins in each layer, and the images with the smallest, patch outlined.

    Args:
        margins: (B, L, T), positive.
        pixels: (B, channels, height, width) uint8, 1 or 3 channels.
        names: (B,) numbers of the images.
        patch: side of a patch, in pixels; tokens before those of the patches are CLS and registers.
        shown: images.
        narrow: lay out for a phone.
        stride: from one patch to the next, in pixels; None: ``patch``.
        cls: the first token is the CLS token.
    """
    least = margins.min((1, 2))
    chosen = np.argsort(least, kind="stable")[:shown]
    columns = 2 if narrow else 3
    rows = math.ceil(len(chosen) / columns)
    heights = max(1.5, 0.62 * margins.shape[1]) + 0.8, 1.75 * rows + 0.3
    size = (NARROW, sum(heights)) if narrow else (WIDE, max(heights))
    figure = Figure(size, layout="constrained")
    if narrow:
        parts = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    else:
        parts = figure.subfigures(1, 2, width_ratios=[1.15, 1], wspace=0.03, squeeze=False)[0]
    _histograms(parts[0], margins)
    parts[1].suptitle(f"smallest margins: {len(chosen)} of {len(margins)} images", fontsize=10.5, weight="bold")
    grid = parts[1].subplots(rows, columns, squeeze=False)
    for place, ax in enumerate(grid.flat):
        if place >= len(chosen):
            ax.set_axis_off()
            continue
        image = chosen[place]
        layer, token = np.unravel_index(margins[image].argmin(), margins[image].shape)
        show_image(ax, pixels[image])
        where = _outline(ax, int(token), margins.shape[2], pixels.shape[2:], patch, stride or patch, cls)
        ax.set_title(f"image {names[image]}: {least[image]:.2g}\nlayer {layer}, {where}", fontsize=8.5, pad=3)
    return figure


def _histograms(figure: SubFigure, margins: np.ndarray) -> None:
    """One row for each layer, logarithmic margins, share of the layer's tokens."""
    logs = np.log10(np.maximum(margins, 1e-12))
    low, high = logs.min(), max(logs.max(), logs.min() + 0.1)
    edges = np.linspace(low - 0.02 * (high - low), high + 0.02 * (high - low), 51)
    axes = figure.subplots(margins.shape[1], 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle("all tokens, by layer", fontsize=10.5, weight="bold")
    for layer, ax in enumerate(axes):
        values = logs[:, layer].ravel()
        count, _ = np.histogram(values, edges)
        median = float(np.median(values))
        ax.stairs(count / count.max(), 10**edges, fill=True, color=BLUE)
        ax.axvline(10**median, color=ORANGE, linestyle=":", linewidth=1.6)
        ax.axvline(10 ** float(values.min()), color=RED, linestyle="--", linewidth=1)
        ax.set(xscale="log", xlim=(10 ** edges[0], 10 ** edges[-1]), ylim=(0, 1.1), yticks=[])
        ax.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
        ax.set_title(
            f"median {10**median:.2g}, smallest {10 ** float(values.min()):.2g}", fontsize=8, loc="right", pad=2
        )
        ax.spines["left"].set_visible(False)
    axes[-1].set_xlabel("margin |det(I − ΣA)|, least of the heads")


def _outline(ax: Axes, token: int, tokens: int, size: tuple[int, ...], patch: int, stride: int, cls: bool) -> str:
    """Outlines the token's patch; returns what the token is called."""
    height, width = size
    grid, _ = patch_grid(height, width, patch, stride)
    number = token - (tokens - grid[0] * grid[1])
    if number < 0:
        ax.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, color=RED, linewidth=2, linestyle="--"))
        return "CLS token" if cls and token == 0 else f"register {token - cls}"
    top, left = stride * (number // grid[1]), stride * (number % grid[1])
    box = (min(patch, width - left), min(patch, height - top))
    ax.add_patch(Rectangle((left - 0.5, top - 0.5), *box, fill=False, color=RED, linewidth=2, clip_on=False))
    return f"patch {number}"
