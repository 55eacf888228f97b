"""Penalties of the weight matrices: by hand, at their minimum, and what they see of every method."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, INFO, TINY, trainer
from kills import same
from torch import Tensor

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.methods.sparse import Magnitude
from pyro_isingvit.nets.readers import vit_readers
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.nets.weight_terms import (
    Matrices,
    group_lasso,
    group_orthogonality,
    hyperspherical_energy,
    spectral,
    trained_matrices,
)
from pyro_isingvit.runs.run import build_run

NEW = ["group_lasso", "group_orthogonality", "spectral", "hyperspherical_energy"]
METHOD_NAMES = [name for name in METHODS if name != "laplace"]  # which needs an extra


def matrices(seed: int = 0, width: int = 8, depth: int = 2) -> Matrices:
    readers = vit_readers(patch=4, width=width, heads=2, depth=depth, hidden=2 * width, classes=3)
    generator = torch.Generator().manual_seed(seed)
    return Matrices({k: torch.randn(shape, generator=generator) for k, shape in readers.shapes.items()}, readers)


def only(kind: str, weight: Tensor) -> Matrices:
    """One matrix of a kind that has rows of its own, (out, in)."""
    return Matrices({kind: weight[None]}, matrices().readers)


# Group lasso ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["unit", "head", "block"])
def test_groups_are_what_masks_of_that_granularity_cover(over: str) -> None:
    vit = ViT(TINY, 1, 4, 4, 3)
    weights = vit.initial_weights()
    layout = MaskLayout(vit, over)
    squares = {kind: weight.square() for kind, weight in weights.items()}
    by_masks = sum(layout.reduce(site, squares).sqrt().sum() for site in layout.sites.values())
    torch.testing.assert_close(group_lasso(trained_matrices(vit, weights), over), by_masks)


def test_a_subgradient_step_is_the_proximal_step() -> None:
    """(1 - step / |w|)_+ w while |w| > step; a group at 0 stays there."""
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.06, 0.08]], requires_grad=True)
    step = 0.02
    value = group_lasso(only("fc1", w), "unit")
    assert float(value.detach()) == pytest.approx(5.1)
    (gradient,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]))
    proximal = torch.stack([row * max(0.0, 1 - step / max(float(row.norm()), 1e-9)) for row in w.detach()])
    torch.testing.assert_close(w.detach() - step * gradient, proximal)


def test_heads_and_blocks_by_hand() -> None:
    found = matrices()
    qkv, out, fc1, fc2 = (found.weights[kind] for kind in ("qkv", "attn_out", "fc1", "fc2"))
    rest = found.weights["patch"].norm(dim=-1).sum() + found.weights["head"].norm(dim=-2).sum()
    blocks = [(qkv[b].square().sum() + out[b].square().sum()).sqrt() for b in range(2)]
    blocks += [(fc1[b].square().sum() + fc2[b].square().sum()).sqrt() for b in range(2)]
    torch.testing.assert_close(group_lasso(found, "block"), rest + sum(blocks))
    heads = []
    for b in range(2):
        for h in range(2):
            rows = [qkv[b, part * 8 + h * 4 : part * 8 + (h + 1) * 4] for part in range(3)]
            heads.append(torch.cat([*map(torch.flatten, rows), out[b, :, h * 4 : (h + 1) * 4].flatten()]).norm())
    units = fc1.norm(dim=-1).sum() + fc2.norm(dim=-1).sum()
    torch.testing.assert_close(group_lasso(found, "head"), rest + units + sum(heads))


# Rows and singular values ---------------------------------------------------------------------------------------------


def test_orthonormal_groups_give_0() -> None:
    rows = torch.linalg.qr(torch.randn(16, 16)).Q
    for w in (rows[:8], torch.cat([rows[:4], rows[:4]])):  # groups of 4: the same rows in two groups are no matter
        assert float(group_orthogonality(only("fc1", w))) == pytest.approx(0.0, abs=1e-5)
    tall = torch.linalg.qr(torch.randn(4, 3)).Q  # more rows than columns: W^T W
    assert float(group_orthogonality(only("fc1", tall))) == pytest.approx(0.0, abs=1e-5)
    assert float(group_orthogonality(only("fc1", torch.cat([rows[:3], rows[:1]])))) > 1


def test_group_orthogonality_by_hand() -> None:
    w = torch.randn(10, 7)  # 10 rows: 2 groups of 5
    by_hand = sum((g @ g.T - torch.eye(5)).square().sum() for g in (w[:5], w[5:]))
    torch.testing.assert_close(group_orthogonality(only("fc1", w)), by_hand)
    w = torch.randn(6, 7)  # 6 // 4 = 1 group
    torch.testing.assert_close(group_orthogonality(only("fc1", w)), (w @ w.T - torch.eye(6)).square().sum())
    q, k, v = torch.randn(3, 4, 8)
    parts = sum((m @ m.T - torch.eye(4)).square().sum() for m in (q, k, v))
    torch.testing.assert_close(group_orthogonality(only("qkv", torch.cat([q, k, v]))), parts)
    both = Matrices({"fc1": w[None], "head": torch.randn(1, 3, 7)}, matrices().readers)
    torch.testing.assert_close(group_orthogonality(both), group_orthogonality(only("fc1", w)))  # no classifier


def test_spectral_against_the_svd() -> None:
    found = matrices()
    singles = [m for kind, w in found.weights.items() if kind != "qkv" for m in w]
    singles += [part for w in found.weights["qkv"] for part in w.chunk(3)]
    by_svd = 0.5 * sum(torch.linalg.svdvals(m)[0].square() for m in singles)
    torch.testing.assert_close(spectral(found), by_svd)
    w = torch.randn(5, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(spectral(only("fc2", w)), w)
    u, s, vh = torch.linalg.svd(w.detach())
    torch.testing.assert_close(gradient, s[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-4, atol=1e-5)


def test_hyperspherical_energy() -> None:
    """1/2 where rows are orthogonal, 1/4 for opposite ones; by hand; lengths do not matter."""
    assert float(hyperspherical_energy(only("fc1", 5 * torch.eye(4)))) == pytest.approx(0.5, rel=1e-4)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert float(hyperspherical_energy(only("fc1", opposite))) == pytest.approx(0.25, rel=1e-3)
    w = torch.randn(4, 6)
    n = w / w.norm(dim=-1, keepdim=True)
    pairs = [1 / (n[i] - n[j]).square().sum() for i in range(4) for j in range(i)]
    torch.testing.assert_close(hyperspherical_energy(only("fc1", w)), sum(pairs) / 6, rtol=1e-3, atol=0)
    equal = torch.ones(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(hyperspherical_energy(only("fc1", equal)), equal)
    assert bool(gradient.isfinite().all())
    for length in (20.0, 40.0, 100.0, 1e6):  # float32 finds equal rows at negative squared distances
        long = torch.stack([torch.arange(1.0, 8), torch.arange(1.0, 8), torch.ones(7)]) * length
        value = hyperspherical_energy(only("fc1", long.requires_grad_()))
        (gradient,) = torch.autograd.grad(value, long)
        assert 0 < value.item() < 1e6 and bool(gradient.isfinite().all()) and float(gradient.abs().max()) < 1
    classifier = {"fc1": torch.randn(1, 1, 4), "head": torch.randn(1, 3, 4)}  # one row has no pair
    both = hyperspherical_energy(Matrices(classifier, matrices().readers))
    torch.testing.assert_close(both, hyperspherical_energy(only("head", classifier["head"][0])))
    w = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: hyperspherical_energy(Matrices({"fc1": w}, matrices().readers)), w)


# What they see --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", [0, 1])
@pytest.mark.parametrize("frozen", [0, 1])
def test_the_trunk_is_seen_and_frozen_layers_are_not(trunk: int, frozen: int) -> None:
    vit = ViT(TINY, 1, 4, 4, 3, trunk=trunk, frozen=frozen)
    weights = {kind: w.requires_grad_() for kind, w in vit.initial_weights().items()}
    found = trained_matrices(vit, weights).weights
    assert ("patch" in found) == (not frozen) and len(found["head"]) == 1
    assert {len(found[kind]) for kind in ("qkv", "attn_out", "fc1", "fc2")} == {2 - frozen}
    group_lasso(trained_matrices(vit, weights), "head").backward()
    for kind in ("qkv", "fc2"):
        parts = [part[kind].grad for part in (vit.trunk, weights) if kind in part]
        moved = [bool(layer.any()) for part in parts for layer in (() if part is None else part)]
        assert sum(moved) == 2 - frozen and moved[-1]
        assert vit.frozen_layers(kind) == frozen


def test_dropped_weights_are_not_seen() -> None:
    network = build_run(replace(CONFIG, method="magnitude"), INFO, 50).method
    assert isinstance(network, Magnitude)
    network.drop(0.5)
    for kind, weight in network.matrices().weights.items():
        assert torch.equal(weight != 0, network.kept()[kind].bool())


def test_of_the_posterior_the_means_are_seen() -> None:
    run = build_run(replace(CONFIG, ising=IsingConfig(granularity="unit", init_scale=0.5)), INFO, 50)
    for kind, weight in run.method.matrices().weights.items():
        assert torch.equal(weight, run.guide.loc[kind])


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_takes_all_of_them(method: str, data: ImageData) -> None:
    strengths = dict.fromkeys(NEW, 1e-3)
    run = trainer(data, config=replace(CONFIG, method=method), epochs=2, lasso_groups="head", **strengths).fit()
    assert all(math.isfinite(record[name]) for record in run.history for name in (*NEW, "loss"))


@pytest.mark.parametrize("name", NEW)
def test_training_lowers_them(name: str, data: ImageData) -> None:
    first, last = trainer(data, **{name: 1.0}).fit().history[:: CONFIG.train.epochs - 1]
    assert last[name] < first[name]


@pytest.mark.parametrize("name", NEW)
def test_both_engines_agree(name: str, data: ImageData) -> None:
    history = [
        trainer(data, epochs=2, engine=engine, draws=1, **{name: 0.5}).fit().history for engine in ("fused", "pyro")
    ]
    for fused, plain in zip(*history, strict=True):
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert fused[name] == pytest.approx(plain[name], rel=1e-3)


@pytest.mark.parametrize("method", ["ising", "deterministic"])
def test_micro_batches_leave_the_loss_as_it_is(method: str, data: ImageData) -> None:
    settings = dict.fromkeys(NEW, 0.1) | {"draws": 1, "epochs": 2}
    config = replace(CONFIG, method=method)
    whole, parts = (trainer(data, config=config, accumulate=n, **settings).fit().history for n in (1, 2))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_resumed_equals_uninterrupted_bit_for_bit(data: ImageData, tmp_path: Path) -> None:
    strengths = dict.fromkeys(NEW, 0.1)
    whole = trainer(data, tmp_path / "whole", **strengths).fit()

    def stop(at) -> None:
        if at.epoch == 3:
            raise KeyboardInterrupt

    cut = trainer(data, tmp_path / "cut", **strengths)
    cut.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = trainer(data, tmp_path / "cut", **strengths)
    again.restore()
    again.fit()
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("cut", "whole"))
    assert same({**ours, "seconds": 0}, {**theirs, "seconds": 0})
    assert whole.history == again.run.history
