"""Which attention or MLP branches say least, by transfer entropy, and a network without them.

After Lin et al. 2024 (arXiv 2404.05657, "lambda-ViT", whose selection is called NOSE). f is what the classifier reads,
taken as Gaussian channel by channel over images:

    H = sum_d log sigma_d + constant,   sigma_d the standard deviation of f_d over images
    TE(S) = H - H without the branches S

A branch that is left out passes the residual stream on as it is. The first one to go is that of the smallest |TE|;
each further one makes |TE| of all that are gone the smallest. The source takes the smallest TE, on networks where
leaving out lowers the entropy; here a branch whose absence raises it has said something too. The source then trains
while it fades the branches out; here they go at once, and what is left can be refitted (merge.py) or fine-tuned.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_isingvit.core.errors import need
from pyro_isingvit.data.images import Images
from pyro_isingvit.pruning.merge import spread_out
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.pruning.shapes import LayerShape

Branch = Literal["attention", "mlp"]
LEAST = 1e-8  # standard deviation of a channel that is the same for all images


@dataclass(frozen=True)
class Removal:
    """One branch, in the order in which they go."""

    block: int
    """Its block, from 0."""
    transfer: float
    """TE of this branch and all before it, nats."""


def branches(model: CompactViT, branch: Branch) -> list[int]:
    """The blocks that have such a branch."""
    return [b for b, block in enumerate(model.blocks) if getattr(block, f"has_{branch}")]


@contextmanager
def skipping(model: CompactViT, branch: Branch, blocks: Sequence[int]) -> Iterator[None]:
    """Leaves out branches of these blocks for a while: x passes as it is."""
    found: list[nn.Module] = [model.blocks[b] for b in blocks]
    for block in found:
        setattr(block, f"has_{branch}", False)
    try:
        yield
    finally:
        for block in found:
            setattr(block, f"has_{branch}", True)


@torch.no_grad()
def feature_entropy(model: CompactViT, images: list[Tensor]) -> float:
    """H of what the classifier reads, without the constant; nats.

    Args:
        model: the network.
        images: normalised, in batches.
    """
    caught: list[Tensor] = []
    classifier = model.head if model.config.head_hidden is None else model.head_hidden
    handle = classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        for x in images:
            model(x)
    finally:
        handle.remove()
    return float(torch.cat(caught).double().std(0, correction=0).clamp(min=LEAST).log().sum())


def rank_branches(
    model: CompactViT,
    images: Images,
    branch: Branch = "attention",
    count: int | None = None,
    most: int = 1000,
    progress: bool = False,
) -> list[Removal]:
    """The order in which branches may go, the one that says least first.

    Args:
        model: the form ``mean``.
        images: training images.
        branch: which of a block's two branches.
        count: how many to rank; None: all.
        most: images that are looked at, evenly spaced.
        progress: show a progress bar.

    Returns:
        the first ``count`` branches; a branch that adds nothing to the stream comes before all others, at TE 0.

    Raises:
        UserError: the form is ``bayes``, fewer than two images, or a count that the network does not have.

    Examples:
        >>> from pyro_isingvit import ViTConfig, compact, fit, load_data
        >>> from pyro_isingvit.pruning.branches import rank_branches, without_branches
        >>> data, vit = load_data("digits", train_size=100), ViTConfig(patch_size=4, width=16, heads=4, depth=2)
        >>> model = compact(fit(vit, data, epochs=2, progress=False))
        >>> order = rank_branches(model, data.train.images, count=1)
        >>> small = without_branches(model, "attention", [removal.block for removal in order])
        >>> sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        True
    """
    left, gone, found = branches(model, branch), list[int](), list[Removal]()
    need(model.config.form == "mean", "only the form 'mean' can be ranked; make the network with `form` mean.")
    count = len(left) if count is None else count
    need(0 <= count <= len(left), f"{count} {branch} branches of {len(left)} cannot be removed.")
    need(len(images) > 1 and most > 1, f"an entropy needs at least 2 images, not {min(len(images), most)}.")
    ready = [model.normalise(part) for part in spread_out(images, min(len(images), most))]
    whole = feature_entropy(model, ready)
    passes = sum(len(left) - k for k in range(count))
    bar = tqdm(total=passes, desc="rank", unit="network", disable=not progress, dynamic_ncols=True)
    while len(found) < count:
        transfer = {}
        for block in left:
            with skipping(model, branch, [*gone, block]):
                transfer[block] = whole - feature_entropy(model, ready)
            bar.update()
        least = min(left, key=lambda block: abs(transfer[block]))
        left.remove(least)
        gone.append(least)
        found.append(Removal(least, transfer[least]))
    bar.close()
    return found


@torch.no_grad()
def without_branches(model: CompactViT, branch: Branch, blocks: Sequence[int]) -> CompactViT:
    """A network of its own without branches of these blocks, equal to the model that skips them.

    Args:
        model: the form ``mean``; it stays as it is.
        branch: which of a block's two branches.
        blocks: numbers of blocks that have one.

    Raises:
        UserError: the form is ``bayes``, or a block has no such branch.
    """
    need(model.config.form == "mean", "only the form 'mean' can be cut; make the network with `form` mean.")
    missing = sorted({*blocks} - {*branches(model, branch)})
    need(not missing, f"there is no {branch} branch in block {missing[:1]}.")
    gone = {"heads": 0, "query": 0, "value": 0, "uniform": 0} if branch == "attention" else {"hidden": 0}
    layers: tuple[LayerShape, ...] = tuple(
        replace(shape, **gone) if b in blocks else shape for b, shape in enumerate(model.config.layers)
    )
    small = CompactViT(replace(model.config, layers=layers)).to(model.position.device)
    names = small.state_dict()
    small.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    return small.eval()
