"""Test-time adaptation: a run's LayerNorms follow unlabelled images of another kind, and come back exactly.

    tent     L(x) = H(p)                                              every image (Wang et al. 2021, arXiv 2006.10726)
    eata     L(x) = exp(E0 - H(p)) H(p), E0 = margin ln C             images with H(p) < E0 that are not like those
                                                                      before (Niu et al. 2022, arXiv 2204.02610)
    eata-c   L(x) = exp(E0 - H(p)) (I(y; W) + sign c H(p))            the same images (after Tan et al. 2024, arXiv
                                                                      2403.11491)

p is the mean prediction of S networks drawn from the posterior. Their disagreement is the mutual information
I(y; W) = mean over draws of KL(p_s | p): what eata-c compares a full network and its sub-networks for. Its sign is +
where every draw names the same class, so that confidence grows there, and - where they differ, so that it falls. Both
last kinds add ``fisher`` sum F (theta - theta_0)^2, F the mean square of the gradients of some images' own answers.

``crowd`` keeps an image only while the adapted network is no less sure of the first network's answer than that was
(after Lee et al. 2023, arXiv 2308.06879): what others teach must not make it doubt.

Nothing but gains and offsets of LayerNorms moves. Labels play no part. Adaptation may harm, most of all where classes
come in other shares than in training (docs/adaptation.md): it is never on by itself.

Shapes: S samples, B batch, C classes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyro_isingvit.core.errors import need, need_whole
from pyro_isingvit.core.random_state import RandomState, undisturbed
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.predictive.metrics import entropy
from pyro_isingvit.runs.run import Run

Kind = Literal["tent", "eata", "eata-c"]
KINDS: tuple[Kind, ...] = ("tent", "eata", "eata-c")
RATES: dict[Kind, float] = {"tent": 1e-3, "eata": 1e-2, "eata-c": 5e-2}  # by dev images, docs/adaptation.md
NORMS = ("norm_gain", "norm_bias", "pre_gain", "pre_bias")
FISHER_IMAGES = 512
MEMORY = 0.9  # of the moving mean of predictions that redundant images are told by


@dataclass(frozen=True)
class Adaptation:
    """How LayerNorms are adapted."""

    kind: Kind = "eata"
    """Which loss."""
    crowd: bool = False
    """Leave out images of whose first answer the adapted network is less sure."""
    lr: float | None = None
    """Learning rate of stochastic gradient descent with momentum 0.9. None: 1e-3 for tent, 1e-2 for eata, 5e-2 for
    eata-c."""
    passes: int = 1
    """Passes over the images."""
    batch_size: int = 64
    """Images of a step."""
    draws: int = 4
    """S, networks drawn in a step."""
    margin: float = 0.4
    """eata, eata-c: images whose entropy is below this share of ln C are reliable."""
    redundancy: float | None = None
    """eata, eata-c: images whose prediction has a larger cosine with the mean of those before are left out; 1: none.
    None: 0.4 for eata, 1 for eata-c."""
    fisher: float = 2000.0
    """eata, eata-c: pull of the LayerNorms towards where they were."""
    confidence: float = 0.1
    """eata-c: c, weight of the entropy that falls or rises."""
    seed: int = 0
    """Of the order of the images and of the draws."""

    def check(self) -> None:
        """Raises UserError for values out of their range."""
        need(self.kind in KINDS, f"`kind` of an adaptation must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        need_whole(1, passes=self.passes, batch_size=self.batch_size, draws=self.draws)
        for name in ("margin", "fisher", "confidence"):
            need(getattr(self, name) >= 0, f"`{name}` of an adaptation must not be negative: {getattr(self, name)}.")
        need(self.rate > 0, f"`lr` of an adaptation must be above 0, not {self.lr}.")
        need(0 < self.most_alike <= 1, f"`redundancy` of an adaptation is a cosine above 0, not {self.redundancy}.")

    @property
    def rate(self) -> float:
        """``lr``, or the kind's own."""
        return RATES[self.kind] if self.lr is None else self.lr

    @property
    def most_alike(self) -> float:
        """``redundancy``, or the kind's own."""
        return (1.0 if self.kind == "eata-c" else 0.4) if self.redundancy is None else self.redundancy


