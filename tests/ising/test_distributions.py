"""KLs against Monte Carlo, quadrature and enumeration; masks against their probabilities."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions.kl import kl_divergence

from pyro_isingvit.ising.distributions import (
    SelectionMask,
    SpikeAndSlab,
    SpikeAndSlabPosterior,
    bernoulli_kl,
    slab_kl,
)

LOGITS = torch.tensor([-6.0, -1.5, 0.0, 0.7, 4.0])


def test_mask_kl_is_the_sum_over_both_states() -> None:
    q, p = LOGITS.sigmoid(), LOGITS.flip(0).sigmoid()
    exact = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    mask = SelectionMask(torch.tensor(0.5), logits=LOGITS)
    torch.testing.assert_close(kl_divergence(mask, dist.Bernoulli(logits=LOGITS.flip(0))), exact, rtol=1e-5, atol=1e-6)


def test_mask_kl_survives_to_event_and_expand() -> None:
    mask, prior = SelectionMask(torch.tensor(0.5), logits=LOGITS), dist.Bernoulli(logits=LOGITS * 0)
    total = bernoulli_kl(LOGITS, LOGITS * 0).sum()
    torch.testing.assert_close(kl_divergence(mask.to_event(1), prior.to_event(1)), total)
    wide = mask.expand(torch.Size([3, 5]))
    assert isinstance(wide, SelectionMask)
    torch.testing.assert_close(kl_divergence(wide.to_event(2), prior.expand([3, 5]).to_event(2)), 3 * total)


def test_mask_kl_is_zero_and_never_negative_where_both_agree() -> None:
    kl = bernoulli_kl(LOGITS, LOGITS)
    assert (kl >= 0).all() and (kl < 1e-6).all()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_masks_are_hard_and_keep_with_their_probability(temperature: float) -> None:
    draws = SelectionMask(torch.tensor(temperature), logits=LOGITS).rsample(torch.Size([40_000]))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    pi = LOGITS.sigmoid()
    error = 4 * (pi * (1 - pi) / 40_000).sqrt()
    assert ((draws.mean(0) - pi).abs() <= error).all()


def test_masks_pass_the_relaxed_gradient_straight_through() -> None:
    logits = LOGITS.clone().requires_grad_()
    SelectionMask(torch.tensor(0.5), logits=logits).rsample(torch.Size([100])).sum().backward()
    assert (logits.grad > 0).all()


def test_slab_kl_against_quadrature() -> None:
    loc, scale, tau = torch.tensor(0.4), torch.tensor(0.07), 0.3
    w = torch.linspace(-1.0, 1.8, 200_001, dtype=torch.double)
    q = torch.distributions.Normal(loc.double(), scale.double())
    p = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.double), tau)
    integral = torch.trapezoid(q.log_prob(w).exp() * (q.log_prob(w) - p.log_prob(w)), w)
    torch.testing.assert_close(slab_kl(loc, scale, tau).double(), integral, rtol=1e-5, atol=1e-6)


def test_weight_kl_against_monte_carlo_over_masks_and_weights() -> None:
    loc, scale = torch.tensor([0.3, -0.05, 0.0]), torch.tensor([0.05, 0.1, 0.3])
    retention, tau_0, tau_1 = torch.tensor([0.9, 0.3, 0.6]), 0.02, 0.3
    mask = torch.bernoulli(retention.expand(200_000, 3))
    q = SpikeAndSlabPosterior(loc, scale, mask, retention, tau_0)
    p = SpikeAndSlab(mask, tau_0, tau_1)
    w = q.rsample()
    terms = q.log_prob(w) - p.log_prob(w)
    error = 4 * terms.std(0) / 200_000**0.5
    exact = kl_divergence(q, p)
    assert exact.shape == (200_000, 3)
    assert exact[0, 1] > 0.1 and exact[0, 2] == 0.0  # N(0, 0.3^2) is the slab itself
    assert ((terms.mean(0) - exact[0]).abs() <= error + 1e-6).all()


def test_weight_kl_refuses_spikes_that_differ() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="spikes"):
        kl_divergence(SpikeAndSlabPosterior(one, one, one, one, 0.01), SpikeAndSlab(one, 0.02, 1.0))


def test_masks_multiply_the_weights() -> None:
    mask = torch.tensor([1.0, 0.0])
    draws = SpikeAndSlabPosterior(torch.tensor([2.0, 2.0]), torch.tensor([0.1, 0.1]), mask, mask, 1e-3).rsample(
        torch.Size([20_000])
    )
    assert abs(draws[:, 0].mean() - 2.0) < 0.01 and abs(draws[:, 0].std() - 0.1) < 0.005
    assert abs(draws[:, 1].mean()) < 1e-4 and abs(draws[:, 1].std() - 1e-3) < 5e-5


def test_prior_is_the_slab_where_kept_and_the_spike_where_dropped() -> None:
    draws = SpikeAndSlab(torch.tensor([1.0, 0.0]), 0.01, 0.5).sample(torch.Size([40_000]))
    torch.testing.assert_close(draws.std(0), torch.tensor([0.5, 0.01]), rtol=0.03, atol=0)
    wide = SpikeAndSlab(torch.tensor([1.0, 0.0]), 0.01, 0.5).expand(torch.Size([7, 2]))
    assert isinstance(wide, SpikeAndSlab) and wide.sample().shape == (7, 2)
