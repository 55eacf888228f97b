"""Data sets: every loader of the registry, every rule of the split, every error a user can make."""

import ast
import hashlib
import itertools
import json
import logging
import math
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import pixels, write_npz
from PIL import Image

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data import files as image_files
from pyro_isingvit.data import load as data
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.inputs import load_image_files, load_inputs
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.sources import DATASETS, PREFIXES
from pyro_isingvit.data.split import UNLABELLED
from pyro_isingvit.data.stratify import hold_out

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
PUBLISHED = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"} | REAL  # name -> folder


def write_images(folder, count, mode="RGB", size=(8, 8), suffix=".png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        array = pixels(size[1], size[0], 3, seed=seed + i)
        Image.fromarray(array).convert(mode).save(folder / f"{i:03d}{suffix}")


@pytest.fixture
def folders(tmp_path):
    """imagefolder with train/ and test/: 2 classes, 10 + 4 images each."""
    root = tmp_path / "images"
    for part, count, seed in (("train", 10, 0), ("test", 4, 100)):
        for i, name in enumerate(("cat", "dog")):
            write_images(root / part / name, count, seed=seed + 50 * i)
    return root


def write_idx(root, folder="MNIST", count=20):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", count), ("t10k", count // 2)):
        images = struct.pack(">IIII", 2051, n, 28, 28) + pixels(n, 28, 28).tobytes()
        labels = struct.pack(">II", 2049, n) + (np.arange(n, dtype=np.uint8) % 10).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return raw


def write_cifar(root, name, classes):
    """CIFAR's files as NumPy 1 pickled them: the dtype's align flag is an integer."""
    folder = root / PUBLISHED[name]
    folder.mkdir(parents=True)
    fine = "fine_labels" if name == "cifar100" else "labels"

    def dump(file, entry):
        new = pickle.dumps(entry, 2)
        old = re.sub(rb"(?<=u1q.)\x89\x88(?=\x87)", lambda _: b"K\x00K\x01", new, flags=re.DOTALL)
        assert old != new or "data" not in entry
        (folder / file).write_bytes(old)

    parts = ["train", "test"] if name == "cifar100" else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, part in enumerate(parts):
        dump(part, {"data": pixels(3 * classes, 3072, seed=i), fine: list(range(classes)) * 3})
    meta = {"fine_label_names" if name == "cifar100" else "label_names": [f"c{i}" for i in range(classes)]}
    dump("meta" if name == "cifar100" else "batches.meta", meta)


def rows(split):
    """A fingerprint per image."""
    return [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in split.images]


def check(loaded):
    """What holds for every data set."""
    info = loaded.info
    for split in (loaded.train, loaded.val, loaded.test):
        assert split.images[:].dtype == torch.uint8 and split.images[:].is_contiguous()
        assert split.images.shape == (len(split), info.channels, info.height, info.width)
        assert split.labels.dtype == torch.int64 and split.labels.shape == (len(split),)
        assert len(split.names) in {0, len(split)}
    assert sorted(set(loaded.train.labels.tolist())) == list(range(info.num_classes))
    plain = loaded.train.images[:].double() / 255
    torch.testing.assert_close(torch.tensor(info.mean).double(), plain.mean((0, 2, 3)), atol=1e-6, rtol=0)
    std = plain.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(info.std).double(), std.clamp(min=1e-3), atol=1e-6, rtol=0)
    normal = info.normalise(loaded.train.images[:])
    assert normal.dtype == torch.float32 and abs(float(normal.mean())) < 1e-3


def test_import_is_cheap():
    names = set()
    for path in Path(data.__file__).parent.glob("*.py"):
        top = ast.parse(path.read_text()).body
        names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert {"numpy", "torch", "concurrent.futures"} <= names  # the lines above do see imports
    assert not {name.split(".")[0] for name in names} & {"torchvision", "sklearn", "PIL", "tqdm"}


# ---- the registry


