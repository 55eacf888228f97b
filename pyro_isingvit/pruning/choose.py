"""From a run to a smaller network: which masks stay on, in which form, at which temperature.

Masks with pi > threshold are kept, the others are off for good; ``assembly`` then removes what cannot act any more.

Shapes: S samples, B batch, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.data.given import Labelled, labelled, pixels
from pyro_isingvit.data.images import Images
from pyro_isingvit.data.split import Split
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.nets.vit import Weights
from pyro_isingvit.predictive.calibration import fit_temperature
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning.assembly import PosteriorParts, assemble
from pyro_isingvit.pruning.cost import macs as count_macs
from pyro_isingvit.pruning.merge import merge_units
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.runs.run import Run

Form = Literal["mean", "bayes"]
Weighting = Literal["auto", "slab", "mean"]
SAMPLES = 50
HALVINGS = 12  # of the interval in which a share of the weights is sought
MIDDLE = 0.5  # the threshold, unless another is asked for

Kept = dict[str, Tensor]  # mask site -> bool, of the site's shape


def guide_of(run: Run) -> IsingGuide:
    """The posterior of a run's masks.

    Raises:
        UserError: the run has none, or never left the pilot phase.
    """
    guide = run.guide
    masked = run.config.method != "mean-field" and guide.phase != "pilot"
    need(
        masked,
        f"every mask of this run ({run.config.method}) is at one: there is nothing to prune by; "
        "take a run of method ising that is past its pilot phase.",
    )
    return guide


@torch.no_grad()
def choose_masks(
    run: Run, threshold: float | None = None, keep: float | None = None, macs: float | None = None
) -> Kept:
    """Which masks stay on.

    Args:
        run: a run with masks.
        threshold: keep pi > threshold, in (0, 1); 0.5 where neither is given.
        keep: keep this share of the masked weights, in (0, 1): the masks of highest pi, and among equals (pi is
            clipped at max_keep) those of highest second-order gain per weight.
        macs: keep as many of them, in the same order, as this share of the dense network's multiply-accumulates
            allows, in (0, 1).

    Raises:
        UserError: two given, a value outside (0, 1), no masks, none kept, or a share that what is not masked exceeds.
    """
    guide = guide_of(run)
    given = {name: value for name, value in (("threshold", threshold), ("keep", keep), ("macs", macs))
             if value is not None}  # fmt: skip
    told = " and ".join(f"`{name}`" for name in given)
    need(len(given) <= 1, f"{told} contradict each other; give one of them.")
    for name, value in given.items():
        inside = isinstance(value, Real) and 0 < value < 1
        need(inside, f"`{name}` must be a number strictly between 0 and 1, not {value!r}.")
    retention = {name: guide.retention(name).cpu() for name in guide.layout.sites}
    if macs is not None:
        return _within(run, *_ranked(guide, retention), macs)
    if keep is None:
        chosen = {name: pi > (MIDDLE if threshold is None else threshold) for name, pi in retention.items()}
    else:
        chosen = highest(*_ranked(guide, retention), keep)
    if not any(bool(mask.any()) for mask in chosen.values()):
        most = max(float(pi.max()) for pi in retention.values())
        way = "lower `threshold`" if keep is None else "raise `keep`: one mask covers more weights"
        raise UserError(f"nothing is left of the network: the highest retention is {most:.3f}; {way}.")
    return chosen


def _within(run: Run, keys: Sequence[Kept], sizes: Kept, share: float) -> Kept:
    """Bisection over the share of masked weights: a network costs more, the more of them it keeps."""
    shape = run.model.vit.image_shape

    def cost(kept: Kept) -> int:
        try:
            return count_macs(from_masks(run, kept, weighting="slab"), shape)
        except UserError:  # a part that a network cannot do without is gone: too little
            return 0

    most = share * cost({name: torch.ones_like(values, dtype=torch.bool) for name, values in sizes.items()})
    low, high, found = 0.0, 1.0, 0
    chosen: Kept = {}
    for _ in range(HALVINGS):
        kept = highest(keys, sizes, middle := (low + high) / 2)
        if (spent := cost(kept)) <= most:
            low, chosen, found = middle, kept, spent
        else:
            high = middle
    need(
        found and any(bool(mask.any()) for mask in chosen.values()),
        f"`macs` {share:g} leaves nothing of the blocks: what cannot be cut takes too many multiply-accumulates; "
        "raise it.",
    )
    return chosen


def _ranked(guide: IsingGuide, retention: Kept) -> tuple[Sequence[Kept], Kept]:
    """By what ``highest`` chooses masks of a posterior, and how many weights each covers."""
    gain, sites = guide.gains(), guide.layout.sites
    sizes = mask_sizes(guide.layout, dict(guide.loc.items()))
    worth = {name: gain[name] / sizes[name] for name in sites}
    # Damped masks are on their way to a clip that moves: those within 1% of it are equals.
    clipped = {name: pi.clamp(max=0.99 * guide.max_keep) for name, pi in retention.items()}
    return (clipped, worth), sizes


def mask_sizes(layout: MaskLayout, weights: Mapping[str, Tensor]) -> Kept:
    """How many weights each mask covers, mask site -> float, of the site's shape."""
    ones = {kind: torch.ones_like(weight) for kind, weight in weights.items()}
    return {name: layout.reduce(site, ones) for name, site in layout.sites.items()}


