"""The likelihood-guided Ising posterior q(xi, W) (METHOD sections 2 to 4).

    q(W, xi) = prod_g Bernoulli(xi_g; pi_g) prod_e N(w_e; xi_e m_e, xi_e s_e^2 + (1 - xi_e) tau_0^2)
    logit pi_g = J c_g - logit(delta) + kappa_mask Dl_g - omega KL_g

m and s are parameters, trained through the ELBO; pi and the curvature behind Dl are buffers, set by ``update``
every few steps: the paper's alternation of mask and weight updates. With mask_posterior "learned" logit pi is a
parameter instead, trained by relaxed-Bernoulli gradients with the Ising field J c - logit(delta) as its prior; with
"hybrid" a parameter is added to the field.
"""

import math
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.processes import averaged, follow_first, own_rows, world
from pyro_isingvit.core.settings import IsingConfig, Tempering
from pyro_isingvit.ising.coupling import COUPLINGS, Network
from pyro_isingvit.ising.curvature import SALIENCY, second_order_gain
from pyro_isingvit.ising.distributions import SelectionMask, SpikeAndSlabPosterior, bernoulli_kl, slab_kl
from pyro_isingvit.ising.layout import WEIGHT, Spread
from pyro_isingvit.ising.model import CERTAIN, IsingViT
from pyro_isingvit.ising.noise import UNFITTED_KEEP, fitted_keep
from pyro_isingvit.nets.vit import Weights

Phase = Literal["pilot", "ising", "frozen"]
BISECTION_SAMPLE = 8_192  # masks looked at to solve for kappa_mask
BISECTIONS = 20  # at most, of a range of 50 in log kappa_mask
CLOSE = 1e-3  # of the target retention is close enough
LOGIT_BOUND = 10.0  # mask logits stay within +-10: a mask can always come back


def tempering(kappa: Tempering | Literal["auto"], num_weights: int, num_data: int) -> float:
    """The number behind a tempering setting.

    exact = 1, data_emphasis = max(1, P / N), batch_mean = 1 / N (the likelihood counts as one image), no_kl = 1e30
    (the KL does not count), auto = 1 to start with.

    Raises:
        UserError: not positive.
    """
    named = {
        "exact": 1.0, "data_emphasis": max(1.0, num_weights / num_data), "batch_mean": 1.0 / num_data, "no_kl": 1e30,
        "auto": 1.0,
    }  # fmt: skip
    value = named[kappa] if isinstance(kappa, str) else float(kappa)
    if not value > 0:
        raise UserError(f"kappa must be positive, not {value}.")
    return value


