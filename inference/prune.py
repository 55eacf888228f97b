"""Cut a run down to a smaller, faster, ordinary network.

python -m inference.prune --run runs/demo --out runs/demo-small --max-accuracy-drop 0.5
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inference.cli import check_place, run_script
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from inference.prune_tuning import Tuning
    from pyro_isingvit.data.split import ImageData, Split
    from pyro_isingvit.pruning.choose import Kept
    from pyro_isingvit.pruning.frontier import Candidate
    from pyro_isingvit.pruning.network import CompactViT
    from pyro_isingvit.runs.run import Run

log = logging.getLogger("pyro_isingvit.prune")
FRONTIER, BRANCHES = "frontier.json", "branches.json"
WORSE = 1.25  # times the NLL, from which on draws of a pruned network deserve a warning


@dataclass(frozen=True)
class PruneArguments:
    """What to cut, and how far."""

    run: Path
    """Folder of a trained run with masks."""
    out: Path
    """Folder of the compact network."""
    threshold: float | None = None
    """Keep masks with a retention above it; 0.5 unless another of these four says how far to cut."""
    keep: float | None = None
    """Keep this share of the weights: the masks of highest retention."""
    macs: float | None = None
    """Keep as much as this share of the dense network's multiply-accumulates allows."""
    max_accuracy_drop: float | None = None
    """Take the smallest network within this many percentage points of the full posterior's validation accuracy."""
    finetune: int = 0
    """Epochs of cross entropy on the training part, for the remaining weights."""
    export: tuple[Literal["onnx", "torch"], ...] = ()
    """Also write compact.onnx (checked with onnxruntime), compact.pt2 (torch.export), or both."""
    peers: bool = False
    """Compare with magnitude pruning and Torch-Pruning's GroupTaylor at the same multiply-accumulates (slow)."""
    data_root: str | None = None
    """Folder of the torchvision data sets; by default the run's own."""
    repeats: int = 15
    """Repeats of each time measurement; the median is reported."""
    plot: bool = True
    """Write the report, with the frontier and the network."""
    overwrite: bool = False
    """Replace the compact network that the folder holds."""
    merge: bool | None = None
    """Refit what is left to what the dropped units wrote, on training images, in closed form; by default where the
    masks cover units, heads or blocks. Zeros inside the matrices are filled."""
    distil: int = 0
    """Epochs of training towards the posterior's mean prediction, on augmented training images."""
    teacher: tuple[Path, ...] = ()
    """With --distil, runs whose mean prediction is the target, such as those of other seeds; by default --run."""
    unlabelled: str | None = None
    """With --distil, further images: a folder, an npz file or a data set (its training files)."""
    members: int | None = None
    """With --export onnx, also write members.onnx: so many networks of the posterior in one file that gives mean
    probabilities, 5 and 95% bounds, entropy and mutual information."""
    int8: bool = False
    """With --export onnx, also write every ONNX file with 8-bit weights and activations (.int8.onnx)."""


def prune(arguments: PruneArguments) -> None:
    """Turn a run's masks into a smaller network; measure it against the dense one and the full posterior."""
    from inference.prune_show import print_frontier, show
    from inference.prune_tuning import make_tuning
    from pyro_isingvit.core.checkpoint import write_json
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.pruning.choose import SAMPLES, choose_masks, from_masks, guide_of
    from pyro_isingvit.pruning.frontier import frontier, kept_share
    from pyro_isingvit.runs.load import open_run
    from pyro_isingvit.runs.predict import draw_predictive

    _check(arguments)
    run = open_run(arguments.run)
    guide_of(run)
    if arguments.peers:
        from inference.prune_peers import check_peers

        check_peers(run.config)
    searched = arguments.max_accuracy_drop is not None
    masks = None if searched else choose_masks(run, arguments.threshold, arguments.keep, arguments.macs)
    data = data_of(run, arguments.data_root)
    seed = run.config.train.seed
    merge = data.train.images if _merges(arguments, run) else None
    found: list[Candidate] = []
    if len(data.val):
        full = classification_metrics(draw_predictive(run, data.val.images, SAMPLES, seed=seed).mean, data.val.labels)
        found = frontier(run, data.val, arguments.repeats, masks, merge)
        print_frontier([candidate.point for candidate in found], full)

    tuning = make_tuning(
        run, data, arguments.finetune, arguments.distil, arguments.teacher, arguments.unlabelled, arguments.data_root
    )
    improved = tuning.improved if tuning else None
    if masks is None:
        need(found, "--max-accuracy-drop needs a validation part, and this run has none (--val-fraction 0).")
        masks, model = _search(arguments, found, full["accuracy"], improved, data.val)
    else:
        model = from_masks(run, masks, "mean", "auto", data.val, merge)
        model = improved(model) if improved else model
    bayes = from_masks(run, masks, "bayes", val=data.val)
    if merge is not None or improved:
        _compare_forms(model, bayes, data.val, arguments.members is not None)

    clear(arguments.out)
    model.save_pretrained(arguments.out)
    bayes.save_pretrained(arguments.out / "bayes")
    metrics = {
        **_quality(run, model, bayes, data),
        **_cost(run, model, arguments, data),
        **_asked(arguments, merge is not None),
        "kept_fraction": kept_share(run, masks), "dataset": data.info.dataset,
        "method": f"{run.config.method}, compact", "granularity": run.config.ising.granularity,
        "train_size": len(data.train), "val_size": len(data.val), "test_size": len(data.test), "seed": seed,
    }  # fmt: skip
    write_json(arguments.out / FRONTIER, _frontier_file(run, masks, found, full if found else {}, metrics))
    _go_further(arguments, run, data, model, bayes, tuning, metrics)
    show(metrics, arguments.out, arguments.plot)