def highest(keys: Sequence[Kept], sizes: Kept, keep: float) -> Kept:
    """The masks of highest keys that cover a share of the weights, or just less.

    Args:
        keys: mask site -> value of each mask; later ones decide among equals.
        sizes: weights that each mask covers.
        keep: share of the weights, in [0, 1].
    """
    flat = [torch.cat([part[name].flatten() for name in sizes]).double().cpu().numpy() for part in (*keys, sizes)]
    order = np.lexsort(flat[-2::-1])[::-1]  # by the first key, then by the next, the highest first
    total = np.cumsum(flat[-1][order])
    on = np.zeros(len(order), bool)
    on[order[total <= keep * total[-1]]] = True
    parts = torch.from_numpy(on).split([values.numel() for values in sizes.values()])
    return {name: part.view(sizes[name].shape) for name, part in zip(sizes, parts, strict=True)}


@torch.no_grad()
def masked_weights(run: Run, kept: Kept, weighting: Literal["slab", "mean"] = "slab") -> Weights:
    """The full network's matrices with the cut masks at 0: kind -> (layers, out, in).

    Args:
        run: a run with masks.
        kept: which masks stay on.
        weighting: slab means m, or posterior means pi m.
    """
    guide = guide_of(run)
    weights = {}
    for kind, loc in guide.loc.items():
        mask = guide.layout.expand(kind, {name: on.to(loc) for name, on in kept.items()})
        weights[kind] = loc.detach() * mask * (guide.weight_retention(kind) if weighting == "mean" else 1.0)
    return weights


@single_precision()
def compact(
    run: Run,
    form: Form = "mean",
    *,
    threshold: float | None = None,
    keep: float | None = None,
    macs: float | None = None,
    weighting: Weighting = "auto",
    val: Labelled | None = None,
    merge: Any = None,
) -> CompactViT:
    """Cuts a run down to a smaller, ordinary network.

    Args:
        run: a trained run with masks.
        form: ``mean``, one deterministic network, or ``bayes``, which can be sampled.
        threshold: keep masks with pi > threshold, in (0, 1); 0.5 unless ``keep`` or ``macs`` is given.
        keep: keep this share of the masked weights instead.
        macs: keep as much as this share of the dense network's multiply-accumulates allows instead.
        weighting: of the form ``mean``: slab means m ("slab"), posterior means pi m ("mean"), or whichever has the
            lower NLL on ``val`` ("auto"; m without ``val``).
        val: validation images with labels, as ``TrainedRun.evaluate`` takes them, on which the temperature is fitted
            anew; None: the run's temperature is kept.
        merge: of the form ``mean``: training images, as ``TrainedRun.predict`` takes them, on which what is left is
            refitted to what the dropped units wrote (``merge_units``); None: they are only dropped.

    Returns:
        the network in evaluation mode, on the CPU.

    Raises:
        UserError: no masks, a threshold outside (0, 1), contradictory arguments, or nothing left.

    Examples:
        >>> from pyro_isingvit import ViTConfig, compact, fit, load_data
        >>> data = load_data("digits", train_size=100)
        >>> vit = ViTConfig(patch_size=4, width=16, heads=4, depth=1)
        >>> run = fit(vit, data, epochs=3, granularity="unit", progress=False)
        >>> small = compact(run, keep=0.5, val=data.val)
        >>> sum(p.numel() for p in small.parameters()) < run.model.num_masked_weights
        True
        >>> small.predict(data.test.images[:2]).shape  # one network: S = 1
        torch.Size([1, 2, 10])
        >>> compact(run, "bayes", keep=0.5).predict(data.test.images[:2], samples=4).shape
        torch.Size([4, 2, 10])
    """
    need(form in ("mean", "bayes"), f"`form` must be mean or bayes, not {form!r}.")
    need(weighting in ("auto", "slab", "mean"), f"`weighting` must be auto, slab or mean, not {weighting!r}.")
    part = None if val is None else labelled(val, run.info, "val")
    images = None if merge is None else pixels(merge, run.info)
    kept = choose_masks(run, threshold, keep, macs)
    return from_masks(run, kept, form, weighting, part, images)


