"""Penalties on Jacobians: linear maps, the same draw in both passes, second derivatives, and their effect."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CONFIG, INFO, TINY, trainer
from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.ising.lean import noisy_linear
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.penalties import PENALTIES, Penalties, Seen
from pyro_isingvit.nets.smoothness import own_normal, squared_jacobian
from pyro_isingvit.nets.vit import ViT, Watch
from pyro_isingvit.runs.checks import check_training

METHOD_NAMES = [name for name in METHODS if name != "laplace"]  # which needs an extra
MADE = torch.Generator().manual_seed(1)
H, G = torch.randn(5, 16, generator=MADE), torch.randn(3, 5, generator=MADE)
Y = torch.zeros(3000, dtype=torch.long)


def linear(images: Tensor, watch: Watch | None) -> Tensor:
    """The network z = G H x, which does what ``ViT.forward`` does with what is watched."""
    features, watch = images.flatten(1) @ H.T, watch or {}
    if "features" in watch:
        watch["features"].append(features)
    if "swap" in watch:
        features = watch["swap"].pop()(features)
    return features @ G.T


def value(name: str, images: Tensor, network: Any = linear) -> Tensor:
    penalties = Penalties(TrainConfig(**{name: 1.0}))
    return penalties.terms(penalties.look(network, images, Y[: len(images)], None))[name]


def test_a_linear_map_gives_its_frobenius_norm() -> None:
    found = value("jacobian", torch.randn(3000, 1, 4, 4))
    torch.testing.assert_close(found, 0.5 * (G @ H).square().sum(), rtol=0.05, atol=0)
    one = value("jacobian", torch.randn(9, 1, 4, 4), lambda x, watch: linear(x, watch)[:, :1])  # v is 1 or -1
    torch.testing.assert_close(one, 0.5 * (G[0] @ H).square().sum())


def test_a_product_of_linear_maps_gives_the_sum_of_their_frobenius_norms() -> None:
    found = value("nuclear_norm", torch.randn(3000, 1, 4, 4))
    torch.testing.assert_close(found, 0.5 * (G.square().sum() + H.square().sum()), rtol=0.05, atol=0)
    least = torch.linalg.matrix_norm(G @ H, "nuc")
    assert found > least
    u, s, v = torch.linalg.svd(G @ H, full_matrices=False)  # the best split of the same product
    best = 0.5 * ((u * s.sqrt()).square().sum() + (s.sqrt()[:, None] * v).square().sum())
    torch.testing.assert_close(best, least)


def test_samples_apart() -> None:
    images, noise = torch.randn(4, 1, 4, 4, requires_grad=True), torch.randn(4, 3)
    scales = torch.tensor([1.0, 2.0])
    both = squared_jacobian(scales[:, None, None] * linear(images, None), images, noise)
    one = squared_jacobian(linear(images, None), images, noise)
    torch.testing.assert_close(both, one * scales**2)
    pair = value("nuclear_norm", images.detach(), lambda x, watch: torch.stack([linear(x, watch)] * 2))
    assert pair.shape == (2,)
    torch.testing.assert_close(pair[0], pair[1])


def test_parts_have_the_numbers_of_the_batch() -> None:
    torch.manual_seed(3)
    whole = own_normal((0, 1), torch.empty(6, 5))
    parts = []
    for part in range(3):
        torch.manual_seed(3)
        parts.append(own_normal((part, 3), torch.empty(2, 5)))
    assert torch.equal(torch.cat(parts), whole)


def test_its_gradient_by_the_weights_is_that_of_differences() -> None:
    torch.manual_seed(0)
    vit = ViT(TINY, 1, 4, 4, 3).double()
    weights = {kind: w.double().requires_grad_() for kind, w in vit.initial_weights().items()}
    images, directions = torch.randn(3, 1, 4, 4).double(), {k: torch.randn_like(w) for k, w in weights.items()}

    def at(step: float) -> Tensor:
        torch.manual_seed(1)
        moved = {kind: w + step * directions[kind] for kind, w in weights.items()}
        return value("jacobian", images, lambda x, watch: _double(vit, moved, x, watch))

    gradients = torch.autograd.grad(at(0.0), list(weights.values()), allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions.values(), strict=True) if g is not None)
    torch.testing.assert_close(slope.float(), ((at(1e-5) - at(-1e-5)) / 2e-5).float(), rtol=1e-4, atol=0)


def _double(vit: ViT, weights: dict[str, Tensor], images: Tensor, watch: Watch | None) -> Tensor:
    logits = vit(weights, images, watch)
    logits.float = lambda: logits  # type: ignore[method-assign]  # finite differences need the digits
    return logits


def test_weights_with_noise_that_is_made_again_have_second_derivatives() -> None:
    x, weight = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(5, 4).double().requires_grad_()
    window = torch.randn(5, 4).double()
    assert torch.autograd.gradgradcheck(lambda a, b: noisy_linear(a, b, window, 0.3), (x, weight))


# Training -------------------------------------------------------------------------------------------------------------


def again_is_the_same(seen: Seen) -> Tensor:
    assert seen.again is not None and seen.images is not None
    state = torch.get_rng_state()
    assert torch.equal(seen.again(seen.images, None), seen.logits)
    assert torch.equal(torch.get_rng_state(), state)
    return seen.logits.new_zeros(())


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_second_pass_is_the_same_network(method: str, data: ImageData, monkeypatch) -> None:
    monkeypatch.setitem(PENALTIES, "nuclear_norm", replace(PENALTIES["nuclear_norm"], term=again_is_the_same))
    trainer(data, config=replace(CONFIG, method=method), nuclear_norm=1.0, epochs=2).fit()


@pytest.mark.parametrize(
    ("granularity", "train"),
    [
        ("weight", {"engine": "pyro"}), ("weight", {"draws": 4}), ("weight", {"noise": "activations"}),
        ("unit", {"draws": "image"}), ("unit", {"draws": "image", "accumulate": 2}),
    ],
)  # fmt: skip
def test_a_second_pass_is_the_same_draw(granularity: str, train: dict, data: ImageData, monkeypatch) -> None:
    monkeypatch.setitem(PENALTIES, "nuclear_norm", replace(PENALTIES["nuclear_norm"], term=again_is_the_same))
    config = replace(CONFIG, ising=replace(CONFIG.ising, granularity=granularity))
    trainer(data, config=config, nuclear_norm=1.0, epochs=2, **train).fit()


def test_a_large_network_gives_the_gradients_of_a_small_one(data: ImageData, monkeypatch) -> None:
    """Its noisy weights are made again in the backward pass; the second derivative sees them all the same."""
    images, steps, v = INFO.normalise(data.train.images[:]), [], torch.randn(60, 3)
    monkeypatch.setattr("pyro_isingvit.nets.penalties.own_normal", lambda part, like: v)
    for large in (10**9, 0):
        monkeypatch.setattr("pyro_isingvit.ising.lean.LARGE", large)
        ising = replace(CONFIG.ising, granularity="unit", tau_0=0.0, posterior_scale="shared", init_scale=1e-9)
        config = replace(CONFIG, ising=replace(ising, max_keep=0.98))
        method = trainer(data, config=config, draws="image", jacobian=1.0).method
        assert method.guide.lean == (large == 0)
        torch.manual_seed(5)
        term = method(images, data.train.labels)["jacobian"]
        steps.append(torch.autograd.grad(term, [*method.guide.loc.values()]))
    for small, lean in zip(*steps, strict=True):
        torch.testing.assert_close(lean, small, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["jacobian", "nuclear_norm"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_methods_take_each(method: str, name: str, data: ImageData) -> None:
    run = trainer(data, config=replace(CONFIG, method=method), epochs=2, **{name: 0.01}).fit()
    assert all(record[name] > 0 for record in run.history)


@pytest.mark.parametrize("name", ["jacobian", "nuclear_norm"])
def test_both_engines_agree(name: str, data: ImageData) -> None:
    history = [
        trainer(data, epochs=2, engine=engine, draws=1, **{name: 0.1}).fit().history for engine in ("fused", "pyro")
    ]
    for fused, plain in zip(*history, strict=True):
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert fused[name] == pytest.approx(plain[name], rel=1e-3)


def squared_norms(method: torch.nn.Module, images: Tensor) -> Tensor:
    """|J|_F^2 of each image under one draw."""
    with torch.no_grad():
        network = method.draw_networks(1)  # type: ignore[operator]
    x = images.clone().requires_grad_()
    z = network(x)[0]
    gradients = [torch.autograd.grad(z[:, c].sum(), x, retain_graph=True)[0] for c in range(z.shape[1])]
    return torch.stack(gradients).flatten(2).square().sum((0, 2))


@pytest.mark.parametrize("method", ["ising", "deterministic"])
@pytest.mark.parametrize("name", ["jacobian", "nuclear_norm"])
def test_training_with_it_gives_smaller_jacobians(method: str, name: str, data: ImageData) -> None:
    norms = []
    for weight in (0.0, 0.3):
        config = replace(CONFIG, method=method)
        run = trainer(data, config=config, epochs=8, lr=1e-2, calibrate=False, **{name: weight}).fit()
        norms.append(float(squared_norms(run.method, INFO.normalise(data.train.images[:])).mean()))
    assert norms[1] < 0.7 * norms[0]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"jacobian": 0.1, "compile": True}, "compile"), ({"nuclear_norm": 0.1, "compile": True}, "compile"),
        ({"jacobian": 0.1, "frozen_blocks": 1}, "frozen_blocks"), ({"nuclear_norm": 0.1, "precision": "bf16"}, "bf16"),
        ({"jacobian": -1.0}, "negative"), ({"jacobian": 0.1, "checkpoint_activations": True}, "checkpoint"),
        ({"rationale": 0.1, "compile": True}, "compile"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_training(TrainConfig(**changes))