def _compare_forms(model: "CompactViT", bayes: "CompactViT", val: "Split", members: bool) -> None:
    """Warns where draws are much worse than the one network, which alone was refitted or trained further."""
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.pruning.choose import SAMPLES

    if not len(val):
        return
    one, drawn = (
        classification_metrics(network.predict(val.images, SAMPLES).mean(0), val.labels) for network in (model, bayes)
    )
    if drawn["nll"] > WORSE * one["nll"] and drawn["accuracy"] < one["accuracy"]:
        log.warning(
            "bayes/, the posterior's draws%s, is neither refitted nor trained further: accuracy %.3f on the validation "
            "part, the one network has %.3f. Cut less for it.", " of which members.onnx is made" if members else "",
            drawn["accuracy"], one["accuracy"],
        )  # fmt: skip


def _go_further(
    arguments: PruneArguments,
    run: "Run",
    data: "ImageData",
    model: "CompactViT",
    bayes: "CompactViT",
    tuning: "Tuning | None",
    metrics: dict[str, Any],
) -> None:
    """Files for elsewhere and the peers, added to the metrics; these are written before and after each of them."""
    from inference.prune_deploy import deploy
    from pyro_isingvit.core.checkpoint import write_json
    from pyro_isingvit.runs.folder import METRICS

    def keep(more: dict[str, Any]) -> None:
        metrics.update(more)
        model.save_pretrained(arguments.out, metrics=metrics)  # again, with what the card tells
        write_json(arguments.out / METRICS, metrics)

    keep({})
    keep(_export(model, arguments))
    if arguments.members is not None or arguments.int8:
        out, members, int8 = arguments.out, arguments.members, arguments.int8
        keep(deploy(model, bayes, out, members, int8, arguments.repeats, data, metrics))
    if arguments.peers:
        from inference.prune_peers import compare_peers
        from inference.prune_tuning import after_cutting

        keep({"peers": compare_peers(run, data, model, tuning or after_cutting(run, data), arguments.repeats)})


def _check(arguments: PruneArguments) -> None:
    from inference.prune_deploy import check_deploy

    check_deploy("onnx" in arguments.export, arguments.members, arguments.int8)
    given = {
        "--threshold": arguments.threshold, "--keep": arguments.keep, "--macs": arguments.macs,
        "--max-accuracy-drop": arguments.max_accuracy_drop,
    }  # fmt: skip
    named = [name for name, value in given.items() if value is not None]
    need(len(named) <= 1, f"{' and '.join(named)} contradict each other; give one of them.")
    check_work(arguments.finetune, arguments.distil, arguments.repeats)
    for name in ("teacher", "unlabelled"):
        need(arguments.distil or not getattr(arguments, name), f"--{name} says what --distil learns from; add it.")
    drop = arguments.max_accuracy_drop
    need(drop is None or 0 <= drop <= 100, f"--max-accuracy-drop is in percentage points, 0 to 100, not {drop}.")
    check_out(arguments.run, arguments.out, arguments.overwrite)


def check_work(finetune: int, distil: int, repeats: int) -> None:
    """Raises UserError for numbers of epochs or of time measurements that cannot be."""
    for name, epochs in (("finetune", finetune), ("distil", distil)):
        need(epochs >= 0, f"--{name} takes a number of epochs, not {epochs}.")
    need(not (finetune and distil), "--finetune and --distil contradict each other; give one.")
    need(repeats >= 1, f"--repeats must be at least 1, not {repeats}.")


