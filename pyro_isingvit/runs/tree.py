"""A run as an ArviZ DataTree.

Draws lie along one dimension, ``sample``: SVI draws are independent, there are no chains to diagnose.
Shapes: S samples, B images, C classes, L depth, H heads.
"""

import json
import logging
import math

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.random import fork_rng

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.core.random_state import undisturbed
from pyro_isingvit.data.split import Split
from pyro_isingvit.ising.layout import head_sites
from pyro_isingvit.nets.margins import least_margins
from pyro_isingvit.nets.vit import Weights
from pyro_isingvit.predictive.datatree import Dims, make_group, make_tree
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.tree import prediction_groups
from pyro_isingvit.predictive.validation import GROUP, Validation
from pyro_isingvit.runs.predict import attention_margins
from pyro_isingvit.runs.run import Run

log = logging.getLogger(__name__)
SMALL_MASKS = 20_000  # fewer mask variables than this: their draws are always stored
MARGIN_DIMS: Dims = {
    "margin": ["image_margin", "token"], "margin_by_layer": ["image_margin", "layer", "token"],
    "support_token": ["image_margin"],
}  # fmt: skip


LARGE_NETWORK = 5_000_000  # more masked weights than this: masks, rows and layers are summarised
PIXEL_BYTES = 50_000_000  # at most this many bytes of images are stored
MARGIN_IMAGES = 200  # attention margins are stored for at most this many of them
MARGIN_WORK = 100_000_000  # and for fewer, or none, where their matrices would have more entries: a few seconds


