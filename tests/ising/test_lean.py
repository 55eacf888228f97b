"""Large networks keep less: the same objective, the same gradients from the same noise (ising/lean.py)."""

import shutil

import pytest
import torch
from helpers import INFO, TINY
from torch.testing import assert_close

from pyro_isingvit import fit, load_run
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising import guide as guide_module
from pyro_isingvit.ising import lean
from pyro_isingvit.ising.curvature import gnb
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.memory import training_memory
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT


@pytest.fixture
def large(monkeypatch):
    """Every network counts as large."""
    monkeypatch.setattr(lean, "LARGE", 1)


def pair(centred=False, granularity="unit", **ising):
    torch.manual_seed(0)
    model = IsingViT(TINY, INFO, IsingConfig(granularity=granularity, tau_1=0.3, **ising), centred=centred)
    guide = IsingGuide(model, 50)
    model.num_data, model.kappa_weights = 50, guide.kappa_weights
    guide.phase = "ising"
    for name in guide.layout.sites:
        guide.field(name).uniform_(-2, 2)
    if centred:
        for kind in guide.kinds:
            model.vit.centre(kind).copy_(guide.loc[kind].detach() + 0.1 * torch.randn_like(guide.loc[kind]))
    return model, guide


def batch():
    return torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


def test_only_large_networks_are_lean(large):
    assert pair()[1].lean
    assert not pair(granularity="weight")[1].lean and not pair(posterior_scale="learned")[1].lean
    assert not lean.is_large(IsingConfig(), 0)


def test_noise_is_made_again_in_the_backward_pass():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    window = torch.randn(6, 5)
    y = lean.noisy_linear(x, weight, window, -0.2)
    wanted = torch.nn.functional.linear(x, weight - 0.2 * window)
    assert_close(y, wanted)
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, [x, weight], grad), torch.autograd.grad(wanted, [x, weight], grad), strict=True
    ):
        assert_close(ours, theirs)


def test_the_first_reader_of_a_layer_writes_its_gradient_in_place(monkeypatch):
    """A layer that is read twice, by a network that is computed twice, has the sum."""
    asked, given = lean.Gradient.place, {}

    def place(self, layer):
        found = asked(self, layer)
        return found if found is None else given.setdefault(layer, found)

    monkeypatch.setattr(lean.Gradient, "place", place)
    torch.manual_seed(0)
    loc, x = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 2, 5)
    window, pi, tau = torch.randn(3, 5), torch.rand(2, 3, 1), torch.ones(2, 1, 1)
    kl, layers = lean.apart(loc, None, pi, tau)
    calls = ((0, 1.0), (1, 0.5), (0, 2.0))
    read = [lean.noisy_linear(c * x, layers.matrices[n], window, 0.1, layers.gradient, n) for n, c in calls]
    ours = kl + sum(y.sin().sum() for y in read)
    theirs = (pi * loc**2 / 2).sum() + sum((c * x @ (loc[n] + 0.1 * window).T).sin().sum() for n, c in calls)
    (wanted,) = torch.autograd.grad(theirs, loc)
    (found,) = torch.autograd.grad(ours, loc, retain_graph=True)
    assert [layer.data_ptr() for layer in found] == [given[layer].data_ptr() for layer in (0, 1)]
    assert_close(found, wanted)
    assert_close(torch.autograd.grad(ours, loc)[0], wanted)  # once more, into memory of its own
    assert_close(found, wanted)


def test_noise_of_two_layers_is_uncorrelated():
    """Each is N(0, 1), whatever windows they share."""
    weights = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(1, 2, 2)}
    found = []
    for seed in range(4000):
        torch.manual_seed(seed)
        noise = lean.Noise.draw(weights)
        layers = [("a", 0), ("a", 1), ("b", 0)]
        drawn = [sign * window.flatten() for window, sign in (noise.of(k, n, weights[k][n]) for k, n in layers)]
        found.append(torch.cat(drawn))
    covariance = torch.stack(found).T.cov()
    assert_close(covariance, torch.eye(28), rtol=0, atol=0.1)
    assert torch.stack(found).mean(0).abs().max() < 0.07