@pytest.mark.parametrize("name", [*DATASETS, *PREFIXES])
def test_every_loader(name, tmp_path, folders, monkeypatch):
    if name in REAL:
        write_idx(tmp_path, REAL[name], 100)
    elif name in PUBLISHED:
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
        write_cifar(tmp_path, name, 10 if name == "cifar10" else 100)
    if name == "npy":
        with np.load(write_npz(tmp_path / "a.npz").removeprefix("npz:")) as arrays:
            for key, array in arrays.items():
                np.save(tmp_path / f"{key}.npy", array)
    if name == "csv":
        lines = [f"{path.relative_to(folders)},{path.parent.name}" for path in sorted(folders.rglob("*.png"))]
        (folders / "images.csv").write_text("\n".join(["path,label", *lines]))
    specs = {
        "imagefolder": lambda: f"imagefolder:{folders}", "npz": lambda: write_npz(tmp_path / "a.npz"),
        "npy": lambda: f"npy:{tmp_path}", "csv": lambda: f"csv:{folders / 'images.csv'}",
    }  # fmt: skip
    spec = specs[name]() if name in specs else name
    loaded = load_data(spec, data_root=tmp_path)
    check(loaded)
    assert loaded.info.dataset == spec
    assert not set(rows(loaded.train)) & set(rows(loaded.val))
    own = loaded.source[0]
    assert load_inputs(spec, loaded.info, data_root=tmp_path, source=own).labels.equal(loaded.test.labels)


@pytest.mark.parametrize("name", REAL)
def test_real(name):
    if not (SHARED / REAL[name]).is_dir():
        pytest.skip(f"{SHARED / REAL[name]} is not here")
    loaded = load_data(name, data_root=SHARED, train_size=1000)
    check(loaded)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (1000, 100, 10_000)
    assert loaded.train.labels.bincount().min() > 80
    assert loaded.info.classes[0] == {"mnist": "0", "fashion-mnist": "T-shirt/top"}[name]
    full = load_data(name, data_root=SHARED)
    assert (len(full.train), len(full.val)) == (54_000, 6_000)
    assert full.info.mean[0] == pytest.approx({"mnist": 0.1307, "fashion-mnist": 0.2860}[name], abs=1e-3)
    assert full.info.std[0] == pytest.approx({"mnist": 0.3081, "fashion-mnist": 0.3530}[name], abs=1e-3)


def test_digits():
    loaded = load_data("digits")
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (1293, 144, 360)
    assert loaded.test.labels.bincount().min() >= 34
    assert int(loaded.train.images[:].max()) == 255
    other = load_data("digits", seed=5, train_size=100)
    assert rows(other.test) == rows(loaded.test)  # the test part does not move with the seed


@pytest.mark.parametrize("spec", ["digit", "imagefolder", "imagefolder:", "npz:", "zip:a", ""])
def test_unknown(spec):
    with pytest.raises(UserError, match="unknown data set") as caught:
        load_data(spec)
    assert all(name in str(caught.value) for name in (*DATASETS, "imagefolder:PATH", "npz:PATH"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files(name, tmp_path):
    with pytest.raises(UserError, match="`download`") as caught:
        load_data(name, data_root=tmp_path)
    assert str(tmp_path / PUBLISHED[name]) in str(caught.value)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("length", [0, 2, 17, -1])
def test_truncated_idx(file, length, tmp_path):
    path = write_idx(tmp_path) / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"cannot read mnist from .*raw"):
        load_data("mnist", data_root=tmp_path)


def test_idx_that_disagree(tmp_path):
    raw = write_idx(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 19) + bytes(19))
    with pytest.raises(UserError, match="label count mismatch"):
        load_data("mnist", data_root=tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 20) + bytes([77] * 20))
    with pytest.raises(UserError, match="labels without a class"):
        load_data("mnist", data_root=tmp_path)


# ---- the split


