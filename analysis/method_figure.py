"""Draw the method in one picture: what sets a mask, what draws say, what the masks leave.

python -m analysis.method_figure --out docs/method.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.cli import run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 13.2, 4.7  # inches
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#C9CDD2", "#1d1d1f"
KEPT = [
    [1, 1, 0, 1, 1],
    [0, 1, 1, 0, 1],
    [1, 0, 1, 1, 0],
    [0, 0, 0, 0, 0],
    [1, 1, 1, 0, 1],
]  # of one matrix, row by row
CLASSES = {"cat": (0.62, 0.90), "dog": (0.06, 0.31), "owl": (0.01, 0.08)}  # of an example: 90% credible intervals


@dataclass(frozen=True)
class Arguments:
    """Where to draw."""

    out: Path
    """PNG file."""


def method_figure() -> "Figure":
    """The picture: weights and masks, what sets a mask, what draws say, what is left."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, HEIGHT), width_ratios=[1.0, 1.25, 1.0, 1.0])
    for number, (ax, panel) in enumerate(zip(axes, (_weights, _field, _draws, _smaller), strict=True), 1):
        ax.set(xlim=(0, 10), ylim=(0, 13))
        ax.axis("off")
        title, note = panel(ax)
        ax.text(0, 12.6, f"{number}  {title}", fontsize=13.5, fontweight="bold", color=INK, va="top")
        ax.text(0, 1.75, note, fontsize=11, color="#3d3d40", va="top", linespacing=1.45)
    figure.subplots_adjust(0.012, 0.02, 0.99, 0.98, 0.16)
    return figure


def _weights(ax: "Axes") -> tuple[str, str]:
    _matrix(ax, 1.2, 3.6, 1.15)
    return "A mask per weight", "blue: kept, from the wide slab\ngrey: dropped, from the spike at 0"


def _matrix(ax: "Axes", left: float, low: float, side: float) -> None:
    from matplotlib.patches import Rectangle

    for i, row in enumerate(KEPT):
        for j, kept in enumerate(row):
            strength = 0.35 + 0.65 * ((3 * i + 5 * j) % 7) / 6
            colour: Any = BLUE if kept else GREY
            place = (left + 1.3 * side * j, low + 1.3 * side * (len(KEPT) - 1 - i))
            ax.add_patch(Rectangle(place, side, side, color=colour, alpha=strength if kept else 0.55, lw=0))


def _field(ax: "Axes") -> tuple[str, str]:
    _box(ax, 5.0, 6.6, "mask on?", INK, 3.4, 1.5, bold=True)
    _box(ax, 2.1, 10.4, "the data would\nmiss the weight", ORANGE, 4.2, 1.7)
    _box(ax, 7.9, 10.4, "later layers read\nwhat it writes", GREEN, 4.2, 1.7)
    _box(ax, 5.0, 3.2, "it costs too much\nto describe", "#7a7f87", 4.4, 1.7)
    _arrow(ax, (2.6, 9.5), (4.2, 7.5), ORANGE)
    _arrow(ax, (7.4, 9.5), (5.8, 7.5), GREEN)
    _arrow(ax, (5.0, 4.1), (5.0, 5.8), "#7a7f87")
    for x, y, sign, colour in (
        (2.75, 8.4, "+", ORANGE),
        (7.25, 8.4, "+", GREEN),
        (5.7, 4.95, "\N{MINUS SIGN}", "#7a7f87"),
    ):
        ax.text(x, y, sign, fontsize=17, fontweight="bold", color=colour, ha="center", va="center")
    return "What turns a mask on", "curvature of the likelihood, Ising\ncoupling from layer to layer, KL"


def _box(
    ax: "Axes", x: float, y: float, text: str, colour: str, width: float, height: float, bold: bool = False
) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0.12,rounding_size=0.35"
    place = (x - width / 2, y - height / 2)
    box = FancyBboxPatch(place, width, height, boxstyle=style, fc="white", ec=colour, lw=1.8, clip_on=False)
    ax.add_patch(box)
    weight = "bold" if bold else "normal"
    ax.text(x, y, text, fontsize=11, color=INK, ha="center", va="center", linespacing=1.3, fontweight=weight)


def _arrow(ax: "Axes", start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "mutation_scale": 16})


def _draws(ax: "Axes") -> tuple[str, str]:
    left, width = 2.4, 7.2
    for row, (name, (low, high)) in enumerate(CLASSES.items()):
        y = 9.6 - 2.1 * row
        ax.plot([left, left + width], [y, y], color="#e6e6e6", lw=9, solid_capstyle="butt", zorder=1)
        ax.plot([left + width * low, left + width * high], [y, y], color=BLUE, lw=9, solid_capstyle="butt", zorder=2)
        ax.plot(left + width * (low + high) / 2, y, "o", color="white", mec=BLUE, mew=1.8, ms=9, zorder=3)
        ax.text(left - 0.4, y, name, fontsize=12, ha="right", va="center", color=INK)
    for share in (0, 0.5, 1):
        ax.text(left + width * share, 4.1, f"{share:g}", fontsize=11, ha="center", va="center", color="#3d3d40")
    ax.text(left + width / 2, 3.0, "probability", fontsize=11, ha="center", va="center", color="#3d3d40")
    return "Draws give intervals", "each draw of masks and weights is\na network: mean and 90% interval"


def _smaller(ax: "Axes") -> tuple[str, str]:
    full, left = (6, 6, 6), {0: {0, 1, 2, 4, 5}, 1: {1, 4}, 2: {0, 2, 3, 5}}
    places = {
        (layer, unit): (1.2 + 3.8 * layer, 10.1 - 1.28 * unit) for layer in range(3) for unit in range(full[layer])
    }
    for (layer, unit), (x, y) in places.items():
        for other in range(full[0]):
            if layer < 2 and unit in left[layer] and other in left[layer + 1]:
                ax.plot([x, places[layer + 1, other][0]], [y, places[layer + 1, other][1]], color=BLUE, lw=1, alpha=0.5)
    for (layer, unit), (x, y) in places.items():
        on = unit in left[layer]
        ax.plot(x, y, "o", ms=13, color=BLUE if on else "white", mec=BLUE if on else GREY, mew=1.6, zorder=3)
    return "Masks cut it smaller", "units, heads and channels that are\nmostly off are removed for good"


def write(arguments: Arguments) -> None:
    """Draw the method as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from pyro_isingvit.report.style import save_png

    save_png(method_figure(), arguments.out)
    print(f"figure: {arguments.out}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(write, Arguments, argv)


if __name__ == "__main__":
    main()