class IsingGuide(nn.Module):
    """Guide of ``IsingViT``; sampling it draws masks and weights, ``update`` moves the masks.

    Args:
        model: the model whose sites it covers.
        num_data: N, training images.
        initial: weight means to start from, kind -> (layers, out, in); None: Xavier-uniform.

    Raises:
        UserError: unknown saliency or coupling, or a setting out of its range.
    """

    def __init__(self, model: IsingViT, num_data: int, initial: Weights | None = None) -> None:
        super().__init__()
        check_ising(model.ising)
        self.config, self.num_data, self.layout = model.ising, num_data, model.layout
        kappa_mask = tempering(self.config.kappa_mask, model.num_masked_weights, num_data)
        self.register_buffer("kappa", torch.tensor(kappa_mask, dtype=torch.double))
        self.kappa_weights = tempering(self.config.kappa_weights, model.num_masked_weights, num_data)
        weights = initial or model.vit.initial_weights()
        self.kinds = tuple(model.vit.matrix_shapes)
        self.loc = nn.ParameterDict({kind: nn.Parameter(weight.clone()) for kind, weight in weights.items()})
        start = math.log(self.config.init_scale)
        self.log_scale = nn.ParameterDict(
            {
                kind: nn.Parameter(
                    torch.full_like(weight, start), requires_grad=self.config.posterior_scale == "learned"
                )
                for kind, weight in weights.items()
            }
        )
        self.kappa: Tensor
        self.curvature_updates: Tensor
        for kind, weight in weights.items():
            self.register_buffer(f"curvature_{kind}", torch.zeros_like(weight))
        for name, site in self.layout.sites.items():
            self.register_buffer(f"logit_{name}", torch.full(site.shape, CERTAIN))
        learns = self.config.mask_posterior != "likelihood_guided"
        self.mask_logit = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(site.shape)) for name, site in self.layout.sites.items() if learns}
        )
        self.phase: Phase = "pilot"
        self.max_keep = UNFITTED_KEEP if self.config.max_keep == "auto" else self.config.max_keep
        self._scales: dict[str, tuple[tuple, Tensor]] = {}  # of each frozen kind, and what it was computed from
        self._sampled: dict[str, tuple[Tensor, Tensor]] = {}  # what _sampled_masks found
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(self.config.temperature))
        self.register_buffer("curvature_updates", torch.zeros((), dtype=torch.long))

    # What the posterior is --------------------------------------------------------------------------------------

    @property
    def kappa_mask(self) -> float:
        """Weight of the likelihood in the mask field: as set, or as last solved for the target retention."""
        return float(self.kappa)

    def field(self, site: str) -> Tensor:
        """The buffer behind logit pi: set by ``update``, ``start_masks`` and ``freeze``; of the site's shape."""
        return self.get_buffer(f"logit_{site}")

    def logits(self, site: str) -> Tensor:
        """logit pi of a mask site, of the site's shape; a function of parameters where masks are learned."""
        if self.phase != "ising" or site not in self.mask_logit:
            return self.field(site)
        logits = self.field(site) + self.mask_logit[site]
        bounded = logits.clamp(-LOGIT_BOUND, self._highest)
        return logits + (bounded - logits).detach()  # the gradient goes through the bounds, so that masks come back

    def get_extra_state(self) -> dict[str, Any]:
        """The phase and max_keep, which are no tensors, for ``state_dict``."""
        return {"phase": self.phase, "max_keep": self.max_keep}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The phase and max_keep, from ``state_dict``; before version 0.3 max_keep was as set."""
        keep = float(state.get("max_keep", self.max_keep))
        need(0 < keep <= 1, f"max_keep is {keep}")
        self.phase, self.max_keep = state["phase"], keep

    def retention(self, site: str) -> Tensor:
        """pi = q(xi = 1) of a mask site, of the site's shape."""
        return self.logits(site).sigmoid()

    def weight_retention(self, kind: str) -> Tensor:
        """pi of every weight of a kind, (layers, out, in)."""
        values = {name: self.retention(name) for name in self.layout.sites}
        return self.layout.expand(kind, values).expand_as(self.loc[kind])

    def curvature(self, kind: str) -> Tensor:
        """h, the averaged curvature of a kind without its start-up bias, (layers, out, in)."""
        seen = 1.0 - self.config.curvature_decay ** int(self.curvature_updates)
        return self.get_buffer(f"curvature_{kind}") / max(seen, 1e-12)

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Samples all mask sites, then all weight sites; the arguments are the model's and unused."""
        masks, retention = {}, {}
        with poutine.scale(scale=1.0 / self.kappa_weights):
            for name, site in self.layout.sites.items():
                logits = self.logits(name)
                mask = SelectionMask(self.temperature, logits=logits, validate_args=False)
                masks[name] = pyro.sample(f"xi_{name}", mask.to_event(len(site.shape)))
                retention[name] = logits.sigmoid()
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
        masks = {name: torch.bernoulli(self.retention(name).expand(*lead, *site.shape))
                 for name, site in self.layout.sites.items()}  # fmt: skip
        weights = {}
        for kind, loc in self.loc.items():
            mask = self.layout.expand(kind, masks)
            noise = torch.randn(*lead, *loc.shape, device=loc.device)
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

    @torch.no_grad()
    def kl_terms(self, model: IsingViT) -> tuple[float, float]:
        """(weight KL, mask KL) in nats, untempered, summed over the network."""
        weight = sum(
            (self.weight_retention(kind) * slab_kl(loc, self.log_scale[kind].exp(), model.tau_1(kind))).sum().item()
            for kind, loc in self.loc.items()
        )
        mask = sum(bernoulli_kl(self.logits(name), model.prior_logits(name)).sum().item() for name in self.layout.sites)
        return weight, mask

    # How the masks move -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, model: IsingViT, images: Tensor, labels: Tensor) -> None:
        """Takes one curvature estimate on a batch into the exponential average.

        The first ``curvature_batch`` images are looked at. gnb squares B^(1/2) times a mean of B independent gradients:
        its expectation does not depend on B, and its relative variance falls to 2, not to 0, as B grows, so that few
        images do nearly as well as many. Several processes that train together (torch.distributed) all call this with
        the same whole batch; they share out as many of these images as they divide, one each at least, and
        take the same estimate.

        Args:
            model: the model, for its network.
            images: (B, channels, height, width), normalised.
            labels: (B,) or (B, C), which hutchinson and empirical_fisher read.
        """
        count = max(min(self.config.curvature_batch, len(images)), world())
        few = own_rows(count - count % world())  # as many on each process
        estimate = SALIENCY[self.config.saliency](model.vit, dict(self.loc.items()), images[few], labels[few])
        for kind, curvature in estimate.items():
            self.get_buffer(f"curvature_{kind}").lerp_(averaged(curvature), 1.0 - self.config.curvature_decay)
        self.curvature_updates += 1

    @torch.no_grad()
    def start_masks(self) -> None:
        """Ends the pilot phase: every mask starts from the highest retention allowed."""
        self.phase = "ising"
        for name in self.layout.sites:
            self.field(name).fill_(self._highest)

    def fit_mask_noise(self, temperature: float, share: float) -> None:
        """With max_keep "auto", moves it by the temperature that held-out predictions want (mask_noise.py).

        Args:
            temperature: T that fits their labels best (calibration.fit_temperature).
            share: of the Ising phase that has passed since the last call, in [0, 1]; any in the pilot phase.

        Raises:
            UserError: T is not positive.
        """
        if self.config.max_keep == "auto" and self.phase != "frozen":
            keep = None if self.phase == "pilot" else self.max_keep
            self.max_keep = fitted_keep(keep, temperature, share)

    @property
    def _highest(self) -> float:
        keep = self.max_keep
        return min(LOGIT_BOUND, math.log(keep / (1.0 - keep))) if keep < 1 else LOGIT_BOUND

    @property
    def _drop_logit(self) -> float:
        return math.log(self.config.delta / (1.0 - self.config.delta))

    @torch.no_grad()
    def update(self, model: IsingViT, progress: float = 1.0) -> None:
        """One mean-field sweep: coupling, likelihood and description cost set every mask's prior and posterior.

        Args:
            model: its prior logits are set.
            progress: share of the Ising phase behind us, in [0, 1]; with kappa_mask "auto" the wanted mean
                retention falls from the highest allowed to ``target_retention`` over the first half of it.
        """
        config, layout = self.config, self.layout
        cooled = (config.final_temperature / config.temperature) ** min(1.0, progress)
        self.temperature.fill_(config.temperature * cooled)
        squared = {kind: loc.detach() ** 2 for kind, loc in self.loc.items()}
        if config.empirical_tau_1:
            self._fit_slabs(model, squared)
        gain = {kind: second_order_gain(self.curvature(kind), loc, self.num_data) for kind, loc in self.loc.items()}
        cost = {}  # KL_e, which is quadratic in the mean
        for kind, second in squared.items():
            scale, tau_1 = self.scale(kind), model.tau_1(kind)
            cost[kind] = torch.addcmul(slab_kl(torch.zeros_like(scale), scale, tau_1), second, 0.5 / tau_1**2)
        if config.kappa_mask == "auto":
            self.kappa.fill_(self._solve_kappa_mask(model, gain, cost, progress))
        evidence = {  # what speaks for a mask besides its prior, site -> site shape, nats
            name: self.kappa_mask * layout.reduce(site, gain) - config.omega * layout.reduce(site, cost)
            for name, site in layout.sites.items()
        }

        def set_site(kind: str, layer: int, c: Tensor) -> Tensor:
            site = layout.site_of[kind]
            if site.coupled_kind == kind:
                pooled = _pool(site.spreads[kind], c, squared[kind][layer])
                prior = config.J * pooled - self._drop_logit
                target = (prior + evidence[site.name][layer]).clamp(-LOGIT_BOUND, self._highest)
                if config.mask_posterior != "learned":
                    self.field(site.name)[layer].lerp_(target, config.mask_damping)
                model.prior_logits(site.name)[layer].copy_(prior.expand_as(target))
            values = self.logits(site.name)[layer : layer + 1].sigmoid()
            return site.spreads[kind].expand(values)[0].expand_as(squared[kind][layer])

        network = Network(squared, model.vit.norm_gain.detach() ** 2, model.vit.config.heads, config.decay)
        COUPLINGS[config.coupling](network, set_site)
        follow_first(field(name) for name in layout.sites for field in (self.field, model.prior_logits))

    def _solve_kappa_mask(self, model: IsingViT, gain: Weights, cost: Weights, progress: float) -> float:
        """kappa_mask at which the mean retention over weights meets the target, by bisection of its logarithm.

        Uses the coupling of the last sweep; retention grows with kappa_mask wherever the likelihood speaks at all.
        """
        config, layout = self.config, self.layout
        left = (1.0 - min(1.0, 2.0 * progress)) ** 3  # gradual pruning: fast first, slow towards the target
        target = self.max_keep * (config.target_retention + (1.0 - config.target_retention) * left)
        flat: dict[str, list[Tensor]] = {"gain": [], "base": [], "size": []}
        for name, (few, sizes) in self._sampled_masks().items():
            site = layout.sites[name]
            prior = model.prior_logits(name).flatten()[few]
            prior = torch.where(prior >= CERTAIN, -self._drop_logit, prior)  # straight after the pilot phase
            flat["gain"].append(layout.reduce(site, gain).flatten()[few])
            flat["base"].append(prior - config.omega * layout.reduce(site, cost).flatten()[few])
            flat["size"].append(sizes)
        gains, base, sizes = (torch.cat(parts) for parts in flat.values())
        low, high, total = -10.0, 40.0, float(sizes.sum())  # of log kappa_mask
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            pi = torch.add(base, gains, alpha=math.exp(middle)).clamp_(-LOGIT_BOUND, self._highest).sigmoid_()
            kept = float(pi.dot(sizes)) / total
            if abs(kept - target) < CLOSE:
                return math.exp(middle)
            low, high = (middle, high) if kept < target else (low, middle)
        return math.exp(0.5 * (low + high))

    def _sampled_masks(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Masks that the bisection looks at: site -> their flat indices, and how many weights each covers."""
        weights = next(iter(self.loc.values()))
        made = next(iter(self._sampled.values()))[1] if self._sampled else None
        if made is None or (made.device, made.dtype) != (weights.device, weights.dtype):
            rows = evenly(sum(self.field(name).numel() for name in self.layout.sites), self.kappa.device)
            for name, site in self.layout.sites.items():
                count = self.field(name).numel()
                few, rows = rows[rows < count], rows[rows >= count] - count
                ones = {kind: self.loc[kind].new_ones(()).expand(self.loc[kind].shape) for kind in site.spreads}
                self._sampled[name] = few, self.layout.reduce(site, ones).flatten()[few]
        return self._sampled

    def _fit_slabs(self, model: IsingViT, squared: Weights) -> None:
        """Empirical Bayes: tau_1^2 = sum pi (m^2 + s^2) / sum pi per layer, kept above the spike (METHOD 5)."""
        for kind, second in squared.items():
            keep = self.weight_retention(kind)
            total = (keep * (second + (2 * self.log_scale[kind]).exp())).sum((1, 2), keepdim=True)
            floor = 10 * self.config.tau_0  # a layer whose masks all drop would send tau_1 to 0, and the KL to inf
            model.tau_1(kind).copy_((total / keep.sum((1, 2), keepdim=True)).sqrt().clamp(min=floor))

    @torch.no_grad()
    def freeze(self, model: IsingViT, threshold: float = 0.5) -> None:
        """Fixes each mask to kept (pi > threshold) or dropped, for fine-tuning; their KL is then constant."""
        for name in self.layout.sites:
            kept = self.retention(name) > threshold
            self.field(name).copy_(torch.where(kept, CERTAIN, -CERTAIN))
            model.prior_logits(name).copy_(self.field(name))
        self.phase = "frozen"


def evenly(count: int, device: torch.device) -> Tensor:
    """Ascending numbers below ``count``: all of them, or ``BISECTION_SAMPLE`` evenly spread."""
    if count <= BISECTION_SAMPLE:
        return torch.arange(count, device=device)
    # Beyond 2^24 single precision may round the last one up to a number that is no index.
    return torch.linspace(0, count - 1, BISECTION_SAMPLE, device=device).long().clamp(max=count - 1)


def _pool(spread: Spread, c: Tensor, squared: Tensor) -> Tensor:
    """c of each mask of a layer: the mean of its weights' c, weighted by w^2; c (out, 1) or (1, 1)."""
    if c.numel() == 1:
        return c.reshape(())
    if spread is WEIGHT:
        return c
    covered = spread.reduce(squared[None])[0]
    return spread.reduce((squared * c)[None])[0] / covered.clamp(min=1e-30)


def check_ising(config: IsingConfig) -> None:
    """Raises UserError where a setting is out of its range."""
    for name, known in (("saliency", SALIENCY), ("coupling", COUPLINGS)):
        if getattr(config, name) not in known:
            raise UserError(f"unknown {name} {getattr(config, name)!r}; known: {', '.join(known)}.")
    for name in ("delta", "curvature_decay"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"{name} must lie strictly between 0 and 1, not {getattr(config, name)}.")
    for name in ("max_keep", "mask_damping", "target_retention"):
        value = getattr(config, name)
        if value != "auto" and not 0 < value <= 1:
            raise UserError(f"{name} must lie in (0, 1], not {value}.")
    for name in ("temperature", "final_temperature", "tau_0", "tau_1", "init_scale"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be positive, not {getattr(config, name)}.")
    if config.tau_0 >= config.tau_1:
        raise UserError(f"the spike tau_0 ({config.tau_0}) must be narrower than the slab tau_1 ({config.tau_1}).")
    need(0 <= config.decay <= 1, f"decay must lie in [0, 1], not {config.decay}.")
    for name in ("update_every", "curvature_batch"):
        need(getattr(config, name) >= 1, f"{name} must be at least 1, not {getattr(config, name)}.")