@pytest.mark.parametrize("train_size", [None, 20, 300, 1300, 1437])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5])
def test_split_rule(train_size, fraction):
    loaded = load_data("digits", train_size=train_size, val_fraction=fraction, seed=3)
    wanted = train_size or 1437
    val = max(round(wanted * fraction), 10) if fraction else 0
    apart = train_size is not None and 1437 - train_size >= val
    assert len(loaded.val) == val
    assert len(loaded.train) == (wanted if apart else wanted - val)
    assert loaded.train.labels.bincount(minlength=10).min() >= 1
    assert not val or loaded.val.labels.bincount(minlength=10).min() >= 1
    parts = [set(rows(split)) for split in (loaded.train, loaded.val, loaded.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_split_is_seeded():
    first, again, other = (load_data("digits", train_size=200, seed=seed) for seed in (1, 1, 2))
    assert rows(first.train) == rows(again.train) and rows(first.val) == rows(again.val)
    assert rows(first.train) != rows(other.train) and rows(first.val) != rows(other.val)
    assert rows(load_data("digits", seed=1).val) != rows(load_data("digits", seed=2).val)


def test_holding_out_leaves_every_class():
    for counts in itertools.product(range(2, 8), repeat=3):
        labels = np.repeat([0, 1, 2], counts)
        for fraction in (0.01, 0.2, 0.35, 0.5):
            count = math.ceil(fraction * len(labels))
            rest, held_out = hold_out(labels, count, np.random.default_rng(0), ("a", "b", "c"), "test")
            assert sorted([*rest, *held_out]) == list(range(len(labels))) and len(held_out) == max(count, 3)
            assert set(labels[rest]) == set(labels[held_out]) == {0, 1, 2}


def test_split_keeps_proportions_and_rare_classes(tmp_path):
    labels = np.repeat([0, 1, 2], [300, 90, 4])
    spec = write_npz(
        tmp_path / "a.npz",
        train_images=pixels(394, 6, 6),
        train_labels=labels,
        val_images=None,
        val_labels=None,
    )
    loaded = load_data(spec, train_size=40)
    assert loaded.train.labels.bincount().tolist() == [30, 9, 1]
    assert loaded.val.labels.bincount(minlength=3).min() == 1
    assert load_data(spec, train_size=3).train.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [-1, 0, 9, 1438, 10**6])
def test_bad_train_size(size):
    with pytest.raises(UserError, match=f"between 10 .* and 1437 .* got {size}"):
        load_data("digits", train_size=size)


@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1.0, float("nan")])
def test_bad_val_fraction(fraction):
    with pytest.raises(UserError, match=r"`val_fraction` must be between 0 and 0.5"):
        load_data("digits", val_fraction=fraction)


def test_bad_seed():
    with pytest.raises(UserError, match="`seed` must not be negative"):
        load_data("digits", seed=-1)


def test_too_few_to_hold_out(tmp_path):
    few = {"train_images": pixels(5, 6, 6), "train_labels": np.array([0, 0, 1, 1, 2])}
    no_val = {"val_images": None, "val_labels": None}
    with pytest.raises(UserError, match=r"class '2' has a single image left.*validation"):
        load_data(write_npz(tmp_path / "a.npz", **few, **no_val))
    assert len(load_data(f"npz:{tmp_path / 'a.npz'}", val_fraction=0).train) == 5
    with pytest.raises(UserError, match=r"class '2' has a single image left.*testing"):
        load_data(write_npz(tmp_path / "b.npz", **few, test_images=None, test_labels=None))


# ---- npz


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (6, 6, 3), (5, 9, 3)])
def test_npz_shapes(shape, tmp_path):
    arrays = {f"{name}_images": pixels(n, *shape) for name, n in (("train", 30), ("val", 6), ("test", 9))}
    loaded = load_data(write_npz(tmp_path / "a.npz", **arrays))
    check(loaded)
    channels = shape[2] if len(shape) == 3 else 1
    assert (loaded.info.channels, loaded.info.height, loaded.info.width) == (channels, *shape[:2])
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (30, 6, 9)  # all official
    if channels == 3:
        assert torch.equal(loaded.test.images[:], torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2))
    assert len(load_data(f"npz:{tmp_path / 'a.npz'}", val_fraction=0).val) == 0


def test_npz_without_val_and_test(tmp_path):
    none = dict.fromkeys(("val_images", "val_labels", "test_images", "test_labels"))
    loaded = load_data(write_npz(tmp_path / "a.npz", **none))
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (21, 3, 6)
    assert loaded.test.labels.bincount().tolist() == [2, 2, 2]


