"""Manifold mixup: what is mixed and where, under one posterior draw, on both engines, in every method's training."""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import CONFIG, INFO, TINY, make_pair, network, resumed_like_whole, trainer
from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.curvature import SALIENCY
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.manifold_mixup import HiddenMix
from pyro_isingvit.nets.view import View, viewing
from pyro_isingvit.nets.vit import ViT, Watch
from pyro_isingvit.runs.checks import check_training
from pyro_isingvit.runs.views import Views

SHARE = 0.3


def mixed(x: Tensor) -> Tensor:
    """Neighbours along the first axis, by hand."""
    return torch.cat([torch.stack([SHARE * a + (1 - SHARE) * b, SHARE * b + (1 - SHARE) * a])
                      for a, b in zip(x[::2], x[1::2], strict=True)])  # fmt: skip


# The network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"pool": "cls"}, {"registers": 2}, {"norm_pre": True}, {"patch_stride": 1}])
def test_mixed_tokens_are_the_mixup_of_images(changes: dict) -> None:
    vit, weights = network(replace(TINY, **changes), INFO, seed=1)
    x = torch.randn(6, 1, 4, 4)
    with viewing(vit, View(mix=HiddenMix(0, SHARE))):
        found = vit(weights, x)
    torch.testing.assert_close(found, vit(weights, mixed(x)), rtol=1e-4, atol=1e-5)
    assert vit.touch is None and not torch.allclose(found, vit(weights, x), atol=1e-3)


@pytest.mark.parametrize("after", [1, 2])
def test_states_are_mixed_after_a_block_and_nowhere_else(after: int) -> None:
    """Three blocks: up to the place all is as it was, there it is the mixture, and from there on something else."""
    vit, weights = network(replace(TINY, depth=3), INFO, seed=1)
    x, clean, touched = torch.randn(6, 1, 4, 4), Watch(tokens=[], blocks=[]), Watch(tokens=[], blocks=[])
    vit(weights, x, clean)
    with viewing(vit, View(mix=HiddenMix(after, SHARE))):
        vit(weights, x, touched)
    assert torch.equal(clean["tokens"][0], touched["tokens"][0])
    for block in range(after - 1):
        assert torch.equal(clean["blocks"][block], touched["blocks"][block])
    torch.testing.assert_close(touched["blocks"][after - 1], mixed(clean["blocks"][after - 1]))
    for block in range(after, 3):
        assert not torch.allclose(touched["blocks"][block], mixed(clean["blocks"][block]), atol=1e-3)


def test_each_draw_mixes_its_own_images() -> None:
    vit, first = network(TINY, INFO, seed=1)
    both = {kind: torch.stack([first[kind], other]) for kind, other in vit.initial_weights().items()}
    x, view = torch.randn(8, 1, 4, 4), View(mix=HiddenMix(1, SHARE))
    with viewing(vit, view):
        together = vit(both, x.unflatten(0, (2, 4)))
        alone = [vit({kind: w[s] for kind, w in both.items()}, x[4 * s : 4 * s + 4]) for s in range(2)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_share_1_changes_nothing() -> None:
    x, y = torch.randn(4, 3, 2), torch.rand(4, 5)
    assert torch.equal(HiddenMix(1, 1.0).states(x), x) and torch.equal(HiddenMix(1, 1.0).labels(y), y)
    torch.testing.assert_close(HiddenMix(1, SHARE).labels(y), mixed(y))


# The posterior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3, 4, "image"])
@pytest.mark.parametrize("parts", [1, 2])
def test_two_images_are_mixed_under_one_draw(draws, parts: int) -> None:
    """Mixed tokens are those of mixed images only if both were embedded by the same weights: for every kind of draw."""
    model, guide = make_pair(vit=TINY, granularity="unit", tau_0=1e-3)
    elbo = FusedELBO(model, guide, draws, group=2)
    x, y, found = torch.randn(12, 1, 4, 4), torch.rand(12, 3).softmax(-1), []
    for images, mix in ((x, HiddenMix(0, SHARE)), (mixed(x), None)):
        for part in range(parts):
            torch.manual_seed(3)
            elbo.part = (part, parts)
            with viewing(model, View(mix=mix)):
                found.append(elbo.terms(images.chunk(parts)[part], y.chunk(parts)[part])["nll"])
    torch.testing.assert_close(torch.stack(found[:parts]), torch.stack(found[parts:]), rtol=1e-4, atol=1e-4)


def test_without_a_shared_draw_they_would_not_be() -> None:
    model, guide = make_pair(vit=TINY, granularity="unit")
    x, y, found = torch.randn(12, 1, 4, 4), torch.arange(12) % 3, []
    for images, mix in ((x, HiddenMix(0, SHARE)), (mixed(x), None)):
        torch.manual_seed(3)
        with viewing(model, View(mix=mix)):
            found.append(float(FusedELBO(model, guide, "image").terms(images, y)["nll"].detach()))
    assert found[0] != pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_both_engines_compute_the_same(after: int) -> None:
    model, guide = make_pair(vit=TINY)
    x, y, found = torch.randn(6, 1, 4, 4), torch.rand(6, 3).softmax(-1), []
    for loss in (FusedELBO(model, guide), ClosedFormELBO().differentiable_loss):
        torch.manual_seed(3)
        with viewing(model, View(mix=HiddenMix(after, SHARE))):
            value = loss(x, y) if isinstance(loss, FusedELBO) else loss(model, guide, x, y)
        found.append((value, *torch.autograd.grad(value, [*guide.loc.values(), model.vit.position])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


# Training -------------------------------------------------------------------------------------------------------------


def test_the_place_is_uniform_and_no_deeper_than_the_network(data) -> None:
    for depth, places in ((1, 2), (2, 3), (4, 3)):
        views = Views(
            TrainConfig(mix="manifold"), trainer(data, config=replace(CONFIG, vit=replace(TINY, depth=depth))).run
        )
        drawn = [views.draw(torch.zeros(2, 1, 4, 4), 0).mix for _ in range(3000)]
        counts = torch.tensor([mix.after for mix in drawn]).bincount()
        assert len(counts) == places and (counts - 3000 / places).abs().max() < 150
        shares = torch.tensor([mix.share for mix in drawn])  # Beta(2, 2) has variance 1 / 20
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.02) and float(shares.var()) == pytest.approx(
            0.05, rel=0.1
        )


@pytest.mark.parametrize("saliency", ["gnb", "lm", "hutchinson"])
def test_curvature_reads_clean_images_and_labels(data, saliency: str) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, saliency=saliency, update_every=1))
    seen: list[tuple[Tensor, Tensor]] = []
    estimate = SALIENCY[saliency]

    def spy(vit: ViT, weights, images, labels):
        assert vit.touch is None
        seen.append((images, labels))
        return estimate(vit, weights, images, labels)

    with patch.dict(SALIENCY, {saliency: spy}):
        trainer(data, config=config, epochs=3, mix="manifold").fit()
    known = data.info.normalise(data.train.images[:])
    assert seen
    for images, labels in seen:
        same = (images[:, None] == known[None]).flatten(2).all(2)
        assert bool(same.any(1).all()) and labels.dtype == torch.long
        assert torch.equal(labels, data.train.labels[same.int().argmax(1)])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_it(data, method: str) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    train = replace(METHODS[method].train, epochs=2, finetune_epochs=1, batch_size=20, val_samples=1, device="cpu")
    run = trainer(
        data, config=replace(CONFIG, method=method, ising=METHODS[method].ising, train=train), mix="manifold"
    ).fit()
    assert all(math.isfinite(record[key]) for record in run.history for key in ("loss", "nll", "val_nll"))


