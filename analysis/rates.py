"""Table and figure of the learning rates that inference.rates tried.

python -m analysis.rates --results analysis/results/rates
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from inference.cli import run_script
from inference.rates import RESULTS, best_rate, read_records
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE = "rates.png"
VARIED = ("method", "rule", "width", "depth", "rate", "seed")  # settings that a figure compares, or averages
Curve = dict[float, dict[str, float]]  # rate -> scores
Curves = dict[tuple[str, str, int, int], Curve]  # method, rule, width, depth


@dataclass(frozen=True)
class Arguments:
    """Which records to show."""

    results: Path
    """Folder with the rates.json of inference.rates; the figure goes there too."""


def curves(records: list[dict[str, Any]]) -> Curves:
    """The records by network, and for each by ascending rate; the NLL is the mean over seeds.

    Raises:
        UserError: records of different data or trainings, which one figure cannot compare.
    """
    shared = [{name: value for name, value in record["settings"].items() if name not in VARIED} for record in records]
    differ = sorted({name for one in shared for name in one | shared[0] if one.get(name) != shared[0].get(name)})
    need(not differ, f"the records differ in {', '.join(differ)}; name a folder of its own (`out`) for each.")
    each: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record["settings"]["rate"]):
        told = record["settings"]
        each[told["method"], told["rule"], told["width"], told["depth"]][told["rate"]].append(record["nll"])
    return {key: {rate: {"nll": mean(values)} for rate, values in found.items()} for key, found in sorted(each.items())}


def best_of(curve: Curve) -> float:
    """The best rate of a network."""
    return best_rate([*curve], [record["nll"] for record in curve.values()])


def table(found: Curves) -> str:
    """NLL at every rate, and the best rate, in Markdown."""
    rates = sorted({rate for curve in found.values() for rate in curve})
    lines = [["method", "`rate_rule`", "width", "depth", *(f"{rate:g}" for rate in rates), "best rate"]]
    lines.append(["---"] * len(lines[0]))
    for (method, rule, width, depth), curve in found.items():
        lowest = min(record["nll"] for record in curve.values())
        cells = [f"{curve[rate]['nll']:.3f}" if rate in curve else "" for rate in rates]
        marked = [f"**{cell}**" if cell == f"{lowest:.3f}" else cell for cell in cells]
        lines.append([f"`{method}`", rule, str(width), str(depth), *marked, f"{best_of(curve):.2g}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(found: Curves) -> "Figure":
    """NLL against the rate: a row for each method, a line for each network."""
    import matplotlib
    from matplotlib.figure import Figure

    from pyro_isingvit.report.style import WIDE, styled

    @styled
    def draw() -> Figure:
        methods = sorted({key[0] for key in found})
        shallow, narrow = min(key[3] for key in found), min(key[2] for key in found)
        panels = {
            "one rate for all matrices: widths": ("uniform", 2, 3, shallow, "width {}"),
            "rates that transfer: widths": ("transfer", 2, 3, shallow, "width {}"),
            "rates that transfer: depths": ("transfer", 3, 2, narrow, "{} blocks"),
        }
        made = Figure((WIDE, 0.4 + 2.5 * len(methods)), layout="constrained")
        axes = made.subplots(len(methods), len(panels), squeeze=False, sharex=True, sharey="row")
        for row, method in zip(axes, methods, strict=True):
            for ax, (title, (rule, varied, fixed, value, name)) in zip(row, panels.items(), strict=True):
                keys = [key for key in found if key[:2] == (method, rule) and key[fixed] == value]
                colours = matplotlib.colormaps["cividis"].resampled(max(2, len(keys)))
                for i, key in enumerate(keys):
                    curve = found[key]
                    ax.plot([*curve], [r["nll"] for r in curve.values()], "o-", ms=3.5, color=colours(i),
                            label=name.format(key[varied]))  # fmt: skip
                    ax.axvline(best_of(curve), color=colours(i), lw=1, ls=":")
                ax.set_xscale("log", base=2)
                ax.set_title(f"{method}, {title}", loc="left")
                if keys:
                    ax.legend()
            row[0].set_ylabel("NLL of validation images")
        rates = sorted({rate for curve in found.values() for rate in curve})
        for ax in axes[-1]:
            ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
            ax.set_xlabel("learning rate")
        return made

    return draw()


def show(arguments: Arguments) -> None:
    """Write the figure of a search for learning rates, and print its table."""
    from pyro_isingvit.core.errors import need
    from pyro_isingvit.report.style import save_png

    found = curves(read_records(arguments.results / RESULTS))
    need(found, f"{arguments.results / RESULTS} has no records; run inference.rates first.")
    save_png(figure(found), arguments.results / FIGURE)
    print(f"{table(found)}\n\nfigure: {arguments.results / FIGURE}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(show, Arguments, argv)


if __name__ == "__main__":
    main()
