"""The fused path against the plain Pyro path: same seed, same loss, same gradients."""

import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import TINY, around, make_pair

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO, draw_masks, fusible
from pyro_isingvit.ising.layout import GRANULARITIES
from pyro_isingvit.ising.model import CERTAIN
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.nets.penalties import PENALTIES, Penalties, Penalty, Seen

HARD = torch.arange(6) % 3
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]]).repeat(2, 1)  # as mixup makes them


def gradients(loss_of, *modules, y=HARD):
    for module in modules:
        module.zero_grad()
    torch.manual_seed(5)
    x = torch.randn(6, 1, 4, 4)
    torch.manual_seed(7)
    loss = loss_of(x, y)
    loss.backward()
    named = [(f"{i}.{name}", p.grad) for i, m in enumerate(modules) for name, p in m.named_parameters()]
    return loss.detach(), {name: grad.clone() for name, grad in named if grad is not None}


@pytest.mark.parametrize("scale", ["learned", "shared"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("phase", ["pilot", "ising", "frozen"])
def test_same_loss_and_gradients_as_pyro(granularity, scale, phase) -> None:
    model, guide = make_pair(vit=TINY, granularity=granularity, posterior_scale=scale)
    guide.phase = phase
    fused, pyro_path = FusedELBO(model, guide), ClosedFormELBO()(model, guide)
    for _ in range(3):  # the mask KL is kept between calls and must follow the masks
        loss, grads = gradients(fused, model, guide)
        expected, expected_grads = gradients(pyro_path, model, guide)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert set(grads) == set(expected_grads)
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))
        for name in guide.layout.sites:
            guide.field(name).add_(0.3)


def test_soft_labels_give_the_same_loss_and_gradients_as_pyro() -> None:
    """And hard ones as probabilities give those of the class numbers."""
    model, guide = make_pair(vit=TINY)
    fused, pyro_path = FusedELBO(model, guide), ClosedFormELBO()(model, guide)
    one_hot = torch.nn.functional.one_hot(HARD, 3).float()
    for y, ours, theirs, other in (
        (SOFT, fused, pyro_path, SOFT), (one_hot, fused, fused, HARD), (one_hot, pyro_path, pyro_path, HARD),
    ):  # fmt: skip
        loss, grads = gradients(ours, model, guide, y=y)
        expected, expected_grads = gradients(theirs, model, guide, y=other)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))


def test_what_has_no_fused_form_is_refused() -> None:
    assert fusible(make_pair()[0])
    assert not fusible(make_pair(mask_posterior="learned")[0])
    assert not fusible(make_pair(mask_posterior="hybrid")[0])


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_penalties_give_the_same_terms_and_gradients_as_pyro(granularity) -> None:
    model, guide = make_pair(vit=TINY, granularity=granularity)
    model.penalties = Penalties(TrainConfig(log_barrier=0.3))
    fused, pyro_path = FusedELBO(model, guide), ClosedFormELBO()(model, guide)
    loss, grads = gradients(fused, model, guide)
    expected, expected_grads = gradients(pyro_path, model, guide)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    x, y, results = torch.randn(6, 1, 4, 4), torch.arange(6) % 3, []
    for engine in ("fused", "pyro"):
        config = RunConfig(vit=TINY, ising=model.ising, train=TrainConfig(engine=engine, log_barrier=0.3, draws=1))
        torch.manual_seed(2)
        method = IsingMethod(config, model.info, 50, model, guide)
        results.append(method(x, y))
    assert set(results[0]) == set(results[1]) == {"nll", "weight_kl", "mask_kl", "log_barrier"}
    for name, term in results[0].items():
        torch.testing.assert_close(term, results[1][name], rtol=1e-5, atol=1e-7)


