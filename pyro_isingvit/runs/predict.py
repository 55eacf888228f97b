"""Predictions of a run, drawn in bounded memory.

Shapes: S samples, B batch, C classes.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_isingvit.core.errors import UserError, need_whole
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.core.processes import gathered, own_rows
from pyro_isingvit.core.random_state import RandomState, undisturbed
from pyro_isingvit.data.images import Images, as_images, network_chunk
from pyro_isingvit.methods.base import Networks
from pyro_isingvit.nets.margins import log_margins
from pyro_isingvit.nets.shape import widest_activation
from pyro_isingvit.nets.trunk import one_trunk, with_trunk
from pyro_isingvit.nets.vit import Watch
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.runs.run import Run

CHUNK = 2048
TRUNK_CHUNK = 256  # images whose tokens above the trunk are kept
MARGIN_BATCH = 64


@single_precision()
@torch.no_grad()
def draw_predictive(
    run: Run,
    images: Images | Tensor | np.ndarray,
    num_samples: int = 100,
    chunk: int = CHUNK,
    seed: int = 0,
    progress: bool = False,
) -> PredictiveDraws:
    """Draws weights from the guide and predicts every image with each draw.

    Draw s is the same whatever the chunk, and one draw serves all images. Dropout alone has noise of its own for
    every image, as it is used; there the draws depend on the chunk. Methods that are a single network give one draw,
    an ensemble one for each member.

    Several processes that train together (torch.distributed) share the images out and all get the whole result: all
    of them must call this.

    Args:
        run: a trained run.
        images: (B, channels, height, width) uint8, as the data set gives them: ``Images``, a tensor or an array.
        num_samples: S, at most as many as the method has networks.
        chunk: at most this many (draw, image) pairs pass through the network at a time; fewer where images are large,
            and at most 256 on a CPU, fewer where the network is wide: its caches then hold what passes.
        seed: of the draws; the global random state is left as it was.
        progress: show a progress bar.

    Returns:
        p(y | x, W_s) = softmax(f_{W_s}(x) / T) of every draw W_s ~ q, (S, B, C) (docs/method.md, Prediction).

    Raises:
        UserError: images that do not fit the run, or S or chunk below 1.

    Examples:
        >>> from pyro_isingvit import ViTConfig, draw_predictive, fit, load_data
        >>> data = load_data("digits", train_size=100)
        >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
        >>> draws = draw_predictive(run, data.test.images[:3], num_samples=5)
        >>> draws.probs.shape
        torch.Size([5, 3, 10])
    """
    need_whole(1, num_samples=num_samples, chunk=chunk)
    images = as_images(images)
    run.info.normalise(images[:1])  # refuses images that do not fit before any work
    batch, classes, most = len(images), run.info.num_classes, min(chunk, images.chunk)
    chunk = images_at_once(run, most)
    num_samples = min(num_samples, run.max_draws or num_samples)
    images = images.take(own_rows(batch))
    probs = torch.empty(num_samples, len(images), classes)
    # A CPU is faster with one draw after another than with their matrices stacked.
    group = 1 if run.device.type == "cpu" else max(1, min(chunk // max(batch, 1), num_samples))
    # Few images are normalised once, many anew for every draw.
    ready = list(images.batches(chunk, run.info.normalise, run.device)) if len(images) <= most else None
    with undisturbed(seed, run.device):
        if with_trunk(run.method):
            _images_first(run, images, probs, min(chunk, TRUNK_CHUNK), progress)
            return PredictiveDraws(gathered(probs, batch, 1, run.device))
        firsts = range(0, num_samples, group)
        unit = "draw" if group == 1 else f"x{group}"
        for first in tqdm(firsts, desc="draw", unit=unit, disable=not progress, dynamic_ncols=True):
            size = min(group, num_samples - first)
            networks = run.draw_networks(size, first)
            for i, x in enumerate(ready or images.batches(chunk, run.info.normalise, run.device)):
                logits = networks(x) / run.temperature  # (S, B, C)
                probs[first : first + size, i * chunk : (i + 1) * chunk] = logits.softmax(-1).cpu()
    return PredictiveDraws(gathered(probs, batch, 1, run.device))


def are_numbers(probs: Tensor) -> Tensor:
    """Whether all draws of an image are numbers: (S, B, C) -> (B,) bool."""
    return ~probs.sum((0, 2)).isnan()


def why_no_numbers(image: Tensor) -> str:
    """The likely cause, from the pixels of an image, as read."""
    ends = f"its pixels go from {float(image.min()):.4g} to {float(image.max()):.4g}"
    return f"{ends}; very large numbers often stand for missing data" if image.is_floating_point() else ends


def need_numbers(draws: PredictiveDraws, images: Images) -> PredictiveDraws:
    """The draws of images, if all of them are numbers.

    Raises:
        UserError: some are not; what their pixels are, and what to do.
    """
    bad = (~are_numbers(draws.probs)).nonzero()[:, 0].tolist()
    if bad:
        few = len(bad) < len(images)
        fix = (
            "Replace such values, or leave the images out" if few else "The network's weights are damaged: train again"
        )
        cause = why_no_numbers(images[bad[0] : bad[0] + 1])
        raise UserError(
            f"the predictions of {len(bad)} of {len(images)} images are not numbers, such as those of image {bad[0]} "
            f"(counted from 0): {cause}. {fix}."
        )
    return draws


def images_at_once(run: Run, chunk: int) -> int:
    """How many images pass through the run's network at a time, at most ``chunk``."""
    info = run.info
    # With a trunk each part of the images takes all draws, so that many parts would cost more than the caches save.
    widest = 1 if with_trunk(run.method) else widest_activation(run.config.vit, info.height, info.width)
    return network_chunk(chunk, run.device, widest)