@pytest.mark.parametrize("changes", [
    {"engine": "pyro"}, {"log_barrier": 0.02, "label_smoothing": 0.1}, {"precision": "bf16"}, {"balance": "loss"},
    {"augment": "randaugment", "confusion": 0.3}, {"mix_alpha": 0.2, "frozen_blocks": 0},
])  # fmt: skip
def test_every_way_of_training(data, changes: dict) -> None:
    run = trainer(data, mix="manifold", **changes).fit()
    assert all(math.isfinite(record["loss"]) for record in run.history)


@pytest.mark.parametrize(("engine", "accumulate", "draws"), [("fused", 2, 2), ("fused", 5, "image"), ("pyro", 2, None)])
def test_micro_batches_leave_the_loss_as_it_is(data, engine: str, accumulate: int, draws: object) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, granularity="unit"))
    settings = {"engine": engine, "draws": draws, "mix": "manifold", "rate_rule": "uniform"}
    whole, parts = (trainer(data, None, config, accumulate=n, **settings).fit().history for n in (1, accumulate))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_checkpointed_blocks_mix_the_same(data) -> None:
    runs = [trainer(data, checkpoint_activations=flag, mix="manifold").fit().history for flag in (False, True)]
    assert runs[0] == runs[1]


def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path) -> None:
    resumed_like_whole(data, tmp_path, mix="manifold")


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "words"), [
    ({"token_masking": 0.5}, "`token_masking`"), ({"self_distillation": 0.5}, "`mix` manifold"),
    ({"early_learning": 1.0}, "`mix` manifold"), ({"mix_alpha": 1e-9}, "`mix_alpha`"),
])  # fmt: skip
def test_settings_that_cannot_be(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_training(TrainConfig(mix="manifold", **changes))


@pytest.mark.parametrize(("changes", "word"), [({"mix": "manifold"}, "mix"), ({"nested_dropout": 0.5}, "nested")])
def test_a_method_without_hidden_states_is_refused(data, changes: dict, word: str) -> None:
    run = trainer(data).run
    run.method = torch.nn.Linear(2, 2)
    run.method.info = data.info
    with pytest.raises(UserError, match=f"`{word}.*needs a method whose networks are ViTs"):
        Views(TrainConfig(**changes), run)


@pytest.mark.parametrize(("changes", "words"), [
    ({"noise": "activations"}, "`noise` to weights"), ({"compile": True}, "`compile`"),
    ({"batch_size": 15}, "pairs of images for `mix` manifold"), ({"accumulate": 20}, "pairs of images"),
])  # fmt: skip
def test_trainings_that_cannot_be(data, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        trainer(data, mix="manifold", **changes)
