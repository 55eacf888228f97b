"""Small shifts, RegMixup and smoothed labels: what the network is trained on, and what curvature reads."""

import json
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import CONFIG, trainer
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.augment import ALPHAS, Augmentation, draw_share, random_crop
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.ising.curvature import SALIENCY

INFO = DataInfo("made", tuple("abcdefghij"), 1, 8, 6, (0.5,), (0.25,))


def augmentation(**settings: object) -> Augmentation:
    return Augmentation(replace(TrainConfig(), **settings), INFO)


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(1, 256, (count, 1, 8, 6), dtype=torch.uint8), torch.randint(10, (count,))


# Small shifts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1, 2, 5])
def test_a_margin_is_the_farthest_that_an_image_moves(margin: int) -> None:
    dot = torch.zeros(2000, 1, 13, 13, dtype=torch.uint8)
    dot[:, :, 6, 6] = 255
    where = random_crop(dot, margin).flatten(1).int().argmax(1)
    for place in (where // 13, where % 13):  # every row and column as likely
        counts = place.bincount(minlength=13)[6 - margin : 7 + margin]
        assert counts.sum() == 2000 and (counts > 0.6 * 2000 / (2 * margin + 1)).all()


def test_margin_0_is_the_identity_and_draws_nothing() -> None:
    images, labels = batch(9)
    state = torch.get_rng_state()
    x, y = augmentation(augment="crop", margin=0)(images, labels)
    assert torch.equal(x, INFO.normalise(images)) and torch.equal(y, labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_open_margin_is_an_eighth_of_each_side() -> None:
    images, labels = batch(40)
    found = []
    for margin in (None, 1):  # 8 and 6 pixels: one of each
        torch.manual_seed(1)
        found.append(augmentation(augment="crop-flip", margin=margin)(images, labels)[0])
    assert torch.equal(*found)


def test_a_margin_of_the_side_is_refused() -> None:
    for margin in (6, 7):
        with pytest.raises(UserError, match=f"`margin` {margin} could move images of 8x6 pixels.*at most 5"):
            augmentation(augment="crop", margin=margin)
    assert augmentation(augment="crop", margin=5)(*batch(3))[0].shape == (3, 1, 8, 6)
    augmentation(margin=6)  # nobody reads it


# RegMixup ---------------------------------------------------------------------------------------------------------


def test_half_is_clean_and_half_is_mixed_with_one_share() -> None:
    images, labels = batch(12)
    x, y = augmentation(mix="regmixup")(images, labels)
    clean, hot = INFO.normalise(images), F.one_hot(labels, 10).float()
    assert torch.equal(x[::2], clean[::2]) and torch.equal(y[::2], hot[::2])
    shares = ((x[1::2] - clean[::2]) / (clean[1::2] - clean[::2])).flatten().nanmedian()
    torch.testing.assert_close(x[1::2], shares * clean[1::2] + (1 - shares) * clean[::2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y[1::2], shares * hot[1::2] + (1 - shares) * hot[::2], atol=1e-4, rtol=1e-4)
    assert 0.01 < float(shares) < 0.99


def test_the_share_has_the_moments_of_its_beta() -> None:
    """Mean 1/2, variance 1 / (4 (2 a + 1)); the mean within 4.5 standard errors, the variance within 10%."""
    for alpha in (0.2, 1.0, 10.0):
        shares = torch.tensor([draw_share(alpha) for _ in range(4000)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(float(shares.mean()) - 0.5) < 4.5 * math.sqrt(variance / 4000)
        assert float(shares.var()) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("mix", ALPHAS)
def test_an_open_alpha_is_that_of_the_mix(mix: str) -> None:
    images, labels = batch(6)
    found = []
    for alpha in (None, 10.0 if mix == "regmixup" else 0.2, 3.0):
        torch.manual_seed(4)
        found.append(augmentation(mix=mix, mix_alpha=alpha)(images, labels)[1])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_settings_of_earlier_versions_keep_their_alpha() -> None:
    raw = json.loads(CONFIG.to_json())
    raw["train"] |= {"mix": "mixup", "mix_alpha": 0.2}
    for name in ("margin", "token_masking", "label_smoothing"):
        del raw["train"][name]
    train = RunConfig.from_json(json.dumps(raw)).train
    assert (train.mix_alpha, train.margin, train.token_masking, train.label_smoothing) == (0.2, None, 0.0, 0.0)
    del raw["train"]["mix_alpha"]
    images, labels = batch(6)
    found = []
    for settings in (train, RunConfig.from_json(json.dumps(raw)).train):
        torch.manual_seed(4)
        found.append(Augmentation(settings, INFO)(images, labels)[1])
    assert torch.equal(*found)


def test_with_share_1_it_is_the_cross_entropy() -> None:
    images, labels = batch(12)
    with patch("pyro_isingvit.data.augment.draw_share", lambda alpha: 1.0):
        x, y = augmentation(mix="regmixup")(images, labels)
    logits = torch.randn(12, 10)
    assert torch.equal(x, INFO.normalise(images))
    torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(logits, labels))


def test_the_loss_is_the_mean_of_both_halves() -> None:
    images, labels = batch(12)
    with patch("pyro_isingvit.data.augment.draw_share", lambda alpha: 0.3):
        _, y = augmentation(mix="regmixup")(images, labels)
    logits = torch.randn(12, 10)
    clean = F.cross_entropy(logits[::2], labels[::2])
    mixed = 0.3 * F.cross_entropy(logits[1::2], labels[1::2]) + 0.7 * F.cross_entropy(logits[1::2], labels[::2])
    torch.testing.assert_close(F.cross_entropy(logits, y), (clean + mixed) / 2)


@pytest.mark.parametrize("parts", [4, 8])
@pytest.mark.parametrize("count", [16, 64, 40])
def test_every_part_of_a_batch_has_both_halves(parts: int, count: int) -> None:
    images = torch.randint(1, 256, (count, 1, 8, 6), dtype=torch.uint8)
    labels = torch.arange(count) % 10  # neighbours differ
    _, y = augmentation(mix="regmixup")(images, labels)
    for part in y.chunk(parts):
        clean = part.max(1).values == 1
        assert abs(int(clean.sum()) - int((~clean).sum())) == len(part) % 2


def test_batches_have_pairs_of_images(data) -> None:
    seen: list[int] = []
    call = Augmentation.__call__

    def spy(self: Augmentation, images, labels, weights):
        seen.append(len(images))
        return call(self, images, labels, weights)

    fewer = replace(data, train=replace(data.train, images=data.train.images[:51], labels=data.train.labels[:51]))
    with patch.object(Augmentation, "__call__", spy):
        trainer(fewer, epochs=1, mix="regmixup", batch_size=24, accumulate=3).fit()
    assert seen == [24, 24]  # the rest of 3 is no multiple of 3 pairs
    for settings in ({"batch_size": 15}, {"batch_size": 18, "accumulate": 6}, {"batch_size": 64, "accumulate": 32}):
        with pytest.raises(UserError, match="pairs of images for `mix` regmixup; `batch_size`"):
            trainer(data, mix="regmixup", **settings)


@pytest.mark.parametrize("saliency", ["gnb", "hutchinson", "empirical_fisher"])
def test_curvature_reads_clean_images(data, saliency: str) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, saliency=saliency, update_every=1, curvature_batch=16))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    estimate = SALIENCY[saliency]

    def spy(vit, weights, images, labels):
        seen.append((images, labels))
        return estimate(vit, weights, images, labels)

    with patch.dict(SALIENCY, {saliency: spy}):
        trainer(data, config=config, epochs=3, mix="regmixup", batch_size=20).fit()
    known = data.info.normalise(data.train.images[:])
    assert len(seen) == 9
    for images, labels in seen:
        assert len(images) == 10  # the half of 20, fewer than curvature_batch
        assert (images[:, None] == known[None]).flatten(2).all(2).any(1).all()
        assert set(labels.unique().tolist()) == {0.0, 1.0}


# Smoothed labels --------------------------------------------------------------------------------------------------


def test_smoothed_labels_by_hand() -> None:
    images, _ = batch(2)
    x, y = augmentation(label_smoothing=0.1)(images, torch.tensor([3, 0]))
    expected = torch.full((2, 10), 0.01)
    expected[0, 3] = expected[1, 0] = 0.91
    torch.testing.assert_close(y, expected)
    assert torch.equal(x, INFO.normalise(images))
    logits = torch.randn(2, 10)
    wanted = F.cross_entropy(logits, torch.tensor([3, 0]), label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, y), wanted)


@pytest.mark.parametrize("mix", ALPHAS)
def test_mixed_labels_are_smoothed_too(mix: str) -> None:
    images, labels = batch(8)
    found = []
    for smoothing in (0.0, 0.2):
        torch.manual_seed(3)
        found.append(augmentation(mix=mix, label_smoothing=smoothing)(images, labels))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], 0.8 * found[0][1] + 0.02)


@pytest.mark.parametrize("changes", [
    {"engine": "pyro"}, {"accumulate": 2}, {"log_barrier": 0.02}, {"precision": "bf16"}, {"mix": "regmixup"},
])  # fmt: skip
def test_every_way_of_training_on_smoothed_labels(data, changes: dict) -> None:
    """The NLL of training is never below the entropy of the labels: 0.2 given to three classes."""
    run = trainer(data, epochs=12, lr=1e-2, label_smoothing=0.2, **changes).fit()
    y = torch.tensor([0.2 / 3, 0.2 / 3, 0.8 + 0.2 / 3])
    assert all(record["nll"] > float(-(y * y.log()).sum()) - 1e-3 for record in run.history)
    assert run.history[-1]["nll"] < run.history[0]["nll"]
