"""Saliency estimators against the exact Gauss-Newton diagonal of a network of a few hundred weights."""

import pytest
import torch
from conftest import make_pair

from pyro_isingvit.config import ViTConfig
from pyro_isingvit.saliency import SALIENCY, second_order_gain

SMALL = ViTConfig(patch_size=2, width=4, heads=2, depth=1, mlp_ratio=2)


def exact_gauss_newton(vit, weights, images):
    """sum_c p_c (d log p_c / d w)^2, averaged over the images: the Fisher diagonal, class by class."""
    leaves = {kind: weight.detach().requires_grad_() for kind, weight in weights.items()}
    total = {kind: torch.zeros_like(weight) for kind, weight in weights.items()}
    for image in images:
        log_probs = vit(leaves, image[None]).log_softmax(-1)[0]
        for log_prob in log_probs:
            grads = torch.autograd.grad(log_prob, list(leaves.values()), retain_graph=True)
            for kind, grad in zip(leaves, grads, strict=True):
                total[kind] += log_prob.detach().exp() * grad**2 / len(images)
    return total


def setting(batch: int):
    model, guide = make_pair(vit=SMALL)
    for parameter in guide.loc.values():
        parameter.data.mul_(2.0)  # away from the start, where softmax is nearly uniform
    return model.vit, {kind: loc.detach() for kind, loc in guide.loc.items()}, torch.randn(batch, 1, 4, 4)


@pytest.mark.parametrize("name", SALIENCY)
def test_shapes_and_signs(name: str) -> None:
    vit, weights, images = setting(5)
    estimate = SALIENCY[name](vit, weights, images)
    assert {kind: h.shape for kind, h in estimate.items()} == {kind: w.shape for kind, w in weights.items()}
    assert all((h >= 0).all() and h.sum() > 0 for h in estimate.values())


def test_gnb_is_unbiased_for_the_gauss_newton_diagonal() -> None:
    vit, weights, images = setting(4)
    exact = torch.cat([h.flatten() for h in exact_gauss_newton(vit, weights, images).values()])
    draws = torch.stack(
        [torch.cat([h.flatten() for h in SALIENCY["gnb"](vit, weights, images).values()]) for _ in range(2000)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    z = (draws.mean(0) - exact) / error.clamp(min=1e-12)
    alive = exact > 1e-9
    assert alive.float().mean() > 0.9
    assert (z[alive].abs() < 4.5).all()  # a few hundred weights: the largest of as many normals
    assert z[alive].mean().abs() < 1.0


def test_gain_is_the_loss_that_deleting_a_weight_costs() -> None:
    """On a quadratic log-likelihood the second order is exact: N times half h w^2."""
    h, w, n = torch.tensor([0.5, 2.0]), torch.tensor([1.5, -0.3]), 40
    log_likelihood = lambda v: -n * (0.5 * h * (v - w) ** 2)  # noqa: E731
    torch.testing.assert_close(second_order_gain(h, w, n), log_likelihood(w) - log_likelihood(torch.zeros(2)))