@dataclass
class Adapted:
    """What an adaptation did."""

    images: int = 0
    """Images seen, over all passes."""
    used: int = 0
    """Those that a step was made for."""
    moved: float = 0.0
    """Largest change of a LayerNorm's gain or offset."""


@contextmanager
def adapted(
    run: Run, images: Images | Tensor | np.ndarray, how: Adaptation | None = None, progress: bool = False
) -> Iterator[Adapted]:
    """Within it, the run's LayerNorms are adapted to images; afterwards they are what they were, bit for bit.

    Args:
        run: a trained run; changed in place until the block ends.
        images: (B, channels, height, width) as the data set gives them, without labels.
        how: the loss and its settings; None: ``eata``.
        progress: show a progress bar.

    Yields:
        what was done.

    Raises:
        UserError: values out of their range, images that do not fit the run, or a method whose predictions do not read
            LayerNorms that could be adapted.

    Examples:
        >>> from pyro_isingvit import Adaptation, ViTConfig, adapted, fit, load_data
        >>> data = load_data("digits", train_size=400)
        >>> run = fit(ViTConfig(patch_size=4, width=16, heads=2, depth=1), data, epochs=5, progress=False)
        >>> before = run.predict(data.test.images[:20], 5).mean
        >>> dark = data.test.images[:] // 2
        >>> with adapted(run, dark, Adaptation("tent")) as done:
        ...     draws = run.predict(dark, 5)
        >>> done.images, done.moved > 0
        (360, True)
        >>> bool((run.predict(data.test.images[:20], 5).mean == before).all())
        True
    """
    how = how or Adaptation()
    how.check()
    images = as_images(images)
    need(len(images) > 0, "`images` has none to adapt to.")
    run.info.normalise(images[:1])  # refuses images that do not fit before any work
    norms = _norms(run)
    start = [norm.detach().clone() for norm in norms]
    wanted = [parameter.requires_grad for parameter in run.method.parameters()]
    try:
        for parameter in run.method.parameters():
            parameter.requires_grad_(False)
        for norm in norms:
            norm.requires_grad_(True)
        with undisturbed(how.seed, run.device), torch.enable_grad():
            done = _adapt(run, images, how, norms, start, progress)
        for norm in norms:
            norm.requires_grad_(False)
        yield done
    finally:
        with torch.no_grad():
            for norm, value in zip(norms, start, strict=True):
                norm.copy_(value)
                norm.grad = None
        for parameter, grad in zip(run.method.parameters(), wanted, strict=True):
            parameter.requires_grad_(grad)


def _norms(run: Run) -> list[Tensor]:
    networks = [module for module in run.method.modules() if isinstance(module, ViT)]
    norms: list[Tensor] = [
        parameter for network in networks for name, parameter in network.named_parameters() if name in NORMS
    ]
    need(
        len(networks) == 1 and norms,
        f"predictions of method {run.config.method} do not read one network's LayerNorms; adapt a run of method ising.",
    )
    return norms


