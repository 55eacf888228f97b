"""Masks of its own for every image: against each image's own weights, the shared-draw path and Pyro's."""

import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import TINY, around, make_pair
from torch.nn.functional import cross_entropy

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.channel_masks import masked_network
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO, draw_all
from pyro_isingvit.nets.penalties import PENALTIES, Penalties, Penalty, Seen

LARGER = ["unit", "head", "block"]
DEEP = replace(TINY, pool="cls", head="mlp")
Y = torch.arange(8) % 3


def test_without_masks_off_it_is_the_network_itself(x) -> None:
    model, guide = make_pair(granularity="unit")
    weights, ones = dict(guide.loc.items()), {n: torch.ones(len(x), *s.shape) for n, s in model.layout.sites.items()}
    logits = masked_network(model.vit, model.layout, weights, {}, ones, x)
    torch.testing.assert_close(logits, model.vit(weights, x), rtol=1e-5, atol=1e-6)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(5))


def loss_and_gradients(elbo, model, guide, x, y=Y, seed=7):
    for module in (model, guide):
        module.zero_grad()
    torch.manual_seed(seed)
    loss = elbo(x, y)
    loss.backward()
    named = [*model.named_parameters(), *guide.named_parameters()]
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert set(ours[1]) == set(theirs[1])
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-4, atol=2e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("tau_0", [0.0, 0.05])
@pytest.mark.parametrize("vit", [TINY, DEEP])
@pytest.mark.parametrize("granularity", LARGER)
def test_each_image_goes_through_its_own_weights(granularity, vit, tau_0, x) -> None:
    model, guide = make_pair(vit=vit, granularity=granularity, tau_0=tau_0)
    torch.manual_seed(3)
    loss = FusedELBO(model, guide, "image")(x, Y)
    torch.manual_seed(3)
    kept = draw_all({name: guide.field(name).sigmoid() for name in guide.layout.sites}, len(x))
    noise = {kind: torch.randn(guide.loc[kind].shape) for kind in guide.kinds}
    nll = 0.0
    for image in range(len(x)):
        weights = {}
        for kind in guide.kinds:
            mask = guide.layout.expand(kind, {name: value[image] for name, value in kept.items()})
            slab = guide.loc[kind] + guide.log_scale[kind].exp() * noise[kind]
            weights[kind] = mask * slab + (1 - mask) * tau_0 * noise[kind]
        nll += cross_entropy(model.vit(weights, x[image : image + 1]), Y[image : image + 1]) / len(x)
    weight_kl, mask_kl = guide.kl_terms(model)
    expected = guide.num_data * nll + (weight_kl + mask_kl) / guide.kappa_weights
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau_0", [0.0, 0.05])
@pytest.mark.parametrize("granularity", LARGER)
def test_with_equal_masks_it_is_the_shared_draw_path(granularity, tau_0, x) -> None:
    model, guide = make_pair(vit=TINY, granularity=granularity, tau_0=tau_0, posterior_scale="learned")
    for name in guide.layout.sites:  # masks that are certain are the same in every draw, whatever the random numbers
        guide.field(name).copy_(torch.where(guide.field(name) > 0, 30.0, -30.0))
    made = torch.Generator().manual_seed(1)
    noise = {loc.shape: torch.randn(loc.shape, generator=made) for loc in guide.loc.values()}
    with patch("pyro_isingvit.ising.fused.torch.randn_like", lambda like: noise[like.shape]):
        ours = loss_and_gradients(FusedELBO(model, guide, "image"), model, guide, x)
        same(ours, loss_and_gradients(FusedELBO(model, guide, 1), model, guide, x))


@pytest.mark.parametrize("granularity", LARGER)
def test_the_mean_of_many_is_that_of_shared_draws_and_of_pyro(granularity, x) -> None:
    """Loss and gradients over 400 steps, within the errors of their means."""
    model, guide = make_pair(vit=TINY, granularity=granularity, tau_0=0.02)
    paths = [FusedELBO(model, guide, "image"), FusedELBO(model, guide, 4), ClosedFormELBO()(model, guide)]
    means, errors = [], []
    for path in paths:
        runs = [loss_and_gradients(path, model, guide, x, seed=seed) for seed in range(400)]
        flat = [torch.cat([loss[None], *(grad.flatten() for grad in grads.values())]) for loss, grads in runs]
        means.append(torch.stack(flat).mean(0))
        errors.append(torch.stack(flat).var(0) / len(flat))
    for other in (1, 2):
        gap = (means[0] - means[other]) / (errors[0] + errors[other]).sqrt().clamp(min=1e-7)
        assert abs(float(gap[0])) < 4
        assert 0.85 < float(gap.std()) < 1.15  # of thousands of gradients: what the errors alone explain
        assert float(gap.abs().max()) < 6


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_are_the_whole_batch(parts, x) -> None:
    model, guide = make_pair(granularity="unit")
    elbo = FusedELBO(model, guide, "image")
    torch.manual_seed(4)
    whole, after = elbo(x, Y), torch.get_rng_state()
    losses = []
    for part, (images, labels) in enumerate(zip(x.chunk(parts), Y.chunk(parts), strict=True)):
        torch.manual_seed(4)
        elbo.part = (part, parts)
        losses.append(elbo(images, labels))
        assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-5, atol=0)


def test_penalties_see_every_image(x) -> None:
    model, guide = make_pair(vit=TINY, granularity="unit")
    seen: list[Seen] = []
    row = Penalty(lambda found: seen.append(found) or found.logits.pow(2).mean(), ("attention", "tokens"))
    with patch.dict(PENALTIES, {"log_barrier": row}):
        model.penalties = Penalties(TrainConfig(log_barrier=0.3))
        FusedELBO(model, guide, "image").terms(x, Y)
    assert seen[0].watched["tokens"][0].shape == (8, 4, 8) and len(seen[0].watched["attention"]) == 2


@pytest.mark.filterwarnings("ignore")  # of dynamo itself, which differ by version
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_it_is_the_same(x) -> None:
    model, guide = make_pair(vit=TINY, granularity="unit")
    compiled, plain = FusedELBO(model, guide, "image", compiled=True), FusedELBO(model, guide, "image")
    same(loss_and_gradients(compiled, model, guide, x), loss_and_gradients(plain, model, guide, x))


def test_masks_on_single_weights_are_refused() -> None:
    train = TrainConfig(draws="image")
    model, guide = make_pair()
    with pytest.raises(UserError, match="`draws` image is for masks on units, heads or blocks; set `granularity`"):
        around(model, guide, RunConfig(ising=model.ising, train=train)).method.check(train)
    model, guide = make_pair(granularity="unit")
    method = around(model, guide, RunConfig(ising=model.ising)).method
    method.check(train)
    assert method.elbo.draws == "image"  # by default
    with pytest.raises(UserError, match="`draws` image needs the fused engine, but `engine` is pyro"):
        pyro_path = replace(train, engine="pyro")
        around(model, guide, RunConfig(ising=model.ising, train=pyro_path)).method.check(pyro_path)