def test_penalties_of_several_draws_see_every_image_once() -> None:
    model, guide = make_pair(vit=TINY)
    seen: list[Seen] = []
    row = Penalty(lambda found: seen.append(found) or found.logits.pow(2).mean(), ("attention", "features", "tokens"))
    with patch.dict(PENALTIES, {"log_barrier": row}):
        model.penalties = Penalties(TrainConfig(log_barrier=0.3))
        x, y, rows = torch.randn(6, 1, 4, 4), torch.arange(6) % 3, torch.arange(6)
        terms = FusedELBO(model, guide, draws=3).terms(x, y, rows)
    assert seen[0].logits.shape == (6, 3) and torch.equal(seen[0].rows, rows)
    assert seen[0].watched["features"][0].shape == (6, 8) and seen[0].watched["tokens"][0].shape == (6, 4, 8)
    assert len(seen[0].watched["attention"]) == 2 and seen[0].watched["attention"][0][0].shape == (6, 2, 4, 4)
    torch.testing.assert_close(terms["log_barrier"], 0.3 * 50 * seen[0].logits.pow(2).mean())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_several_draws_share_the_batch_out_among_them(granularity) -> None:
    """The loss of 2 draws is the mean over the halves of the batch, each under the draw that it got."""
    model, guide = make_pair(vit=TINY, granularity=granularity)
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    torch.manual_seed(3)
    loss = FusedELBO(model, guide, draws=2)(x, y)
    torch.manual_seed(3)
    sites, retention = guide.layout.sites, {name: guide.field(name).sigmoid() for name in guide.layout.sites}
    kept = {name: draw_masks(retention[name], 2) for name in sites}
    noise = {kind: torch.randn(guide.loc[kind].shape) for kind in guide.kinds}
    nll = 0.0
    for half in range(2):
        weights = {}
        for kind in guide.kinds:
            mask = guide.layout.expand(kind, {name: value[half] for name, value in kept.items()}).float()
            slab = guide.loc[kind] + guide.log_scale[kind].exp() * noise[kind]
            weights[kind] = mask * slab + (1 - mask) * guide.config.tau_0 * noise[kind]
        rows = slice(3 * half, 3 * half + 3)
        nll += torch.nn.functional.cross_entropy(model.vit(weights, x[rows]), y[rows]) / 2
    weight_kl, mask_kl = guide.kl_terms(model)
    expected = guide.num_data * nll + (weight_kl + mask_kl) / guide.kappa_weights
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("draws", [1, 2, 4, 7])
def test_masks_have_their_rate_and_are_independent(draws) -> None:
    pi = torch.tensor([0.0, 1e-3, 0.3, 0.9, 1.0])[:, None].expand(5, 40_000).contiguous()
    masks = draw_masks(pi, draws).view(draws, 5, -1)
    error = (masks.mean(-1) - pi[:, 0]).abs() / (pi[:, 0] * (1 - pi[:, 0]) / 40_000).sqrt().clamp(min=1e-9)
    assert float(error.max()) < 4.5
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    for other in range(1, draws):  # of the same word, and of the next
        both = (masks[0, 2] * masks[other, 2]).mean()
        assert float(both) == pytest.approx(0.09, abs=4.5 * (0.09 * 0.91 / 40_000) ** 0.5)


def test_draws_that_do_not_divide_the_batch_take_the_next_number_that_does() -> None:
    model, guide = make_pair()
    x, y = torch.randn(5, 1, 4, 4), torch.arange(5) % 3
    for asked, taken in ((4, 1), (7, 5), (5, 5)):
        torch.manual_seed(1)
        loss = FusedELBO(model, guide, asked)(x, y)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, FusedELBO(model, guide, taken)(x, y))


def test_more_draws_less_noise_in_the_gradient() -> None:
    """Total variance of the gradient over draws, the batch held fixed, falls; the mean loss does not move."""
    model, guide = make_pair()
    x, y = torch.randn(24, 1, 4, 4), torch.zeros(24, dtype=torch.long)
    noise, losses = {}, {}
    for draws in (1, 8):
        pairs = [gradients_of(FusedELBO(model, guide, draws), guide, x, y) for _ in range(300)]
        losses[draws] = torch.stack([loss for loss, _ in pairs])
        noise[draws] = float(torch.stack([grad for _, grad in pairs]).var(0).sum())
    assert noise[8] < 0.7 * noise[1]
    error = (losses[1].var() / 300 + losses[8].var() / 300).sqrt()
    assert abs(float(losses[1].mean() - losses[8].mean())) < 4 * float(error)


def gradients_of(elbo, guide, x, y) -> tuple[torch.Tensor, torch.Tensor]:
    guide.zero_grad()
    loss = elbo(x, y)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in guide.loc.values()])


# Noise on activations ------------------------------------------------------------------------------------------


def test_noise_on_activations_has_the_moments_of_the_weights() -> None:
    """One layer's outputs under q(W), by Monte Carlo over weights, against the two moments in closed form."""
    model, guide = make_pair(vit=TINY, posterior_scale="learned", init_scale=0.2, max_keep=0.9)
    torch.manual_seed(0)
    for name in guide.layout.sites:
        guide.field(name).copy_(torch.randn_like(guide.field(name)))
    x, seen = torch.randn(5, TINY.width), {}

    class Spy:
        """Takes the place of the network: sees what noise the first layer's rule makes."""

        def __call__(self, weights, images, watch, layer_rule):
            weight, bias = weights["fc1"][0], model.vit.bias["fc1"][0]
            seen["y"] = torch.stack([layer_rule("fc1", 0, x, weight, bias) for _ in range(20_000)])
            return torch.zeros(6, 3)

    elbo = FusedELBO(model, guide, noise="activations")
    elbo._network = Spy()
    with torch.no_grad():
        elbo(torch.randn(6, 1, 4, 4), torch.arange(6) % 3)
    draws = guide.draw(20_000)["fc1"][:, 0]  # (S, out, in)
    exact = torch.einsum("bi,soi->sbo", x, draws) + model.vit.bias["fc1"][0].detach()
    scale = float(exact.detach().std())
    torch.testing.assert_close(seen["y"].mean(0), exact.mean(0), rtol=0, atol=0.04 * scale)
    torch.testing.assert_close(seen["y"].std(0), exact.std(0), rtol=0.05, atol=0)


