"""Augmentation: what moves, what stays, and that every image gets a draw of its own."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import TINY

from inference.train import main
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.augment import GROUPS, Augmentation, random_crop, random_flip
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.ising.curvature import SALIENCY
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.runs.trainer import Trainer

KINDS = ("crop", "crop-flip", "randaugment")
MIXES = ("mixup", "cutmix", "regmixup")
SHAPES = ((1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (1, 13, 30), (3, 1, 2))


def info(channels: int, height: int, width: int) -> DataInfo:
    return DataInfo("made", tuple("abcdefghij"), channels, height, width, (0.5,) * channels, (0.25,) * channels)


def images(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(1, 256, (count, *shape), dtype=torch.uint8)  # never 0, which marks the margin


def augmentation(shape: tuple[int, int, int], **settings: object) -> Augmentation:
    return Augmentation(replace(TrainConfig(), **settings), info(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_crop_is_a_window_of_the_padded_image(shape) -> None:
    before = images(40, *shape)
    after = random_crop(before)
    assert after.shape == before.shape and after.dtype == torch.uint8
    above, beside = (max(1, round(side / 8)) for side in shape[1:])
    padded = torch.nn.functional.pad(before, [beside, beside, above, above])
    places = set()
    for image, crop in zip(padded, after, strict=True):
        found = [
            (top, left)
            for top in range(2 * above + 1)
            for left in range(2 * beside + 1)
            if torch.equal(image[:, top : top + shape[1], left : left + shape[2]], crop)
        ]
        assert found
        places.add(found[0])
    assert len(places) > 3


def test_every_place_is_as_likely_as_any_other() -> None:
    dot = torch.zeros(9000, 1, 8, 8, dtype=torch.uint8)
    dot[:, :, 4, 4] = 255
    where = random_crop(dot).flatten(1).int().argmax(1)
    counts = where.bincount(minlength=64).view(8, 8)[3:6, 3:6]
    assert counts.sum() == 9000 and ((counts - 1000).abs() < 5 * math.sqrt(1000 * 8 / 9)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_half_of_the_images_are_mirrored(shape) -> None:
    before = images(400, *shape)
    after = random_flip(before)
    same = (before == after).flatten(1).all(1)
    assert torch.equal(after[~same], before[~same].flip(-1)) and after.dtype == torch.uint8
    assert 150 < int(same.sum()) < 250


@pytest.mark.parametrize("count", [1, 2, GROUPS - 1, GROUPS + 1, 37])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_image_and_any_batch(kind, shape, count) -> None:
    before = images(count, *shape)
    kept = before.clone()
    augment = augmentation(shape, augment=kind)
    after = augment.images(before)
    assert after.shape == before.shape and after.dtype == torch.uint8 and torch.equal(before, kept)
    labels = torch.zeros(count, dtype=torch.long)
    x, y = augment(before, labels)
    assert x.shape == before.shape and x.dtype == torch.float32 and y is labels


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_get_different_draws(kind) -> None:
    """The same image 64 times over."""
    batch = images(1, 3, 32, 32).expand(64, -1, -1, -1)
    after = augmentation((3, 32, 32), augment=kind).images(batch)
    assert len(after.flatten(1).unique(dim=0)) > 30  # of 81 windows, or 162


def test_rand_augment_differs_from_group_to_group(monkeypatch) -> None:
    monkeypatch.setattr("pyro_isingvit.data.augment.random_crop", lambda x, margin: x)
    monkeypatch.setattr("pyro_isingvit.data.augment.random_flip", lambda x: x)
    batch = images(1, 3, 32, 32).expand(64, -1, -1, -1)
    after = augmentation((3, 32, 32), augment="randaugment").images(batch)
    assert 3 < len(after.flatten(1).unique(dim=0)) <= GROUPS


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_every_operation_of_randaugment_takes_the_channels(shape) -> None:
    """300 draws of two of its 14 operations: each is left out with probability 1e-19."""
    rand = augmentation(shape, augment="randaugment").rand_augment
    before = images(2, *shape)
    after = torch.stack([rand(before) for _ in range(300)])
    assert after.shape[1:] == before.shape and after.dtype == torch.uint8
    assert len(after.flatten(1).unique(dim=0)) > 50


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 1e3])
@pytest.mark.parametrize("count", [1, 2, 37])
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_labels_are_the_shares_of_the_images(mix, count, alpha) -> None:
    shape = (1, 20, 30)
    labels = torch.arange(count) % 10
    flat = (20 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(count, *shape).contiguous()  # its class is its grey
    augment = augmentation(shape, mix=mix, mix_alpha=alpha)
    for _ in range(5):
        x, y = augment(flat, labels)
        assert y.shape == (count, 10) and (y >= 0).all() and x.shape == flat.shape
        torch.testing.assert_close(y.sum(1), torch.ones(count))
        grey = (x * 0.25 + 0.5).mean((1, 2, 3)) * 255 / 20
        torch.testing.assert_close(grey, y @ torch.arange(10.0), atol=1e-4, rtol=1e-4)


def test_without_augmentation_no_number_is_drawn() -> None:
    before = images(5, 1, 28, 28)
    labels = torch.arange(5)
    state = torch.get_rng_state()
    augment = augmentation((1, 28, 28))
    x, y = augment(before, labels)
    assert torch.equal(x, augment.info.normalise(before)) and y is labels
    assert torch.equal(torch.get_rng_state(), state)


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="expected images"):
        augmentation((1, 28, 28), augment="crop")(images(2, 3, 28, 28), torch.zeros(2, dtype=torch.long))


def train(data: ImageData, method: str = "ising", ising: IsingConfig | None = None, **changes: object):
    settings = {"epochs": 4, "batch_size": 16, "val_samples": 2, "device": "cpu", "finetune_epochs": 1} | changes
    config = RunConfig(
        vit=TINY, method=method, ising=ising or IsingConfig(update_every=2),
        train=replace(METHODS[method].train, **settings),
    )  # fmt: skip
    return Trainer(config, data, None, progress=False).fit()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_augmented_and_mixed_images(data, method) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    ising = METHODS[method].ising if method in ("ising-paper", "mean-field") else None
    for mix in ("mixup", "regmixup"):  # 60 images: the last batch has 12
        run = train(data, method, ising, augment="crop-flip", mix=mix, margin=1, label_smoothing=0.1)
        assert all(math.isfinite(record[key]) for record in run.history for key in ("loss", "nll", "val_nll"))


@pytest.mark.parametrize("mode", ["likelihood_guided", "learned", "hybrid"])
@pytest.mark.parametrize("saliency", SALIENCY)
def test_every_curvature_takes_soft_labels(data, saliency, mode) -> None:
    run = train(data, ising=IsingConfig(saliency=saliency, mask_posterior=mode, update_every=2), mix="cutmix")
    assert all(math.isfinite(record["loss"]) for record in run.history)
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


@pytest.mark.parametrize("changes", [
    {"engine": "pyro"}, {"engine": "fused"}, {"log_barrier": 0.02}, {"precision": "bf16"}, {"batch_size": 59},
])  # fmt: skip
def test_every_way_of_training(data, changes) -> None:
    run = train(data, augment="randaugment", mix="mixup", **changes)
    assert all(math.isfinite(record["loss"]) for record in run.history)


def test_only_training_images_are_augmented(data, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    images = Augmentation.images
    monkeypatch.setattr(Augmentation, "images", lambda self, batch: seen.append(batch) or images(self, batch))
    train(data, augment="crop", mix="mixup")
    for batch in seen:
        known = (batch[:, None] == data.train.images[None]).flatten(2).all(2)
        assert known.any(1).all()
    assert sum(map(len, seen)) == 5 * len(data.train)  # and no other one, in 5 epochs


def test_digits_are_cropped_at_any_patch_size() -> None:
    config = ViTConfig(patch_size=3, width=8, heads=2, depth=1)  # 8 is no multiple: the network pads
    augment = augmentation((1, 8, 8), augment="crop")
    vit = ViT(config, 1, 8, 8, 10)
    x, _ = augment(images(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))
    assert vit(vit.initial_weights(), x).shape == (3, 10)


@pytest.mark.parametrize("words", [
    ["--augment", "flip"], ["--mix", "both"], ["--mix-alpha", "0"], ["--mix-alpha", "nan"], ["--augment"],
    ["--mix", "mixup", "--mix-alpha", "1e9"], ["--augment", "crop", "--margin", "-1"],
    ["--augment", "crop", "--margin", "8"], ["--margin", "0.5"], ["--label-smoothing", "1"], ["--token-masking", "1.0"],
    ["--token-masking", "0.99"], ["--mix", "regmixup", "--batch-size", "33"],
])  # fmt: skip
def test_bad_values_on_the_command_line(words, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "r"), "--dataset", "digits", "--device", "cpu", *words])
    assert stop.value.code == 2 and words[-2 if len(words) > 1 else 0].strip("-")[:3] in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_the_command_line_trains_with_them(tmp_path, capsys) -> None:
    main([
        "--out", str(tmp_path / "r"), "--dataset", "digits", "--device", "cpu", "--train-size", "60", "--epochs", "2",
        "--width", "8", "--depth", "1", "--samples", "2", "--augment", "crop", "--mix", "cutmix", "--mix-alpha", "1",
    ])  # fmt: skip
    written = RunConfig.from_json((tmp_path / "r" / "config.json").read_text()).train
    assert (written.augment, written.mix, written.mix_alpha) == ("crop", "cutmix", 1.0)
