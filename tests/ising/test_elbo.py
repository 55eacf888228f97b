"""The ELBO is the specification: value and gradient against the formula, written out by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import make_pair
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.nn import functional as F

from pyro_isingvit.ising.distributions import SelectionMask
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.layout import GRANULARITIES

X, Y = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def by_hand(model, guide, weights) -> torch.Tensor:
    """-(N/B) sum log p(y|x,W) + (1/kappa) [sum pi KL_e + sum KL(Bern(pi) || Bern(prior))] (docs/method.md)."""
    nll = F.cross_entropy(model.vit(weights, X), Y, reduction="sum") * model.num_data / len(X)
    kl = torch.zeros(())
    for kind, loc in guide.loc.items():
        s, tau = guide.log_scale[kind].exp(), model.ising.tau_1
        slab = (tau / s).log() + (s**2 + loc**2) / (2 * tau**2) - 0.5
        kl = kl + (guide.weight_retention(kind) * slab).sum()
    for name in guide.layout.sites:
        q, p = guide.logits(name).sigmoid(), model.prior_logits(name).sigmoid()
        kl = kl + (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum()
    return nll + kl / guide.kappa_weights


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("elbo", [ClosedFormELBO, TraceMeanField_ELBO])
def test_value_and_gradient_against_the_formula(granularity: str, elbo: type) -> None:
    model, guide = make_pair(granularity=granularity, kappa_weights=3.0, posterior_scale="learned")
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace(X, Y)
    weights = {kind: trace.nodes[f"w_{kind}"]["value"] for kind in guide.kinds}
    expected = by_hand(model, guide, weights)
    params = [*model.parameters(), *guide.parameters()]
    expected_grads = torch.autograd.grad(expected, params)
    torch.manual_seed(1)
    loss = elbo()(model, guide)(X, Y)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(loss, params), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["likelihood_guided", "learned", "hybrid"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_parameter_gets_a_gradient(granularity: str, mode: str) -> None:
    model, guide = make_pair(granularity=granularity, mask_posterior=mode, posterior_scale="learned")
    assert bool(guide.mask_logit) == (mode != "likelihood_guided")
    ClosedFormELBO()(model, guide)(X, Y).backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_no_kl_is_estimated_by_sampling() -> None:
    """Less the likelihood of the drawn weights, the loss is the same for every draw: the KLs are closed forms."""
    model, guide = make_pair(kappa_weights=1.0)

    def spread(elbo) -> float:
        values = []
        for seed in range(6):
            torch.manual_seed(seed)
            trace = poutine.trace(guide).get_trace(X, Y)
            weights = {kind: trace.nodes[f"w_{kind}"]["value"] for kind in guide.kinds}
            nll = F.cross_entropy(model.vit(weights, X), Y, reduction="sum") * model.num_data / len(X)
            torch.manual_seed(seed)
            values.append(elbo()(model, guide)(X, Y).detach() - nll.detach())
        return float(torch.stack(values).std())

    assert spread(ClosedFormELBO) < 0.01
    assert spread(TraceMeanField_ELBO) < 0.01
    assert spread(Trace_ELBO) > 1.0  # the sampled estimate does vary: the test can fail


def test_a_missing_closed_form_is_an_error() -> None:
    def model(x, y=None):
        pyro.sample("z", dist.Gumbel(0.0, 1.0))

    def guide(x, y=None):
        pyro.sample("z", dist.Logistic(0.0, 1.0))

    with pytest.raises(NotImplementedError):
        ClosedFormELBO().differentiable_loss(model, guide, X)


def test_loss_is_unbiased_over_masks() -> None:
    """The weight KL averages over xi exactly: its mean over sampled masks is the closed form."""
    model, guide = make_pair()
    closed, _ = guide.kl_terms(model)
    sampled = []
    for seed in range(200):
        torch.manual_seed(seed)
        total = 0.0
        for kind, loc in guide.loc.items():
            mask = SelectionMask(torch.tensor(0.5), logits=guide.logits(kind)).rsample()
            m, s, tau = loc.detach(), guide.log_scale[kind].exp().detach(), model.ising.tau_1
            total += float((mask * ((tau / s).log() + (s**2 + m**2) / (2 * tau**2) - 0.5)).sum())
        sampled.append(total)
    sampled_t = torch.tensor(sampled)
    assert abs(sampled_t.mean() - closed) < 4 * sampled_t.std() / 200**0.5


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_are_averaged(vectorize: bool) -> None:
    """Many particles only lessen the noise: the mean loss of one at a time lies within 4 standard errors."""
    model, guide = make_pair()
    several = ClosedFormELBO(num_particles=100, vectorize_particles=vectorize, max_plate_nesting=1)
    ones = torch.stack([ClosedFormELBO().differentiable_loss(model, guide, X, Y).detach() for _ in range(100)])
    loss = several.differentiable_loss(model, guide, X, Y).detach()
    assert abs(loss - ones.mean()) < 4 * ones.std() * (2 / 100) ** 0.5
