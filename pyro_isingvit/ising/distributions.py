"""Selection masks and spike-and-slab weights, with the closed-form KLs that ELBOs need.

Pyro's own relaxed Bernoulli has no KL registered, so ``TraceMeanField_ELBO`` would fall back to a Monte Carlo
estimate that mixes a density with a mass. The subclasses here carry exact KLs instead.
"""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl
from torch.nn.functional import softplus
from torch.types import _size


class SelectionMask(dist.RelaxedBernoulliStraightThrough):
    """q(xi): hard 0/1 samples, the gradient of the relaxed sample (straight-through).

    P(xi = 1) = sigmoid(logits) at every temperature; the temperature only shapes the gradient. ``log_prob`` is the
    log-mass of hard values, not the density of the relaxed ones that Pyro's class scores.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(xi) of masks in {0, 1}, elementwise: xi l - softplus(l), l the logits."""
        logits = self.base_dist.logits
        return value * logits - softplus(logits)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "SelectionMask":
        """The same mask over a larger batch shape; the subclass, and so its KL, survives."""
        return type(self)(self.temperature, logits=self.base_dist.logits.expand(batch_shape), validate_args=False)


def log_odds(p: float) -> float:
    """logit p = log(p / (1 - p)) of a probability in (0, 1).

    Examples:
        >>> round(log_odds(0.9), 4)
        2.1972
    """
    return math.log(p / (1.0 - p))


def bernoulli_kl(logits_q: Tensor, logits_p: Tensor) -> Tensor:
    """KL(Bern(sigmoid(logits_q)) || Bern(sigmoid(logits_p))), elementwise, in nats.

    With a = logits_q, b = logits_p: sigmoid(a) (a - b) + softplus(b) - softplus(a).

    Examples:
        >>> q, p = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0])
        >>> bernoulli_kl(q, p)
        tensor([0.0000, 0.3278])
    """
    kl = logits_q.sigmoid() * (logits_q - logits_p) + softplus(logits_p) - softplus(logits_q)
    return kl.clamp(min=0.0)  # rounding can leave -1e-7 where both agree


def slab_kl(loc: Tensor, scale: Tensor, tau_1: Tensor | float) -> Tensor:
    """KL(N(loc, scale^2) || N(0, tau_1^2)), elementwise, in nats: the description cost of docs/method.md, Posterior.

    Examples:
        >>> slab_kl(torch.tensor([0.0, 0.3]), torch.tensor(0.3), 0.3)
        tensor([0.0000, 0.5000])
    """
    ratio = scale / tau_1
    return 0.5 * (ratio**2 + (loc / tau_1) ** 2 - 1.0) - ratio.log()


def _log_density(value: Tensor, loc: Tensor | float, scale: Tensor) -> Tensor:
    """log N(value; loc, scale^2); of a spike of width 0, which is one point, log 1 there and log 0 elsewhere.

    A density against Lebesgue's measure where the scale is positive and the counting measure where it is 0: the same
    for prior and posterior, so that log p - log q is what an ELBO needs.
    """
    wide = scale > 0
    normal = torch.distributions.Normal(loc, torch.where(wide, scale, 1.0), validate_args=False).log_prob(value)
    return torch.where(wide, normal, torch.where(value == loc, 0.0, -math.inf))


class SpikeAndSlab(dist.TorchDistribution):
    """Prior p(w | xi): the slab N(m0, tau_1^2) where xi = 1 (kept), the spike N(0, tau_0^2) where xi = 0.

    Args:
        mask: xi in {0, 1}, any shape that broadcasts with the weight.
        tau_0: spike standard deviation.
        tau_1: slab standard deviation, a number or a tensor that broadcasts with the mask.
        centre: m0, which broadcasts with the mask; None: 0.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, mask: Tensor, tau_0: float, tau_1: Tensor | float, centre: Tensor | None = None) -> None:
        self.mask_value, self.tau_0, self.tau_1, self.centre = mask, tau_0, tau_1, centre
        super().__init__(mask.shape, validate_args=False)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "SpikeAndSlab":
        """The same prior over a larger batch shape."""
        return SpikeAndSlab(self.mask_value.expand(batch_shape), self.tau_0, self.tau_1, self.centre)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each weight given its mask."""
        return self.mask_value * self.tau_1 + (1.0 - self.mask_value) * self.tau_0

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws weights; shape ``sample_shape + mask.shape``."""
        mask = self.mask_value
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=mask.dtype, device=mask.device)
        return noise * self.scale if self.centre is None else self.mask_value * self.centre + noise * self.scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density given the mask, elementwise; where the spike has no width, log 1 at 0."""
        loc = 0.0 if self.centre is None else self.mask_value * self.centre
        return _log_density(value, loc, self.scale)


class SpikeAndSlabPosterior(dist.TorchDistribution):
    """Guide q(w | xi) = N(xi m, xi s^2 + (1 - xi) tau_0^2); the mask multiplies the weight.

    Args:
        loc: m, slab means.
        scale: s > 0, slab standard deviations.
        mask: xi in {0, 1} as sampled, broadcast to the shape of ``loc`` (leading sample axes allowed).
        retention: pi = q(xi = 1), broadcast likewise; used by the KL, which averages over xi exactly.
        tau_0: spike standard deviation.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, mask: Tensor, retention: Tensor, tau_0: float) -> None:
        self.loc, self.slab_scale, self.mask_value = loc, scale, mask
        self.retention, self.tau_0 = retention, tau_0
        super().__init__(torch.broadcast_shapes(loc.shape, mask.shape), validate_args=False)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "SpikeAndSlabPosterior":
        """The same posterior over a larger batch shape."""
        return SpikeAndSlabPosterior(
            self.loc, self.slab_scale, self.mask_value.expand(batch_shape), self.retention, self.tau_0
        )

    @property
    def scale(self) -> Tensor:
        """Standard deviation given xi; for xi in {0, 1} the root of xi s^2 + (1 - xi) tau_0^2."""
        return self.mask_value * self.slab_scale + (1.0 - self.mask_value) * self.tau_0

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws weights; gradients reach m, s and, through the straight-through xi, the mask logits."""
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device
        )
        return self.mask_value * torch.addcmul(self.loc, self.slab_scale, noise) + (1.0 - self.mask_value) * (
            self.tau_0 * noise
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density given the mask, elementwise; where the spike has no width, log 1 at 0."""
        return _log_density(value, self.mask_value * self.loc, self.scale)


@register_kl(SelectionMask, torch.distributions.Bernoulli)
def _kl_mask(q: SelectionMask, p: torch.distributions.Bernoulli) -> Tensor:
    return bernoulli_kl(q.base_dist.logits, p.logits)


@register_kl(SpikeAndSlabPosterior, SpikeAndSlab)
def _kl_weight(q: SpikeAndSlabPosterior, p: SpikeAndSlab) -> Tensor:
    """E_q(xi) KL(q(w | xi) || p(w | xi)) = pi KL(N(m, s^2) || N(m0, tau_1^2)): the spikes are equal and cost 0.

    The expectation over xi is exact (pi, not the sampled xi): the same ELBO, less noise in its gradient.
    """
    if q.tau_0 != p.tau_0:
        raise ValueError(f"the spikes `tau_0` of guide ({q.tau_0}) and model ({p.tau_0}) must be the same.")
    moved = q.loc if p.centre is None else q.loc - p.centre
    kl = q.retention * slab_kl(moved, q.slab_scale, p.tau_1)
    return kl.expand(q.batch_shape)
