"""Other ways to prune, at the same multiply-accumulates: Torch-Pruning's group magnitude and GroupTaylor.

They prune the same vision transformer, trained by the method deterministic with its own defaults for as many epochs as
the run. They remove hidden units and head channels. The result is fine-tuned, or distilled from the run, like the
compact network, for as many epochs, and calibrated.
"""

import copy
import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.prune_tuning import Tuning
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.methods.registry import with_defaults
from pyro_isingvit.nets.plain import PlainViT
from pyro_isingvit.predictive.calibration import fit_temperature
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning.cost import latency, macs
from pyro_isingvit.pruning.merge import spread_rows
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.trainer import Trainer

STEPS = 50  # pruning ratios that are tried
MOST = 0.95  # share of a layer that may go


def check_peers(config: RunConfig) -> None:
    """Checks before any work.

    Raises:
        UserError: Torch-Pruning is not installed, or the comparison does not support this network.
    """
    need_peers()
    plain = config.vit.plain
    need(
        plain,
        "the comparison with peers needs `pool` mean, `head` linear and a plain network, as --preset small has: no "
        "stem, registers or overlapping patches; leave out `peers`.",
    )
    told = "peers are trained from random weights, this run from a trained network; leave out `peers`."
    need(config.init is None, told)


def need_peers() -> None:
    """Raises UserError where Torch-Pruning is not installed."""
    try:
        importlib.import_module("torch_pruning")
    except ImportError as error:
        text = "the comparison needs the package torch-pruning: pip install 'pyro-isingvit[prune-peers]'."
        raise UserError(text) from error


def inner(network: PlainViT) -> tuple[dict[nn.Module, int], list[nn.Module]]:
    """Fused projections with their heads, and the layers whose outputs stay as they are."""
    linears = network.linears()
    blocks: list[Any] = list(network.blocks)
    heads = {block.qkv: block.heads for block in blocks}
    return heads, [network.patch, network.head, *linears["attn_out"], *linears["fc2"]]


def train_dense(run: Run, data: ImageData) -> PlainViT:
    """A plain network of the run's shape, trained by the method deterministic with its own defaults, as long."""
    ours = run.config.train
    config = with_defaults("deterministic", run.config, ours.epochs + ours.finetune_epochs)
    same = {name: getattr(ours, name) for name in ("augment", "margin", "batch_size", "seed", "device", "balance")}
    config = replace(config, train=replace(config.train, **same))
    trained = Trainer(config, data, None, False).fit()
    assert isinstance(trained.network, Plain)
    vit = trained.network.vit
    return PlainViT(vit).copy_from(vit, trained.network.weights()).eval()


def prune_to(dense: PlainViT, importance: Any, wanted: int, run: Run, data: ImageData) -> PlainViT:
    """A copy of the network, pruned once and globally to ``wanted`` multiply-accumulates or just below."""
    import torch_pruning as tp

    shape = run.model.vit.image_shape
    example = torch.zeros(2, *shape)
    rows = spread_rows(len(data.train), 512)
    x, y = run.info.normalise(data.train.images[rows]), data.train.labels[rows]

    def pruned(ratio: float) -> PlainViT:
        network = copy.deepcopy(dense)
        heads, ignored = inner(network)
        pruner = tp.pruner.BasePruner(
            network, example, importance=importance, global_pruning=True, pruning_ratio=ratio,
            max_pruning_ratio=MOST, num_heads=heads, ignored_layers=ignored,
            unwrapped_parameters=[(network.position, 1)],
        )  # fmt: skip
        F.cross_entropy(network(x), y).backward()  # gradients for Taylor importance
        pruner.step()
        network.zero_grad()
        return network

    best, most = None, 0
    for step in range(1, STEPS):  # not a bisection: if a ratio would empty a layer, Torch-Pruning leaves it whole
        network = pruned(step / STEPS)
        cost = macs(network, shape)
        if most < cost <= wanted:
            best, most = network, cost
    if best is None:
        raise UserError(f"Torch-Pruning cannot reach {wanted:,} multiply-accumulates with {MOST:.0%} of each layer.")
    return best


def compare_peers(
    run: Run, data: ImageData, model: CompactViT, tuning: Tuning, repeats: int
) -> dict[str, dict[str, Any]]:
    """Accuracy, NLL, Brier and ECE on the test part, multiply-accumulates and latency of each peer.

    Args:
        run: the run that was pruned.
        data: its data.
        model: the compact network whose multiply-accumulates the peers must meet.
        tuning: of the compact network, and of the peers.
        repeats: of each time measurement, interleaved with the compact network's.

    Raises:
        UserError: Torch-Pruning is missing, or the network has a CLS token or a two-layer head.
    """
    check_peers(run.config)
    import torch_pruning as tp

    torch.manual_seed(run.config.train.seed)
    shape, dense = run.model.vit.image_shape, train_dense(run, data)
    wanted = macs(model, shape)
    networks: dict[str, nn.Module] = {"plain, dense": dense}
    importances = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "GroupTaylor": tp.importance.GroupTaylorImportance(),
    }
    for name, importance in importances.items():
        networks[name] = prune_to(dense, importance, wanted, run, data)
        tuning.peer(networks[name])
    everything = [model, *networks.values()]
    times = {batch: latency(everything, shape, batch, repeats) for batch in (1, 256)}
    result = {}
    for number, (name, network) in enumerate(networks.items(), start=1):
        row = _scores(network.eval(), run, data)
        row |= {"macs": macs(network, shape), "latency_1": times[1][number], "latency_256": times[256][number]}
        result[name] = row | {"compact_latency_256": times[256][0]}
    return result


@torch.no_grad()
def _scores(network: nn.Module, run: Run, data: ImageData) -> dict[str, Any]:
    def probabilities(split: Split, temperature: float) -> Tensor:
        logits = [network(x) for x, _ in split.batches(2048, run.info.normalise)]
        return (torch.cat(logits) / temperature).softmax(-1)

    val = data.val
    temperature = fit_temperature(probabilities(val, 1.0)[None], val.labels, run.moved_prior) if len(val) else 1.0
    scores = classification_metrics(probabilities(data.test, temperature), data.test.labels)
    return {name: scores[name] for name in ("accuracy", "nll", "brier", "ece")} | {"temperature": temperature}