@pytest.mark.parametrize("piece", [1, 1 << 17])
@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 1, 3), (2, 1, 1)])
@pytest.mark.parametrize("centre", [None, "other", "rounded"])
def test_the_pull_of_the_slab_beside_the_gradient_of_the_network(centre, shape, piece, monkeypatch):
    """Value and gradient are those of autograd, row by row or all at once, with and without a layer that is read."""
    monkeypatch.setattr(lean, "PIECE", piece)
    torch.manual_seed(0)
    loc, pi, tau = torch.randn(2, 4, 3, requires_grad=True), torch.rand(shape), torch.rand(2, 1, 1) + 0.1
    m0 = None if centre is None else torch.randn(2, 4, 3)
    m0 = m0.bfloat16() if centre == "rounded" else m0
    moved = loc if m0 is None else loc - m0
    wanted = (pi * moved**2 / (2 * tau**2)).sum()
    found, cut = lean.apart(loc, m0, pi, tau)
    layers = cut.matrices
    assert_close(found, wanted)
    assert torch.equal(torch.stack(layers), loc)
    x = torch.randn(5, 3)
    for reads in ((), (1,), (0, 1)):
        ours, theirs = 3 * found, 3 * wanted
        for layer in reads:
            ours, theirs = ours + (x @ layers[layer].T).sin().sum(), theirs + (x @ loc[layer].T).sin().sum()
        assert_close(*(torch.autograd.grad(value, loc, retain_graph=True)[0] for value in (ours, theirs)))
    unread = [(x @ layers[0].T).sin().sum(), (x @ loc[0].T).sin().sum()]
    assert_close(*(torch.autograd.grad(value, loc, retain_graph=True)[0] for value in unread))


def test_gradients_of_two_steps_do_not_share_their_memory(large):
    """Kept gradients stay as they were; those that are added up are the sum."""
    model, guide = pair()
    elbo, (x, y) = FusedELBO(model, guide, "image"), batch()
    kept = []
    for images in (x, 2 * x, 3 * x):
        torch.manual_seed(3)
        found = torch.autograd.grad(elbo(images, y), [*guide.loc.values()])
        kept.append((found, [grad.clone() for grad in found]))
    for found, copies in kept:
        assert all(torch.equal(*pair) for pair in zip(found, copies, strict=True))
    for images in (x, 2 * x, 3 * x):
        torch.manual_seed(3)
        elbo(images, y).backward()
    for loc, *parts in zip(guide.loc.values(), *(copies for _, copies in kept), strict=True):
        assert_close(loc.grad, sum(parts))


