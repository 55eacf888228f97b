"""The ELBO of ``ClosedFormELBO()(model, guide)`` without effect handlers, in little more than a plain step.

With one draw and noise on the weights, value, gradients and random numbers are the same, penalties included.
Only for masks that the guide sets itself (mask_posterior "likelihood_guided"), whose gradient nobody needs; masks that
are learned take the Pyro path.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.ising.channel_masks import masked_network
from pyro_isingvit.ising.distributions import bernoulli_kl, slab_kl
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.lean import Layers, Noise, NoisyLayers, apart
from pyro_isingvit.ising.masks import MASK_POSTERIORS
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.nets.vit import Watch

DRAWS = 4  # posterior draws of a training step where the settings leave it open


REWRITTEN = (  # methods whose work the fused path does itself: a subclass that overrides one takes the Pyro path
    (IsingViT, ("forward", "sample_weights")),
    (IsingGuide, ("forward",)),
)


def overridden(*modules: nn.Module) -> list[str]:
    """Methods of model or guide that the fused path would pass over, as ``Class.method``."""
    return [
        f"{type(module).__name__}.{name}"
        for module in modules
        for base, names in REWRITTEN
        if isinstance(module, base)
        for name in names
        if getattr(type(module), name) is not getattr(base, name)
    ]


def fusible(model: IsingViT, *guides: IsingGuide) -> bool:
    """Whether the fused path computes this model's objective, under this guide if one is given."""
    return MASK_POSTERIORS[model.ising.mask_posterior].fusible and not overridden(model, *guides)


