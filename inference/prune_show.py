"""What inference.prune prints: networks that could be taken, and the cost and quality of the one that was."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.cli import print_table, show_results

WIDE = 100  # columns

if TYPE_CHECKING:
    from pyro_isingvit.pruning.frontier import Point


def print_frontier(points: "list[Point]", full: dict[str, float]) -> None:
    """Networks of falling size on the validation part, and the full posterior."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="frontier, validation part; ms at batch 1 and 256", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    merged = any(p.unmerged for p in points)
    for name in ("pi >=", "kept", "params", "kMACs", "ms, 1", "256", "acc", "NLL", "ECE", *["acc*"] * merged):
        table.add_column(name, justify="right", no_wrap=True)
    for p in points:
        table.add_row(
            f"{p.threshold:.3f}", f"{100 * p.kept:.1f}%", f"{p.parameters:,}", f"{p.macs / 1e3:,.0f}",
            f"{1e3 * p.latency_1:.2f}", f"{1e3 * p.latency_256:.1f}", f"{p.accuracy:.4f}", f"{p.nll:.4f}",
            f"{p.ece:.4f}", *([f"{p.unmerged['accuracy']:.4f}"] if p.unmerged else []),
        )  # fmt: skip
    table.add_row("full", *["-"] * 5, *(f"{full[name]:.4f}" for name in ("accuracy", "nll", "ece")))
    console = Console()
    console.width = max(console.width, WIDE)  # a pipe has 80 columns, and numbers would be cut
    console.print(table)
    if merged:
        print("  * where the dropped units are only dropped, not refitted into those that are left (--merge False)\n")


def show(metrics: dict[str, Any], out: Path, plot: bool) -> None:
    """Tables of a compact network's cost and quality, and its report."""
    names = {
        "weights kept": "kept_fraction", "parameters": "parameters", "of them not zero": "nonzero_parameters",
        "parameters, dense": "dense_parameters", "multiply-accumulates": "macs",
        "multiply-accumulates, dense": "dense_macs", "multiply-accumulates, dense / compact": "macs_ratio",
        "throughput at 256, compact / dense": "throughput_ratio", "bytes in memory": "memory_bytes",
        "bytes in memory, sparse rows": "csr_bytes", "bytes in memory, dense": "dense_memory_bytes",
        "bytes, safetensors": "bytes_safetensors", "bytes, bayes": "bytes_bayes", "bytes, ONNX": "bytes_onnx",
        "bytes, torch.export": "bytes_torch",
    }  # fmt: skip
    shown: dict[str, object] = {title: metrics[name] for title, name in names.items() if name in metrics}
    shown["ms at batch 1, compact (dense)"] = _milliseconds(metrics, 1)
    shown["ms at batch 256, compact (dense)"] = _milliseconds(metrics, 256)
    titles = {"": "compact", "bayes_": f"compact, {metrics['samples']} draws", "dense_": "dense, posterior mean",
              "full_": f"full posterior, {metrics['samples']} draws"}  # fmt: skip
    scores = {
        title: "  ".join(f"{metrics[prefix + name]:.4f}" for name in ("accuracy", "nll", "ece"))
        for prefix, title in titles.items()
    }
    for name, peer in metrics.get("peers", {}).items():
        shown[f"{name}: MACs, ms at batch 256"] = f"{peer['macs']}, {1e3 * peer['latency_256']:.2f}"
        scores[name] = "  ".join(f"{peer[key]:.4f}" for key in ("accuracy", "nll", "ece"))
    print_table("cost", shown)
    print_table("test part: accuracy, NLL (nats), ECE", scores)
    if "deploy" in metrics:
        from inference.prune_deploy import print_deploy

        print_deploy(metrics["deploy"])
    print(f"compact network: {out}\nreport: python -m analysis.report --run {shlex.quote(str(out))}")
    if plot:
        show_results("analysis.report", "--run", out, "the report")


def _milliseconds(metrics: dict[str, Any], batch: int) -> str:
    return f"{1e3 * metrics[f'latency_{batch}']:.2f} ({1e3 * metrics[f'dense_latency_{batch}']:.2f})"
