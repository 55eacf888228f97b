"""The likelihood-guided Ising posterior q(xi, W): slab times masks (docs/method.md, Posterior).

    q(W, xi) = q(xi) prod_e N(w_e; xi_e m_e, xi_e s_e^2 + (1 - xi_e) tau_0^2)

m and s are parameters, trained through the ELBO; s may also be fixed, or follow from the curvature (``scales``). q(xi)
itself is in ``masks``. ``update`` sets them every few steps from the curvature that ``observe`` collects: the paper's
alternation of mask and weight updates.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.core.processes import averaged, follow_first, own_rows, world
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising.coupling import COUPLINGS, Network
from pyro_isingvit.ising.curvature import SALIENCY, second_order_gain
from pyro_isingvit.ising.distributions import SpikeAndSlabPosterior, log_odds, slab_kl
from pyro_isingvit.ising.layout import MaskSite, Spread
from pyro_isingvit.ising.lean import QUARTER, Squares, is_large
from pyro_isingvit.ising.masks import MASK_POSTERIORS, Masks, Move, Phase
from pyro_isingvit.ising.model import IsingViT, announce
from pyro_isingvit.ising.scales import curvature_log_scale
from pyro_isingvit.ising.tempering import tempering
from pyro_isingvit.nets.vit import Weights

Squared = Callable[[str], Tensor]  # kind -> squares, (layers, out, in)
LEAST_SPIKE = 1e-3  # what empirical Bayes takes for the spike where that has no width


class IsingGuide(nn.Module):
    """Guide of ``IsingViT``; sampling it draws masks and weights, ``update`` moves the masks.

    Args:
        model: the model whose sites it covers; it is told N and the weight of the KL, which both must share.
        num_data: N, training images, at least 1.
        initial: weight means to start from, kind -> (layers, out, in); None: Xavier-uniform.

    Attributes:
        masks: q(xi), of the family that ``mask_posterior`` names.
        loc: m, kind -> (layers, out, in).
        log_scale: log s, likewise; without a gradient unless they are learned.

    Raises:
        UserError: unknown saliency, coupling or mask posterior, a setting out of its range, or weights to start from
            that are not those of the network.

    Examples:
        >>> from pyro_isingvit import IsingGuide, IsingViT, ViTConfig, load_data
        >>> data = load_data("digits", train_size=100)
        >>> model = IsingViT.for_data(data, ViTConfig(patch_size=4, width=8, heads=2, depth=1))
        >>> guide = IsingGuide(model, num_data=len(data.train))
        >>> guide.draw(5)["qkv"].shape  # (S, layers, out, in)
        torch.Size([5, 1, 24, 8])
        >>> guide.start_masks()
        >>> x = data.info.normalise(data.train.images[:16])
        >>> guide.observe(model, x, data.train.labels[:16])
        >>> guide.update(model)
        >>> guide.phase, bool(guide.retention("qkv").mean() < guide.max_keep)
        ('ising', True)
    """

    @single_precision()
    def __init__(self, model: IsingViT, num_data: int, initial: Weights | None = None) -> None:
        super().__init__()
        check_ising(model.ising)
        need(num_data >= 1, f"`num_data` must be at least 1, not {num_data}.")
        self.config, self.num_data, self.layout = model.ising, num_data, model.layout
        kappa_mask = tempering(self.config.kappa_mask, model.num_masked_weights, num_data)
        self.kappa_weights = tempering(self.config.kappa_weights, model.num_masked_weights, num_data)
        model.num_data, model.kappa_weights = num_data, self.kappa_weights
        weights = _fitting(initial, model) if initial else model.initial_weights()
        self.kinds = tuple(model.vit.matrix_shapes)
        self.loc = nn.ParameterDict({kind: nn.Parameter(weight.clone()) for kind, weight in weights.items()})
        start, learned = math.log(self.config.init_scale), self.config.posterior_scale == "learned"
        self.lean = is_large(self.config, model.num_masked_weights)
        scales = {kind: torch.full((1, 1, 1) if self.lean else w.shape, start) for kind, w in weights.items()}
        self.log_scale = nn.ParameterDict({k: nn.Parameter(s, requires_grad=learned) for k, s in scales.items()})
        self.masks = MASK_POSTERIORS[self.config.mask_posterior](self.config, self.layout, kappa_mask)
        self.curvature_updates: Tensor
        for kind, weight in weights.items() if not self.lean else ():
            self.register_buffer(f"curvature_{kind}", torch.zeros_like(weight))
        for name, site in self.layout.sites.items() if self.lean else ():
            self.register_buffer(f"saliency_{name}", torch.zeros(site.shape))
        self.register_buffer("curvature_updates", torch.zeros((), dtype=torch.long))
        self._scales: dict[str, tuple[tuple, Tensor]] = {}  # of each frozen kind, and what it was computed from
        # Checkpoints name the masks' tensors as if they were the guide's own.
        self.register_state_dict_post_hook(_lift_masks)
        self.register_load_state_dict_pre_hook(_lower_masks)

    # What the posterior is --------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Of the masks: pilot (every mask at one), ising, or frozen."""
        return self.masks.phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.masks.phase = phase

    @property
    def max_keep(self) -> float:
        """Retention is clipped to this."""
        return self.masks.max_keep

    @property
    def kappa(self) -> Tensor:
        """Weight of the likelihood in the mask field, a buffer: as set, or as last solved for the target retention."""
        return self.masks.kappa

    @property
    def kappa_mask(self) -> float:
        """``kappa`` as a number."""
        return self.masks.kappa_mask

    @property
    def temperature(self) -> Tensor:
        """Of the relaxed masks, a buffer."""
        return self.masks.temperature

    @property
    def mask_logit(self) -> nn.ParameterDict:
        """Learned mask logits, site -> site shape; empty where none are learned."""
        return self.masks.mask_logit

    def field(self, site: str) -> Tensor:
        """The buffer behind logit pi: set by ``update``, ``start_masks`` and ``freeze``; of the site's shape."""
        return self.masks.field(site)

    def logits(self, site: str) -> Tensor:
        """logit pi of a mask site, of the site's shape; a function of parameters where masks are learned."""
        return self.masks.logits(site)

    def retention(self, site: str) -> Tensor:
        """pi = q(xi = 1) of a mask site, of the site's shape."""
        return self.masks.retention(site)

    def weight_retention(self, kind: str) -> Tensor:
        """pi of every weight of a kind, (layers, out, in)."""
        values = {name: self.retention(name) for name in self.layout.sites}
        return self.layout.expand(kind, values).expand_as(self.loc[kind])

    def curvature(self, kind: str) -> Tensor:
        """h, the averaged curvature of a kind without its start-up bias, (layers, out, in); not of large networks."""
        return self.get_buffer(f"curvature_{kind}") / self._seen

    @property
    def _seen(self) -> float:
        """Weight of all curvature estimates in their average: 1 after many."""
        return max(1.0 - self.config.curvature_decay ** int(self.curvature_updates), 1e-12)

    @torch.no_grad()
    def gains(self) -> Masks:
        """Dl of every mask, what the data lose without its weights, site -> site shape, nats."""
        if self.lean:
            half = 0.5 * self.num_data / self._seen
            return {name: half * self.get_buffer(f"saliency_{name}").clamp(min=0.0) for name in self.layout.sites}
        gain = {kind: second_order_gain(self.curvature(kind), loc, self.num_data) for kind, loc in self.loc.items()}
        return {name: self.layout.reduce(site, gain) for name, site in self.layout.sites.items()}

    @torch.no_grad()
    def costs(self, model: IsingViT, moved: Squared) -> Masks:
        """KL of the slabs under every mask, what it takes to describe them, site -> site shape, nats.

        Args:
            model: for the widths of the slabs.
            moved: kind -> (m - m0)^2, (layers, out, in).
        """

        def cost(kind: str) -> Tensor:
            scale, tau_1 = self.scale(kind), model.tau_1(kind)
            return torch.addcmul(slab_kl(torch.zeros_like(scale), scale, tau_1), moved(kind), 0.5 / tau_1**2)

        def summed(site: MaskSite) -> Tensor:  # one kind at a time: a large network has no room for all
            parts = [spread.reduce(cost(kind)) for kind, spread in site.spreads.items()]
            return sum(parts[1:], start=parts[0])

        return {name: summed(site) for name, site in self.layout.sites.items()}

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Samples all mask sites, then all weight sites; the arguments are the model's and unused."""
        announce(self)
        with poutine.scale(scale=1.0 / self.kappa_weights):
            masks, retention = self.masks.sample()
            for kind in self.kinds:  # the model's order, which the mean-field check wants
                slab = SpikeAndSlabPosterior(
                    self.loc[kind],
                    self.log_scale[kind].exp(),
                    self.layout.expand(kind, masks),
                    self.layout.expand(kind, retention),
                    self.config.tau_0,
                )
                pyro.sample(f"w_{kind}", slab.to_event(3))

    @torch.no_grad()
    def draw(self, num_samples: int | None = None) -> Weights:
        """Weight draws without Pyro's handlers: kind -> (S, layers, out, in), or (layers, out, in) for None."""
        lead = () if num_samples is None else (num_samples,)
        masks, weights = self.masks.draw(num_samples), {}
        for kind, loc in self.loc.items():
            mask = self.layout.expand(kind, masks)
            noise = torch.randn(*lead, *loc.shape, dtype=loc.dtype, device=loc.device)
            slab = torch.addcmul(loc, self.log_scale[kind].exp(), noise)
            weights[kind] = mask * slab + (1.0 - mask) * (self.config.tau_0 * noise)
        return weights

    def scale(self, kind: str) -> Tensor:
        """s of a kind, broadcastable to (layers, out, in); one number where it is frozen and shared by all weights.

        Kept until ``log_scale`` is written to; writes through ``.data`` are not seen.
        """
        log_scale = self.log_scale[kind]
        if log_scale.requires_grad or log_scale.is_inference() or torch.is_inference_mode_enabled():
            return log_scale.exp()  # what inference mode makes could not be kept for training
        state = (log_scale.data_ptr(), log_scale._version)
        if kind not in self._scales or self._scales[kind][0] != state:
            first = log_scale.detach().flatten()[:1].view(1, 1, 1)
            self._scales[kind] = state, (first if bool((log_scale == first).all()) else log_scale.detach()).exp()
        return self._scales[kind][1]

    def moved(self, model: IsingViT, kind: str) -> Tensor:
        """m - m0: how far the means of a kind are from the centre of their slab, (layers, out, in)."""
        centre = model.centre(kind)
        return self.loc[kind] if centre is None else self.loc[kind] - centre

    @torch.no_grad()
    def kl_terms(self, model: IsingViT) -> tuple[float, float]:
        """(weight KL, mask KL) in nats, untempered, summed over the network."""
        weight = sum(
            (
                self.weight_retention(kind)
                * slab_kl(self.moved(model, kind), self.log_scale[kind].exp(), model.tau_1(kind))
            )
            .sum()
            .item()
            for kind in self.kinds
        )
        return weight, self.masks.kl(model)

    # How the masks move -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, model: IsingViT, images: Tensor, labels: Tensor) -> None:
        """Takes one curvature estimate on a batch into the exponential average, from which curvature scales follow.

        The first ``curvature_batch`` images are looked at. gnb squares B^(1/2) times a mean of B independent gradients:
        its expectation does not depend on B, and its relative variance falls to 2, not to 0, as B grows, so that few
        images do nearly as well as many. Several processes that train together (torch.distributed) all call this with
        the same whole batch; they share out as many of these images as they divide, one each at least, and
        take the same estimate.

        Args:
            model: the model, for its network.
            images: (B, channels, height, width), normalised.
            labels: (B,) or (B, C), which hutchinson and empirical_fisher read; the others take the images' weights
                from them.
        """
        most = -(-len(images) // QUARTER) if self.lean else len(images)
        count = max(min(self.config.curvature_batch, most), world())
        few = own_rows(count - count % world())  # as many on each process
        network: Any = model.likelihood.network(model.vit)
        estimate = SALIENCY[self.config.saliency](network, dict(self.loc.items()), images[few], labels[few])
        share = 1.0 - self.config.curvature_decay
        if self.lean:
            weighed = {
                kind: h.mul_(self.loc[kind].detach()).mul_(self.loc[kind].detach()) for kind, h in estimate.items()
            }
            for name, site in self.layout.sites.items():
                self.get_buffer(f"saliency_{name}").lerp_(averaged(self.layout.reduce(site, weighed)), share)
        for kind, curvature in estimate.items() if not self.lean else ():
            self.get_buffer(f"curvature_{kind}").lerp_(averaged(curvature), share)
        self.curvature_updates += 1
        if self.config.posterior_scale == "curvature":
            emphasis = self.config.curvature_factor * self.kappa_weights * self.num_data
            for kind, log_scale in self.log_scale.items():
                log_scale.copy_(curvature_log_scale(self.curvature(kind), model.tau_1(kind), emphasis))

    def start_masks(self) -> None:
        """Ends the pilot phase: every mask starts from the highest retention allowed."""
        self.masks.start()

    def freeze(self, model: IsingViT, threshold: float = 0.5) -> None:
        """Fixes each mask to kept (pi > threshold) or dropped, for fine-tuning; their KL is then constant."""
        self.masks.freeze(model, threshold)

    def set_noise(self, max_keep: float) -> None:
        """Sets max_keep; masks that were clipped, or are above it, go there at once; UserError outside (0, 1]."""
        self.masks.set_noise(max_keep)

    @torch.no_grad()
    def update(self, model: IsingViT, progress: float = 1.0) -> None:
        """One mean-field sweep: coupling, likelihood and description cost set every mask's prior and posterior.

        Args:
            model: its prior logits are set.
            progress: share of the Ising phase that has passed, in [0, 1]; with kappa_mask "auto" the wanted mean
                retention falls from the highest allowed to ``target_retention`` over the first half of it.
        """
        config, layout = self.config, self.layout
        made = None if self.lean else {kind: loc.detach() ** 2 for kind, loc in self.loc.items()}
        squared: Any = made or Squares(self.loc)

        def moved(kind: str) -> Tensor:
            if made is not None and not model.centred:
                return made[kind]
            return self.moved(model, kind).detach() ** 2

        if config.empirical_tau_1:
            self._fit_slabs(model, moved)
        network = Network(squared, model.vit.norm_gain.detach() ** 2, model.vit.readers, config.decay)

        def sweep(move: Move) -> None:
            def set_site(kind: str, layer: int, c: Tensor) -> Tensor:
                site = layout.site_of[kind]
                if site.coupled_kind == kind:
                    prior = config.J * _pool(site.spreads[kind], c, squared[kind][layer]) - log_odds(config.delta)
                    move(site.name, layer, prior)
                    model.prior_logits(site.name)[layer].copy_(prior)
                values = self.logits(site.name)[layer : layer + 1].sigmoid()
                return site.spreads[kind].expand(values)[0].expand_as(squared[kind][layer])

            COUPLINGS[config.coupling](network, set_site)

        self.masks.step(model, self.gains(), self.costs(model, moved), sweep, progress)
        follow_first([*self.masks.buffers(), *(model.prior_logits(name) for name in layout.sites)])

    def _fit_slabs(self, model: IsingViT, moved: Squared) -> None:
        """Empirical Bayes: tau_1^2 = sum pi ((m - m0)^2 + s^2) / sum pi per layer, kept above the spike."""
        for kind in self.kinds:
            keep = self.weight_retention(kind)
            total = (keep * (moved(kind) + (2 * self.log_scale[kind]).exp())).sum((1, 2), keepdim=True)
            floor = 10 * max(
                self.config.tau_0, LEAST_SPIKE
            )  # a layer whose masks all drop would send tau_1 to 0, and the KL to inf
            model.tau_1(kind).copy_((total / keep.sum((1, 2), keepdim=True)).sqrt().clamp(min=floor))


def _fitting(initial: Weights, model: IsingViT) -> Weights:
    """Weight means to start from as float32; raises UserError where they are not those of the network."""
    shapes = {kind: tuple(shape) for kind, shape in model.vit.matrix_shapes.items()}
    given = {kind: tuple(weight.shape) for kind, weight in initial.items()}
    need(given == shapes, f"`initial` has the weights {given}, but the network has {shapes}.")
    return {kind: initial[kind].float() for kind in shapes}


def _lift_masks(guide: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """masks.kappa -> kappa and so on, in what ``state_dict`` gives."""
    for name in [name for name in state if name.startswith(f"{prefix}masks.")]:
        own = prefix + name.removeprefix(f"{prefix}masks.")
        if own in state:
            raise ValueError(f"guide and mask posterior both have a tensor {own}; rename that of the mask posterior.")
        state[own] = state.pop(name)


def _lower_masks(guide: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """kappa -> masks.kappa and so on, before the guide takes a ``state_dict``."""
    assert isinstance(guide, IsingGuide)
    for name in guide.masks.state_dict():
        if prefix + name in state:
            state[f"{prefix}masks.{name}"] = state.pop(prefix + name)


def _pool(spread: Spread, c: Tensor, squared: Tensor) -> Tensor:
    """c of each mask of a layer: the mean of its weights' c, weighted by w^2; c (out, 1) or (1, 1)."""
    if c.numel() == 1:
        return c.reshape(())
    if spread.side == "both":
        return c
    covered = spread.reduce(squared[None])[0]
    return spread.reduce((squared * c)[None])[0] / covered.clamp(min=1e-30)


REGISTRIES: dict[str, Any] = {"saliency": SALIENCY, "coupling": COUPLINGS, "mask_posterior": MASK_POSTERIORS}


def check_ising(config: IsingConfig) -> None:
    """Raises UserError where a setting is out of its range."""
    for name, known in REGISTRIES.items():
        if getattr(config, name) not in known:
            raise UserError(f"unknown `{name}` {getattr(config, name)!r}; known: {', '.join(known)}.")
    for name in ("delta", "curvature_decay"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"`{name}` must lie strictly between 0 and 1, not {getattr(config, name)}.")
    for name in ("max_keep", "mask_damping", "target_retention"):
        value = getattr(config, name)
        if value != "auto" and not 0 < value <= 1:
            raise UserError(f"`{name}` must lie in (0, 1], not {value}.")
    for name in ("temperature", "final_temperature", "tau_1", "init_scale", "curvature_factor"):
        if not getattr(config, name) > 0:
            raise UserError(f"`{name}` must be positive, not {getattr(config, name)}.")
    need(config.tau_0 >= 0, f"`tau_0` must not be negative, but is {config.tau_0}.")
    if config.tau_0 >= config.tau_1:
        raise UserError(f"the spike `tau_0` ({config.tau_0}) must be narrower than the slab `tau_1` ({config.tau_1}).")
    need(0 <= config.decay <= 1, f"`decay` must lie in [0, 1], not {config.decay}.")
    for name in ("update_every", "curvature_batch"):
        need(getattr(config, name) >= 1, f"`{name}` must be at least 1, not {getattr(config, name)}.")
