"""Rows of arrays that stay in their file."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import pixels, write_npz

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data import npz as arrays
from pyro_isingvit.data.batches import ahead, batches
from pyro_isingvit.data.images import as_images
from pyro_isingvit.data.inputs import load_inputs
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.on_disk import OnDisk, open_npy
from pyro_isingvit.data.split import Split
from pyro_isingvit.experiment import fit

TYPES = {"uint8": np.uint8, "uint16": np.uint16, "float32": np.float32}
SHAPES = [(20, 6, 5), (20, 6, 5, 3), (20, 3, 17, 18), (20, 6, 5, 1)]


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(arrays, "SMALL", 0)


def as_read(array):
    wanted = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2) if array.shape[3] < 17 else array
    return torch.from_numpy(np.ascontiguousarray(wanted if array.dtype == np.uint8 else wanted.astype(np.float32)))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["npz", "npy"])
@pytest.mark.usefixtures("everything_is_large")
def test_rows_are_those_of_the_array(kind, shape, form, tmp_path):
    array = (pixels(*shape).astype(TYPES[kind]) * (257 if kind == "uint16" else 1)).astype(TYPES[kind])
    labels = np.arange(20) % 2
    if form == "npz":
        np.savez(tmp_path / "a.npz", train_labels=labels, train_images=array)
    else:
        np.save(tmp_path / "train_images.npy", array)
        np.save(tmp_path / "train_labels.npy", labels)
    images = (
        arrays.Stored(tmp_path / "a.npz" if form == "npz" else tmp_path).part("train_images", "train_labels").images
    )
    assert isinstance(images, OnDisk) and images.kind == kind
    wanted = as_read(array)
    for where in (slice(None), slice(3, 9), [5, 2, 5], [7], np.arange(20) % 3 == 0):
        rows = where if isinstance(where, slice) else torch.as_tensor(where)
        assert torch.equal(images[where], wanted[rows])
    assert torch.equal(images[4], wanted[4]) and torch.equal(images.take([9, 1])[:], wanted[[9, 1]])
    for again in (copy.deepcopy(images), pickle.loads(pickle.dumps(images))):
        assert torch.equal(again[:], wanted)


@pytest.mark.usefixtures("everything_is_large")
def test_training_and_prediction_from_disk(tmp_path, monkeypatch):
    spec = write_npz(tmp_path / "a.npz")
    vit = ViTConfig(patch_size=3, width=8, heads=2, depth=1)
    there = load_data(spec)
    assert not isinstance(there.train.images, arrays.InMemory)
    run = fit(vit, there, epochs=2, progress=False)
    inputs = load_inputs(str(tmp_path / "a.npz"), run.info)
    monkeypatch.setattr(arrays, "SMALL", 2**30)
    here = load_data(spec)
    assert isinstance(here.train.images, arrays.InMemory) and here.info == there.info
    other = fit(vit, here, epochs=2, progress=False)
    assert all(torch.equal(value, other.state()["model"][name]) for name, value in run.state()["model"].items())
    assert torch.equal(run.predict(inputs.images, 3).probs, other.predict(here.test.images, 3).probs)


@pytest.mark.usefixtures("everything_is_large")
def test_compressed_arrays_in_any_order_are_the_same_with_a_cache(tmp_path):
    array = pixels(20, 6, 5)
    for name, images in (("c", array), ("f", np.asfortranarray(array))):
        np.savez_compressed(tmp_path / f"{name}.npz", train_images=images, train_labels=np.arange(20) % 2)
        there = arrays.Stored(tmp_path / f"{name}.npz", str(tmp_path / "cache")).part("train_images", "train_labels")
        assert torch.equal(there.images[:], as_read(array))


@pytest.mark.parametrize(("trained", "other"), [("uint16", "float32"), ("float32", "uint16")])
def test_pixels_of_another_type_are_refused(trained, other, tmp_path):
    """Both are read as floats; what stands for what differs."""
    array = {"uint16": pixels(30, 6, 6).astype(np.uint16) * 257, "float32": (pixels(30, 6, 6) / 255).astype(np.float32)}
    spec = write_npz(tmp_path / "a.npz", **{f"{part}_images": array[trained] for part in ("train", "val", "test")},
                     val_labels=np.arange(30) % 3, test_labels=np.arange(30) % 3)  # fmt: skip
    data = load_data(spec)
    run = fit(ViTConfig(patch_size=3, width=8, heads=2, depth=1), data, epochs=1, progress=False)
    assert torch.equal(run.predict(data.test.images, 2).probs, run.predict(array[trained], 2).probs)
    assert torch.equal(run.predict(data.test.images[:3], 2).probs, run.predict(array[trained][:3], 2).probs)
    np.savez(tmp_path / "b.npz", images=array[other])
    with pytest.raises(UserError, match=f"its images are {other}, those of the training {trained}"):
        load_inputs(str(tmp_path / "b.npz"), run.info)
    for given in (array[other], as_images(array[other][:, None])):
        with pytest.raises(UserError, match=f"are {other}; expected {trained}"):
            run.predict(given, 2)


def test_what_cannot_stay_there_is_read(tmp_path):
    array = pixels(20, 6, 5)
    for name, other in (
        ("fortran", np.asfortranarray(array)),
        ("double", array.astype(float)),
        ("big", array.astype(">u2")),
    ):
        np.save(tmp_path / f"{name}.npy", other)
        assert open_npy(tmp_path / f"{name}.npy") is None
        kind = torch.uint8 if name == "fortran" else torch.float32
        assert torch.equal(arrays.Stored(tmp_path).images(name)[:][:, 0], torch.from_numpy(array).to(kind))


@pytest.mark.usefixtures("everything_is_large")
def test_a_file_cut_short(tmp_path):
    np.save(tmp_path / "train_images.npy", pixels(20, 6, 5))
    images = arrays.Stored(tmp_path).images("train_images")
    size = (tmp_path / "train_images.npy").stat().st_size
    with (tmp_path / "train_images.npy").open("r+b") as file:
        file.truncate(size - 10)
    with pytest.raises(UserError, match="was cut short while it was read"):
        images[19]
    with pytest.raises(UserError, match=r"is cut short: .* bytes where .* are needed"):
        arrays.Stored(tmp_path).images("train_images")


@pytest.mark.usefixtures("everything_is_large")
def test_floats_that_are_none(tmp_path):
    array = pixels(20, 6, 5).astype(np.float32)
    array[13, 2, 2] = np.nan
    np.save(tmp_path / "train_images.npy", array)
    images = arrays.Stored(tmp_path).images("train_images")
    assert len(images[:13]) == 13
    with pytest.raises(UserError, match=r"image 13 of .*train_images.npy has NaN"):
        images[10:]


def test_batches_are_read_ahead_in_another_thread():
    here, threads = threading.get_ident(), []

    def items():
        for i in range(5):
            threads.append(threading.get_ident())
            yield i

    taken = ahead(items())
    assert next(taken) == 0 and list(taken) == [1, 2, 3, 4]
    assert here not in threads and len(set(threads)) == 1

    def breaks():
        yield 1
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        list(ahead(breaks()))


def test_batches_from_disk_are_those_from_memory(tmp_path):
    array = pixels(20, 6, 5)
    np.save(tmp_path / "a.npy", array)
    on_disk = open_npy(tmp_path / "a.npy")
    labels = torch.arange(20) % 2
    for one, other in zip(
        batches(Split(on_disk, labels), 6, 0, 1), batches(Split(array[:, None], labels), 6, 0, 1), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