def check_out(run: Path, out: Path, overwrite: bool) -> None:
    """Raises UserError where a compact network cannot be written to ``out``."""
    from pyro_isingvit.runs.folder import holds_run

    check_place(out)
    need(out.resolve() != run.resolve(), "--out is the run's own folder; name another.")
    need(not run.resolve().is_relative_to(out.resolve()), f"{out} holds the run; name another --out.")
    need(not holds_run(out), f"{out} holds a run; name another --out.")
    held = (out / "compact.json").exists()
    need(not held or overwrite, f"{out} already holds a compact network; name another --out or --overwrite.")


def _asked(arguments: PruneArguments, merged: bool) -> dict[str, Any]:
    """How the network was made, for metrics.json."""
    return {
        "run": str(arguments.run), "threshold": arguments.threshold, "keep": arguments.keep,
        "macs_share": arguments.macs, "max_accuracy_drop": arguments.max_accuracy_drop, "merged": merged,
        "finetune_epochs": arguments.finetune, "distil_epochs": arguments.distil,
        "teachers": len(arguments.teacher) or 1,
    }  # fmt: skip


def _merges(arguments: PruneArguments, run: "Run") -> bool:
    """Whether what is left is refitted."""
    by_weight = run.config.ising.granularity == "weight"
    need(
        not (arguments.merge and by_weight),
        "--merge is for masks of units, heads and blocks; it would fill the zeros that masks of weights leave.",
    )
    return not by_weight if arguments.merge is None else arguments.merge


def data_of(run: "Run", data_root: str | None) -> "ImageData":
    """The data that a run was trained on; raises UserError where they are others now, or have no test part."""
    from pyro_isingvit.data.load import is_named, load_data

    source = dataclasses.asdict(run.config.data) | ({} if data_root is None else {"data_root": data_root})
    told = (
        "the run was shared, or trained on images given in memory, and does not say where they are: cut it in Python, "
        "`run.prune(...)`."
    )
    need(is_named(run.config.data.dataset), told)
    data = load_data(**source, seed=run.config.train.seed)
    if run.config.init is not None:  # images are normalised as those were from which training started
        data = dataclasses.replace(data, info=data.info.with_scale_of(run.info))
    same = data.info.has_images_of(run.info) and len(data.train) == run.method.num_data
    counted = {name: getattr(run.info, name) for name in ("counts", "weighted", "pool")}  # earlier versions lack some
    same = same and dataclasses.replace(data.info, **counted) == run.info
    need(same, f"{source['dataset']} is no longer the data that the run was trained on; prune with the same data.")
    need(len(data.test), f"{data.info.dataset} has no test part to evaluate on.")
    return data


def _search(
    arguments: PruneArguments,
    found: "list[Candidate]",
    reference: float,
    improved: "Callable[[CompactViT], CompactViT] | None",
    val: "Split",
) -> tuple[Any, "CompactViT"]:
    """Masks and network of the smallest candidate within the allowed drop, on the validation part."""
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.pruning.frontier import smallest_within

    def improve(candidate: "Candidate") -> float:
        assert improved is not None
        improved(candidate.model)
        return classification_metrics(candidate.model.predict(val.images)[0], val.labels)["accuracy"]

    assert arguments.max_accuracy_drop is not None
    chosen = smallest_within(found, reference, arguments.max_accuracy_drop, improve if improved else None)
    return chosen.kept, chosen.model


def _quality(run: "Run", model: "CompactViT", bayes: "CompactViT", data: "ImageData") -> dict[str, Any]:
    """The only use of the test part: compact, sampled compact, dense, and the full posterior."""
    from pyro_isingvit.predictive.intervals import overall_intervals
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.pruning.choose import dense_network
    from pyro_isingvit.runs.predict import draw_predictive

    test, samples, seed = data.test, run.config.train.samples, run.config.train.seed
    probs = {
        "": model.predict(test.images).mean(0),
        "bayes_": bayes.predict(test.images, samples, seed).mean(0),
        "dense_": dense_network(run, data.val).predict(test.images).mean(0),
    }
    scores = {name: classification_metrics(mean, test.labels) for name, mean in probs.items()}
    full = draw_predictive(run, test.images, samples, seed=seed, progress=True)
    scores["full_"] = classification_metrics(full.mean, test.labels)
    chosen = ("accuracy", "nll", "brier", "ece")
    metrics: dict[str, Any] = scores.pop("") | {"intervals": overall_intervals(probs[""], test.labels)}
    metrics |= {prefix + name: values[name] for prefix, values in scores.items() for name in chosen}
    return metrics | {
        "samples": samples, "temperature": float(model.temperature), "bayes_temperature": float(bayes.temperature)
    }  # fmt: skip