def from_masks(
    run: Run,
    kept: Kept,
    form: Form = "mean",
    weighting: Weighting = "auto",
    val: Split | None = None,
    merge: Images | None = None,
) -> CompactViT:
    """``compact`` with the masks already chosen."""
    need(form == "mean" or merge is None, "`merge` is for the form 'mean': draws have masks of their own.")
    if form == "bayes":
        vit, weights = run.model.vit.whole(masked_weights(run, kept))
        model = of_run(run, assemble(vit, run.info, weights, posterior_parts(run, kept)))
        return calibrated(model, val, run.moved_prior)
    names: list[Literal["slab", "mean"]] = ["slab", "mean"] if weighting == "auto" else [weighting]
    if val is None or len(val) == 0:
        names = names[:1]
    models, reference = [], None if merge is None else dense_network(run, None)
    for name in names:
        vit, weights = run.model.vit.whole(masked_weights(run, kept, name))
        model = of_run(run, assemble(vit, run.info, weights))
        if merge is not None and reference is not None:
            merge_units(model, reference, merge)
        models.append(calibrated(model, val, run.moved_prior))
    if len(models) == 1:
        return models[0]
    assert val is not None
    means = [run.among(val.labels, model.predict(val.images)[0]) for model in models]
    scores = [classification_metrics(mean, val.labels)["nll"] for mean in means]
    return models[int(np.argmin(scores))]


def of_run(run: Run, model: CompactViT) -> CompactViT:
    """The network with what is known of the run: its temperature, and the shares its probabilities stand for."""
    model.config = replace(model.config, class_prior=run.class_prior or ())
    model.temperature.copy_(run.temperature)
    return model


def dense_network(run: Run, val: Split | None) -> CompactViT:
    """The posterior mean pi m with nothing removed, calibrated on validation images, as the reference."""
    everything = {name: torch.ones(site.shape, dtype=torch.bool) for name, site in guide_of(run).layout.sites.items()}
    return from_masks(run, everything, "mean", "mean", val)


@torch.no_grad()
def calibrated(model: CompactViT, val: Split | None, prior: Sequence[float] | None = None) -> CompactViT:
    """The model with its temperature fitted on validation images; as it is where there are none.

    Args:
        model: the network.
        val: validation images.
        prior: the shares of the classes that its probabilities stand for (``Run.moved_prior``).
    """
    given = type(val).__name__
    need(val is None or isinstance(val, Split), f"`val` must be a part of a data set, such as data.val, not {given}.")
    if val is not None and len(val):
        model.temperature.fill_(1.0)
        model.temperature.fill_(fit_temperature(model.predict(val.images, SAMPLES), val.labels, prior))
    return model


@torch.no_grad()
def posterior_parts(run: Run, kept: Kept) -> PosteriorParts:
    """Scales, retention and mask numbers of a run's matrices, those of its trunk without noise and masks."""
    guide, trunk = guide_of(run), run.model.vit.trunk
    layout = guide.layout
    below = {kind: len(weight) for kind, weight in trunk.items()}

    def whole(kind: str, field: Tensor, value: float) -> Tensor:
        """A field of all layers, with a value in the trunk's."""
        return F.pad(field, (0, 0, 0, 0, below.get(kind, 0), 0), value=value)

    pi = {name: guide.retention(name).detach().cpu() * on for name, on in kept.items()}
    numbers = {name: torch.arange(on.numel()).view(on.shape) for name, on in kept.items()}
    by_weight = layout.granularity == "weight"
    return PosteriorParts(
        {
            kind: whole(kind, scale.detach().exp().cpu().expand(guide.loc[kind].shape), 0.0)
            for kind, scale in guide.log_scale.items()
        },
        {kind: whole(kind, layout.expand(kind, pi).expand_as(loc), 1.0) for kind, loc in guide.loc.items()}
        | {kind: torch.ones(trunk[kind].shape) for kind in below if kind not in guide.kinds},
        None if by_weight else {kind: whole(kind, layout.expand(kind, numbers), 0) for kind in guide.kinds},
        {kind: layout.site_of[kind].name for kind in guide.kinds},
        {} if by_weight else {name: F.pad(values.flatten(), (0, 1)) for name, values in pi.items()},
        below,
    )