NANS = np.where(np.arange(30 * 36).reshape(30, 6, 6) < 5, np.nan, 0.5)
NPZ_ERRORS = {
    "float in one part": ({"train_images": np.ones((30, 6, 6), np.float32)}, "parts' images differ in type"),
    "int": (
        {"test_images": np.ones((9, 6, 6), np.int64)},
        r"test_images is int64; uint8, uint16 or floats are expected; convert .*255",
    ),
    "nan": ({"train_images": NANS}, "train_images has 5 NaN"),
    "objects": ({"train_labels": np.array([{}] * 30)}, "cannot read .*object arrays"),
    "object images": ({"train_images": np.array([None] * 30)}, "cannot read .*object arrays"),
    "mismatch": (
        {"train_labels": np.zeros(29, int)},
        "label count mismatch: 30 train_images, 29 train_labels",
    ),
    "negative": ({"train_labels": np.arange(30) % 3 - 1}, "negative"),
    "float labels": ({"train_labels": np.ones(30)}, "expected integers"),
    "multi-label": ({"train_labels": np.zeros((30, 14), int)}, r"expected integers \(N,\) or \(N, 1\)"),
    "gap": ({"train_labels": np.arange(30) % 2 * 2}, "empty class 1"),
    "first": ({"train_labels": np.arange(30) % 2 + 1}, "empty class 0"),
    "huge": ({"train_labels": np.arange(30) % 2 * 10**12}, "empty class 1"),
    "test alone": ({"test_labels": np.full(9, 3)}, "empty class 3: .* up to 3"),
    "volumes": ({"train_images": pixels(30, 6, 6, 6)}, r"expected \(N, H, W\),"),
    "scalar": ({"train_images": np.uint8(3)}, r"expected \(N, H, W\),"),
    "empty": ({"train_images": pixels(0, 6, 6), "train_labels": np.zeros(0, int)}, "not empty"),
    "other size": ({"test_images": pixels(9, 5, 6)}, "parts' images differ"),
    "other channels": ({"val_images": pixels(6, 6, 6, 3)}, "parts' images differ"),
    "no images": ({"train_images": None}, "has no array 'train_images'; found: train_labels"),
    "no labels": ({"test_labels": None}, "has no array 'test_labels'"),
    "one class": (
        {f"{p}_labels": np.zeros(n, int) for p, n in (("train", 30), ("val", 6), ("test", 9))},
        "only the",
    ),
}


@pytest.mark.parametrize("name", NPZ_ERRORS)
def test_npz_errors(name, tmp_path):
    changes, message = NPZ_ERRORS[name]
    with pytest.raises(UserError, match=message) as caught:
        load_data(write_npz(tmp_path / "a.npz", **changes))
    assert "a.npz" in str(caught.value)


