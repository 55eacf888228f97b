"""Scales from the curvature: the objective's optimum in s, by calculus, by sampling, and against a conjugate model."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, make_pair, trainer
from torch import Tensor

from pyro_isingvit.ising.curvature import SALIENCY
from pyro_isingvit.ising.distributions import slab_kl
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.ising.scales import curvature_log_scale

N, KAPPA, TAU = 40, 3.0, 0.7


@pytest.mark.parametrize(("factor", "optimal"), [(1.0, True), (1.1, False), (30.0, False)])
@pytest.mark.parametrize("pi", [1.0, 0.3])
def test_factor_one_is_stationary_for_a_quadratic_loss(factor: float, optimal: bool, pi: float) -> None:
    """Expected quadratic loss plus KL / kappa, closed forms, differentiated by autograd."""
    m, h = torch.randn(50), torch.rand(50)
    log_scale = curvature_log_scale(h, TAU, factor * KAPPA * N).requires_grad_()
    s = log_scale.exp()
    expected = N * pi * 0.5 * h * (m**2 + s**2)  # E_q of N h w^2 / 2, w = xi (m + s eps)
    (gradient,) = torch.autograd.grad((expected + pi * slab_kl(m, s, TAU) / KAPPA).sum(), log_scale)
    assert bool((gradient.abs() < 1e-5).all()) == optimal


def regression() -> tuple[Tensor, Tensor]:
    """Inputs (N, 3), of correlated columns, and targets of a linear model with unit noise."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, generator=made) @ torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 2.0]])
    return x, x @ torch.tensor([0.4, -1.0, 0.2]) + torch.randn(N, generator=made)


def test_sampled_objective_of_a_linear_model_is_stationary() -> None:
    """Gradients of the loss at sampled weights, masks included; correlated columns, so that cross terms are seen."""
    x, y = regression()
    made, m, pi = torch.Generator().manual_seed(2), torch.tensor([0.3, -0.9, 0.1]), torch.tensor([0.9, 0.5, 1.0])
    h = (x**2).mean(0)
    for factor in (1.0, 2.0):
        log_scale = curvature_log_scale(h, TAU, factor * KAPPA * N).expand(200_000, 3).clone().requires_grad_()
        xi = torch.bernoulli(pi.expand_as(log_scale), generator=made)
        w = xi * (m + log_scale.exp() * torch.randn(log_scale.shape, generator=made))
        loss = 0.5 * (w @ x.T - y).pow(2).sum(1) + (pi * slab_kl(m, log_scale.exp(), TAU)).sum(1) / KAPPA
        (gradient,) = torch.autograd.grad(loss.sum(), log_scale)
        errors = gradient.mean(0) / (gradient.std(0) / len(gradient) ** 0.5)
        assert bool((errors.abs() < 4).all()) == (factor == 1.0), errors


def test_precision_is_the_diagonal_of_the_exact_posterior_of_a_linear_model() -> None:
    """Mean-field VI of a conjugate model has the exact posterior's precisions; the likelihood counts kappa times."""
    x, _ = regression()
    exact = KAPPA * x.T @ x + torch.eye(3) / TAU**2
    ours = (-2 * curvature_log_scale((x**2).mean(0), TAU, KAPPA * N)).exp()
    torch.testing.assert_close(ours, exact.diagonal())


def test_extremes_stay_finite() -> None:
    h = torch.tensor([-1.0, 0.0, 1e-30, 1.0, 1e30])
    log_scale = curvature_log_scale(h, torch.full((1,), TAU), 30.0 * 1e30 * 60_000)
    assert bool(log_scale.isfinite().all()) and bool((log_scale <= math.log(TAU) + 1e-6).all())
    torch.testing.assert_close(log_scale[:2].exp(), torch.full((2,), TAU))
    assert bool((log_scale[1:].diff() < 0).all())


@pytest.mark.parametrize("saliency", SALIENCY)
@pytest.mark.parametrize("phase", ["pilot", "ising"])
def test_the_guide_sets_them_with_every_estimate(saliency: str, phase: str) -> None:
    model, guide = make_pair(
        posterior_scale="curvature", saliency=saliency, kappa_weights=5.0, curvature_factor=7.0, init_scale=0.02
    )
    guide.phase = phase
    assert not any(parameter.requires_grad for parameter in guide.log_scale.values())
    torch.testing.assert_close(guide.scale("fc1"), torch.full((1, 1, 1), 0.02))
    for _ in range(2):
        guide.observe(model, torch.randn(6, 1, 4, 4), torch.arange(6) % 3)
        for kind in guide.kinds:
            precision = 7.0 * 5.0 * 50 * guide.curvature(kind).clamp(min=0.0) + 0.3**-2
            torch.testing.assert_close(guide.scale(kind), precision**-0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_both_engines_see_new_scales(granularity: str) -> None:
    model, guide = make_pair(posterior_scale="curvature", granularity=granularity)
    fused, losses, constants = FusedELBO(model, guide), [], []
    for seed in range(3):
        made = torch.Generator().manual_seed(seed)
        x, y = torch.randn(6, 1, 4, 4, generator=made), torch.arange(6) % 3
        guide.observe(model, x, y)
        gradients = []
        for loss_of in (fused, ClosedFormELBO()(model, guide)):
            guide.zero_grad()
            torch.manual_seed(7)
            loss = loss_of(x, y)
            loss.backward()
            gradients.append([loc.grad.clone() for loc in guide.loc.values()])
            losses.append(loss.detach())
        torch.testing.assert_close(losses[-2], losses[-1], rtol=1e-5, atol=0)
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
        constants.append(float(fused.constant_kl()[1]))
    assert len(set(constants)) == 3  # what is kept between steps was computed anew


@pytest.mark.parametrize("pilot", [0.34, 1.0])
def test_training_takes_them_from_the_first_step_on_and_stays_finite(data, pilot: float) -> None:
    """Also where every epoch is of the pilot phase, so that nobody else reads the curvature."""
    ising = replace(CONFIG.ising, posterior_scale="curvature", granularity="unit", empirical_tau_1=True)
    t = trainer(data, config=replace(CONFIG, ising=ising), pilot_fraction=pilot)
    seen: list[float] = []
    t.on_epoch = lambda at: seen.append(float(at.run.guide.scale("fc1").std()))
    run = t.fit()
    assert min(seen) > 0 and len(set(seen)) == len(seen)
    assert all(math.isfinite(record[key]) for record in run.history for key in ("loss", "weight_kl", "val_nll"))