def _cost(run: "Run", model: "CompactViT", arguments: PruneArguments, data: "ImageData") -> dict[str, Any]:
    """Parameters, multiply-accumulates, times and bytes, compact and dense."""
    import torch

    from pyro_isingvit.pruning.choose import dense_network
    from pyro_isingvit.pruning.cost import BATCH, latency, macs, memory, parameters
    from pyro_isingvit.pruning.deployed import deployed_networks

    dense, shape = dense_network(run, None), model.config.image_shape
    weights = {kind: loc.detach() for kind, loc in run.guide.loc.items()}
    original = lambda x: run.model.vit(weights, x)  # noqa: E731
    total, nonzero = parameters(model)
    costs: dict[str, Any] = {
        "parameters": total, "nonzero_parameters": nonzero, "dense_parameters": parameters(dense)[0],
        "macs": macs(model, shape), "dense_macs": macs(original, shape),
        "run_macs": sum(macs(network, shape) for network in deployed_networks(run.method)),
    }  # fmt: skip
    costs["macs_ratio"] = costs["dense_macs"] / costs["macs"]
    for batch in (1, BATCH):  # the faster of the library's dense network and its rebuilt copy counts
        ours, first, second = latency([model, original, dense], shape, batch, arguments.repeats)
        costs |= {f"latency_{batch}": ours, f"dense_latency_{batch}": min(first, second)}
    costs["throughput_ratio"] = costs[f"dense_latency_{BATCH}"] / costs[f"latency_{BATCH}"]
    costs["threads"] = torch.get_num_threads()
    costs["memory_bytes"], costs["csr_bytes"] = memory(model)
    costs["dense_memory_bytes"] = memory(dense)[0]
    return costs


def _export(model: "CompactViT", arguments: PruneArguments) -> dict[str, Any]:
    """Writes what --export asks for; the difference of the ONNX file's logits, and bytes of all files."""
    from pyro_isingvit.pruning.export import ONNX, PROGRAM, export_onnx, export_program

    found: dict[str, Any] = {}
    if "onnx" in arguments.export:
        found["onnx_difference"] = export_onnx(model, arguments.out / ONNX)
    if "torch" in arguments.export:
        export_program(model, arguments.out / PROGRAM)
    files = {"safetensors": "compact.safetensors", "onnx": ONNX, "torch": PROGRAM, "bayes": "bayes/compact.safetensors"}
    sizes = {name: arguments.out / file for name, file in files.items()}
    return found | {f"bytes_{name}": path.stat().st_size for name, path in sizes.items() if path.is_file()}


def _frontier_file(
    run: "Run", masks: "Kept", found: "list[Candidate]", full: dict[str, float], metrics: dict[str, Any]
) -> dict[str, Any]:
    """The data of the figures: the points, the chosen one, the dense network, and what is left of each layer."""
    from pyro_isingvit.pruning.assembly import structure
    from pyro_isingvit.pruning.choose import masked_weights

    _, weights = run.model.vit.whole(masked_weights(run, masks))  # with the blocks below the masks
    alive = {kind: weight != 0 for kind, weight in weights.items()}
    return {
        "points": [dataclasses.asdict(candidate.point) for candidate in found],
        "full": {name: full[name] for name in ("accuracy", "nll", "ece") if name in full},
        "chosen": {"kept": metrics["kept_fraction"], "macs": metrics["macs"], "parameters": metrics["parameters"]},
        "dense": {"macs": metrics["dense_macs"], "parameters": metrics["dense_parameters"]},
        "structure": structure(alive, run.config.vit.heads),
    }


def clear(out: Path) -> None:
    """Removes an earlier compact network and what came with it; nothing from a folder without one."""
    from inference.prune_deploy import DEPLOYED
    from pyro_isingvit.pruning.export import ONNX, PROGRAM

    if not (out / "compact.json").exists():
        return
    for name in ("bayes", "report"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("compact.safetensors", ONNX, PROGRAM, *DEPLOYED, "metrics.json", FRONTIER, BRANCHES, "compact.json"):
        (out / name).unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(prune, PruneArguments, argv)


if __name__ == "__main__":
    main()