def test_noise_on_activations_without_noise_is_the_plain_path() -> None:
    model, guide = make_pair(vit=TINY, posterior_scale="shared", init_scale=1e-8, tau_0=1e-9)
    for name in guide.layout.sites:
        guide.field(name).fill_(CERTAIN)
    results = [gradients(FusedELBO(model, guide, noise=noise), model, guide) for noise in ("weights", "activations")]
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=1e-5, atol=0)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


def test_each_token_has_noise_of_its_own() -> None:
    model, guide = make_pair(vit=TINY)
    guide.start_masks()
    outputs = []
    elbo = FusedELBO(model, guide, noise="activations")
    network = elbo._network

    def record(weights, images, watch, layer_rule):
        x = torch.ones(2, 4, TINY.width)  # B = 2 images of T = 4 tokens, all alike
        outputs.append(layer_rule("fc1", 0, x, weights["fc1"][0], model.vit.bias["fc1"][0]))
        return network(weights, images, layer_rule=layer_rule)

    elbo._network = record
    elbo(torch.randn(2, 1, 4, 4), torch.arange(2))
    rows = outputs[0].flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 8


@pytest.mark.parametrize("change", [{"mask_posterior": "learned"}, {"granularity": "unit"}])
def test_noise_on_activations_is_refused_where_it_has_no_form(change) -> None:
    model, guide = make_pair(**change)
    with pytest.raises(UserError, match="`noise`"):
        around(model, guide, RunConfig(ising=model.ising)).method.check(TrainConfig(noise="activations"))


# torch.compile -------------------------------------------------------------------------------------------------


def test_compile_needs_the_fused_engine() -> None:
    model, guide = make_pair()
    train = TrainConfig(compile=True, engine="pyro")
    with pytest.raises(UserError, match="`compile` needs the fused engine"):
        around(model, guide, RunConfig(ising=model.ising, train=train)).method.check(train)


@pytest.mark.parametrize("change", [{"train": {"engine": "pyro"}}, {"ising": {"mask_posterior": "hybrid"}}])
def test_draws_are_refused_where_the_pyro_path_takes_one(change) -> None:
    model, guide = make_pair(**change.get("ising", {}))
    train = TrainConfig(draws=2, **change.get("train", {}))
    method = around(model, guide, RunConfig(ising=model.ising, train=train)).method
    with pytest.raises(UserError, match="`draws` 2 needs the fused engine"):
        method.check(train)
    method.check(replace(train, draws=None))
    method.check(replace(train, draws=1))


@pytest.mark.filterwarnings("ignore")  # of dynamo itself, which differ by version
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_loss_and_gradients_are_those_of_the_plain_network() -> None:
    model, guide = make_pair(vit=TINY)
    guide.start_masks()
    loss, grads = gradients(FusedELBO(model, guide, 2, compiled=True), model, guide)
    expected, expected_grads = gradients(FusedELBO(model, guide, 2), model, guide)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("noise", ["weights", "activations"])
@pytest.mark.parametrize("scale", ["shared", "learned"])
def test_a_look_in_inference_mode_leaves_training_as_it_was(noise, scale) -> None:
    model, guide = make_pair(vit=TINY, posterior_scale=scale)
    elbo = FusedELBO(model, guide, noise=noise)
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    with torch.inference_mode():
        elbo(x, y)
    elbo(x, y).backward()
    assert all(loc.grad is not None for loc in guide.loc.values())


@pytest.mark.parametrize("engine", ["pyro", "fused"])
def test_a_penalty_that_is_no_single_number_is_refused(engine, monkeypatch) -> None:
    monkeypatch.setitem(PENALTIES, "logit_penalty", Penalty(lambda seen: seen.logits.pow(2).mean(-1)))
    config = RunConfig(vit=TINY, train=TrainConfig(logit_penalty=0.1, engine=engine))
    method = IsingMethod(config, make_pair(vit=TINY)[0].info, 50)
    with pytest.raises(UserError, match=r"gives a tensor of shape \(6,\), not one number; take its mean"):
        method(torch.randn(6, 1, 4, 4), HARD)
