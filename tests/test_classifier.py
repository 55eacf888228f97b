"""The classifier keeps scikit-learn's conventions, and takes images of every layout."""

import pickle

import numpy as np
import pytest
import torch
from helpers import make_split
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from pyro_isingvit import IsingConfig, IsingViTClassifier, UserError, ViTConfig
from pyro_isingvit.ising.noise import USUAL_KEEP

SMALL = ViTConfig(patch_size=1, width=16, heads=2, depth=1, mlp_ratio=2)
QUICK = {"batch_size": 32, "device": "cpu", "lr": 1e-2}


PRECISION = "float32: the last bits depend on an image's place in the batch"


def expected_failures(estimator: IsingViTClassifier) -> dict[str, str]:
    return dict.fromkeys(("check_methods_sample_order_invariance", "check_methods_subset_invariance"), PRECISION)


@parametrize_with_checks(
    [IsingViTClassifier(SMALL, epochs=10, samples=5, settings=QUICK)], expected_failed_checks=expected_failures
)
def test_conventions(estimator, check) -> None:
    check(estimator)


def quick(**changes) -> IsingViTClassifier:
    vit = ViTConfig(patch_size=2, width=16, heads=2, depth=1, mlp_ratio=2)
    return IsingViTClassifier(
        **{"vit": vit, "epochs": 25, "samples": 5, "settings": QUICK, "random_state": 0} | changes
    )


