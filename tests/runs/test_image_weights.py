"""What each image counts in the training loss, as a table's column of weights says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import make_split, pixels

from pyro_isingvit import ImageData, ViTConfig, fit
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.augment import Augmentation
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.laplace import LastLayerLaplace
from pyro_isingvit.methods.registry import METHODS

VIT = ViTConfig(patch_size=2, width=8, heads=2, depth=1)
INFO = DataInfo("made", ("a", "b", "c"), 1, 4, 4, (0.5,), (0.25,), counts=(10, 10, 10))
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1])


def data(weights, count=60):
    split = make_split(count, torch.Generator().manual_seed(0))
    return ImageData.from_arrays(split.images, split.labels, weights=weights, val_fraction=0)


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix", "regmixup"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_sum_to_the_weights(mix, smoothing):
    torch.manual_seed(0)
    settings = TrainConfig(mix=mix, mix_alpha=1.0, label_smoothing=smoothing)
    images, labels = torch.from_numpy(pixels(4, 1, 4, 4)), torch.tensor([0, 1, 2, 0])
    state = torch.get_rng_state()
    _, y = Augmentation(settings, INFO)(images, labels, WEIGHTS)
    assert y.sum() == pytest.approx(float(WEIGHTS.sum()), rel=1e-5) or mix in ("cutmix", "regmixup")
    torch.set_rng_state(state)
    _, alike = Augmentation(settings, INFO)(images, labels, torch.ones(4))
    torch.set_rng_state(state)
    _, plain = Augmentation(settings, INFO)(images, labels)
    plain = torch.nn.functional.one_hot(plain, 3).float() if plain.dim() == 1 else plain
    torch.testing.assert_close(alike, plain)
    if mix == "none":
        torch.testing.assert_close(y, plain * WEIGHTS[:, None])


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("laplace", "temperature")])
def test_every_method_follows_the_weights(method):
    """Half of the images say the opposite; the weights decide which half is believed."""
    wrong = np.arange(60) % 2 == 0
    split = make_split(60, torch.Generator().manual_seed(0))
    labels = torch.where(torch.from_numpy(wrong), (split.labels + 1) % 3, split.labels)
    accuracy = {}
    for believed in (True, False):
        weights = np.where(wrong == believed, 50.0, 1.0)
        given = ImageData.from_arrays(split.images, labels, weights=weights, val_fraction=0, test_fraction=0)
        run = fit(VIT, given, method=method, epochs=40, progress=False, lr=1e-2, calibrate=False,
                  **({"max_keep": 0.95} if "ising" in method else {}))  # fmt: skip
        guess = run.predict(split.images, 5).mean.argmax(-1)
        accuracy[believed] = float((guess == split.labels).float().mean())
    assert accuracy[False] > accuracy[True] + 0.2, accuracy


def test_equal_weights_are_none():
    runs = [fit(VIT, data(weights), epochs=3, progress=False, max_keep=0.95) for weights in (None, np.full(60, 7.0))]
    one, other = (run.state()["model"] for run in runs)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_who_cannot_weigh_says_so(monkeypatch):
    """laplace is one; its package is not everywhere, so another method says it here."""
    assert not LastLayerLaplace.weighs_images
    monkeypatch.setattr(method_class("dropout"), "weighs_images", False)
    with pytest.raises(UserError, match=r"method dropout measures .* leave out the weights"):
        fit(VIT, data(np.arange(1, 61)), method="dropout", epochs=1, progress=False)


@pytest.mark.parametrize("bad", [[1.0] * 59 + [0.0], [1.0] * 59 + [np.nan], [[1.0]] * 60, [-1.0] * 60])
def test_weights_that_are_none(bad):
    with pytest.raises(UserError, match="`weights` must be positive numbers"):
        data(bad)


def test_another_number_of_weights():
    with pytest.raises(UserError, match="60 images, 60 labels, 59 weights"):
        data([1.0] * 59)
    part = data(np.arange(1, 61)).train
    assert part.weights is not None and float(part.weights.mean()) == pytest.approx(1)
    assert replace(part, weights=None).weights is None


def test_confusion_counts_images_whatever_they_weigh():
    """It compares how often a class is drawn, to which weights do not matter."""
    run = fit(
        VIT, data(np.where(np.arange(60) % 3 == 0, 4.0, 1.0)), epochs=1, progress=False, max_keep=0.95, confusion=0.3
    )
    assert run.method.penalties.shares == run.info.image_shares
    assert run.info.image_shares == pytest.approx((1 / 3,) * 3, abs=0.05)
    assert run.info.shares[0] == pytest.approx(2 / 3, abs=0.05)
