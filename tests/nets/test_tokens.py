"""Token masking: what an image shows, in the network, in a batch's parts, and in every method's training."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import CONFIG, INFO, TINY, make_pair, network, trainer
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.curvature import SALIENCY
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.penalties import PENALTIES, Penalties, Penalty, Seen
from pyro_isingvit.nets.tokens import TokenMasking, showing
from pyro_isingvit.nets.vit import ViT, Watch

POOLS = ("mean", "cls")
VISIBLE = torch.tensor([[0, 2], [1, 3], [2, 3], [0, 1], [0, 3], [1, 2]])  # two of four patches of 2x2 pixels, 6 images


def made(pool: str) -> tuple[ViT, dict[str, Tensor]]:
    return network(replace(TINY, pool=pool), INFO, seed=1)


def dropped(visible: Tensor) -> Tensor:
    """The two other tokens of each image."""
    return torch.stack([torch.tensor(sorted(set(range(4)) - set(row))) for row in visible.tolist()])


def with_patches(images: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Images (B, 1, 4, 4) with other 2x2 patches at the places (B, n): values (B, n, 2, 2)."""
    changed = images.clone()
    for image, places, patches in zip(changed, where.tolist(), values, strict=True):
        for place, value in zip(places, patches, strict=True):
            top, left = divmod(place, 2)
            image[0, 2 * top : 2 * top + 2, 2 * left : 2 * left + 2] = value
    return changed


# The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_what_is_dropped_does_not_count(pool: str) -> None:
    """Not its content, and not its order: the dropped patches are exchanged, and made others."""
    vit, weights = made(pool)
    x, hidden = torch.randn(6, 1, 4, 4), dropped(VISIBLE)
    patches = vit.patchify(x).gather(1, hidden.unsqueeze(-1).expand(6, 2, 4)).view(6, 2, 2, 2)
    exchanged = with_patches(x, hidden, patches.flip(1))
    others = with_patches(x, hidden, torch.randn(6, 2, 2, 2))
    assert not torch.equal(x, exchanged)
    with showing(vit, VISIBLE):
        logits = vit(weights, x)
        assert torch.equal(vit(weights, exchanged), logits) and torch.equal(vit(weights, others), logits)
    assert not torch.allclose(vit(weights, exchanged), vit(weights, x))
    assert not torch.allclose(vit(weights, x), logits)


@pytest.mark.parametrize("pool", POOLS)
def test_the_others_keep_their_positions(pool: str) -> None:
    """The first block reads the rows that it reads of the whole image; the CLS token among them."""
    vit, weights = made(pool)
    x, whole, part = torch.randn(6, 1, 4, 4), {"tokens": []}, {"tokens": [], "attention": []}
    vit(weights, x, whole)
    with showing(vit, VISIBLE):
        vit(weights, x, part)
    extra = int(pool == "cls")
    for image, row in enumerate(VISIBLE.tolist()):
        kept = [0] * extra + [number + extra for number in row]
        assert torch.equal(part["tokens"][0][image], whole["tokens"][0][image, kept])
    assert [query.shape for query, _ in part["attention"]] == [(6, 2, 2 + extra, 4)] * 2


@pytest.mark.parametrize("pool", POOLS)
def test_all_tokens_are_the_whole_image(pool: str) -> None:
    vit, weights = made(pool)
    x = torch.randn(6, 1, 4, 4)
    with showing(vit, torch.arange(4).expand(6, 4)):
        shown = vit(weights, x)
    assert torch.equal(shown, vit(weights, x))