class FusedELBO(nn.Module):
    """loss = -(N / B) sum_b log p(y_b | W_g(b)) + (weight KL + mask KL) / kappa_weights + N penalties, nats.

    The batch is cut into ``draws`` parts, each with its own draw W_g of the guide: the same expectation as with one
    draw for all, at the cost of one forward pass, and with less noise from the draw in its gradient. With "image" every
    image has a draw of the masks of its own (``channel_masks``): each term of the likelihood is an expectation
    over q by itself. Masks on single weights cannot be drawn so.

    With noise "activations" (local reparameterisation, Kingma et al. 2015) every token of every image has noise of its
    own, Gaussian with the two first moments that the weights' posterior gives a layer's outputs:

        y = x M^T + b + ((x^2) V^T)^(1/2) eps,   M = pi m,   V = pi (m^2 + s^2) + (1 - pi) tau_0^2 - M^2

    It ignores that the tokens of an image share their weights, and that a mask is no Gaussian: an estimate of the same
    expectation up to that, at two matrix products a layer.

    The batch may itself be one of P equal, contiguous parts of the batch of a step (``part``). Each part then generates
    the random numbers of all draws and takes those of its own rows, so that the mean loss of the P parts, computed from
    the same random-number state, is the loss of the whole batch.

    Args:
        model: for which ``fusible`` holds.
        guide: its posterior.
        draws: "image", or parts of a batch, S; where that many do not fit, the largest smaller number that divides the
            step's batch and is a multiple of P (a part has several draws) or a divisor of it (several parts share one).
        noise: where the noise of the posterior enters.
        compiled: run the network through torch.compile.
        group: neighbouring images that share a draw of the masks whatever ``draws`` is; 2 where they are mixed inside.

    Attributes:
        part: (number of the part, P); (0, 1) is the whole batch.
    """

    def __init__(
        self,
        model: IsingViT,
        guide: IsingGuide,
        draws: int | Literal["image"] = 1,
        noise: Literal["weights", "activations"] = "weights",
        compiled: bool = False,
        group: int = 1,
    ) -> None:
        super().__init__()
        self.model, self.guide, self.draws, self.noise, self.group = model, guide, draws, noise, group
        network = partial(masked_network, model.vit, model.layout) if draws == "image" else model.vit.forward
        self._network: Callable[..., Tensor] = torch.compile(network) if compiled else network
        self._in_place = not compiled  # whether the backward pass may write where it likes
        self.part = (0, 1)
        self._seen: tuple[tuple[int, int], ...] = ()
        self._constant, self._retention = (torch.zeros(()), torch.zeros(())), dict[str, Tensor]()

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """The loss of a batch, the sum of its ``terms``."""
        return torch.stack([*self.terms(x, y, rows).values()]).sum()

    def terms(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of the loss, nats over all images.

        Args:
            x: (B, channels, height, width), normalised.
            y: (B,) class numbers or (B, C) probabilities.
            rows: (B,) numbers of the images within the training part, for penalties that read them.

        Returns:
            nll, weight_kl, mask_kl, and each penalty by its name.
        """
        model, guide, layout = self.model, self.guide, self.guide.layout
        mask_kl, kl = self.constant_kl()
        layers = dict[str, Layers]()  # of a large network
        for kind in guide.kinds:
            tau_1 = model.tau_1(kind)
            pi = layout.expand(kind, self._retention)
            if guide.log_scale[kind].requires_grad:
                kl = kl + (pi * slab_kl(guide.moved(model, kind), guide.scale(kind), tau_1)).sum()
            elif guide.lean:
                moving, layers[kind] = apart(guide.loc[kind], model.centre(kind), pi, tau_1)
                kl = kl + moving
            else:  # pi (m - m0)^2 / (2 tau_1^2), whose gradient is the pull: half the product with it
                loc = guide.moved(model, kind)
                pull = (pi * loc.detach()).div_(tau_1**2)
                product = torch.dot(pull.flatten(), loc.flatten())
                kl = kl + product - 0.5 * product.detach()
        path: Callable[..., Tensor] = self._by_activations if self.noise == "activations" else self._by_weights
        if self.draws == "image":
            path = partial(self._by_images, layers if self._in_place else {})
        seen = model.penalties.look(path, x, y, rows)
        size = len(x) if model.num_data is None else model.num_data
        return {
            "nll": size * model.likelihood.nll(seen.logits, y),
            "weight_kl": kl / model.kappa_weights,
            "mask_kl": mask_kl / model.kappa_weights,
            **model.penalties.terms(seen, size),
        }

    def _by_weights(self, x: Tensor, watch: Watch | None) -> Tensor:
        """Logits (B, C), each part of the batch under a draw of its own."""
        guide, layout, weights = self.guide, self.guide.layout, {}
        draws, own = self.own_draws(len(x))
        kept = {name: draw_masks(pi, draws, own) for name, pi in self._retention.items()}
        for kind in guide.kinds:  # the order in which Pyro draws
            loc = guide.loc[kind]
            # Parts of the batch share the Gaussian noise, which is small: each is a draw of q all the same.
            noise = torch.randn_like(loc)
            # xi (m + s e) + (1 - xi) tau_0 e
            wider = torch.addcmul(loc, guide.scale(kind) - guide.config.tau_0, noise)
            weights[kind] = torch.addcmul(guide.config.tau_0 * noise, layout.expand(kind, kept), wider)
        mine = len(range(draws)[own])
        images = x if mine == 1 else x.unflatten(0, (mine, -1))
        logits = self._network(weights, images, watch).flatten(0, -2)  # from kind -> ([S,] layers, out, in)
        if mine > 1 and watch:  # (S, B / S, ...) -> (B, ...): a penalty sees images, whatever draw each had
            for place, values in watch.items():
                watch[place] = [_flat(value) for value in values]
        return logits

    def _by_images(self, layers: dict[str, Layers], x: Tensor, watch: Watch | None) -> Tensor:
        """Logits (B, C), each image under masks of its own; the images share the Gaussian noise, which is small.

        ``layers`` are those of a large network, already cut; {} to read the guide's.
        """
        guide, weights, spikes = self.guide, dict[str, Tensor](), dict[str, Tensor]()
        (part, parts), count = self.part, len(x) // self.group
        masks = draw_all(self._retention, parts * count, slice(part * count, (part + 1) * count))
        if self.group > 1:
            masks = {name: mask.repeat_interleave(self.group, 0) for name, mask in masks.items()}
        if guide.lean and not guide.config.tau_0:
            whole = dict(guide.loc.items())
            scales = {kind: float(guide.scale(kind)) for kind in whole}
            gradients = {kind: cut.gradient for kind, cut in layers.items()}
            matrices = {kind: cut.matrices for kind, cut in layers.items()} or whole
            return self._network(matrices, {}, masks, x, watch, NoisyLayers(scales, Noise.draw(whole), gradients))
        for kind in guide.kinds:
            noise, tau_0 = torch.randn_like(guide.loc[kind]), guide.config.tau_0
            # xi (m + s e) + (1 - xi) tau_0 e: what a mask multiplies, and what is there without it
            weights[kind] = torch.addcmul(guide.loc[kind], guide.scale(kind) - tau_0, noise)
            if tau_0:
                spikes[kind] = tau_0 * noise
        return self._network(weights, spikes, masks, x, watch)

    def _by_activations(self, x: Tensor, watch: Watch | None) -> Tensor:
        """Logits (B, C) with noise of its own for every token."""
        guide, layout, means, variances = self.guide, self.guide.layout, {}, {}
        for kind in guide.kinds:
            loc, pi = guide.loc[kind], layout.expand(kind, self._retention)
            slab = loc**2 + guide.scale(kind) ** 2
            means[kind] = pi * loc
            variances[kind] = pi * slab + (1 - pi) * guide.config.tau_0**2 - means[kind] ** 2

        def noisy(kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            mean = F.linear(x, weight, bias)
            variance = F.linear(x**2, variances[kind][layer])
            return torch.addcmul(mean, variance.clamp(min=1e-12).sqrt(), torch.randn_like(mean))

        return self._network(means, x, watch, noisy)

    def own_draws(self, batch: int) -> tuple[int, slice]:
        """How many draws the step's batch is shared out among, and which of them this part of ``batch`` images has."""
        (part, parts), most = self.part, self.draws
        assert most != "image"

        def fits(count: int) -> bool:
            return parts * batch % (count * self.group) == 0 and (count % parts == 0 or parts % count == 0)

        draws = max(count for count in range(1, most + 1) if fits(count))
        start = part * draws // parts
        return draws, slice(start, start + max(1, draws // parts))

    @torch.no_grad()
    def constant_kl(self) -> tuple[Tensor, Tensor]:
        """What does not move with the means, in nats: the masks' KL; the slabs' share of scales that are frozen.

        Computed again, and the retention with it, only when a tensor that it reads was written to (writes through
        ``.data`` are not seen), and always in inference mode, whose tensors could not be kept for training.
        """
        model, guide, layout = self.model, self.guide, self.guide.layout
        pairs = [(guide.field(name), model.prior_logits(name)) for name in layout.sites]
        frozen = [kind for kind in guide.kinds if not guide.log_scale[kind].requires_grad]
        slabs = [(guide.log_scale[kind], model.tau_1(kind)) for kind in frozen]
        state = tuple((tensor.data_ptr(), tensor._version) for pair in (*pairs, *slabs) for tensor in pair)
        if state != self._seen or torch.is_inference_mode_enabled():
            self._retention = {name: guide.field(name).sigmoid() for name in layout.sites}
            masks = torch.stack([bernoulli_kl(q, p).sum() for q, p in pairs]).sum()
            total = torch.zeros_like(masks)
            for kind, (_, tau_1) in zip(frozen, slabs, strict=True):
                scale = guide.scale(kind)
                cost = layout.expand(kind, self._retention) * slab_kl(torch.zeros_like(scale), scale, tau_1)
                total = total + cost.expand(guide.loc[kind].shape).sum()
            self._constant, self._seen = (masks, total), () if torch.is_inference_mode_enabled() else state
        return self._constant


def draw_all(pi: dict[str, Tensor], draws: int, own: slice = slice(None)) -> dict[str, Tensor]:
    """``draw_masks`` for all sites at once, which is faster: site -> (draws of ``own``, *site shape)."""
    sizes = [site.numel() for site in pi.values()]
    drawn = draw_masks(torch.cat([site.flatten() for site in pi.values()]), draws, own).view(-1, sum(sizes))
    return {name: flat.unflatten(-1, pi[name].shape) for name, flat in zip(pi, drawn.split(sizes, -1), strict=True)}


def _flat(value: Any) -> Any:
    """Joins the axes of draws and images, of a tensor or a tuple of tensors."""
    return tuple(map(_flat, value)) if isinstance(value, tuple) else value.flatten(0, 1)


def draw_masks(pi: Tensor, draws: int, own: slice = slice(None)) -> Tensor:
    """Independent Bernoulli(pi) draws as 0.0 and 1.0: of pi's shape, or (draws, *shape) for more than one.

    ``own`` takes some of the draws alone; the random numbers are generated for all.
    One draw takes the numbers that Pyro's guide takes. More are cut from 64 random bits, 16 each, which is four times
    as fast on a CPU; pi is then rounded to a multiple of 2^-16.
    """
    if draws == 1:
        return torch.ge(torch.rand_like(pi), 1.0 - pi, out=torch.empty_like(pi))
    words = torch.empty(-(-draws // 4), *pi.shape, dtype=torch.int64, device=pi.device).random_(-(2**63), None)
    numbers = words.view(torch.int16).view(-1, *pi.shape)[:draws][own]  # uniform on -2^15 .. 2^15 - 1
    if len(numbers) == 1:
        numbers = numbers[0]  # without a sample axis the network is faster
    bound = (pi * 2**16 - 2**15).round()
    return torch.lt(numbers, bound, out=pi.new_empty(numbers.shape))  # straight to floats: half the time
