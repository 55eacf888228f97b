"""Your own arrays and torch data sets: every shape, every type, every error."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import pixels
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torch.utils.data import Subset as TorchSubset

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.arrays import label_array, to_pixels, to_uint8
from pyro_isingvit.data.given import labelled
from pyro_isingvit.data.given import pixels as given_pixels
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.split import ImageData, Split

N = 30
LABELS = np.arange(N) % 3
GREY, COLOUR = pixels(N, 6, 5), pixels(N, 6, 5, 3)


def everything(data: ImageData) -> list[tuple[int, list[int]]]:
    """(label, pixels) of all images, in an order that does not depend on the split."""
    parts = (data.train, data.val, data.test)
    return sorted(
        (int(y), x.flatten().tolist()) for part in parts for x, y in zip(part.images, part.labels, strict=True)
    )


LAYOUTS = {
    "N H W": (GREY, GREY[:, None]),
    "N H W 1": (GREY[..., None], GREY[:, None]),
    "N 1 H W": (GREY[:, None], GREY[:, None]),
    "N H W 3": (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
    "N 3 H W": (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
}
TYPES = {
    "uint8": lambda x: x,
    "float64": lambda x: x / 255,
    "float32": lambda x: (x / 255).astype(np.float32),
    "float16": lambda x: (x / 255).astype(np.float16),
    "int64": lambda x: x.astype(np.int64),
    "int16": lambda x: x.astype(np.int16),
    "tensor": torch.from_numpy,
    "float tensor": lambda x: torch.from_numpy(x / 255).float().requires_grad_(),
    "list": lambda x: x.tolist(),
    "reversed twice": lambda x: np.ascontiguousarray(x[::-1])[::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
def test_layouts_and_types(layout: str, kind: str) -> None:
    given, wanted = LAYOUTS[layout]
    data = ImageData.from_arrays(TYPES[kind](given.copy()), LABELS, name="mine")
    assert everything(data) == sorted(zip(LABELS.tolist(), wanted.reshape(N, -1).tolist(), strict=True))
    assert (data.info.channels, data.info.height, data.info.width) == wanted.shape[1:]
    assert (len(data.train), len(data.val), len(data.test)) == (21, 3, 6)
    assert data.info.dataset == "mine" and data.info.classes == ("0", "1", "2")


def test_bool_becomes_black_and_white() -> None:
    data = ImageData.from_arrays(GREY > 100, LABELS)
    assert set(data.train.images[:].unique().tolist()) == {0, 255}


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)), st.sampled_from("efd"))
def test_floats_round_back_to_the_same_pixels(array: np.ndarray, kind: str) -> None:
    floats = (array / 255).astype(kind)
    assert np.array_equal(to_uint8(floats), array)
    assert np.array_equal(to_pixels(torch.from_numpy(floats)), array[:, None])


@given(hnp.arrays(np.float64, (2, 2, 2), elements=st.floats(0, 1)))
def test_rounding_is_to_the_nearest_255th(array: np.ndarray) -> None:
    assert np.abs(to_uint8(array) / 255 - array).max() <= 0.5 / 255 + 1e-12


@given(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(4, 6), st.integers(4, 6))
def test_both_axes_of_channels(count: int, depth: int, height: int, width: int) -> None:
    first = pixels(count, depth, height, width)
    assert np.array_equal(to_pixels(first), first)
    assert np.array_equal(to_pixels(first.transpose(0, 2, 3, 1)), first)
    assert np.array_equal(to_pixels(first, "first"), to_pixels(first.transpose(0, 2, 3, 1), "last"))


AMBIGUOUS = pixels(N, 3, 6, 3)
HALF = GREY / 255
PIXEL_ERRORS = {
    "ambiguous": (AMBIGUOUS, r"both axes can be the channels; say `channels='first'` or `channels='last'`"),
    "no channels": (pixels(N, 6, 5, 2), r"\(N, C, H, W\) with C = 1 or 3; with other channels say"),
    "alpha": (pixels(N, 6, 5, 4), r"alpha channel by `images\[..., :3\]`"),
    "flat": (pixels(N, 30), r"have shape \(30, 30\).*`images.reshape\(-1, height, width\)`"),
    "one axis": (pixels(N), "expected .N, H, W."),
    "five axes": (pixels(N, 2, 3, 4, 1), "expected .N, H, W."),
    "ragged": ([[[1]], [[1, 2]]], "no array .*one shape"),
    "empty": (pixels(0, 6, 5), r"empty, their shape is \(0, 6, 5\)"),
    "no pixels": (pixels(N, 0, 5), "empty"),
    "nan": (np.where(GREY[0, 0, 0] == GREY, np.nan, HALF), rf"{(GREY[0, 0, 0] == GREY).sum()} NaN or infinite"),
    "infinite": (np.where(GREY[0, 0, 0] == GREY, np.inf, HALF), "NaN or infinite values; repair or remove"),
    "grey levels as floats": (GREY.astype(float), r"from 0 to 255, and floats must lie in \[0, 1\].*`images / 255`"),
    "sixteenths": (np.rint(HALF * 16), "`images / 16`"),
    "normalised": (HALF - 0.5, r"`\(images - images.min\(\)\).*leave out any transform that normalises"),
    "16 bits": (GREY.astype(np.uint16) * 257, r"uint16 from \d+ to 65535, not 0 to 255; .*`\(images // 256\)"),
    "negative": (GREY.astype(int) - 1, "int64 from -1 to"),
    "complex": (GREY.astype(complex), "complex128; expected uint8"),
    "text": (GREY.astype(str), "expected uint8, or float"),
}  # fmt: skip


@pytest.mark.parametrize("name", PIXEL_ERRORS)
def test_pixels_that_are_refused(name: str) -> None:
    images, message = PIXEL_ERRORS[name]
    with pytest.raises(UserError, match=f"`images`.*{message}"):
        ImageData.from_arrays(images, LABELS)


def test_the_argument_resolves_what_is_ambiguous() -> None:
    first = ImageData.from_arrays(AMBIGUOUS, LABELS, channels="first")
    last = ImageData.from_arrays(AMBIGUOUS, LABELS, channels="last")
    assert first.train.images.shape[1:] == (3, 6, 3) and last.train.images.shape[1:] == (3, 3, 6)
    with pytest.raises(UserError, match="`channels='last'` it has 17"):
        ImageData.from_arrays(np.zeros((N, 3, 6, 17)), LABELS, channels="last")
    with pytest.raises(UserError, match="`channels` must be"):
        ImageData.from_arrays(COLOUR, LABELS, channels="middle")  # type: ignore[arg-type]


# ---- labels


NAMES = np.array(["owl", "cat", "dog"])[LABELS]
GOOD_LABELS = {
    "list": (LABELS.tolist(), ("0", "1", "2")),
    "column": (LABELS[:, None], ("0", "1", "2")),
    "rows": (LABELS[:, None].tolist(), ("0", "1", "2")),
    "uint8": (LABELS.astype(np.uint8), ("0", "1", "2")),
    "tensor": (torch.from_numpy(LABELS)[:, None], ("0", "1", "2")),
    "list of tensors": (list(torch.from_numpy(LABELS)), ("0", "1", "2")),
    "text": (NAMES, ("cat", "dog", "owl")),
    "list of text": (NAMES.tolist(), ("cat", "dog", "owl")),
    "objects": (NAMES.astype(object), ("cat", "dog", "owl")),
    "tuples": ([("a", int(i)) for i in LABELS], ("('a', 0)", "('a', 1)", "('a', 2)")),
    "bool": (LABELS > 0, ("False", "True")),
    "control characters": (["a\x1b", "b"] * 15, ("a\\x1b", "b")),
}


@pytest.mark.parametrize("name", GOOD_LABELS)
def test_labels_become_numbers_of_sorted_classes(name: str) -> None:
    labels, classes = GOOD_LABELS[name]
    data = ImageData.from_arrays(GREY, labels, val_fraction=0, test_fraction=0)
    assert data.info.classes == classes and data.train.labels.dtype == torch.int64
    _, wanted = np.unique(label_array([str(x) for x in label_array(labels)]), return_inverse=True)
    assert data.train.labels.tolist() == wanted.tolist()
    assert torch.equal(data.train.images[:], torch.from_numpy(GREY)[:, None]) and len(data.test) == len(data.val) == 0


def test_names_and_order_of_the_classes() -> None:
    data = ImageData.from_arrays(GREY, LABELS, classes=["x", "y", "z"], val_fraction=0, test_fraction=0)
    assert data.info.classes == ("x", "y", "z") and data.train.labels.tolist() == LABELS.tolist()
    data = ImageData.from_arrays(GREY, NAMES, classes=["owl", "cat", "dog"], val_fraction=0, test_fraction=0)
    assert data.info.classes == ("owl", "cat", "dog") and data.train.labels.tolist() == LABELS.tolist()
    data = ImageData.from_arrays(GREY, LABELS > 0, classes=["no", "yes"])
    assert data.info.classes == ("no", "yes")


LABEL_ERRORS = {
    "count": (LABELS[1:], {}, "differ in number: 30 images, 29 labels"),
    "nan": (np.where(LABELS == 1, np.nan, LABELS), {}, "10 NaN or missing"),
    "none": ([None, *NAMES[1:].tolist()], {}, "1 NaN or missing"),
    "nan among text": (np.array([float("nan"), *NAMES[1:]], object), {}, "1 NaN or missing"),
    "float": (LABELS.astype(float), {}, r"float64; convert whole numbers by `labels.astype\(int\)`"),
    "one-hot": (np.eye(3)[LABELS], {}, r"have shape \(30, 3\).*`labels.argmax\(1\)`"),
    "ragged": ([[1], [1, 2]], {}, "no array"),
    "text alone": ("abc", {}, "list or an array"),
    "number": (3, {}, "list or an array"),
    "gap": (LABELS * 2, {}, r"no training image has label 1, and labels go up to 4; .*`labels.astype\(str\)`"),
    "from one": (LABELS + 1, {}, "no training image has label 0"),
    "negative": (LABELS - 1, {}, "negative"),
    "one class": (LABELS * 0, {}, "only the class '0'"),
    "mixed": ([1, "a"] * 15, {}, "cannot be sorted into classes"),
    "rare": (np.array([0] * 15 + [1] * 14 + [2]), {}, "class '2' has a single image left, .*testing"),
    "rare in training": (
        np.array([0] * 15 + [1] * 13 + [2] * 2), {}, r"class '2' has a single image left, .*validation \(`val_fraction`"
    ),
    "too many": (LABELS, {"classes": ("a", "b")}, "go up to 2, and `classes` name 2"),
    "unused": (LABELS, {"classes": ("a", "b", "c", "d")}, "no training image has label 3 .'d'., and labels go up to 2"),
    "unnamed": (NAMES, {"classes": ("cat", "dog")}, "have 'owl', which `classes` do not name"),
    "no image": (NAMES, {"classes": ("cat", "dog", "owl", "yak")}, "class 'yak' of `classes` has no training image"),
    "twice": (LABELS, {"classes": ("a", "a", "b")}, "name a class twice"),
    "missing": (None, {}, "`labels` are missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", LABEL_ERRORS)
def test_labels_that_are_refused(name: str) -> None:
    labels, settings, message = LABEL_ERRORS[name]
    with pytest.raises(UserError, match=message):
        ImageData.from_arrays(GREY, labels, **settings)


# ---- the split


def test_the_split_is_load_data_s() -> None:
    """scikit-learn's digits as arrays come out as they do by name."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    for settings in ({}, {"train_size": 300, "seed": 3}, {"val_fraction": 0.5, "seed": 1}, {"val_fraction": 0}):
        ours = ImageData.from_arrays(raw.images / 16, raw.target, name="digits", **settings)
        theirs = load_data("digits", **settings)
        assert ours.info == theirs.info
        for part in ("train", "val", "test"):
            one, other = getattr(ours, part), getattr(theirs, part)
            assert torch.equal(one.images[:], other.images[:]) and torch.equal(one.labels, other.labels)