class SameDraws:
    """Draws of a run that can be taken again: draw s is the same network each time.

    The random state from which each comes is kept. Draws are taken in order, from the first or again from an earlier
    one.

    Args:
        run: a trained run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.states = run, list[RandomState]()

    def network(self, s: int) -> Networks:
        """Draw s alone: normalised images (B, ...) -> logits (1, B, C) at T = 1."""
        if s == len(self.states):
            self.states.append(RandomState.now(self.run.device))
        self.states[s].restore(self.run.device)
        return self.run.draw_networks(1, s)

    def is_unchanged(self, s: int) -> bool:
        """Whether nothing random has happened since draw s began."""
        return self.states[s].is_that_of(RandomState.now(self.run.device))


def _images_first(run: Run, images: Images, probs: Tensor, chunk: int, progress: bool) -> None:
    """Fills ``probs`` (S, B, C) chunk by chunk, each with all draws in turn, so that one trunk serves them."""
    draws = SameDraws(run)
    bar = tqdm(total=len(images), desc="draw", unit="image", disable=not progress, dynamic_ncols=True)
    with bar:
        for i, x in enumerate(images.batches(chunk, run.info.normalise, run.device)):
            with one_trunk(run.method):
                for s in range(len(probs)):
                    logits = draws.network(s)(x) / run.temperature
                    probs[s, i * chunk : i * chunk + len(x)] = logits[0].softmax(-1).cpu()
            bar.update(len(x))


@torch.no_grad()
def attention_margins(run: Run, images: Images | Tensor | np.ndarray, batch: int = MARGIN_BATCH) -> Tensor:
    """Attention margins |det(I - Sigma_i A)| of images, at the posterior mean of the weights, pi m (nets/margins.py).

    Args:
        run: a run, trained with or without the log-barrier.
        images: (B, channels, height, width) uint8, as the data set gives them: ``Images``, a tensor or an array.
        batch: at most this many images pass through the network at a time.

    Returns:
        (B, L, H, T) on the CPU, without unit; L layers, H heads, T tokens (the CLS token, if any, comes first).

    Raises:
        UserError: images that do not fit the run, a run without masks, or batch below 1.

    Examples:
        >>> from pyro_isingvit import ViTConfig, attention_margins, fit, load_data
        >>> data = load_data("digits", train_size=100)
        >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
        >>> margins = attention_margins(run, data.test.images[:3])
        >>> margins.shape, bool((margins > 0).all())
        (torch.Size([3, 1, 2, 4]), True)
    """
    if batch < 1:
        raise UserError(f"`batch` must be at least 1, not {batch}.")
    images = as_images(images)
    run.info.normalise(images[:1])  # refuses images that do not fit before any work
    weights = {kind: run.guide.weight_retention(kind) * loc for kind, loc in run.guide.loc.items()}
    config = run.model.vit.config
    margins = torch.empty(len(images), config.depth, config.heads, len(run.model.vit.position))
    for i, x in enumerate(images.batches(batch, run.info.normalise, run.device)):
        watch: Watch = {"attention": []}
        run.model.vit(weights, x, watch)
        margins[i * batch : (i + 1) * batch] = log_margins(watch["attention"]).exp().cpu()
    return margins