@pytest.mark.parametrize("granularity", ["unit", "head", "block"])
@pytest.mark.parametrize("centred", [False, True])
def test_without_noise_it_is_the_fused_elbo(granularity, centred, monkeypatch):
    """The masks are drawn alike; with a scale next to nothing, loss and gradients agree."""
    found = []
    for size in (lean.LARGE, 1):
        monkeypatch.setattr(lean, "LARGE", size)
        model, guide = pair(centred, granularity, init_scale=1e-12)
        torch.manual_seed(3)
        terms = FusedELBO(model, guide, "image").terms(*batch())
        loss = torch.stack([*terms.values()]).sum()
        wanted = [*guide.loc.values(), *model.vit.parameters()]
        found.append((dict(terms), torch.autograd.grad(loss, wanted)))
    (plain, plain_grads), (large, large_grads) = found
    rtol = 2e-3 if centred else 1e-5  # the centre is rounded
    for name, value in plain.items():
        assert_close(large[name], value, rtol=rtol, atol=1e-4)
    for ours, theirs in zip(large_grads, plain_grads, strict=True):
        assert_close(ours, theirs, rtol=1e-3 if centred else 1e-4, atol=1e-3 if centred else 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_it_is_the_same(large):
    found = []
    for compiled in (False, True):
        model, guide = pair(True)
        torch.manual_seed(3)
        loss = FusedELBO(model, guide, "image", compiled=compiled)(*batch())
        found.append((loss, *torch.autograd.grad(loss, [*guide.loc.values(), *model.vit.parameters()])))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_noise_has_its_scale(large):
    """Mean and spread of many losses agree with weights that are drawn once for a batch."""
    model, guide = pair(init_scale=0.05)
    for name in guide.layout.sites:
        guide.field(name).fill_(30.0)
    elbo, x, y = FusedELBO(model, guide, "image"), *batch()
    with torch.no_grad():
        ours = torch.stack([elbo.terms(x, y)["nll"] for _ in range(400)])
        theirs = torch.stack(
            [50 * torch.nn.functional.cross_entropy(model.vit(guide.draw(), x), y) for _ in range(400)]
        )
    error = float((ours.var() / 400 + theirs.var() / 400).sqrt())
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    assert 0.7 < float(ours.std() / theirs.std()) < 1.4


def test_saliency_of_a_mask_is_what_its_weights_sum_to(monkeypatch):
    """With one estimate, and means that have not moved, both averages are the same."""
    found = []
    for size in (lean.LARGE, 1):
        monkeypatch.setattr(lean, "LARGE", size)
        monkeypatch.setattr(guide_module, "QUARTER", 1)
        model, guide = pair()
        torch.manual_seed(4)
        guide.observe(model, *batch())
        guide.update(model)
        found.append((guide.gains(), {name: guide.field(name).clone() for name in guide.layout.sites}))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_estimate_is_not_changed_by_working_in_place():
    model, guide = pair()
    weights = {kind: loc.detach() for kind, loc in guide.loc.items()}
    x, y = batch()
    torch.manual_seed(5)
    estimate = gnb(model.vit, weights, x, y)
    torch.manual_seed(5)
    leaves = {kind: w.clone().requires_grad_() for kind, w in weights.items()}
    logits = model.vit(leaves, x)
    noise = torch.empty_like(logits).exponential_().log()
    loss = torch.nn.functional.cross_entropy(logits, (logits.detach() - noise).argmax(-1))
    for (kind, h), grad in zip(estimate.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert torch.equal(h, 6 * grad**2), kind


def test_training_from_a_start(large, data, tmp_path):
    """The centre is rounded, the means start from the network itself; what lasts is counted to the byte."""
    vit = ViT(TINY, 1, 4, 4, classes=3)
    start = Start.of(vit, vit.initial_weights(), INFO.scale, "made")
    settings = {"epochs": 3, "batch_size": 20, "device": "cpu", "progress": False, "max_keep": 0.9}
    run = fit(start, data, **settings)
    model, guide = run.model, run.guide
    assert all(model.vit.centre(kind).dtype == torch.bfloat16 for kind in guide.kinds)
    assert_close(model.vit.centre("qkv").float(), start.weights["qkv"], rtol=4e-3, atol=0)
    x = data.test.images[:4]
    assert torch.equal(load_run(run.save(tmp_path / "run")).predict(x, 5).probs, run.predict(x, 5).probs)
    taken = training_memory(model, guide, run.config.train)

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert taken["centre"] == size(model.vit.centre(kind) for kind in guide.kinds)
    assert taken["posterior_scale"] == size(guide.log_scale.values())
    assert taken["curvature"] == size(guide.get_buffer(f"saliency_{name}") for name in guide.layout.sites)


def test_training_saving_and_pruning(large, data, tmp_path):
    settings = {"epochs": 4, "batch_size": 20, "device": "cpu", "progress": False, "max_keep": 0.9,
                "target_retention": 0.6, "pilot_fraction": 0.25}  # fmt: skip
    run = fit(TINY, data, **settings)
    assert run.guide.lean and run.guide.log_scale["qkv"].shape == (1, 1, 1)
    x = data.test.images[:4]
    loaded = load_run(run.save(tmp_path / "run"))
    assert torch.equal(loaded.predict(x, 5).probs, run.predict(x, 5).probs)
    assert run.prune(keep=0.5).predict(x).shape == (1, 4, 3)
    assert run.prune(form="bayes").predict(x, 3).shape == (3, 4, 3)
    assert run.evaluate(data.test)["pruned_fraction"] >= 0
    last = run.history[-1]
    assert last["weight_kl"] > 0
