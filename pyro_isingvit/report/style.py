"""Style and formats of all figures: SVG for the page, PNG for the folder.

Colours are Okabe and Ito's, which readers with any colour vision tell apart; colour maps are cividis and Blues.
"""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter

from pyro_isingvit.core.checkpoint import write_atomically

BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#595959"
WIDE, HALF, NARROW = 11.0, 5.4, 4.0  # inches: the page, half of it, a phone
READABLE_CLASSES = 20  # more than this: no counts in the cells, not every class named
STYLE: Any = {
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
    """The figure as SVG, the same text each time; its layout, the slow part, is computed once."""
    buffer = io.StringIO()
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
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


def naming_step(classes: int) -> int:
    """An axis has room for the name of every class, or of one in this many."""
    return math.ceil(classes / READABLE_CLASSES)


def percent(axis: Any) -> None:
    """Writes the axis in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
