"""Remove the attention or MLP branches that say least, by transfer entropy.

python -m inference.branches --run runs/demo --out runs/demo-less --share 0.4 --finetune 5
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inference.cli import print_table, run_script
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from pyro_isingvit.pruning.network import CompactViT


@dataclass(frozen=True)
class BranchesArguments:
    """What is removed, and what becomes of the rest."""

    run: Path
    """Folder of a trained run, of any method but an ensemble."""
    out: Path
    """Folder of the compact network."""
    branch: Literal["attention", "mlp"] = "attention"
    """Which of the two branches of a block."""
    share: float = 0.4
    """Share of these branches that is removed."""
    images: int = 1000
    """Training images on which entropies are measured."""
    merge: bool | None = None
    """Refit what is left to what the removed branches wrote, on training images, in closed form; by default unless
    single weights were pruned, whose zeros it fills."""
    finetune: int = 0
    """Epochs of cross entropy on the training part, for the remaining weights."""
    distil: int = 0
    """Epochs of training towards the mean prediction of the run, on augmented training images."""
    data_root: str | None = None
    """Folder of the torchvision data sets; by default the run's own."""
    repeats: int = 15
    """Repeats of each time measurement; the median is reported."""
    overwrite: bool = False
    """Replace the compact network that the folder holds."""


def cut(arguments: BranchesArguments) -> None:
    """Rank the branches of a run's network, remove the first ones, and measure what is left against the whole."""
    from inference.prune import BRANCHES, check_out, check_work, clear, data_of
    from inference.prune_tuning import make_tuning
    from pyro_isingvit.core.checkpoint import write_json
    from pyro_isingvit.pruning.branches import branches, rank_branches, without_branches
    from pyro_isingvit.pruning.choose import calibrated, of_run
    from pyro_isingvit.pruning.deployed import deployed_networks
    from pyro_isingvit.pruning.merge import merge_units
    from pyro_isingvit.runs.folder import METRICS
    from pyro_isingvit.runs.load import open_run

    _check(arguments)
    check_work(arguments.finetune, arguments.distil, arguments.repeats)
    check_out(arguments.run, arguments.out, arguments.overwrite)
    run = open_run(arguments.run)
    networks = deployed_networks(run.method, or_whole=False)
    need(len(networks) == 1, f"method {run.config.method} has {len(networks)} networks; take a run of a single one.")
    data, branch = data_of(run, arguments.data_root), arguments.branch
    dense = calibrated(of_run(run, networks[0]), data.val, run.moved_prior)
    there = len(branches(dense, branch))
    count = round(arguments.share * there)
    need(count > 0, f"--share {arguments.share} of {there} branches is none; raise it.")
    masks = run.has_masks and run.config.ising.granularity != "weight"
    merge = arguments.merge
    if merge is None:
        merge = masks or run.mask_summary()["pruned_fraction"] == 0
    order = rank_branches(dense, data.train.images, branch, count, arguments.images, progress=True)

    def left(removed: int) -> "CompactViT":
        small = without_branches(dense, branch, [removal.block for removal in order[:removed]])
        if merge and removed:
            merge_units(small, dense, data.train.images)
        return calibrated(small, data.val, run.moved_prior)

    points = [{"removed": k, **_scores(left(k), data.val)} for k in range(count + 1)] if len(data.val) else []
    _print_order([asdict(removal) for removal in order], points, branch)
    model = left(count)
    tuning = make_tuning(run, data, arguments.finetune, arguments.distil, (), None, arguments.data_root)
    model = tuning.improved(model) if tuning else model

    clear(arguments.out)
    metrics = {
        **_quality(model, dense, data), **_cost(model, dense, arguments.repeats),
        "branch": branch, "share": arguments.share, "removed": [removal.block for removal in order],
        "merged": merge, "finetune_epochs": arguments.finetune, "distil_epochs": arguments.distil,
        "temperature": float(model.temperature), "dataset": data.info.dataset,
        "method": f"{run.config.method}, without branches", "run": str(arguments.run), "train_size": len(data.train),
        "val_size": len(data.val), "test_size": len(data.test), "seed": run.config.train.seed,
    }  # fmt: skip
    model.save_pretrained(arguments.out, metrics=metrics)
    write_json(arguments.out / METRICS, metrics)
    write_json(
        arguments.out / BRANCHES,
        {"branch": branch, "order": [asdict(removal) for removal in order], "validation": points},
    )
    _show(arguments, metrics)


