"""How much of a trained network can be cut, all at once and without further training, at equal accuracy.

What is cut are groups of weights, those that the masks of ``ising`` cover: units, unless its settings say otherwise.
Networks with masks lose the groups of lowest retention (and, among equals, of lowest second-order gain per weight);
others those of smallest magnitude, the root of the mean square of a group's weights.
"""

import torch

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.split import Split
from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.pruning.choose import Kept, choose_masks, highest, mask_sizes
from pyro_isingvit.runs.run import Run

DROP = 0.005  # of the accuracy, which counts as equal
STEP = 0.05  # of the share that is cut
CHUNK = 1024


def magnitudes(layout: MaskLayout, weights: Weights) -> Kept:
    """Root mean square of the weights of each group, mask site -> of its shape."""
    sizes, squares = mask_sizes(layout, weights), {kind: weight.square() for kind, weight in weights.items()}
    return {name: (layout.reduce(site, squares) / sizes[name]).sqrt() for name, site in layout.sites.items()}


@torch.no_grad()
def cut(run: Run, share: float) -> tuple[ViT, Weights] | None:
    """The mean network without a share of its weights, which are 0.

    Args:
        run: a trained run.
        share: of the weights that masks can cover, in [0, 1); whole groups are cut until it is reached.

    Returns:
        network and matrices; None for a method of several networks.
    """
    if run.has_masks and run.config.method != "mean-field" and run.guide.phase != "pilot":
        vit, layout = run.model.vit, run.guide.layout
        weights = {kind: pi * run.guide.loc[kind] for kind, pi in run.kept().items()}
        kept = choose_masks(run, keep=1 - share) if share else None
    else:
        networks = run.method.deployed()
        if len(networks) != 1:
            return None
        [(vit, weights)] = networks
        layout = MaskLayout(vit, run.config.ising.granularity)
        kept = highest([magnitudes(layout, weights)], mask_sizes(layout, weights), 1 - share) if share else None
    if kept is None:
        return vit, weights
    on = {name: mask.to(run.device) for name, mask in kept.items()}
    return vit, {kind: weight * layout.expand(kind, on) for kind, weight in weights.items()}


@torch.no_grad()
def accuracy(run: Run, network: tuple[ViT, Weights], split: Split) -> float:
    """Share of labelled images that a network of a run's method classifies rightly."""
    vit, weights = network
    right = 0
    for x, y in split.batches(CHUNK, run.info.normalise, run.device):
        right += int((vit(weights, x).argmax(-1) == y).sum())
    return right / len(split)


def prunable(run: Run, split: Split, drop: float = DROP, step: float = STEP) -> float | None:
    """The largest share of the weights up to which no cut costs more accuracy than ``drop``.

    Args:
        run: a trained run.
        split: labelled images.
        drop: largest loss of accuracy against the mean network with nothing cut, 0 to 1.
        step: shares that are tried are its multiples below 1.

    Returns:
        the share, 0 where the first step is too much; None for a method of several networks.
    """
    whole = cut(run, 0.0)
    if whole is None:
        return None
    wanted, found = accuracy(run, whole, split) - drop - 1e-9, 0.0
    for number in range(1, round(1 / step)):
        try:
            network = cut(run, number * step)
        except UserError:  # less than the smallest group would be left
            break
        assert network is not None
        if accuracy(run, network, split) < wanted:
            break
        found = number * step
    return found
