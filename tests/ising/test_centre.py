"""The slab around the weights of a trained network (docs/method.md, Model)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import INFO, TINY, make_pair
from scipy.integrate import quad
from scipy.stats import norm
from torch.testing import assert_close

from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising.distributions import SpikeAndSlab, SpikeAndSlabPosterior
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT

UNITS = {"granularity": "unit", "tau_0": 0.0, "tau_1": 0.3, "target_retention": 0.7}


def pair(centred=True, fill=None, **ising):
    """Model and guide with masks between 0.1 and 0.9; the centre as ``fill`` makes it from the means."""
    torch.manual_seed(0)
    model = IsingViT(TINY, INFO, replace(IsingConfig(), **{**UNITS, **ising}), centred=centred)
    guide = IsingGuide(model, 50)
    model.num_data, model.kappa_weights = 50, guide.kappa_weights
    guide.phase = "ising"
    for name in guide.layout.sites:
        guide.field(name).uniform_(-2, 2)
    for kind in guide.kinds if fill else ():
        model.vit.centre(kind).copy_(fill(guide.loc[kind].detach()))
    return model, guide


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 4, 4, generator=generator), torch.arange(6) % 3


def losses(model, guide, elbo):
    torch.manual_seed(5)
    x, y = batch()
    loss = elbo(model, guide)(x, y)
    return float(loss.detach()), torch.autograd.grad(loss, list(guide.loc.values()))


def pyro_elbo(model, guide):
    return lambda x, y: ClosedFormELBO().differentiable_loss(model, guide, x, y)


@pytest.mark.parametrize("elbo", [pyro_elbo, FusedELBO])
def test_a_centre_of_zero_is_today_to_the_bit(elbo):
    plain, zero = losses(*pair(centred=False), elbo), losses(*pair(), elbo)
    assert plain[0] == zero[0]
    for ours, theirs in zip(zero[1], plain[1], strict=True):
        assert torch.equal(ours, theirs)


def test_masks_move_as_today_with_a_centre_of_zero():
    found = []
    for centred in (False, True):
        model, guide = pair(centred, empirical_tau_1=True)
        torch.manual_seed(2)
        guide.observe(model, *batch())
        guide.update(model)
        found.append({name: guide.field(name) for name in guide.layout.sites})
    for name, field in found[0].items():
        assert torch.equal(field, found[1][name])


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_fused_and_pyro_agree_around_a_centre(granularity):
    model, guide = pair(fill=lambda loc: loc + 0.1 * torch.randn_like(loc), granularity=granularity)
    ours, theirs = losses(model, guide, FusedELBO), losses(model, guide, pyro_elbo)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("m, m0, s, tau", [(0.3, 0.25, 0.05, 0.1), (-0.2, 0.5, 0.3, 0.4), (0.7, 0.7, 0.01, 0.02)])
def test_the_kl_by_quadrature(m, m0, s, tau):
    q, p = norm(m, s), norm(m0, tau)
    wanted, _ = quad(lambda w: q.pdf(w) * (q.logpdf(w) - p.logpdf(w)), m - 12 * s, m + 12 * s)
    one, pi = torch.ones(1), torch.tensor([0.6])
    posterior = SpikeAndSlabPosterior(torch.tensor([m]), torch.tensor([s]), one, pi, 0.0)
    prior = SpikeAndSlab(one, 0.0, tau, torch.tensor([m0]))
    found = torch.distributions.kl_divergence(posterior, prior)
    assert float(found) == pytest.approx(0.6 * wanted, rel=1e-4)


def test_densities_and_draws_around_a_centre():
    mask, centre = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    prior = SpikeAndSlab(mask, 0.1, 0.3, centre)
    wanted = [norm(0.5, 0.3).logpdf(0.2), norm(0.0, 0.1).logpdf(0.2)]
    assert prior.log_prob(torch.full((2,), 0.2)).tolist() == pytest.approx(wanted, rel=1e-5)
    torch.manual_seed(0)
    draws = prior.rsample(torch.Size([20_000]))
    assert draws.mean(0).tolist() == pytest.approx([0.5, 0.0], abs=0.01)
    assert prior.expand(torch.Size([3, 2])).log_prob(torch.zeros(3, 2)).shape == (3, 2)


def test_a_dropped_weight_goes_to_zero_not_to_the_centre():
    _, guide = pair(fill=lambda loc: loc + 1.0)
    for name in guide.layout.sites:
        guide.field(name).fill_(-30.0)
    assert all(not weight.any() for weight in guide.draw().values())


def test_masks_see_how_far_a_weight_moved_and_how_much_it_matters():
    """KL_e is that of the move; the gain keeps m^2."""
    at_start, moved = pair(fill=lambda loc: loc), pair(fill=lambda loc: loc * 0)
    for _, guide in (at_start, moved):
        for kind in guide.kinds:
            guide.get_buffer(f"curvature_{kind}").fill_(1e-3)
        guide.curvature_updates.fill_(100)
    fields = []
    for model, guide in (at_start, moved):
        guide.update(model)
        fields.append(torch.cat([guide.field(name).flatten() for name in guide.layout.sites]))
    assert (fields[0] >= fields[1] - 1e-6).all() and (fields[0] > fields[1] + 1e-3).any()
    assert at_start[1].kl_terms(at_start[0])[0] < moved[1].kl_terms(moved[0])[0]


def test_empirical_bayes_learns_how_far_weights_moved():
    model, guide = pair(fill=lambda loc: loc + 0.05, empirical_tau_1=True, init_scale=1e-4)
    for name in guide.layout.sites:
        guide.field(name).fill_(30.0)
    guide.update(model)
    for kind in guide.kinds:
        assert_close(model.tau_1(kind), torch.full_like(model.tau_1(kind), 0.05), rtol=1e-3, atol=1e-5)


def test_the_centre_may_be_zero_all_the_same():
    model, guide = pair(fill=lambda loc: loc + 1.0, centre="zero")
    assert not model.centred and model.centre("qkv") is None
    plain = losses(*pair(centred=False), FusedELBO)
    assert losses(model, guide, FusedELBO)[0] == plain[0]


def test_a_guide_starts_from_the_centre():
    model, _ = pair(fill=lambda loc: loc + 1.0)
    guide = IsingGuide(model, 50)
    assert all(torch.equal(guide.loc[kind], model.vit.centre(kind)) for kind in guide.kinds)


def test_masks_on_weights_keep_their_helpers():
    model, guide = make_pair()
    assert model.centre("qkv") is None and np.isfinite(guide.kl_terms(model)[0])