def test_own_parts() -> None:
    test, val = (pixels(9, 6, 5, seed=1), NAMES[:9]), (pixels(6, 6, 5, seed=2) / 255, NAMES[:6, None])
    data = ImageData.from_arrays(GREY, NAMES, val=val, test=test)
    assert (len(data.train), len(data.val), len(data.test)) == (N, 6, 9)
    assert data.test.labels.tolist() == [data.info.classes.index(name) for name in NAMES[:9]]
    assert torch.equal(data.test.images[:][:, 0], torch.from_numpy(test[0]))
    # a split-off validation part, and own test images
    assert len(ImageData.from_arrays(GREY, NAMES, test=test, val_fraction=0.2).val) == 6
    for settings, message in (
        ({"test": (COLOUR, NAMES)}, r"`test` images and .* differ in \(C, H, W\) or type: \(3, 6, 5\) uint8 and"),
        ({"test": (GREY, LABELS)}, "`test labels` have 0, 1, 2, which no training image has"),
        ({"val": (GREY[:5], NAMES)}, "`val images` and `val labels` differ in number"),
        ({"val": GREY}, "`val` must be a pair"),
        ({"val": (GREY, None)}, "`val labels` are missing"),
        ({"test": (GREY.astype(float), NAMES)}, "`test images` are float64"),
        ({"val_fraction": 0.6}, "`val_fraction` must be between"),
        ({"test_fraction": -0.1}, "`test_fraction` must be between"),
        ({"seed": -1}, "`seed` must not be negative"),
        ({"train_size": 2}, r"`train_size` must be between 3 .* and 24"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            ImageData.from_arrays(GREY, NAMES, **settings)


@given(st.integers(0, 2**20), st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.5]))
def test_no_image_is_lost_or_in_two_parts(seed: int, fraction: float) -> None:
    numbered = np.arange(N, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    data = ImageData.from_arrays(numbered, LABELS, seed=seed, test_fraction=fraction)
    rows = [int(x[0, 0, 0]) for part in (data.train, data.val, data.test) for x in part.images]
    assert sorted(rows) == list(range(N))
    for part in (data.train, data.val, data.test):
        assert part.labels.tolist() == [LABELS[int(x[0, 0, 0])] for x in part.images]
        assert set(part.labels.tolist()) == {0, 1, 2}


# ---- torch data sets


class Pairs(Dataset):
    def __init__(self, images, labels) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.images[i], self.labels[i]


class Stream(IterableDataset):
    def __iter__(self):
        return zip(GREY, LABELS.tolist(), strict=True)


DATASETS = {
    "PIL, grey": (Pairs([Image.fromarray(x) for x in GREY], LABELS.tolist()), GREY[:, None]),
    "PIL, RGB": (Pairs([Image.fromarray(x) for x in COLOUR], LABELS.tolist()), COLOUR.transpose(0, 3, 1, 2)),
    "PIL, RGBA": (
        Pairs([Image.fromarray(x).convert("RGBA") for x in COLOUR], LABELS), COLOUR.transpose(0, 3, 1, 2)
    ),
    "PIL, LA": (Pairs([Image.fromarray(x).convert("LA") for x in GREY], LABELS), GREY[:, None]),
    "tensors": (TensorDataset(torch.from_numpy(COLOUR).permute(0, 3, 1, 2), torch.from_numpy(LABELS)),
                COLOUR.transpose(0, 3, 1, 2)),
    "float tensors": (TensorDataset(torch.from_numpy(GREY / 255), torch.from_numpy(LABELS)), GREY[:, None]),
    "narrow tensors": (TensorDataset(torch.from_numpy(AMBIGUOUS), torch.from_numpy(LABELS)), AMBIGUOUS),
    "arrays": (Pairs(COLOUR, LABELS), COLOUR.transpose(0, 3, 1, 2)),
    "subset": (TorchSubset(Pairs(GREY[::-1], LABELS[::-1]), range(N)[::-1]), GREY[:, None]),
    "iterable": (Stream(), GREY[:, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
def test_torch_data_sets(name: str) -> None:
    dataset, wanted = DATASETS[name]
    data = ImageData.from_dataset(dataset, val_fraction=0, test_fraction=0, name="mine")
    assert torch.equal(data.train.images[:], torch.from_numpy(np.ascontiguousarray(wanted)))
    assert data.train.labels.tolist() == LABELS.tolist()
    assert ImageData.from_arrays(dataset, name="mine").info.channels == wanted.shape[1]


def test_palettes_have_colours() -> None:
    pictures = [Image.fromarray(x).convert("P") for x in COLOUR]
    data = ImageData.from_dataset(Pairs(pictures, LABELS), val_fraction=0, test_fraction=0)
    wanted = np.asarray(pictures[0].convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.train.images[0].numpy(), wanted)


def test_parts_and_names_of_torch_data_sets() -> None:
    train, test = Pairs(GREY, LABELS), Pairs(pixels(9, 6, 5, seed=1), LABELS[:9])
    train.classes = ["x", "y", "z"]  # type: ignore[attr-defined]
    data = ImageData.from_dataset(train, test=test, val=(GREY[:3], LABELS[:3]))
    assert data.info.classes == ("x", "y", "z") and (len(data.train), len(data.val), len(data.test)) == (N, 3, 9)
    assert ImageData.from_dataset(train, classes=["a", "b", "c"]).info.classes == ("a", "b", "c")


def test_torch_data_sets_that_are_refused() -> None:
    small = [*GREY[:-1], GREY[-1][:3]]
    wide = [*GREY[:-1], GREY[-1] / 255 - 0.5]
    for dataset, message in (
        (Pairs(small, LABELS), r"item 0 is \(1, 6, 5\), item 29 is \(1, 3, 5\).*resize by a transform"),
        (Pairs(wide, LABELS), "`item 29: images` are float64 .*transform that normalises"),
        (TensorDataset(torch.from_numpy(GREY)), "item 0 of the data set is tuple of 1, not a pair"),
        (Pairs([], []), "data set is empty"),
        (Pairs(["a.png"], [0]), "has shape"),
    ):
        with pytest.raises(UserError, match=message):
            ImageData.from_dataset(dataset)
    for wrong in (GREY, [GREY, LABELS], None):
        with pytest.raises(UserError, match="`dataset` must be a torch Dataset"):
            ImageData.from_dataset(wrong)
    with pytest.raises(UserError, match=r"`item 0: image` has shape \(2, 3, 4, 5\)"):
        ImageData.from_dataset(Pairs([pixels(2, 3, 4, 5)], [0]))


class Items(Dataset):
    """Images of types of their own, with labels of their own."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number], self.labels[number]


def test_8_and_16_bits_in_one_data_set_are_stretched():
    deep = [GREY[i] if i % 2 else GREY[i].astype(np.uint16) * np.uint16(257) for i in range(N)]
    data = ImageData.from_dataset(Items(deep, LABELS), intensity="full")
    flat = ImageData.from_dataset(Items(list(GREY), LABELS))
    assert data.info.kind == "uint16" and torch.equal(data.train.images[:], flat.train.images[:].to(torch.uint16) * 257)
    mixed = [GREY[i] if i % 2 else GREY[i] / np.float32(255) for i in range(N)]
    with pytest.raises(UserError, match="images of types float32 and uint8"):
        ImageData.from_dataset(Items(mixed, LABELS), intensity="full")


@pytest.mark.parametrize("dtype", ["int16", "int32", ">i2", "<f8"])
def test_any_numbers_are_kept_where_an_intensity_is_asked_for(dtype):
    values = (COLOUR.astype(np.int64) * 100 - 1000).astype(dtype)
    data = ImageData.from_arrays(values, LABELS, intensity="none")
    assert data.info.kind == "float32" and float(data.train.images[:].min()) < -900
    big = ImageData.from_arrays(COLOUR.astype(">u2") * 257, LABELS, intensity="full")
    assert big.info.kind == "uint16" and int(big.train.images[:].max()) == 257 * int(COLOUR.max())


def test_one_hot_tensors_are_named():
    hot = torch.eye(3)[torch.as_tensor(LABELS)]
    with pytest.raises(UserError, match="of one-hot labels take"):
        ImageData.from_dataset(Items(list(GREY), list(hot)))


@pytest.mark.parametrize(
    "weights", [["x"] * N, [[1, 2]] * N, [1e-300, *[1e300] * (N - 1)], [1, [2, 3]] * (N // 2), [0.0] * N]
)
def test_bad_weights(weights):
    with pytest.raises(UserError, match="`weights` must be positive"):
        ImageData.from_arrays(GREY, LABELS, weights=weights)


def test_huge_weights_are_weights():
    data = ImageData.from_arrays(GREY, LABELS, weights=np.full(N, 1e308))
    assert data.train.weights.tolist() == [1.0] * len(data.train)


@pytest.mark.parametrize("size", [12.5, "12", 12.0])
def test_a_size_is_a_whole_number(size):
    with pytest.raises(UserError, match="`train_size` must be a whole number"):
        ImageData.from_arrays(GREY, LABELS, train_size=size)
    with pytest.raises(UserError, match="`train_size` cannot be"):
        load_data("digits", train_size=size)


@pytest.mark.parametrize("setting", [{"pages": "all"}, {"resize": "Fit"}, {"image_size": 8.0}, {"image_size": "8"}])
def test_settings_of_reading_are_checked(setting):
    with pytest.raises(UserError, match=f"`{next(iter(setting))}` cannot be"):
        load_data("digits", **setting)


def test_numbers_against_classes_that_are_called_by_numbers():
    """Labels 1 to 3 as text: 1 is the class of number 0."""
    data = ImageData.from_arrays(GREY, [str(1 + label) for label in LABELS])
    with pytest.raises(UserError, match=r"whole numbers, but classes are called by others \(0 is '1'"):
        labelled((GREY, 1 + LABELS), data.info, "data")
    named = labelled((GREY, (1 + LABELS).astype(str)), data.info, "data")
    assert named.labels.tolist() == LABELS.tolist()
    plain = ImageData.from_arrays(GREY, LABELS)
    assert labelled((GREY, LABELS), plain.info, "data").labels.tolist() == LABELS.tolist()


def test_parts_of_another_data_set_count_by_their_names():
    """Its classes have other numbers, and not all are there."""
    data = ImageData.from_arrays(GREY, np.array(["cat", "dog", "owl"])[LABELS])
    other = ImageData.from_arrays(GREY, np.array(["owl", "cat", "owl"])[LABELS])
    names = np.array(other.info.classes)[other.test.labels.numpy()]
    for each in (other.test, other, other.test.take(np.arange(len(other.test))), other.test.to("cpu")):
        found = labelled(each, data.info, "data")
        assert np.array(data.info.classes)[found.labels.numpy()].tolist() == names.tolist()
    unlabelled = replace(other.test, labels=torch.full_like(other.test.labels, -1))
    assert set(labelled(unlabelled, data.info, "data").labels.tolist()) == {-1}
    with pytest.raises(UserError, match=r"`data` has the class dog; the run knows cat, owl\."):
        labelled(data.test, other.info, "data")
    mixed = replace(data, test=other.test)  # by name here too
    assert np.array(data.info.classes)[mixed.test.labels.numpy()].tolist() == names.tolist()
    renamed = replace(data, info=replace(data.info, classes=("x", "y", "z")))
    assert renamed.test.labels.equal(data.test.labels) and renamed.test.classes == ("x", "y", "z")
    nameless = Split(other.test.images, other.test.labels)
    assert labelled(nameless, data.info, "data") is nameless


def test_bool_labels_with_names_are_taken_back():
    data = ImageData.from_arrays(GREY, LABELS > 0, classes=["no", "yes"])
    assert labelled((GREY, LABELS > 0), data.info, "data").labels.tolist() == (LABELS > 0).tolist()


def test_images_as_a_run_takes_them():
    cube = np.random.default_rng(0).integers(0, 255, (N, 4, 4, 4), dtype=np.uint8)
    data = ImageData.from_arrays(cube, LABELS, channels="first")
    assert np.array_equal(given_pixels(cube, data.info)[:].numpy(), cube)
    with pytest.raises(UserError, match="all images need one shape"):
        given_pixels([np.zeros((8, 8)), np.zeros((8, 9))], data.info)
    deep = ImageData.from_arrays(GREY.astype(np.uint16) * np.uint16(257), LABELS, intensity="full")
    with pytest.raises(UserError, match="numbers from 0 to 65535, not from -1 to 70000"):
        given_pixels(np.where(GREY > 99, 7e4, -1.0), deep.info)


def test_no_weights_at_all_are_too_few():
    with pytest.raises(UserError, match="0 weights"):
        ImageData.from_arrays(GREY, LABELS, weights=[])


def test_numbers_that_are_settings():
    assert load_data("digits", download=0, columns=None).info.num_classes == 10
