"""Which pixel values become 0 and 1, fitted on the training part and kept with the run."""

import numpy as np
import pytest
import torch
from helpers import pixels

from pyro_isingvit import CompactViT, ImageData, ViTConfig, compact, fit, load_run
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data import intensity
from pyro_isingvit.data.augment import Augmentation
from pyro_isingvit.data.images import as_images
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.intensity import fit_scale, percentiles

RNG = np.random.default_rng(0)
COUNT = 60
DEEP = RNG.integers(900, 3000, (COUNT, 4, 8, 8), np.uint16)
HOUNSFIELD = RNG.normal(-200, 400, (COUNT, 2, 8, 8)).astype(np.float32)
VIT = ViTConfig(patch_size=4, width=8, heads=2, depth=1)
LABELS = np.arange(COUNT) % 2
SETTINGS = ["full", "percentile 5 90", "none"]


@pytest.mark.parametrize("array", [DEEP, HOUNSFIELD, pixels(COUNT, 3, 8, 8)], ids=["16 bits", "floats", "8 bits"])
@pytest.mark.parametrize("how", SETTINGS)
def test_against_numpy(array, how):
    scale = fit_scale(as_images(array), how)
    x = array.astype(np.float64)
    if how.startswith("percentile"):
        low, high = (np.percentile(x, end, axis=(0, 2, 3)).reshape(-1, 1, 1) for end in (5, 90))
        x = np.clip((x - low) / (high - low), 0, 1)
    elif array.dtype != np.float32:
        x = x / np.iinfo(array.dtype).max
    elif how == "full":
        low, high = x.min((0, 2, 3)).reshape(-1, 1, 1), x.max((0, 2, 3)).reshape(-1, 1, 1)
        x = (x - low) / (high - low)
    got = scale.scaled(as_images(array)[:]).double().numpy()
    np.testing.assert_allclose(got, x, atol=2e-6 * max(1, abs(x).max()))
    np.testing.assert_allclose(scale.mean, x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(scale.std, x.std((0, 2, 3)), rtol=1e-5)
    normal = scale.standardised(scale.scaled(as_images(array)[:]))
    assert abs(float(normal.mean())) < 1e-4 and abs(float(normal.std()) - 1) < 1e-2


def test_eight_bits_are_as_ever():
    images = torch.from_numpy(pixels(COUNT, 3, 8, 8))
    scale = fit_scale(as_images(images))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (scale.mean, scale.std))
    assert torch.equal(scale.standardised(scale.scaled(images)), (images.float() / 255 - mean) / std)


def test_percentiles_of_many_images_look_at_some(monkeypatch):
    monkeypatch.setattr(intensity, "MOST", 20 * 64)
    scale = fit_scale(as_images(DEEP), "percentile 1 99")
    np.testing.assert_allclose(scale.low, np.percentile(DEEP[::3], 1, axis=(0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    "bad", ["", "percent", "percentile 1", "percentile 99 1", "percentile a b", "full 1", "percentile -1 9"]
)
def test_what_is_no_setting(bad):
    with pytest.raises(UserError, match="`intensity` must be full, none or 'percentile LOW HIGH'"):
        percentiles(bad)


def test_percentiles_may_be_written_with_colons():
    assert percentiles("percentile:2:98.5") == (2, 98.5) and percentiles("percentile") == (1, 99)


def test_pixels_without_a_range():
    flat = HOUNSFIELD.copy()
    flat[:, 1] = 7
    with pytest.raises(UserError, match="channel 1 of the training images has one value"):
        fit_scale(as_images(flat))
    assert fit_scale(as_images(flat), "none").std[1] == 1e-3
    flat[3, 0, 0, 0] = np.inf
    with pytest.raises(UserError, match="1 NaN or infinite"):
        fit_scale(as_images(flat))


@pytest.mark.parametrize("array", [DEEP, HOUNSFIELD], ids=["16 bits", "floats"])
@pytest.mark.parametrize("how", SETTINGS)
def test_from_images_to_a_compact_network(array, how, tmp_path):
    """The run, its folder and the pruned network take the raw pixels, and all see them alike."""
    data = ImageData.from_arrays(array, LABELS, channels="first", intensity=how)
    assert data.info.kind == array.dtype.name and data.info.channels == array.shape[1]
    run = fit(VIT, data, epochs=2, progress=False)
    run.save(tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert again.info == data.info
    raw = array[:5]
    probs = again.predict(raw, 4).probs
    assert torch.equal(probs, run.predict(raw, 4).probs)
    small = compact(run)
    small.save_pretrained(tmp_path / "small")
    kept = CompactViT.from_pretrained(tmp_path / "small")
    assert torch.equal(kept.predict(raw), small.predict(raw))
    assert torch.equal(kept.normalise(as_images(raw)[:]), data.info.normalise(as_images(raw)))
    with pytest.raises(UserError, match=r"expected images|given, the network reads"):
        kept.predict(pixels(5, array.shape[1], 8, 8))


def test_a_damaged_description():
    good = DataInfo("a", ("x", "y"), 1, 4, 4, (0.5,), (0.2,), "uint16", (3.0,), (9.0,)).to_dict()
    assert DataInfo.from_dict(good).low == (3.0,)
    old = {key: value for key, value in good.items() if key not in ("kind", "low", "high")}
    assert DataInfo.from_dict(old).kind == "uint8"
    for changes in ({"kind": "int7"}, {"low": [9.0]}, {"high": []}, {"high": [float("nan")]}, {"low": [1.0, 2.0]}):
        with pytest.raises(UserError, match="saved data description is damaged"):
            DataInfo.from_dict({**good, **changes})


def test_augmented_views_of_deep_images():
    data = ImageData.from_arrays(HOUNSFIELD, LABELS, channels="first", intensity="percentile 5 90", val_fraction=0)
    x, _ = Augmentation(TrainConfig(augment="crop-flip"), data.info)(data.train.images[:], data.train.labels)
    dark = data.info.scale.standardised(torch.zeros(1, 2, 1, 1))
    assert x.min() >= dark.min() - 1e-6  # margins are as dark as the lowest pixel
    with pytest.raises(UserError, match="`augment` randaugment is for images of 1 or 3 channels"):
        Augmentation(TrainConfig(augment="randaugment"), data.info)
    grey = ImageData.from_arrays(DEEP[:, 0], LABELS, intensity="full", val_fraction=0)
    x, _ = Augmentation(TrainConfig(augment="randaugment"), grey.info)(grey.train.images[:], grey.train.labels)
    assert torch.isfinite(x).all()


def test_what_a_screen_shows():
    for array, how, colours in (
        (DEEP, "full", 3), (HOUNSFIELD, "none", 3), (HOUNSFIELD, "percentile 1 99", 3), (DEEP[:, :1], "percentile", 1),
        (pixels(COUNT, 3, 8, 8), "full", 3), (pixels(COUNT, 1, 8, 8), "full", 1),
    ):  # fmt: skip
        shown = fit_scale(as_images(array), how).shown(as_images(array)[:])
        assert shown.dtype == torch.uint8 and shown.shape == (COUNT, colours, 8, 8)
        assert how == "full" or (shown.min() == 0 and shown.max() == 255)
    two = Scale("float32", (0.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0)).shown(
        torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    )
    assert two.flatten().tolist() == [255, 0, 255]  # magenta