@single_precision()
def run_to_datatree(
    run: Run,
    split: Split,
    draws: PredictiveDraws,
    *,
    full: bool = False,
    num_samples: int | None = None,
    max_images: int = 1000,
    part: str = "test",
    seed: int = 0,
    validation: Validation | None = None,
) -> xr.DataTree:
    """A run's posterior and its predictions for a part of the data, as kept in ``posterior.nc``.

    - ``posterior``, joint draws: ``kept_<kind>`` (sample, layer), share of the kind's weights with mask 1;
      ``kept_heads`` (sample, layer, head), the same of a head's q, k, v rows and output columns; the masks
      ``xi_<site>`` if under 20,000 or with ``full``, which adds the weights ``w_<kind>``.
    - ``variational``: ``retention_<kind>`` pi, ``loc_<kind>`` m, ``scale_<kind>`` s, each (layer, out, in);
      of over 5 million weights only ``retention_mean_<kind>`` (layer). One layer alone has no layer axis.
    - ``predictive_summary``: ``prob_mean``, ``prob_low``, ``prob_high`` (5%, 95%) (image_all, class); in nats
      ``entropy``, ``expected_entropy``, ``mutual_information`` (image_all); labels ``y``. Of all images.
    - ``posterior_predictive``: ``probs`` (sample, image, class); ``observed_data``: ``y`` (image);
      ``constant_data``: ``pixels`` (image, channel, height, width) as they were read, ``shown`` (image, colour, height,
      width) where a screen cannot show those, ``image_index``. At most ``max_images``.
    - ``constant_data``, of at most 200 of those images (``image_margin``, named as in ``image``), at the posterior
      mean weights: attention margins (nets/margins.py) ``margin`` (image_margin, token), the least over layers and
      heads; ``margin_by_layer`` (image_margin, layer, token), over heads; ``support_token`` (image_margin), its
      position.
    - ``validation``: ``prob_mean`` (image_val, class) and ``y`` (image_val) of the validation part, where it is given.

    A baseline has no masks: its tree lacks ``posterior``, ``variational`` and the margins.

    With the seed that made ``draws``, draw s of ``posterior`` is the network that gave draw s of ``probs``.

    Args:
        run: the run.
        split: the images that ``draws`` predict, with labels.
        draws: predictive draws.
        full: store every mask and weight of every draw; the log says the size first.
        num_samples: S of ``posterior``; None: as many as ``draws``.
        max_images: of more images than this, or than fit into 50 MB, a random choice is stored.
        part: name of the part.
        seed: of the draws and the choice of images; the global random state is left as it was.
        validation: what the run predicts for the validation part, from which later decisions get their guarantee.

    Returns:
        the tree, which ``save_datatree`` writes.

    Raises:
        UserError: draws that do not belong to the images, no images, or a count below 1.

    Examples:
        >>> from pyro_isingvit import ViTConfig, draw_predictive, fit, load_data, run_to_datatree
        >>> data = load_data("digits", train_size=100)
        >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
        >>> tree = run_to_datatree(run, data.val, draw_predictive(run, data.val.images, 5))
        >>> dict(tree["posterior_predictive"].sizes)
        {'sample': 5, 'image': 10, 'class': 10}
        >>> tree["posterior"]["xi_qkv"].sizes["sample"]
        5
    """
    samples = len(draws.probs) if num_samples is None else num_samples
    if samples < 1 or max_images < 1 or len(split) == 0 or draws.probs.shape[1] != len(split):
        raise UserError(
            f"need `num_samples` ({samples}), `max_images` ({max_images}) and images ({len(split)}) of at least 1, "
            f"and draws for the same images (they are for {draws.probs.shape[1]})."
        )
    limit = max(1, min(max_images, PIXEL_BYTES // math.prod(split.images.shape[1:])))
    index = np.arange(len(split))
    if limit < len(split):
        index = np.sort(np.random.default_rng(seed).choice(len(split), limit, replace=False))
        log.info("storing probabilities and pixels of %d of %d images, chosen at random", limit, len(split))
    pixels = split.images[index]
    constant = {"pixels": pixels, "image_index": index}
    if not run.info.visible:
        constant["shown"] = run.info.scale.shown(pixels)
    constant_dims = {
        "pixels": ["image", "channel", "height", "width"], "image_index": ["image"],
        "shown": ["image", "colour", "height", "width"], **MARGIN_DIMS,
    }  # fmt: skip
    chosen = _margin_images(run, index) if run.has_masks else index[:0]
    if len(chosen):
        constant |= _margins(run, split.images[chosen])
    groups = (
        {}
        if not run.has_masks
        else {
            "posterior": _posterior(run, samples, full, seed),
            "variational": _variational(run),
        }
    )
    groups |= {
        **prediction_groups(draws, run.info.classes, split.labels, index, index, "image_all"),
        "constant_data": make_group(constant, constant_dims, {"image": index, "image_margin": chosen}),
    }
    if validation is not None:
        groups[GROUP] = validation.to_group(run.info.classes)
    attrs = {
        "config": run.config.to_json(), "dataset": run.info.dataset, "method": run.config.method,
        "part": part, "seed": run.config.train.seed, "draw_seed": seed, "num_samples": samples,
        "classes": json.dumps(run.info.classes),
    }  # fmt: skip
    return make_tree(groups, attrs)


def _axes(name: str, layers: int, *dims: str) -> list[str | None]:
    """Names of a stored array's axes: no layer axis where there is one layer; out and in by matrix kind."""
    kept = [dim for dim in dims if dim != "layer" or layers > 1]
    return [f"{dim}_{name}" if dim in ("out", "in") else dim for dim in kept]


def _layers(run: Run) -> dict[str, np.ndarray] | None:
    """Numbers of the blocks that have masks, where those before them have none."""
    vit = run.model.vit
    return {"layer": np.arange(vit.trunk_depth, vit.config.depth)} if 0 < vit.trunk_depth < vit.config.depth else None


@torch.no_grad()
def _posterior(run: Run, samples: int, full: bool, seed: int) -> xr.Dataset:
    """Joint draws of masks and weights, one by one; those of ``draw_predictive`` with this seed."""
    guide, vit, layout = run.guide, run.model.vit, run.guide.layout
    attention = next((site for site in head_sites(vit.readers) if site.name == "attention"), None)
    covered = 4 * vit.config.width**2 / vit.config.heads  # weights of a head: q, k, v, output
    dims: Dims = {"kept_heads": ["layer", "head"]}
    for kind, shape in vit.matrix_shapes.items():
        dims[f"kept_{kind}"] = _axes(kind, shape[0], "layer")
        dims[f"w_{kind}"] = _axes(kind, shape[0], "layer", "out", "in")
    dims |= {f"xi_{name}": _axes(name, site.shape[0], *site.dims) for name, site in layout.sites.items()}
    num_masks = sum(math.prod(site.shape) for site in layout.sites.values())
    if full:
        size = samples * (4 * run.model.num_masked_weights + num_masks) / 1e6
        log.info("storing every mask and weight of %d draws: %.1f MB before compression", samples, size)
    stored: Weights = {}
    cuda = [run.device] if run.device.type == "cuda" else []
    with undisturbed(seed, run.device):
        for s in range(samples):
            with fork_rng(devices=cuda):  # guide.draw starts from the same random state, with the same masks
                masks = guide.masks.draw()
            weights = guide.draw()
            fields = {kind: layout.expand(kind, masks).expand_as(weight) for kind, weight in weights.items()}
            drawn = {f"kept_{kind}": field.mean((1, 2)).squeeze(0) for kind, field in fields.items()}
            if attention is not None:  # masks in the head alone cover no attention head
                drawn["kept_heads"] = layout.reduce(attention, fields) / covered
            if full or num_masks < SMALL_MASKS:
                drawn |= {f"xi_{name}": mask.to(torch.int8).squeeze(0) for name, mask in masks.items()}
            if full:
                drawn |= {f"w_{kind}": weight.squeeze(0) for kind, weight in weights.items()}
            for name, values in drawn.items():
                if s == 0:
                    stored[name] = torch.empty(samples, *values.shape, dtype=values.dtype)
                stored[name][s] = values
    return make_group(stored, dims, _layers(run), "sample")


def _margin_images(run: Run, index: np.ndarray) -> np.ndarray:
    """Images to store attention margins of: at most 200, evenly spread, fewer or none where they would take long."""
    vit = run.model.vit
    each = vit.config.depth * len(vit.position) * vit.config.width**2 // vit.config.heads  # L H T d^2
    most = min(MARGIN_IMAGES, MARGIN_WORK // each)
    if most < 1:
        log.info("the network is large: no attention margins are stored")
        return index[:0]
    return index[:: -(-len(index) // most)]


def _margins(run: Run, images: Tensor) -> dict[str, Tensor]:
    margins = attention_margins(run, images)  # (B, L, H, T)
    least, support = least_margins(margins)
    return {"margin": least, "margin_by_layer": margins.amin(2), "support_token": support}


@torch.no_grad()
def _variational(run: Run) -> xr.Dataset:
    guide, arrays, dims = run.guide, {}, {}
    small = run.model.num_masked_weights <= LARGE_NETWORK
    if not small:
        log.info("the network is large: masks, rows and layers are summarised, single weights are not stored")
    for kind, shape in run.model.vit.matrix_shapes.items():
        retention = guide.weight_retention(kind)
        values = {"retention": retention, "loc": guide.loc[kind], "scale": guide.log_scale[kind].exp()}
        for name, x in (values if small else {"retention_mean": retention.mean((1, 2))}).items():
            dims[f"{name}_{kind}"] = _axes(kind, shape[0], *("layer", "out", "in")[: x.dim()])
            arrays[f"{name}_{kind}"] = x.squeeze(0)  # does nothing where there are several layers
        if not small:
            dims[f"loc_norm_{kind}"] = _axes(kind, shape[0], "layer", "out")
            arrays[f"loc_norm_{kind}"] = guide.loc[kind].norm(dim=-1).squeeze(0)
    for name, site in guide.layout.sites.items() if not small and guide.config.granularity != "weight" else ():
        dims[f"mask_retention_{name}"] = _axes(name, site.shape[0], *site.dims)
        arrays[f"mask_retention_{name}"] = guide.retention(name).squeeze(0)
    return make_group(arrays, dims, _layers(run))
