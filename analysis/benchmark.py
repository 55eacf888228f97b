"""Draw a benchmark and write its tables.

python -m analysis.benchmark --results runs/benchmark

Reads benchmark.json (inference.benchmark). Writes scaling.png, steps.png, memory.png and benchmark.md to its folder.
docs/speed.md says how to read them.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.cli import run_script
from pyro_isingvit.core.errors import UserError, need

RESULTS, TABLE = "benchmark.json", "benchmark.md"
KEYS = ("step_ratio_eager", "step_ratio_pyro_engine", "predictive_ratio", "mask_update_share", "repeats_s", "settings",
        "machine", "weights", "input")  # fmt: skip


@dataclass(frozen=True)
class BenchmarkFigures:
    """Which benchmark."""

    results: Path
    """Folder with benchmark.json."""


def read(folder: Path) -> dict[str, Any]:
    """What the folder's benchmark.json holds.

    Raises:
        UserError: the file is missing, damaged, or not a benchmark.
    """
    path = folder / RESULTS
    need(path.is_file(), f"there is no {path}; run: python -m inference.benchmark --out {folder}")
    try:
        result = json.loads(path.read_text())
        missing = [key for key in KEYS if key not in result]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the benchmark again.") from error
    need(not missing, f"{path} is no benchmark: {', '.join(missing)} missing; run inference.benchmark again.")
    return result


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of the measurements, by file name."""
    from analysis import benchmark_figures as draw

    found = {"steps.png": draw.steps(result["repeats_s"])}
    if result.get("curves"):
        found["scaling.png"] = draw.scaling(result["curves"])
    if result.get("memory"):
        found["memory.png"] = draw.memory(result["memory"])
    return found


def spread(taken: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    if len(taken) < 2:
        return f"{1e3 * taken[0]:.1f}"
    low, _, high = statistics.quantiles(taken, n=4)
    return f"{1e3 * statistics.median(taken):.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"


def table(result: dict[str, Any]) -> str:
    """Everything as Markdown."""
    settings, machine, repeats = result["settings"], result["machine"], result["repeats_s"]
    vit = settings["vit"]
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    lines = [
        f"{machine['processor']}, {machine['threads']} threads{gpu}, torch {machine['torch']}; preset "
        f"{settings['preset']} (width {vit['width']}, depth {vit['depth']}, {result['weights']:,} masked weights), "
        f"batch {settings['batch_size']}.", "",
        "| | ms: median (quartiles) | ratio to plain |", "|---|---|---|",
    ]  # fmt: skip
    rows = [
        ("plain step", "plain_step", None), ("our step, mask updates included", "ising_step", "step_ratio_eager"),
        ("the same without the default regulariser", "ising_step_unregularised", "step_ratio_unregularised"),
        ("our step alone", "ising_step_alone", None),
        ("with mask updates, through Pyro's handlers", "pyro_engine_step", "step_ratio_pyro_engine"),
        ("plain step, torch.compile", "plain_step_compiled", None),
        ("our step, torch.compile", "ising_step_compiled", "step_ratio_compiled"),
        ("mask update alone", "mask_update", None),
        (f"{settings['draws']} plain passes, {settings['images']} images", "plain_draws", None),
        (f"{settings['draws']} posterior draws of them", "ising_draws", "predictive_ratio"),
    ]  # fmt: skip
    for label, name, ratio in rows:
        if name in repeats:
            lines.append(f"| {label} | {spread(repeats[name])} | {f'{result[ratio]:.3f}' if ratio else ''} |")
    lines += ["", f"Mask update, share of a step: {result['mask_update_share']:.3f}. "
              f"Epoch on real batches over one on a fixed batch: {result['input']['ratio']:.3f}."]  # fmt: skip
    if result.get("variants"):
        lines += ["", "| masks on | saliency | step / plain step | mask update, share |", "|---|---|---|---|"]
        lines += [f"| {row['granularity']} | {row['saliency']} | {row['step_ratio']:.2f} | "
                  f"{row['mask_update_share']:.3f} |" for row in result["variants"]]  # fmt: skip
    if result.get("memory"):
        memory = result["memory"]
        lines += ["", f"Peak memory added by {memory['images']} images, MB:", "",
                  "| draws | chunk | added | of it the result |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {row['samples']} | {row['chunk']} | {row['growth_mb']:.0f} | {row['result_mb']:.0f} |"
                  for row in memory["predictive"]]  # fmt: skip
        lines += ["", f"Ten training steps add {memory['plain_step']['growth_mb']:.0f} MB (plain), "
                  f"{memory['ising_step']['growth_mb']:.0f} MB (ours, masks and curvature included)."]  # fmt: skip
    if result.get("peers"):
        lines += ["", "| epoch of | over ours |", "|---|---|"]
        for name, ratio in result["peers"]["epoch_ratio"].items():
            lines.append(f"| {name} | {'not installed' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines) + "\n"


def make(arguments: BenchmarkFigures) -> None:
    """Draw the results of a benchmark and write them as tables."""
    from pyro_isingvit.core.checkpoint import write_text
    from pyro_isingvit.report.style import save_png

    result = read(arguments.results)
    for name, figure in figures(result).items():
        save_png(figure, arguments.results / name)
        print(arguments.results / name)
    write_text(arguments.results / TABLE, table(result))
    print(arguments.results / TABLE)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(make, BenchmarkFigures, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
