"""Partly Bayesian networks: masks and noise in the last blocks, ordinary weights below them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import INFO, TINY, tensors
from torch.testing import assert_close

from pyro_isingvit import UserError, fit, load_run, run_to_datatree
from pyro_isingvit.core.settings import IsingConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.methods.rates import rate_factors
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.methods.sparse import Magnitude
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.trunk import one_trunk, with_trunk
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.runs import predict
from pyro_isingvit.runs.run import build_run

SHAPE = replace(TINY, depth=3, pool="cls", registers=1, norm_pre=True)
TRAIN = {"epochs": 4, "batch_size": 20, "device": "cpu", "progress": False, "max_keep": 0.9, "target_retention": 0.9,
         "pilot_fraction": 0.25}  # fmt: skip


def vit(trunk=0, frozen=0, seed=0):
    torch.manual_seed(seed)
    net = ViT(SHAPE, 1, 4, 4, classes=3, trunk=trunk, frozen=frozen)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("trunk", [1, 2, 3])
def test_the_whole_network_computes_the_same(trunk):
    net = vit(trunk)
    weights = net.initial_weights()
    whole, matrices = net.whole(weights)
    x = torch.randn(4, 1, 4, 4)
    assert not whole.trunk and matrices["qkv"].shape[0] == 3 and set(whole.matrix_shapes) == set(matrices)
    assert_close(whole(matrices, x), net(weights, x))


@pytest.mark.parametrize("trunk", [1, 3])
def test_draws_share_the_trunk(trunk):
    """S draws give S results, and what is below the first of them is computed for B images, not S B."""
    net = vit(trunk)
    draws = [{kind: w + 0.1 * s for kind, w in net.initial_weights().items()} for s in range(3)]
    stacked = {kind: torch.stack([draw[kind] for draw in draws]) for kind in draws[0]}
    x, seen = torch.randn(2, 1, 4, 4), []
    patchify = net.patchify
    net.patchify = lambda images: seen.append(patchify(images)) or seen[-1]
    together = net(stacked, x)
    assert seen[0].shape[0] == 2 and together.shape == (3, 2, 3)
    assert_close(together, torch.stack([net(draw, x) for draw in draws]), rtol=1e-4, atol=1e-5)


def test_predictions_compute_the_trunk_once(data, monkeypatch):
    """As many images pass the trunk as there are; draws are those of networks without a shared trunk."""
    run = fit(SHAPE, data, bayesian_blocks=1, **TRAIN)
    x, seen = data.test.images[:7], []
    net, patchify = run.model.vit, run.model.vit.patchify
    net.patchify = lambda images: seen.append(len(images)) or patchify(images)
    draws = run.predict(x, 6)
    assert sum(seen) == 7
    monkeypatch.setattr(predict, "TRUNK_CHUNK", 2)
    assert_close(run.predict(x, 6).probs, draws.probs)
    monkeypatch.setattr(predict, "with_trunk", lambda _: [])
    assert_close(run.predict(x, 6).probs, draws.probs)
    assert net.shared is None


def test_a_shared_trunk_is_forgotten_even_after_an_error():
    net = vit(1)
    assert with_trunk(net) == [net] and not with_trunk(vit())
    x = torch.randn(2, 1, 4, 4)
    with pytest.raises(RuntimeError), one_trunk(net):
        net(net.initial_weights(), x)
        assert net.shared is not None and net.shared[0].shape == (2, 6, 8)
        raise RuntimeError
    assert net.shared is None


def test_a_trunk_is_in_nobodys_masks():
    model = IsingViT(SHAPE, INFO, IsingConfig(bayesian_blocks=1))
    assert set(model.vit.trunk) == {"patch", "qkv", "attn_out", "fc1", "fc2"}
    assert {kind: shape[0] for kind, shape in model.vit.matrix_shapes.items()} == {
        "qkv": 1, "attn_out": 1, "fc1": 1, "fc2": 1, "head": 1,
    }  # fmt: skip
    assert model.vit.readers.matrix("qkv").norm == 4 and "patch" not in model.layout.sites


def test_fused_and_pyro_agree_above_a_trunk():
    torch.manual_seed(0)
    model = IsingViT(SHAPE, INFO, IsingConfig(bayesian_blocks=2))
    guide = IsingGuide(model, 50)
    model.num_data, model.kappa_weights = 50, guide.kappa_weights
    guide.phase = "ising"
    for name in guide.layout.sites:
        guide.field(name).uniform_(-2, 2)
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    found = []
    for loss in (
        lambda: FusedELBO(model, guide)(x, y),
        lambda: ClosedFormELBO().differentiable_loss(model, guide, x, y),
    ):
        torch.manual_seed(3)
        value = loss()
        wanted = [*guide.loc.values(), *model.vit.trunk.values(), model.vit.position]
        found.append((value.detach(), torch.autograd.grad(value, wanted)))
    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert theirs.any()
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_one_rate():
    method = method_class("ising")(RunConfig(vit=SHAPE, ising=IsingConfig(bayesian_blocks=1)), INFO, 50)
    groups = method.parameter_groups(replace(TrainConfig(), weight_decay=0.1))
    listed = [p for group in groups for p in group["params"]]
    trained = [p for p in method.parameters() if p.requires_grad]
    assert len(listed) == len(set(listed)) and set(listed) == set(trained)
    factors = rate_factors(method.model.vit.all_readers)
    for group in groups:
        for kind, weight in method.model.vit.trunk.items():
            if any(p is weight for p in group["params"]):
                assert group["lr"] == TrainConfig().lr * factors[kind] and group["weight_decay"] > 0


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_everything_after_training_works(blocks, data, tmp_path):
    run = fit(SHAPE, data, bayesian_blocks=blocks, **TRAIN)
    x = data.test.images[:5]
    draws = run.predict(x, 6)
    assert draws.probs.shape == (6, 5, 3) and draws.probs.std(0).max() > 1e-4
    loaded = load_run(run.save(tmp_path / "run"))
    assert torch.equal(loaded.predict(x, 6).probs, draws.probs)
    [(net, weights)] = run.method.deployed()
    z = run.info.normalise(x)
    small = run.prune(form="mean", weighting="slab")
    assert_close(small(z) * small.temperature, net(weights, z), rtol=1e-4, atol=1e-5)
    sampled = run.prune(form="bayes")
    assert not any(name.startswith(("patch", "blocks__0")) for name in sampled.posteriors)
    mean, wide = sampled.predict(x, 400).mean(0), run.predict(x, 400).mean
    assert (mean - wide).abs().max() < 0.1
    metrics = run.evaluate(data.test)
    assert np.isfinite(metrics["nll"])
    tree = run_to_datatree(run, data.test, run.predict(data.test.images, 4))
    assert "retention_head" in tree["variational"]
    if blocks:
        assert tree["posterior"]["kept_heads"]["layer"].values.tolist() == list(range(3 - blocks, 3))
    start = Start.of(*_network(run), run.info.scale, "made")
    again = fit(start, data, bayesian_blocks=1, **{**TRAIN, "epochs": 1})
    assert again.model.vit.trunk["qkv"].shape[0] == 2


def _network(run):
    [(net, weights)] = run.method.trained_networks()
    return net, dict(weights.items())


@pytest.mark.parametrize("method, blocks", [("ising", 1), ("deterministic", None), ("dropout", None)])
def test_frozen_blocks_stay(method, blocks, data):
    start = Start.of(vit(), vit().initial_weights(), INFO.scale, "made")
    settings = {} if method != "ising" else {"bayesian_blocks": blocks}
    keep = {k: v for k, v in TRAIN.items() if k not in ("max_keep", "target_retention")} if method != "ising" else TRAIN
    run = fit(start, data, method=method, frozen_blocks=2, **settings, **keep)
    whole, matrices = _network(run)[0].whole(_network(run)[1])
    for kind in ("qkv", "attn_out", "fc1", "fc2"):
        assert_close(matrices[kind][:2].detach(), start.weights[kind][:2], rtol=0, atol=0)
        assert not torch.allclose(matrices[kind][2].detach(), start.weights[kind][2])
    assert_close(matrices["patch"].detach(), start.weights["patch"], rtol=0, atol=0)
    own = tensors(whole)
    for name in ("position", "cls", "register_tokens", "pre_gain", "bias.patch"):
        assert_close(own[name], start.others[name], rtol=0, atol=0)
    assert_close(own["norm_gain"][:4], start.others["norm_gain"][:4], rtol=0, atol=0)
    assert not torch.equal(own["norm_gain"][4:], start.others["norm_gain"][4:])


EVERY = [name for name, row in METHODS.items() if not row.networks and name not in ("laplace", "temperature")]


@pytest.mark.parametrize("method", EVERY)
def test_whatever_a_method_keeps_of_frozen_blocks_stays(method, data):
    """No gate of a frozen block closes, no rate or variance of it grows, none of its weights is pruned."""
    start = Start.of(vit(), vit().initial_weights(), INFO.scale, "made")
    masked = "bayesian_blocks" if issubclass(method_class(method), IsingMethod) else None
    settings = {masked: 1, "max_keep": 0.9} if masked else {}
    config = {"epochs": 6, "batch_size": 20, "device": "cpu", "progress": False, "lr": 0.05}
    run = fit(start, data, method=method, frozen_blocks=2, **settings, **config)
    fresh = build_run(replace(run.config, init="made"), run.info, 60)
    fresh.method.start_from(start)
    if masked:  # those blocks have no masks at all
        assert {len(kept) for kept in run.kept().values()} == {1}
        return
    before, after = fresh.kept(), run.kept()
    for kind, kept in after.items():
        layers = slice(0, run.method.vit.frozen_layers(kind))
        assert torch.equal(kept[layers], before[kind][layers]), kind
    for noise in run.method.fast:
        for kind, parameter in getattr(run.method, noise).items():
            layers = slice(0, run.method.vit.frozen_layers(kind))
            if noise != "log_a":  # starts at random
                assert torch.equal(parameter[layers], getattr(fresh.method, noise)[kind][layers]), (noise, kind)
    pruning = [kept[run.method.vit.frozen_layers(kind) :] for kind, kept in after.items()]
    if isinstance(run.method, Magnitude):  # the share is one of what is not frozen
        left = sum(float(kept.sum()) for kept in pruning) / sum(kept.numel() for kept in pruning)
        assert left == pytest.approx(1 - run.config.baseline.sparsity, abs=0.01)


def test_blocks_that_cannot_be(data):
    with pytest.raises(UserError, match="`bayesian_blocks` 4 of 3"):
        fit(SHAPE, data, bayesian_blocks=4, **TRAIN)
    with pytest.raises(UserError, match="set `bayesian_blocks` to 1 or less"):
        fit(SHAPE, data, bayesian_blocks=2, frozen_blocks=2, **TRAIN)
    with pytest.raises(UserError, match="`frozen_blocks` must not be negative"):
        fit(SHAPE, data, frozen_blocks=-1, **TRAIN)
    with pytest.raises(UserError, match="`frozen_blocks` would keep random weights"):
        fit(SHAPE, data, bayesian_blocks=1, frozen_blocks=1, **TRAIN)
