"""The page of a compact network: structure, cost, quality."""

import base64
import json
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from pyro_isingvit.core.checkpoint import write_text
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.pruning.shapes import CONFIG
from pyro_isingvit.report import pruning_figures, style
from pyro_isingvit.runs.folder import METRICS

PAGE, FRONTIER, BRANCHES = "index.html", "frontier.json", "branches.json"
CAPTIONS = {
    "structure": (
        "What is left, block by block",
        "Left, the attention heads: filled where value channels (dark) and query-key channels (light) are left; an "
        "empty head is gone, one without query-key channels averages over the patches. Right, the hidden units of the "
        "MLP. A block whose halves are both empty costs nothing.",
    ),
    "frontier": (
        "Frontier",
        "Networks of one run cut further and further, by retention threshold, then by share. Size is relative to the "
        "dense network; times are medians on this machine. Accuracy, NLL and ECE are of the validation part, without "
        "fine-tuning. Dashed: the full posterior. Dotted: the dropped units are only dropped, not refitted into "
        "those that are left. The red line is the network that was taken.",
    ),
}


def is_compact(folder: Path) -> bool:
    """Whether the folder holds a compact network, not a run."""
    return (folder / CONFIG).is_file()


def read(path: Path) -> dict[str, Any]:
    """A JSON file of the folder.

    Raises:
        UserError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({why(error)}); prune the run again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; prune the run again.")
    return value


def write_pruning_report(folder: Path) -> Path:
    """Writes ``report/index.html`` and the figures as PNG into the folder of a compact network.

    Args:
        folder: where the compact network was saved.

    Returns:
        the page.

    Raises:
        UserError: files are missing or damaged.
    """
    metered = (folder / METRICS).is_file() and not (folder / BRANCHES).is_file()
    need(
        not is_compact(folder) or metered or (folder / FRONTIER).is_file(),
        f"{folder} holds a compact network without a report: a report shows how a run was cut by its masks, "
        "which the script for pruning measures; networks saved from Python, those that lost whole branches "
        "(branches.json) and the part bayes/ have none.",
    )
    metrics, found = read(folder / METRICS), read(folder / FRONTIER)
    try:
        figures = {"structure": partial(pruning_figures.kept_structure, found["structure"])}
        if found["points"]:
            figures["frontier"] = partial(
                pruning_figures.frontier, found["points"], found["full"], found["chosen"], found["dense"]
            )
        sections = [_section(folder / "report", name, draw) for name, draw in figures.items()]
        tables = [("Test part", ("", "accuracy", "NLL, nats", "Brier", "ECE"), _scores(metrics)),
                  ("Cost", ("", "compact", "dense", "ratio"), _costs(metrics)), _bytes(metrics),
                  ("Frontier, validation part", HEADINGS, [_row(point) for point in found["points"]])]  # fmt: skip
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
            lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        page = environment.get_template("pruning_report.html.j2").render(
            metrics=metrics, sections=sections, tables=tables, folder=folder.resolve().name
        )
    except UserError:
        raise
    except (
        KeyError,
        TypeError,
        IndexError,
        ValueError,
        AttributeError,
        ZeroDivisionError,
        jinja2.UndefinedError,
    ) as error:
        raise UserError(f"{folder / FRONTIER} or {METRICS} lacks what the page shows ({why(error)}).") from error
    write_text(folder / "report" / PAGE, page)
    return folder / "report" / PAGE


def _section(target: Path, name: str, draw: Any) -> dict[str, Any]:
    images = {}
    for layout in ("wide", "narrow"):
        figure = draw(narrow=layout == "narrow")
        images[layout] = "data:image/svg+xml;base64," + base64.b64encode(style.to_svg(figure).encode()).decode()
        if layout == "wide":
            style.save_png(figure, target / f"{name}.png")
    title, caption = CAPTIONS[name]
    return {"name": name, "title": title, "caption": caption, "images": images}


def _scores(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    draws = f"{metrics['samples']} draws"
    titles = {"": "compact", "bayes_": f"compact, {draws}", "dense_": "dense, posterior mean", "full_": f"full posterior, {draws}"}  # noqa: E501  # fmt: skip
    rows = {title: {key: metrics[prefix + key] for key in KEYS} for prefix, title in titles.items()}
    rows |= metrics.get("peers", {})
    return [(title, *(f"{row[key]:.4f}" if key in row else "-" for key in KEYS)) for title, row in rows.items()]


KEYS = ("accuracy", "nll", "brier", "ece")
HEADINGS = ("retention ≥", "kept", "parameters", "MACs", "ms at 1", "ms at 256", "accuracy", "NLL", "ECE")


def _costs(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("parameters", f"{metrics['parameters']:,}", f"{metrics['dense_parameters']:,}",
             f"{metrics['dense_parameters'] / metrics['parameters']:.2f}"),
            ("multiply-accumulates", f"{metrics['macs']:,}", f"{metrics['dense_macs']:,}",
             f"{metrics['macs_ratio']:.2f}")]  # fmt: skip
    for batch in (1, 256):
        ours, dense = metrics[f"latency_{batch}"], metrics[f"dense_latency_{batch}"]
        rows.append((f"ms at batch {batch}", f"{1e3 * ours:.2f}", f"{1e3 * dense:.2f}", f"{dense / ours:.2f}"))
    return rows


def _bytes(metrics: dict[str, Any]) -> tuple[str, tuple[str, str], list[tuple[str, ...]]]:
    titles = {
        "memory_bytes": "in memory", "csr_bytes": "in memory, matrices as sparse rows where that is smaller",
        "dense_memory_bytes": "in memory, dense network", "bytes_safetensors": "safetensors",
        "bytes_bayes": "safetensors, form bayes", "bytes_onnx": "ONNX", "bytes_torch": "torch.export",
    }  # fmt: skip
    return "Bytes", ("", "bytes"), [(title, f"{metrics[k]:,}") for k, title in titles.items() if k in metrics]


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{point['threshold']:.3f}", f"{100 * point['kept']:.1f} %", f"{point['parameters']:,}", f"{point['macs']:,}",
        f"{1e3 * point['latency_1']:.2f}", f"{1e3 * point['latency_256']:.1f}",
        *(f"{point[key]:.4f}" for key in ("accuracy", "nll", "ece")),
    )  # fmt: skip
