"""Posteriors of the selection masks, q(xi): the half of the guide that drops weights (docs/method.md, Posterior).

    likelihood_guided   logit pi_g = J c_g - logit(delta) + kappa_mask Dl_g - omega KL_g, damped
    learned             logit pi_g is a parameter, J c_g - logit(delta) its prior
    hybrid              the equation plus a parameter

A new family is a subclass of ``MaskPosterior`` and a row of ``MASK_POSTERIORS``.

Shapes: S samples. A mask site has one mask per entry of its shape, (layers, ...).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pyro
import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising.distributions import SelectionMask, bernoulli_kl, log_odds
from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.ising.model import CERTAIN, IsingViT
from pyro_isingvit.ising.noise import USUAL_KEEP

Phase = Literal["pilot", "ising", "frozen"]
Masks = dict[str, Tensor]  # site -> ([S,] *site shape)
Move = Callable[[str, int, Tensor], None]  # (site, layer, J c - logit(delta) of its masks)
Sweep = Callable[[Move], None]

BISECTION_SAMPLE = 8_192  # masks looked at to solve for kappa_mask
BISECTIONS = 20  # at most, of a range of 50 in log kappa_mask
CLOSE = 1e-3  # of the target retention is close enough
CLIPPED = 0.1  # of a logit below the highest: there on its way to the clip
LOGIT_BOUND = 10.0  # mask logits stay within +-10: a mask can always come back


class MaskPosterior(nn.Module):
    """q(xi) of all mask sites: independent masks, with a buffer for each site that holds logit pi.

    Here the masks stay where ``start`` puts them. A family that sets them overrides ``move``; one whose masks depend
    on each other, or on more than the buffer, also overrides ``logits``, ``sample`` and ``draw``, and ``kl``.
    Its parameters are trained by the gradient of the loss; its tensors travel with the guide's ``state_dict`` under
    their own names.

    Args:
        config: settings of prior and posterior.
        layout: the mask sites.
        kappa_mask: weight of the likelihood in the mask field, to start with.

    Attributes:
        fusible: the masks are independent, ``field`` alone says what they are, and no gradient reaches it, so that
            ``FusedELBO`` may take the place of Pyro's handlers. It is not inherited: each family says so itself.
        phase: pilot (every mask at one), ising, or frozen.
        max_keep: retention is clipped to this.
        mask_logit: learned logits, site -> site shape; empty where none are learned.
        kappa: the weight of the likelihood, as set or as last solved for the target retention.
        temperature: of the relaxed masks, which shapes their gradient alone.
    """

    fusible: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass that changes ``logits`` must not take the fused path by inheritance."""
        super().__init_subclass__(**kwargs)
        cls.fusible = vars(cls).get("fusible", False)

    def __init__(self, config: IsingConfig, layout: MaskLayout, kappa_mask: float) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.phase: Phase = "pilot"
        self.max_keep = USUAL_KEEP if config.max_keep == "auto" else config.max_keep
        self.mask_logit = nn.ParameterDict()
        self.kappa: Tensor
        self.temperature: Tensor
        self.register_buffer("kappa", torch.tensor(kappa_mask, dtype=torch.double))
        self.register_buffer("temperature", torch.tensor(config.temperature))
        for name, site in layout.sites.items():
            self.register_buffer(f"logit_{name}", torch.full(site.shape, CERTAIN))
        self._sampled: dict[str, tuple[Tensor, Tensor]] = {}  # what _sampled_masks found

    def get_extra_state(self) -> dict[str, Any]:
        """The phase and max_keep, which are no tensors, for ``state_dict``."""
        return {"phase": self.phase, "max_keep": self.max_keep}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The phase and max_keep, from ``state_dict``; before version 0.3 max_keep was as set."""
        keep = float(state.get("max_keep", self.max_keep))
        need(0 < keep <= 1, f"max_keep is {keep}")
        self.phase, self.max_keep = state["phase"], keep

    # What the posterior is ------------------------------------------------------------------------------------------

    @property
    def kappa_mask(self) -> float:
        """``kappa`` as a number."""
        return float(self.kappa)

    @property
    def highest(self) -> float:
        """The largest logit that the Ising phase allows, that of max_keep."""
        return min(LOGIT_BOUND, log_odds(self.max_keep)) if self.max_keep < 1 else LOGIT_BOUND

    def field(self, site: str) -> Tensor:
        """The buffer behind logit pi: set by ``step``, ``start`` and ``freeze``; of the site's shape."""
        return self.get_buffer(f"logit_{site}")

    def logits(self, site: str) -> Tensor:
        """logit pi of a mask site, pi = q(xi = 1), of the site's shape."""
        return self.field(site)

    def retention(self, site: str) -> Tensor:
        """pi = q(xi = 1) of a mask site, of the site's shape."""
        return self.logits(site).sigmoid()

    def sample(self) -> tuple[Masks, Masks]:
        """Samples every site ``xi_<name>`` for Pyro; the distributions need a closed-form KL to Bernoulli masks.

        Returns:
            the masks, and the probability with which each was kept in this draw; both site -> site shape.
        """
        masks, retention = {}, {}
        for name, site in self.layout.sites.items():
            logits = self.logits(name)
            mask = SelectionMask(self.temperature, logits=logits, validate_args=False)
            masks[name] = pyro.sample(f"xi_{name}", mask.to_event(len(site.shape)))
            retention[name] = logits.sigmoid()
        return masks, retention

    @torch.no_grad()
    def draw(self, num_samples: int | None = None) -> Masks:
        """Masks without Pyro's handlers, zeros and ones: site -> (S, *site shape), or the site's shape for None."""
        lead = () if num_samples is None else (num_samples,)
        return {name: torch.bernoulli(self.retention(name).expand(*lead, *site.shape))
                for name, site in self.layout.sites.items()}  # fmt: skip

    @torch.no_grad()
    def kl(self, model: IsingViT) -> float:
        """KL(q(xi) || p(xi)) in nats, over all sites; for the log, the loss takes its own."""
        return sum(bernoulli_kl(self.logits(name), model.prior_logits(name)).sum().item() for name in self.layout.sites)

    # How the masks move ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self) -> None:
        """Ends the pilot phase: every mask starts from the highest retention allowed."""
        self.phase = "ising"
        for name in self.layout.sites:
            self.field(name).fill_(self.highest)

    @torch.no_grad()
    def set_noise(self, max_keep: float) -> None:
        """Sets max_keep; masks that were clipped, or are above it, go there at once.

        Args:
            max_keep: in (0, 1].

        Raises:
            UserError: outside that.
        """
        need(0 < max_keep <= 1, f"`max_keep` must lie in (0, 1], not {max_keep}.")
        before, changed, self.max_keep = self.highest, max_keep != self.max_keep, max_keep
        if self.phase == "ising" and changed:
            for name in self.layout.sites:
                field = self.field(name)
                own = self.mask_logit.get(name, 0.0)  # learned, beside the field
                whole, top = field + own, field.new_tensor(self.highest)
                at_top = torch.where(whole >= before - CLIPPED, top, whole.minimum(top))
                field.copy_(torch.where(at_top == whole, field, at_top - own))

    @torch.no_grad()
    def step(self, model: IsingViT, gain: Masks, cost: Masks, sweep: Sweep, progress: float = 1.0) -> None:
        """One update, from what speaks for each mask and from the coupling.

        Args:
            model: its prior logits are those of the last sweep; the next one renews them.
            gain: Dl, what the data lose when a mask drops its weights, site -> site shape, nats.
            cost: KL, what it takes to describe the weights under a mask, likewise.
            sweep: goes through the network in the order of the coupling. It hands the prior J c - logit(delta) of one
                layer's masks to the function given to it, and reads their new ``logits`` afterwards.
            progress: share of the Ising phase that has passed, in [0, 1].
        """
        config = self.config
        cooled = (config.final_temperature / config.temperature) ** min(1.0, progress)
        self.temperature.fill_(config.temperature * cooled)
        if config.kappa_mask == "auto":
            self.kappa.fill_(self._solve_kappa_mask(model, gain, cost, progress))
        evidence = {name: self.kappa_mask * gain[name] - config.omega * cost[name] for name in self.layout.sites}
        sweep(lambda site, layer, prior: self.move(site, layer, prior + evidence[site][layer]))

    def move(self, site: str, layer: int, target: Tensor) -> None:
        """Moves one layer's masks towards logit pi = ``target`` (the field equation), of the layer's shape."""

    @torch.no_grad()
    def freeze(self, model: IsingViT, threshold: float = 0.5) -> None:
        """Fixes each mask to kept (pi > threshold) or dropped, for fine-tuning; their KL is then constant."""
        for name in self.layout.sites:
            kept = self.retention(name) > threshold
            self.field(name).copy_(torch.where(kept, CERTAIN, -CERTAIN))
            model.prior_logits(name).copy_(self.field(name))
        self.phase = "frozen"

    def _solve_kappa_mask(self, model: IsingViT, gain: Masks, cost: Masks, progress: float) -> float:
        """kappa_mask at which the mean retention over weights meets the target, by bisection of its logarithm.

        Uses the coupling of the last sweep; retention grows with kappa_mask wherever the likelihood speaks at all.
        """
        config = self.config
        left = (1.0 - min(1.0, 2.0 * progress)) ** 3  # gradual pruning: fast first, slow towards the target
        target = self.max_keep * (config.target_retention + (1.0 - config.target_retention) * left)
        flat: dict[str, list[Tensor]] = {"gain": [], "base": [], "own": [], "size": []}
        for name, (few, sizes) in self._sampled_masks(model).items():
            prior = model.prior_logits(name).flatten()[few]
            prior = torch.where(prior >= CERTAIN, -log_odds(config.delta), prior)  # straight after the pilot phase
            flat["gain"].append(gain[name].flatten()[few])
            flat["base"].append(prior - config.omega * cost[name].flatten()[few])
            if (learned := self.correction(name)) is not None:
                flat["own"].append(learned.flatten()[few])
            flat["size"].append(sizes)
        own = flat.pop("own")  # learned, beside the field
        gains, base, sizes = (torch.cat(parts) for parts in flat.values())
        low, high, total = -10.0, 40.0, float(sizes.sum())  # of log kappa_mask
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            logits = torch.add(base, gains, alpha=math.exp(middle)).clamp_(-LOGIT_BOUND, self.highest)
            if own:
                logits = logits.add_(torch.cat(own)).clamp_(-LOGIT_BOUND, self.highest)
            pi = logits.sigmoid_()
            kept = float(pi.dot(sizes)) / total
            if abs(kept - target) < CLOSE:
                return math.exp(middle)
            low, high = (middle, high) if kept < target else (low, middle)
        return math.exp(0.5 * (low + high))

    def correction(self, site: str) -> Tensor | None:
        """What is learned beside the field, of the site's shape; None: nothing is."""
        return self.mask_logit.get(site)

    def _sampled_masks(self, model: IsingViT) -> dict[str, tuple[Tensor, Tensor]]:
        """Masks that the bisection looks at: site -> their flat indices, and how many weights each covers."""
        fields = {name: self.field(name) for name in self.layout.sites}
        one = next(iter(fields.values())).new_ones(())
        made = next(iter(self._sampled.values()))[1] if self._sampled else None
        if made is None or (made.device, made.dtype) != (one.device, one.dtype):
            rows = evenly(sum(field.numel() for field in fields.values()), self.kappa.device)
            ones = {kind: one.expand(shape) for kind, shape in model.vit.matrix_shapes.items()}
            for name, field in fields.items():
                few, rows = rows[rows < field.numel()], rows[rows >= field.numel()] - field.numel()
                self._sampled[name] = few, self.layout.reduce(self.layout.sites[name], ones).flatten()[few]
        return self._sampled