@pytest.fixture(scope="module")
def made() -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) uint8 and names of classes that the brightest quadrant tells."""
    split = make_split(90, torch.Generator().manual_seed(0))
    return np.asarray(split.images[:])[:, 0], np.array(["low", "mid", "top"])[split.labels.numpy()]


@pytest.fixture(scope="module")
def fitted(made) -> IsingViTClassifier:
    return quick().fit(*made)


def test_it_learns_names_and_orders_them(fitted, made) -> None:
    images, names = made
    assert list(fitted.classes_) == ["low", "mid", "top"] and fitted.score(images, names) > 0.9
    proba = fitted.predict_proba(images)
    assert proba.shape == (90, 3) and np.abs(proba.sum(1) - 1).max() < 1e-12
    assert (fitted.classes_[proba.argmax(1)] == fitted.predict(images)).all()
    draws = fitted.predict_draws(images[:4])
    assert draws.probs.shape == (5, 4, 3) and (draws.mutual_information >= 0).all()


def test_rows_of_an_order_give_the_same_to_single_precision(fitted, made) -> None:
    # What scikit-learn's two checks of invariance ask, with the tolerance that float32 allows.
    images, order = made[0], np.random.default_rng(0).permutation(90)
    whole = fitted.predict_proba(images)
    assert np.allclose(fitted.predict_proba(images[order]), whole[order], rtol=1e-5)
    single = np.concatenate([fitted.predict_proba(images[i : i + 1]) for i in range(9)])
    assert np.allclose(single, whole[:9], rtol=1e-5)


LAYOUTS = {
    "flat": lambda x: x.reshape(90, 16),
    "channels last": lambda x: x[..., None],
    "channels first": lambda x: x[:, None],
    "tensor": torch.from_numpy,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_same_images_give_the_same(made, fitted, layout) -> None:
    (images, names), arrange = made, LAYOUTS[layout]
    again = quick().fit(arrange(images), names)
    assert again.n_features_in_ == 16 and again.image_shape_ == (4, 4, 1)
    assert np.allclose(again.predict_proba(arrange(images)), fitted.predict_proba(images), atol=1e-6)


def test_lists_are_images_too(made) -> None:
    images, names = made
    fitted = quick().fit(images.tolist(), names.tolist())
    assert fitted.pixel_range_ == (images.min(), images.max()) and fitted.score(images.tolist(), names.tolist()) > 0.9


def test_colour_images_of_either_layout(made) -> None:
    images, names = made
    last = np.stack([images, 255 - images, images // 2], -1)
    first = np.moveaxis(last, 3, 1)
    one, two = (quick(epochs=6).fit(X, names) for X in (last, first))
    flat = quick(epochs=6, image_shape=(4, 4, 3)).fit(last.reshape(90, -1), names)
    assert one.run_.info.channels == 3
    for other, X in ((one, first), (two, last), (two, first), (flat, last.reshape(90, -1))):
        assert np.allclose(one.predict_proba(last), other.predict_proba(X), atol=1e-6)


def test_floats_of_any_range_are_scaled_by_the_training_images(made) -> None:
    images, names = made
    low, high = float(images.min()), float(images.max())
    levels = np.rint((images - low) / (high - low) * 255).astype(np.uint8)
    floats = images * 3.0 - 7
    plain, scaled = quick().fit(levels, names), quick().fit(floats, names)
    assert scaled.pixel_range_ == (3 * low - 7, 3 * high - 7) and plain.pixel_range_ is None
    assert np.allclose(scaled.predict_proba(floats), plain.predict_proba(levels), atol=1e-6)
    beyond = np.where(images == high, 1e6, floats)
    assert np.allclose(scaled.predict_proba(beyond), scaled.predict_proba(floats))


def test_the_automatic_network_fits_the_images(made) -> None:
    images, names = made
    square = quick(vit=None, epochs=1).fit(images, names)
    assert square.run_.config.vit == ViTConfig(patch_size=1, width=64, heads=4, depth=4, mlp_ratio=2)
    flat = images.reshape(90, -1)[:, :11]
    row = quick(vit=None, epochs=1).fit(flat, names)
    assert row.image_shape_ == (1, 11, 1) and row.predict(flat[:2]).shape == (2,)


def test_seeds(made) -> None:
    images, names = made
    before = torch.get_rng_state()
    one, two = (quick(epochs=1).fit(images, names).predict_proba(images) for _ in range(2))
    assert (one == two).all() and (torch.get_rng_state() == before).all()
    drawn = [quick(epochs=1, random_state=np.random.RandomState(3)).fit(images, names) for _ in range(2)]
    assert drawn[0].run_.config.train.seed == drawn[1].run_.config.train.seed != 0
    assert quick(epochs=1, random_state=None).fit(images, names).run_.config.train.seed >= 0


def test_methods_settings_and_parameters(made) -> None:
    base = quick(method="dropout", epochs=2, settings={**QUICK, "drop_rate": 0.3})
    run = clone(base).fit(*made).run_
    assert run.config.method == "dropout" and run.config.baseline.drop_rate == 0.3 and run.config.train.epochs == 2
    assert clone(base).get_params() == base.get_params()
    assert base.set_params(epochs=5).epochs == 5


def test_a_pickle_predicts_the_same(fitted, made) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    assert (again.predict_proba(made[0]) == fitted.predict_proba(made[0])).all()
    assert again.run_.history == fitted.run_.history


def test_without_validation_images_the_noise_is_the_usual_one(made) -> None:
    """One class has four images, so that none is spared."""
    X, y = made
    rare = np.unique(y)[0]
    few = np.concatenate([np.flatnonzero(y == rare)[:4], np.flatnonzero(y != rare)])
    for keep, wanted in ((None, 0.98), (0.9, 0.9)):
        settings = {} if keep is None else {"max_keep": keep}
        fitted = quick(epochs=8, settings=QUICK | settings).fit(X[few], y[few])
        assert fitted.run_.config.ising.max_keep == wanted and fitted.run_.history[-1].get("max_keep", wanted) == wanted


def test_validation_images_are_held_out_where_there_are_enough(made) -> None:
    images, names = made
    assert len(quick(epochs=1).fit(images, names).run_.val) == 9
    assert len(quick(epochs=1).fit(images[:12], names[:12]).run_.val) == 0  # four of each class
    assert len(quick(epochs=1, val_fraction=0).fit(images, names).run_.val) == 0


@pytest.mark.parametrize(
    ("changes", "X", "words"),
    [
        ({"vit": "huge"}, None, "huge"),
        ({"method": "magic"}, None, "method. .magic."),
        ({"settings": {"epoch": 3}}, None, "`epoch`"),
        ({"val_fraction": 0.9}, None, "`val_fraction`"),
        ({"image_shape": (3, 3)}, np.zeros((90, 16)), "`image_shape`"),
        ({}, np.zeros((90, 2, 2, 2)), "channels"),
        ({}, np.zeros((90, 1, 4, 1)), "`image_shape`"),
        ({}, np.zeros((90, 1, 2, 3, 4)), "`X`"),
        ({}, np.zeros((90, 1027)), "`image_shape`"),
    ],
)
def test_what_cannot_be_used_is_named(made, changes, X, words) -> None:
    images, names = made
    with pytest.raises(UserError, match=words):
        quick(**changes).fit(images if X is None else X, names)


def test_images_of_another_size_or_type_are_refused(fitted, made) -> None:
    images, _ = made
    with pytest.raises(UserError, match="`X`"):
        fitted.predict(images[:, :3])
    with pytest.raises(UserError, match="uint8"):
        fitted.predict(images / 255)
    with pytest.raises(ValueError, match="features"):
        fitted.predict(images.reshape(90, -1)[:, :9])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"method": "dropout"}}, "`settings` has method; give it to IsingViTClassifier itself"),
        ({"settings": {"model": "digits"}}, "`settings` has model, which IsingViTClassifier makes of"),
        ({"settings": [1]}, "`settings` must be a dict"),
        ({"image_shape": 8}, "`image_shape` must be"),
        ({"image_shape": (2, 2)}, r"`image_shape` \(2, 2\) is not that of `X`, whose images are \(4, 4, 1\)"),
    ],
)
def test_arguments_that_cannot_be_are_named(made, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        quick(**changes).fit(*made)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), [4, 4], np.array([4, 4])])
def test_a_shape_that_the_images_have_may_be_given(made, shape) -> None:
    assert quick(image_shape=shape, epochs=1).fit(*made).image_shape_ == (4, 4, 1)


def test_whole_numbers_after_shares_are_refused(made) -> None:
    """Every pixel of 1 or more would be white, and every image of one class."""
    images, names = made
    classifier = quick(epochs=1).fit(images / 255.0, names)
    with pytest.raises(
        UserError, match=r"uint8 up to \d+; the training images were floats from 0 to 0\.\d+\. Scale both"
    ):
        classifier.predict(images)
    black_and_white = (images > 99).astype(np.int64)
    assert classifier.predict(black_and_white).shape == (90,)
    counts = quick(epochs=1).fit(black_and_white, names)  # whole numbers to 1 are cut like any others
    assert (counts.predict(2 * black_and_white) == counts.predict(black_and_white)).all()


def test_images_on_another_scale_are_refused(made) -> None:
    images, names = made
    shares, deep = images / 255.0, images.astype(np.uint16) * 257
    bright, dark = quick(epochs=1).fit(deep, names), quick(epochs=1).fit(shares, names)
    for classifier, X in ((bright, images), (bright, shares), (dark, images * 1.0)):
        with pytest.raises(UserError, match="Scale both alike"):
            classifier.predict(X)
    assert bright.predict(deep // 2).shape == dark.predict(1.2 * shares).shape == (90,)
    assert (bright.predict(deep.astype(float)) == bright.predict(deep)).all()


def test_numbers_of_numpy_are_numbers(made) -> None:
    """A grid over ``np.arange`` gives them."""
    settings = {**QUICK, "batch_size": np.int64(32), "lr": np.float64(1e-2)}
    changes = {"epochs": np.int64(2), "samples": np.int64(3), "random_state": 2**32 - 1, "settings": settings}
    run = quick(**changes).fit(*made).run_
    assert (run.config.train.epochs, run.config.train.samples, run.config.train.seed) == (2, 3, 2**31 - 1)


@pytest.mark.parametrize(
    ("name", "words"), [("seed", "seed .as `random_state`."), ("epochs", "epochs"), ("samples", "samples")]
)
def test_what_is_an_argument_is_no_setting(made, name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"`settings` has {words}; give it to IsingViTClassifier itself"):
        quick(settings={**QUICK, name: 3}).fit(*made)


@pytest.mark.parametrize("method", ["ising-sparse", "magnitude", "dropout"])
def test_epochs_are_those_in_all(made, method: str) -> None:
    run = quick(method=method, epochs=5).fit(*made).run_
    assert len(run.history) == 5 and (run.config.train.finetune_epochs > 0) == (method != "dropout")
    settings = {**QUICK, "finetune_epochs": 2}
    assert len(quick(method=method, epochs=5, settings=settings).fit(*made).run_.history) == 7


def test_an_ising_config_without_validation_images(made) -> None:
    X, y = made
    rows = np.r_[np.flatnonzero(y != "top"), np.flatnonzero(y == "top")[:3]]
    settings = {**QUICK, "ising": IsingConfig(target_retention=0.8)}
    run = quick(epochs=8, settings=settings).fit(X[rows], y[rows]).run_
    assert run.config.ising.max_keep == USUAL_KEEP and run.config.ising.target_retention == 0.8


def test_height_and_width_alone_tell_the_layout() -> None:
    X, y = np.random.default_rng(0).integers(0, 255, (30, 3, 8, 3), dtype=np.uint8), ["a", "b", "c"] * 10
    assert quick(epochs=1, image_shape=(3, 8)).fit(X, y).image_shape_ == (3, 8, 3)
    assert quick(epochs=1, image_shape=(8, 3)).fit(X, y).image_shape_ == (8, 3, 3)
    cube = np.random.default_rng(0).integers(0, 255, (30, 3, 3, 3), dtype=np.uint8)
    assert quick(epochs=1, image_shape=(3, 3, 3)).fit(cube, y).image_shape_ == (3, 3, 3)
    with pytest.raises(UserError, match=r"`image_shape` \(4, 4\) is not that of `X`"):
        quick(epochs=1, image_shape=(4, 4)).fit(X, y)


def test_a_training_that_failed_leaves_no_network_of_other_classes(made) -> None:
    images, names = made
    classifier = quick(epochs=1).fit(images, names)
    with pytest.raises(UserError):
        classifier.set_params(settings={**QUICK, "lr": -1.0}).fit(images, np.char.add("z", names))
    with pytest.raises(NotFittedError):
        classifier.predict(images)
    assert classifier.set_params(settings=QUICK).fit(images, names).predict(images).shape == (90,)


def test_images_that_may_be_on_another_scale_are_warned_of(made, caplog) -> None:
    images, names = made
    floats = quick(epochs=1).fit(images * 1.0, names)
    bits = quick(epochs=1).fit(images > 99, names)
    for classifier, X in ((floats, images * 1.0), (floats, images / 2.0), (bits, images > 9)):
        classifier.predict(X)
    assert "scaled alike" not in caplog.text
    floats.predict(images / 255.0)
    assert "are both scaled alike?" in caplog.text
    caplog.clear()
    bits.predict(images * 1.0)
    assert "goes up to 2" in caplog.text and "went up to 1" in caplog.text


def test_values_whose_range_overflows_are_refused(made) -> None:
    images, names = made
    large = images * 1.0
    large[0, 0, :2] = -1.7e308, 1.7e308
    with pytest.raises(UserError, match="their range overflows"):
        quick(epochs=1).fit(large, names)


@pytest.mark.parametrize("shape", [(8.0, 8.0), (-8, -8), ("8", 8), 64, (8, True)])
def test_an_image_shape_is_of_whole_numbers(shape) -> None:
    X, y = np.random.default_rng(0).integers(0, 255, (30, 64), dtype=np.uint8), ["a", "b", "c"] * 10
    with pytest.raises(UserError, match=r"`image_shape` must be \(H, W\) or \(H, W, C\), whole numbers"):
        quick(epochs=1, image_shape=shape).fit(X, y)


def test_an_image_shape_of_numpy() -> None:
    X, y = np.random.default_rng(0).integers(0, 255, (30, 64), dtype=np.uint8), ["a", "b", "c"] * 10
    assert [type(n) for n in quick(epochs=1, image_shape=np.array([8, 8])).fit(X, y).image_shape_] == [int] * 3


@pytest.mark.parametrize("fraction", [None, "a", -0.1, 0.6])
def test_a_validation_share_is_a_number(made, fraction) -> None:
    with pytest.raises(UserError, match=r"`val_fraction` must be between 0 and 0\.5"):
        quick(epochs=1, val_fraction=fraction).fit(*made)