def _adapt(
    run: Run, images: Images, how: Adaptation, norms: list[Tensor], start: list[Tensor], progress: bool
) -> Adapted:
    classes, done = run.info.num_classes, Adapted()
    limit = how.margin * math.log(classes)
    optimizer = torch.optim.SGD(norms, lr=how.rate, momentum=0.9)
    weights = _fisher(run, images, how, norms) if how.kind != "tent" and how.fisher else None
    mean: Tensor | None = None
    generator = torch.Generator().manual_seed(how.seed)
    steps = how.passes * -(-len(images) // how.batch_size)
    bar = tqdm(total=steps, desc="adapt", unit="step", dynamic_ncols=True, disable=not progress)
    step = 0
    with bar:
        for _ in range(how.passes):
            for rows in torch.randperm(len(images), generator=generator).split(how.batch_size):
                x = run.info.normalise(images[rows].to(run.device))
                first = _at(start, norms, run, x, how, step) if how.crowd else None
                probs = _draw(run, x, how, step)
                mixed = probs.mean(0)
                unsure = entropy(mixed)
                chosen = torch.ones_like(unsure, dtype=torch.bool)
                if how.kind != "tent":
                    chosen &= unsure.detach() < limit
                    if mean is not None:
                        chosen &= F.cosine_similarity(mixed.detach(), mean, dim=-1) <= how.most_alike
                if first is not None:
                    confidence, label = first.max(-1)
                    chosen &= mixed.detach().gather(-1, label[:, None])[:, 0] >= confidence
                done.images += len(x)
                step += 1
                bar.update()
                if not bool(chosen.any()):
                    continue
                if how.kind != "tent":
                    seen = mixed.detach()[chosen].mean(0)
                    mean = seen if mean is None else MEMORY * mean + (1 - MEMORY) * seen
                loss = _losses(probs, mixed, unsure, how, limit)[chosen].mean()
                if weights is not None:
                    pulls = zip(weights, norms, start, strict=True)
                    loss = loss + how.fisher * sum((w * (norm - old).square()).sum() for w, norm, old in pulls)
                need(bool(loss.isfinite()), "the adaptation diverged: its loss is not finite; lower `lr` or `fisher`.")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                done.used += int(chosen.sum())
    done.moved = max(float((norm.detach() - old).abs().max()) for norm, old in zip(norms, start, strict=True))
    return done


def _draw(run: Run, x: Tensor, how: Adaptation, step: int) -> Tensor:
    """Probabilities (S, B, C) of networks drawn anew."""
    draws, first = how.draws, step * how.draws
    if (most := run.max_draws) is not None:
        draws, first = min(draws, most), 0
    return (run.draw_networks(draws, first)(x) / run.temperature).softmax(-1)


def _losses(probs: Tensor, mean: Tensor, unsure: Tensor, how: Adaptation, limit: float) -> Tensor:
    """L(x) of each image, (B,)."""
    if how.kind == "tent":
        return unsure
    weight = (limit - unsure.detach()).exp()
    if how.kind == "eata":
        return weight * unsure
    information = unsure - entropy(probs).mean(0)
    agree = (probs.argmax(-1) == mean.argmax(-1)).all(0)
    return weight * (information + how.confidence * torch.where(agree, unsure, -unsure))


@torch.no_grad()
def _at(start: list[Tensor], norms: list[Tensor], run: Run, x: Tensor, how: Adaptation, step: int) -> Tensor:
    """Mean prediction (B, C) of the first network; the next draws are the same ones."""
    now, state = [norm.detach().clone() for norm in norms], RandomState.now(run.device)
    for norm, value in zip(norms, start, strict=True):
        norm.copy_(value)
    first = _draw(run, x, how, step).mean(0)
    for norm, value in zip(norms, now, strict=True):
        norm.copy_(value)
    state.restore(run.device)
    return first


def _fisher(run: Run, images: Images, how: Adaptation, norms: list[Tensor]) -> list[Tensor]:
    """Mean over batches of the squared gradient of CE(y, p), y the answers themselves; as each norm."""
    total, count = [torch.zeros_like(norm) for norm in norms], 0
    rows = torch.linspace(0, len(images) - 1, min(len(images), FISHER_IMAGES)).round().long()
    for part in rows.split(how.batch_size):
        mean = _draw(run, run.info.normalise(images[part].to(run.device)), how, count).mean(0)
        loss = F.nll_loss(mean.clamp(min=1e-12).log(), mean.detach().argmax(-1))
        for each, gradient in zip(total, torch.autograd.grad(loss, norms, allow_unused=True), strict=True):
            if gradient is not None:
                each += gradient.square()
        count += 1
    return [each / count for each in total]