def test_npz_damaged(tmp_path):
    whole = tmp_path / "a.npz"
    write_npz(whole)
    for content in (b"", b"PK\x03\x04 no zip", b"text", whole.read_bytes()[:-40], whole.read_bytes()[:500]):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*b.npz"):
            load_data(f"npz:{tmp_path / 'b.npz'}")
    damaged = bytearray(whole.read_bytes())
    damaged[300:340] = bytes(40)  # inside the first array: the checksum tells
    (tmp_path / "b.npz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"cannot read .*b.npz"):
        load_data(f"npz:{tmp_path / 'b.npz'}")
    np.save(tmp_path / "c.npy", pixels(3))
    with pytest.raises(UserError, match="cannot read"):
        load_data(f"npz:{tmp_path / 'c.npy'}")
    with pytest.raises(UserError, match="no such file"):
        load_data(f"npz:{tmp_path / 'none.npz'}")


# ---- image folders


def test_imagefolder_official(folders):
    loaded = load_data(f"imagefolder:{folders}")
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (18, 2, 8)
    assert loaded.info.classes == ("cat", "dog") and loaded.info.channels == 3
    for split in (loaded.train, loaded.val, loaded.test):
        for image, label, name in zip(split.images, split.labels, split.names, strict=True):
            assert name.split("/")[1] == loaded.info.classes[label]
            assert torch.equal(image.permute(1, 2, 0), torch.tensor(np.array(Image.open(folders / name))))
    for name in ("cat", "dog"):
        write_images(folders / "val" / name, 3, seed=300)
    loaded = load_data(f"imagefolder:{folders}")
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (20, 6, 8)


def test_imagefolder_of_classes(folders, monkeypatch):
    loaded = load_data(f"imagefolder:{folders / 'train'}")
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (14, 2, 4)
    assert loaded.test.labels.bincount().tolist() == [2, 2]
    monkeypatch.chdir(folders / "train")
    assert load_data("imagefolder:.").test.names == loaded.test.names
    # without test/ a fifth of train/ is held out, and a class may be called train
    (folders / "test").rename(folders.parent / "away")
    assert len(load_data(f"imagefolder:{folders}").test) == 4
    write_images(folders.parent / "vehicles" / "train", 5)
    write_images(folders.parent / "vehicles" / "bus", 5, seed=9)
    assert load_data(f"imagefolder:{folders.parent / 'vehicles'}").info.classes == ("bus", "train")


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_grey_stays_grey(mode, folders):
    for path in folders.rglob("*.png"):
        grey = Image.open(path).convert("L")
        if mode == "I;16":
            grey = Image.fromarray(np.asarray(grey).astype(np.uint16) * 200)
        (grey if mode == "I;16" else grey.convert(mode)).save(path)
    loaded = load_data(f"imagefolder:{folders}")
    assert loaded.info.channels == 1 and len(loaded.train.images[:].unique()) > (1 if mode == "1" else 50)
    if mode == "I;16":
        deep = np.asarray(Image.open(folders / loaded.train.names[0]))
        assert loaded.info.kind == "uint16" and np.array_equal(loaded.train.images[0][0].numpy(), deep)
    Image.new("RGB", (8, 8), "red").save(folders / "test" / "cat" / "000.png")  # one in colour: all are RGB
    loaded = load_data(f"imagefolder:{folders}")
    assert loaded.info.channels == 3 and torch.equal(loaded.train.images[:, 0], loaded.train.images[:, 2])


@pytest.mark.parametrize("suffix", image_files.SUFFIXES)
def test_file_types(suffix, folders):
    path = folders / "train" / "cat" / f"x{suffix.upper()}"
    picture = Image.new("L" if suffix == ".pgm" else "RGB", (8, 8), "white")
    if suffix == ".npy":
        with path.open("wb") as file:
            np.save(file, np.asarray(picture))
    else:
        picture.save(path)
    images = load_image_files([path], DataInfo("a", ("a", "b"), 3, 8, 8, (0.5,) * 3, (1.0,) * 3)).images[:]
    assert images.shape == (1, 3, 8, 8) and images.min() > 250


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_modes_become_rgb(mode, folders, tmp_path):
    picture = Image.new("RGB", (8, 8), (200, 30, 30)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path, **({"transparency": b"\x00" * 256} if mode == "P" else {}))
    path.rename(folders / "train" / "cat" / f"zz{path.suffix}")
    loaded = load_data(f"imagefolder:{folders}", val_fraction=0)
    row = loaded.train.names.index(f"train/cat/zz{path.suffix}")
    assert loaded.train.images[row, :, 0, 0].tolist() == pytest.approx([200, 30, 30], abs=25)


def test_sizes_must_agree(folders):
    write_images(folders / "test" / "dog", 1, size=(12, 7))
    with pytest.raises(UserError, match="`image_size`") as caught:
        load_data(f"imagefolder:{folders}")
    assert str(folders / "train/cat/000.png") in str(caught.value) and "8x8" in str(caught.value)
    assert str(folders / "test/dog/000.png") in str(caught.value) and "12x7" in str(caught.value)
    loaded = load_data(f"imagefolder:{folders}", image_size=5)
    check(loaded)
    assert (loaded.info.height, loaded.info.width) == (5, 5)
    assert len(load_inputs(f"imagefolder:{folders}", loaded.info)) == 8


def test_resize_is_antialiased(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    for name in "ab":
        for i in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(board).save(tmp_path / name / f"{i}.png")
    images = load_data(f"imagefolder:{tmp_path}", image_size=8, val_fraction=0).train.images[:]
    assert images.min() > 110 and images.max() < 145


def test_any_source_is_resized():
    data, plain = load_data("digits", train_size=50, image_size=16), load_data("digits", train_size=50)
    assert (data.info.height, data.info.width) == (16, 16) and data.train.images.shape == (50, 1, 16, 16)
    small = data.train.images[:20].float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (small - plain.train.images[:20].float()).abs().mean() < 12  # bicubic, with its overshoot cut off
    index = torch.tensor([3, 1, 3])
    assert torch.equal(data.train.images.take(index)[:], data.train.images[index])
    assert torch.equal(data.train.images.to("cpu")[7], data.train.images[7])
    same = load_data("digits", train_size=50, image_size=8)
    assert torch.equal(same.train.images[:], plain.train.images[:])


@pytest.mark.parametrize(("spec", "size"), [("digits", 0), ("imagefolder:{}", 0), ("imagefolder:{}", -3)])
def test_bad_image_size(spec, size, folders):
    with pytest.raises(UserError, match="`image_size`"):
        load_data(spec.format(folders), image_size=size)


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_unreadable_image(content, folders):
    path = folders / "train" / "dog" / "004.png"
    path.write_bytes(path.read_bytes()[:90] if content == "half" else content)
    with pytest.raises(UserError, match=r"cannot read the image .*train/dog/004.png"):
        load_data(f"imagefolder:{folders}")


def test_only_raster_readers(folders):
    Image.new("RGB", (8, 8)).save(folders / "train" / "dog" / "004.png", format="PCX")  # Pillow reads 40 more
    with pytest.raises(UserError, match=r"cannot read the image .*004\.png"):
        load_data(f"imagefolder:{folders}")


@pytest.mark.parametrize("limit", [20, 40])  # 64 pixels: more than twice the limit, and between
def test_decompression_bomb(limit, folders, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=r"cannot read the image .*decompression bomb"):
        load_data(f"imagefolder:{folders}")


def test_strange_grey(tmp_path):
    info = DataInfo("a", ("a", "b"), 1, 8, 8, (0.5,), (1.0,))
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(tmp_path / "b.tif")
    tifffile.imwrite(tmp_path / "c.tif", np.full((8, 8), 70000, np.uint32))
    for name, message in (("a", "float32, uint8 is expected"), ("b", "float32, uint8"), ("c", "beyond 16 bits")):
        with pytest.raises(UserError, match=message):
            load_image_files([tmp_path / f"{name}.tif"], info)


def test_folder_errors(folders, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_data(f"imagefolder:{tmp_path / 'none'}")
    write_images(tmp_path / "flat", 3)
    with pytest.raises(UserError, match="no class folders"):
        load_data(f"imagefolder:{tmp_path / 'flat'}")
    write_images(tmp_path / "one" / "cat", 5)
    with pytest.raises(UserError, match="only the class 'cat'"):
        load_data(f"imagefolder:{tmp_path / 'one'}")
    write_images(folders / "test" / "fox", 2)
    with pytest.raises(UserError, match=r"train/ and test/ must agree.*fox"):
        load_data(f"imagefolder:{folders}")
    (folders / "train" / "fox").mkdir()
    with pytest.raises(UserError, match=r"empty folder .*train/fox"):
        load_data(f"imagefolder:{folders}")


def test_other_files_are_skipped_and_counted(folders, caplog):
    for name in ("a.txt", "b.eps", ".hidden.png", "._000.png"):
        (folders / "train" / "cat" / name).write_text("no image")
    (folders / "train" / ".cache").mkdir()
    with caplog.at_level(logging.INFO):
        loaded = load_data(f"imagefolder:{folders}", val_fraction=0)
    assert len(loaded.train) == 20 and "skipped 2 files that are no images and 0 links" in caplog.text


def test_links_out_of_the_folder(folders, tmp_path, caplog):
    write_images(tmp_path / "secret", 3, size=(30, 30))
    cat = folders / "train" / "cat"
    (cat / "out.png").symlink_to(tmp_path / "secret" / "000.png")
    (cat / "nested").symlink_to(tmp_path / "secret")
    (folders / "train" / "linked").symlink_to(tmp_path / "secret")
    (cat / "in.png").symlink_to(folders / "train" / "cat" / "000.png")
    loaded = load_data(f"imagefolder:{folders}", val_fraction=0)
    assert loaded.info.classes == ("cat", "dog") and len(loaded.train) == 21
    assert "skipped 0 files that are no images and 2 links" in caplog.text
    assert "skipped 1 links to folders (linked) and 0 images outside of the class folders" in caplog.text
    write_images(folders / "train", 2, size=(8, 8))
    load_data(f"imagefolder:{folders}", val_fraction=0)
    assert "and 2 images outside of the class folders" in caplog.text


def test_many_images_show_progress(folders, capsys):
    write_images(folders / "train" / "cat", 510, suffix=".bmp", size=(8, 8))
    assert len(load_data(f"imagefolder:{folders}", val_fraction=0).train) == 530
    out, err = capsys.readouterr()
    assert "reading images: 100%" in err and not out


# ---- inputs for prediction


@pytest.fixture
def info(folders):
    return load_data(f"imagefolder:{folders}").info


def test_inputs_from_folders(folders, info, tmp_path, caplog):
    labelled = load_inputs(str(folders / "test"), info)
    assert labelled.labels.tolist() == [0] * 4 + [1] * 4 and labelled.names[4] == "dog/000.png"
    flat = load_inputs(str(folders / "test" / "dog"), info)
    assert set(flat.labels.tolist()) == {UNLABELLED} and torch.equal(flat.images[:], labelled.images[4:])
    assert flat.names[0] == "000.png" and not caplog.records
    nested = load_inputs(str(folders), info)  # its subfolders are train and test
    assert len(nested) == 28 and set(nested.labels.tolist()) == {UNLABELLED}
    write_images(tmp_path / "new", 3, mode="L")
    write_images(tmp_path / "new" / "cat", 2, size=(20, 10))
    mixed = load_inputs(str(tmp_path / "new"), info)
    assert mixed.images.shape == (5, 3, 8, 8) and set(mixed.labels.tolist()) == {UNLABELLED}
    assert "2 of 5 images resized to 8x8" in caplog.text


def test_colour_inputs_for_a_grey_run(folders):
    grey = DataInfo("a", ("a", "b"), 1, 6, 9, (0.5,), (1.0,))
    split = load_inputs(str(folders / "test"), grey)
    assert split.images.shape == (8, 1, 6, 9) and set(split.labels.tolist()) == {UNLABELLED}


def test_inputs_from_npz(info, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels(4, 8, 8, 3))
    assert load_inputs(str(path), info).labels.tolist() == [UNLABELLED] * 4
    np.savez(path, test_images=pixels(4, 8, 8, 3), test_labels=[[0], [1], [1], [0]])
    assert load_inputs(str(path), info).labels.tolist() == [0, 1, 1, 0]
    for changes, message in (
        ({"images": pixels(4, 8, 8)}, r"expected images \(N, 3, 8, 8\) torch.uint8.*got \(N, 1, 8, 8\)"),
        ({"images": pixels(4, 9, 8, 3)}, r"got \(N, 3, 9, 8\)"),
        ({"images": pixels(4, 8, 8, 3), "labels": [0, 1, 2, 0]}, "label 2, but the run has 2 classes"),
        ({"images": np.ones((4, 8, 8, 3))}, r"expected .* torch.uint8.* got .* torch.float32"),
        ({"train_images": pixels(4, 8, 8, 3)}, "has no array 'test_images'"),
    ):
        np.savez(path, **changes)
        with pytest.raises(UserError, match=message):
            load_inputs(str(path), info)


def test_inputs_from_another_data_set(tmp_path, caplog):
    write_idx(tmp_path, "MNIST")
    write_idx(tmp_path, "FashionMNIST")
    info = load_data("mnist", data_root=tmp_path, val_fraction=0).info
    assert load_inputs("mnist", info, data_root=tmp_path).labels.tolist() == list(range(10))
    assert set(load_inputs("fashion-mnist", info, data_root=tmp_path).labels.tolist()) == {UNLABELLED}
    assert "other classes" in caplog.text
    with pytest.raises(UserError, match=r"expected images .*got \(N, 1, 8, 8\)"):
        load_inputs("digits", info)


def test_input_errors(info, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="empty folder"):
        load_inputs(str(tmp_path / "none"), info)
    for spec in (str(tmp_path / "gone"), "mnst"):
        with pytest.raises(UserError, match=r"no folder, no .npz file and no known data set"):
            load_inputs(spec, info)
    with pytest.raises(UserError, match="no such file"):
        load_inputs(str(tmp_path / "gone.npz"), info)
    with pytest.raises(UserError, match="no images to read"):
        load_image_files([], info)
    with pytest.raises(UserError, match="no such folder"):
        image_files.list_images(tmp_path / "gone")


# ---- DataInfo


def test_info_survives_json(info):
    assert DataInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    for raw in ({}, info.to_dict() | {"more": 1}, info.to_dict() | {"mean": 3}):
        with pytest.raises(UserError, match="damaged"):
            DataInfo.from_dict(raw)


def test_normalise_says_what_it_expected(info):
    for images in (
        torch.zeros(2, 3, 8, 8),
        *(torch.zeros(s, dtype=torch.uint8) for s in ((3, 8, 8), (2, 1, 8, 8), ())),
    ):
        with pytest.raises(UserError, match=r"expected images \(N, 3, 8, 8\) torch.uint8.* got "):
            info.normalise(images)
    assert info.normalise(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 3, 8, 8)


def test_constant_images_do_not_divide_by_zero(tmp_path):
    spec = write_npz(tmp_path / "a.npz", train_images=np.full((30, 6, 6), 9, np.uint8))
    assert load_data(spec).info.std == (1e-3,)