def _check(arguments: BranchesArguments) -> None:
    need(0 < arguments.share <= 1, f"--share must lie in (0, 1], not {arguments.share}.")
    need(arguments.images >= 2, f"--images must be at least 2, not {arguments.images}.")


def _scores(model: "CompactViT", part: Any) -> dict[str, float]:
    from pyro_isingvit.predictive.metrics import classification_metrics

    scores = classification_metrics(model.predict(part.images)[0], part.labels)
    return {name: scores[name] for name in ("accuracy", "nll", "brier", "ece")}


def _quality(model: "CompactViT", dense: "CompactViT", data: Any) -> dict[str, Any]:
    """The only use of the test part."""
    from pyro_isingvit.predictive.intervals import overall_intervals
    from pyro_isingvit.predictive.metrics import classification_metrics

    probs = model.predict(data.test.images)[0]
    metrics: dict[str, Any] = classification_metrics(probs, data.test.labels)
    metrics["intervals"] = overall_intervals(probs, data.test.labels)
    return metrics | {f"dense_{name}": value for name, value in _scores(dense, data.test).items()}


def _cost(model: "CompactViT", dense: "CompactViT", repeats: int) -> dict[str, Any]:
    from pyro_isingvit.pruning.cost import BATCH, latency, macs, parameters

    shape = model.config.image_shape
    costs: dict[str, Any] = {
        "parameters": parameters(model)[0], "dense_parameters": parameters(dense)[0],
        "macs": macs(model, shape), "dense_macs": macs(dense, shape),
    }  # fmt: skip
    costs["macs_ratio"] = costs["dense_macs"] / costs["macs"]
    for batch in (1, BATCH):
        costs[f"latency_{batch}"], costs[f"dense_latency_{batch}"] = latency([model, dense], shape, batch, repeats)
    return costs


def _print_order(order: list[dict[str, Any]], points: list[dict[str, Any]], branch: str) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{branch} branches in the order in which they go"
    table = Table(title=title + (", and the validation part without them" if points else ""), title_justify="left")
    names = ("accuracy", "nll", "ece") if points else ()
    for name in ("removed", "block", "transfer entropy, nats", *names):
        table.add_column(name, justify="right")
    for k in range(len(order) + 1):
        scores = [f"{points[k][name]:.4f}" for name in names]
        removal = (str(order[k - 1]["block"]), f"{order[k - 1]['transfer']:.4f}") if k else ("", "")
        table.add_row(str(k), *removal, *scores)
    Console().print(table)


def _show(arguments: BranchesArguments, metrics: dict[str, Any]) -> None:
    shown: dict[str, object] = {
        name: f"{metrics[key]:,} of {metrics['dense_' + key]:,}"
        for name, key in (("parameters", "parameters"), ("multiply-accumulates", "macs"))
    }
    for batch in (1, 256):
        less, whole = (1e3 * metrics[f"{prefix}latency_{batch}"] for prefix in ("", "dense_"))
        shown[f"ms at batch {batch} (whole network)"] = f"{less:.2f} ({whole:.2f})"
    print_table("cost", shown)
    scores = {
        title: "  ".join(f"{metrics[prefix + name]:.4f}" for name in ("accuracy", "nll", "ece"))
        for title, prefix in (("without the branches", ""), ("whole network", "dense_"))
    }
    print_table("test part: accuracy, NLL (nats), ECE", scores)
    print(f"compact network: {arguments.out}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(cut, BranchesArguments, argv)


if __name__ == "__main__":
    main()