class LikelihoodGuided(MaskPosterior):
    """Masks set by the field equation; each update takes the share ``mask_damping`` of the new logit."""

    fusible = True

    def move(self, site: str, layer: int, target: Tensor) -> None:
        """logit pi <- (1 - mask_damping) logit pi + mask_damping target, the target within its bounds."""
        self.field(site)[layer].lerp_(target.clamp(-LOGIT_BOUND, self.highest), self.config.mask_damping)


class Learned(MaskPosterior):
    """Masks whose logits are parameters, trained by relaxed-Bernoulli gradients around the retention at the start."""

    def __init__(self, config: IsingConfig, layout: MaskLayout, kappa_mask: float) -> None:
        super().__init__(config, layout, kappa_mask)
        self.mask_logit.update({name: nn.Parameter(torch.zeros(site.shape)) for name, site in layout.sites.items()})

    def logits(self, site: str) -> Tensor:
        """logit pi of a mask site, of the site's shape; a function of parameters in the Ising phase."""
        if self.phase != "ising":
            return self.field(site)
        logits = self.field(site) + self.mask_logit[site]
        bounded = logits.clamp(-LOGIT_BOUND, self.highest)
        return logits + (bounded - logits).detach()  # the gradient goes through the bounds, so that masks come back


class Hybrid(Learned, LikelihoodGuided):
    """Masks set by the field equation, with a learned correction to each logit."""


MASK_POSTERIORS: dict[str, type[MaskPosterior]] = {
    "likelihood_guided": LikelihoodGuided,
    "learned": Learned,
    "hybrid": Hybrid,
}


def evenly(count: int, device: torch.device) -> Tensor:
    """Ascending numbers below ``count``: all of them, or ``BISECTION_SAMPLE`` evenly spread.

    Examples:
        >>> evenly(4, torch.device("cpu"))
        tensor([0, 1, 2, 3])
        >>> len(evenly(1_000_000, torch.device("cpu")))
        8192
    """
    if count <= BISECTION_SAMPLE:
        return torch.arange(count, device=device)
    # Beyond 2^24 single precision may round the last one up to a number that is no index.
    return torch.linspace(0, count - 1, BISECTION_SAMPLE, device=device).long().clamp(max=count - 1)