@pytest.mark.parametrize("pool", POOLS)
def test_every_draw_of_the_weights_sees_the_tokens_of_its_images(pool: str) -> None:
    """Two draws of the weights, with a half of the batch each and with all of it."""
    vit, first = made(pool)
    second = vit.initial_weights()
    both = {kind: torch.stack([first[kind], second[kind]]) for kind in first}
    x, alone = torch.randn(6, 1, 4, 4), []
    for weights in (first, second):
        rows = [vit_of_one(vit, weights, x[image : image + 1], VISIBLE[image : image + 1]) for image in range(6)]
        alone.append(torch.cat(rows))
    with showing(vit, VISIBLE):
        halves, whole = vit(both, x.unflatten(0, (2, 3))), vit(both, x)
    torch.testing.assert_close(whole, torch.stack(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(halves.flatten(0, 1), torch.cat([alone[0][:3], alone[1][3:]]), rtol=1e-4, atol=1e-5)


def vit_of_one(vit: ViT, weights: dict[str, Tensor], x: Tensor, visible: Tensor) -> Tensor:
    with showing(vit, visible):
        return vit(weights, x)


def test_a_network_shows_everything_again_whatever_happened() -> None:
    vit, weights = made("mean")
    with pytest.raises(AssertionError, match="another batch"), showing(vit, VISIBLE):
        vit(weights, torch.randn(5, 1, 4, 4))
    assert vit.visible is None


# The draw ---------------------------------------------------------------------------------------------------------


def test_every_image_draws_its_own_and_every_token_is_as_likely() -> None:
    masking = TokenMasking(0.25, made("mean")[0])
    visible = masking.draw(8000, torch.device("cpu"))
    assert visible is not None and visible.shape == (8000, 3) and (visible.diff(dim=1) > 0).all()
    counts = visible.flatten().bincount(minlength=4)
    assert (counts - 6000).abs().max() < 4.5 * math.sqrt(8000 * 0.75 * 0.25)
    assert visible.min() == 0 and visible.max() == 3  # of the patches: a CLS token has no number


def test_the_share_is_rounded_and_the_cls_token_is_not_counted() -> None:
    for share, left in ((0.0, 4), (0.13, 3), (0.25, 3), (0.37, 3), (0.38, 2), (0.87, 1)):
        visible = TokenMasking(share, made("cls")[0]).draw(5, torch.device("cpu"))
        assert (4 if visible is None else visible.shape[1]) == left


def test_share_0_draws_no_random_number() -> None:
    masking, state = TokenMasking(0.0, made("mean")[0]), torch.get_rng_state()
    assert masking.draw(64, torch.device("cpu")) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_share_of_less_than_half_a_token_is_told(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert TokenMasking(0.1, made("mean")[0]).draw(3, torch.device("cpu")) is None
    assert "`token_masking` 0.1 of 4 tokens" in caplog.text


@pytest.mark.parametrize(("share", "words"), [
    (0.9, "means masking all tokens, of which there are 4; choose at most 0.75"), (1.0, "below 1, not 1.0"),
    (-0.1, "below 1"), (1.5, "below 1"), (math.nan, "finite"),
])  # fmt: skip
def test_masking_all_tokens_is_refused_by_name(data, tmp_path, share: float, words: str) -> None:
    with pytest.raises(UserError, match=f"`token_masking`.*{words}"):
        trainer(data, tmp_path / "run", token_masking=share)
    assert not (tmp_path / "run").exists()


def test_a_method_without_patches_is_refused() -> None:
    with pytest.raises(UserError, match="`token_masking` needs a method whose networks are ViTs"):
        TokenMasking(0.5, nn.Linear(2, 2))


# The objective ----------------------------------------------------------------------------------------------------


def test_both_engines_compute_the_same_loss_and_gradients_with_penalties() -> None:
    model, guide = make_pair(vit=replace(TINY, pool="cls"))
    model.penalties = Penalties(TrainConfig(log_barrier=0.3))
    x, y, found = torch.randn(6, 1, 4, 4), torch.arange(6) % 3, []
    for loss in (FusedELBO(model, guide), ClosedFormELBO().differentiable_loss):
        torch.manual_seed(3)
        with showing(model, VISIBLE):
            value = loss(x, y) if isinstance(loss, FusedELBO) else loss(model, guide, x, y)
        found.append((value, *torch.autograd.grad(value, [*guide.loc.values(), model.vit.position])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))
    torch.manual_seed(3)
    whole = FusedELBO(model, guide)(x, y)
    assert float(whole.detach()) != pytest.approx(float(found[0][0].detach()), rel=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_penalties_see_the_tokens_of_their_images_in_any_part(parts: int) -> None:
    """Three draws: the tokens that a penalty watches are those of each image, in order, whatever the parts."""
    model, guide = make_pair(vit=TINY)
    for name in guide.layout.sites:
        guide.field(name).fill_(20.0)  # every mask at one: the tokens are the same in all draws
    seen: list[Seen] = []
    row = Penalty(lambda found: seen.append(found) or found.logits.mean(), ("tokens", "attention"))
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    watch: Watch = {"tokens": []}
    elbo = FusedELBO(model, guide, draws=3)
    with patch.dict(PENALTIES, {"log_barrier": row}), patch("torch.randn_like", torch.zeros_like):
        model.penalties = Penalties(TrainConfig(log_barrier=0.3))
        shares = zip(x.chunk(parts), y.chunk(parts), VISIBLE.chunk(parts), strict=True)
        for part, (images, labels, visible) in enumerate(shares):
            elbo.part = (part, parts)
            with showing(model, visible):
                elbo.terms(images, labels)
    model.vit(dict(guide.loc.items()), x, watch)
    expected = torch.stack([tokens[row] for tokens, row in zip(watch["tokens"][0], VISIBLE, strict=True)])
    torch.testing.assert_close(torch.cat([found.watched["tokens"][0] for found in seen]), expected)
    assert sum(len(found.watched["attention"][0][0]) for found in seen) == 6


# Training ---------------------------------------------------------------------------------------------------------


@contextmanager
def looks() -> Iterator[list[tuple[bool, int | None]]]:
    """Every pass through a network: whether in training mode, and how many tokens an image shows; None: all."""
    seen: list[tuple[bool, int | None]] = []
    forward = ViT.forward

    def spy(self: ViT, weights, images, *rest, **more) -> Tensor:
        seen.append((self.training, None if self.visible is None else self.visible.shape[1]))
        return forward(self, weights, images, *rest, **more)

    with patch.object(ViT, "forward", spy):
        yield seen


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_masked_images_and_predicts_on_whole_ones(data, method: str) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    train = replace(METHODS[method].train, epochs=2, finetune_epochs=1, batch_size=20, val_samples=1, device="cpu")
    config = replace(CONFIG, method=method, ising=replace(METHODS[method].ising, update_every=100), train=train)
    with looks() as seen:
        run = trainer(data, config=config, token_masking=0.5).fit()
    assert all(math.isfinite(record[key]) for record in run.history for key in ("loss", "nll", "val_nll"))
    steps = [shown for _, shown in seen if shown is not None]
    assert set(steps) == {2} and len(steps) % 9 == 0  # 3 epochs of 3 steps
    assert all(shown is None for training, shown in seen if not training)


@pytest.mark.parametrize("saliency", SALIENCY)
def test_curvature_looks_at_whole_images(data, saliency: str) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, saliency=saliency, update_every=1))
    whole: list[bool] = []
    estimate = SALIENCY[saliency]

    def spy(vit: ViT, *rest) -> dict[str, Tensor]:
        whole.append(vit.visible is None)
        return estimate(vit, *rest)

    with patch.dict(SALIENCY, {saliency: spy}):
        trainer(data, config=config, epochs=3, token_masking=0.5).fit()
    assert whole and all(whole)


@pytest.mark.parametrize("changes", [
    {"engine": "pyro"}, {"log_barrier": 0.02, "accumulate": 2}, {"checkpoint_activations": True}, {"precision": "bf16"},
    {"noise": "activations"}, {"mix": "cutmix", "augment": "randaugment", "label_smoothing": 0.1},
])  # fmt: skip
def test_every_way_of_training(data, changes: dict) -> None:
    run = trainer(data, token_masking=0.25, **changes).fit()
    assert all(math.isfinite(record["loss"]) for record in run.history)


@pytest.mark.parametrize(
    ("engine", "accumulate", "draws"), [("fused", 2, 4), ("fused", 4, 2), ("fused", 2, "image"), ("pyro", 2, None)]
)
def test_micro_batches_leave_the_loss_as_it_is(data, engine: str, accumulate: int, draws: object) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, granularity="unit"))
    settings = {"engine": engine, "draws": draws, "token_masking": 0.5, "log_barrier": 0.02, "rate_rule": "uniform"}
    whole, parts = (trainer(data, None, config, accumulate=n, **settings).fit().history for n in (1, accumulate))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["log_barrier"] == pytest.approx(expected["log_barrier"], rel=1e-3)


def test_checkpointed_blocks_read_the_same_tokens(data) -> None:
    runs = [trainer(data, checkpoint_activations=flag, token_masking=0.5).fit().history for flag in (False, True)]
    assert runs[0] == runs[1]


def test_ensembles_show_every_member_the_same_tokens(data) -> None:
    config = replace(CONFIG, method="ensemble", train=replace(CONFIG.train, epochs=1))
    ours = trainer(data, config=config, token_masking=0.5)
    seen: list[Tensor] = []
    forward = ViT.forward

    def spy(self: ViT, *rest, **more) -> Tensor:
        if self.visible is not None:
            seen.append(self.visible)
        return forward(self, *rest, **more)

    with patch.object(ViT, "forward", spy):
        ours.fit()
    assert len(seen) == 15  # 3 steps of 5 members
    assert all(torch.equal(seen[5 * step + k], seen[5 * step]) for step in range(3) for k in range(5))
    assert not torch.equal(seen[0], seen[5])
