"""Nested dropout: prefixes of the units, what these are worth, every method, engine and part of a batch."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, INFO, TINY, make_pair, network, resumed_like_whole, trainer
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit import Run, ViTConfig, fit, load_data
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.nested_dropout import draw_kept, first_units
from pyro_isingvit.nets.view import View, viewing
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.runs.checks import check_training


def without(vit: ViT, weights: Weights, gone: list[slice]) -> Weights:
    """The matrices with the units of each block that fc2 must not read at zero."""
    fc2 = weights["fc2"].clone()
    for block, units in enumerate(gone):
        fc2[block, :, units] = 0.0
    return {**weights, "fc2": fc2}


# The prefix property --------------------------------------------------------------------------------------------------


def test_what_is_kept_is_a_prefix_of_the_right_length() -> None:
    kept = torch.tensor([0.0, 0.1, 0.5, 0.999, 1.0])
    units = first_units(torch.ones(5, 3, 4), kept)
    assert units[:, 0].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert (units == units[:, :1]).all()  # all tokens of an image alike


def test_every_length_is_as_likely_for_the_share_of_the_images() -> None:
    kept = draw_kept(0.4, 6000, 2, torch.device("cpu"))
    lengths = first_units(torch.ones(12000, 1, 8), kept.flatten()).sum(-1).long().flatten()
    counts = lengths.bincount(minlength=9)
    wanted = torch.tensor([0.0, *[0.4 / 8] * 7, 0.4 / 8 + 0.6]) * 12000
    assert bool(((counts - wanted).abs() < 4.5 * wanted.sqrt() + 1).all())
    cut = kept < 1
    assert torch.equal(cut[:, 0], cut[:, 1])  # an image keeps all units of all blocks, or has a k in each
    assert (kept[cut[:, 0], 0] != kept[cut[:, 0], 1]).all()  # blocks apart


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_an_image_sees_the_network_without_the_other_units(pool: str) -> None:
    vit, weights = network(replace(TINY, pool=pool), INFO, seed=1)
    x, kept = torch.randn(3, 1, 4, 4), torch.tensor([[0.0, 0.5], [0.3, 1.0], [0.99, 0.2]])
    with viewing(vit, View(kept=kept)):
        found = vit(weights, x)
    for image, (first, second) in enumerate([(1, 9), (5, 16), (16, 4)]):
        cut = without(vit, weights, [slice(first, None), slice(second, None)])
        torch.testing.assert_close(found[image], vit(cut, x[image : image + 1])[0], rtol=1e-4, atol=1e-5)
    assert vit.touch is None


def test_every_draw_sees_the_units_of_its_images() -> None:
    vit, first = network(TINY, INFO, seed=1)
    both = {kind: torch.stack([first[kind], other]) for kind, other in vit.initial_weights().items()}
    x, kept = torch.randn(6, 1, 4, 4), torch.rand(6, 2)
    with viewing(vit, View(kept=kept)):
        together = vit(both, x.unflatten(0, (2, 3)))
    for s in range(2):
        with viewing(vit, View(kept=kept)[slice(3 * s, 3 * s + 3)]):
            alone = vit({kind: w[s] for kind, w in both.items()}, x[3 * s : 3 * s + 3])
        torch.testing.assert_close(together[s], alone, rtol=1e-4, atol=1e-5)


def test_both_engines_compute_the_same() -> None:
    model, guide = make_pair(vit=TINY)
    x, y, found = torch.randn(6, 1, 4, 4), torch.arange(6) % 3, []
    for loss in (FusedELBO(model, guide), ClosedFormELBO().differentiable_loss):
        torch.manual_seed(3)
        with viewing(model, View(kept=torch.linspace(0, 1, 12).view(6, 2))):
            value = loss(x, y) if isinstance(loss, FusedELBO) else loss(model, guide, x, y)
        found.append((value, *torch.autograd.grad(value, [*guide.loc.values(), model.vit.position])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


# Training -------------------------------------------------------------------------------------------------------------


def test_units_are_ordered_by_what_they_are_worth() -> None:
    """Trained on digits, a quarter of the units does nearly what all do, if it is the first one."""
    digits, vit = load_data("digits", train_size=300), ViTConfig(patch_size=4, width=16, heads=4, depth=1)
    x, y = digits.info.normalise(digits.test.images[:]), digits.test.labels

    def loss(run: Run, gone: slice) -> float:
        net: ViT = run.method.vit
        with torch.no_grad():
            return float(F.cross_entropy(net(without(net, dict(run.method.loc.items()), [gone]), x), y))

    rises = []
    for share in (1.0, 0.0):
        run = fit(vit, digits, method="deterministic", epochs=20, nested_dropout=share, progress=False)
        rises.append(loss(run, slice(16, None)) - loss(run, slice(0)))
        if share:
            assert loss(run, slice(0, 32)) > loss(run, slice(32, None)) + 0.05
    assert rises[0] < 0.3 * rises[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_it_and_predicts_with_all_units(data, method: str, monkeypatch) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    looks: list[tuple[bool, bool]] = []
    forward = ViT.forward

    def spy(self: ViT, *rest, **more) -> Tensor:
        looks.append((self.training, self.touch is not None))
        return forward(self, *rest, **more)

    monkeypatch.setattr(ViT, "forward", spy)
    train = replace(METHODS[method].train, epochs=2, finetune_epochs=1, batch_size=20, val_samples=1, device="cpu")
    config = replace(CONFIG, method=method, ising=replace(METHODS[method].ising, update_every=100), train=train)
    run = trainer(data, config=config, nested_dropout=0.5).fit()
    assert all(math.isfinite(record[key]) for record in run.history for key in ("loss", "nll", "val_nll"))
    assert any(touched for _, touched in looks) and not any(touched for training, touched in looks if not training)


@pytest.mark.parametrize("changes", [
    {"engine": "pyro"}, {"precision": "bf16"}, {"noise": "activations"}, {"mix": "manifold"}, {"token_masking": 0.5},
])  # fmt: skip
def test_every_way_of_training(data, changes: dict) -> None:
    run = trainer(data, nested_dropout=0.5, **changes).fit()
    assert all(math.isfinite(record["loss"]) for record in run.history)


@pytest.mark.parametrize("draws", [2, "image"])
def test_micro_batches_leave_the_loss_as_it_is(data, draws) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, granularity="unit"))
    settings = {"draws": draws, "nested_dropout": 0.5, "rate_rule": "uniform"}
    whole, parts = (trainer(data, None, config, accumulate=n, **settings).fit().history for n in (1, 2))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_checkpointed_blocks_keep_the_same_units(data) -> None:
    runs = [trainer(data, checkpoint_activations=flag, nested_dropout=0.5).fit().history for flag in (False, True)]
    assert runs[0] == runs[1]


def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path) -> None:
    resumed_like_whole(data, tmp_path, nested_dropout=0.5)


def test_what_cannot_be(data) -> None:
    for share in (-0.1, 1.5):
        with pytest.raises(UserError, match="`nested_dropout` must lie"):
            check_training(TrainConfig(nested_dropout=share))
    with pytest.raises(UserError, match=r"`nested_dropout` changes the network.*`compile`"):
        trainer(data, nested_dropout=0.5, compile=True)
