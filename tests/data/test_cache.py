"""The cache of decoded images: filled once, by whom it may be, and never trusted blindly."""

import errno
import os
import shutil
import signal
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from forks import exit_code
from helpers import pixels
from kills import forked
from PIL import Image

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data import cache as module
from pyro_isingvit.data import npz as arrays
from pyro_isingvit.data.decode import Reading, read
from pyro_isingvit.data.files import read_files
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.parallel import in_parallel

COUNT = 40


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{i:02d}.png" for i in range(COUNT)]
    for i, path in enumerate(paths):
        Image.fromarray(pixels(6, 5, 3, seed=i)).save(path)
    return paths


@pytest.fixture
def store(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """How often each file was decoded."""
    counts = Counter()

    def counting(path, reading, wanted):
        counts[path.name] += 1
        return read(path, reading, wanted)

    monkeypatch.setattr(module, "read", counting)
    return counts


def key(store):
    return next(path for path in store.iterdir() if path.is_dir())


def test_the_same_images_as_in_memory_and_decoded_once(files, store, decoded):
    plain, _ = read_files(files, Reading())
    for _ in range(2):
        images, changes = read_files(files, Reading(), cache=store)
        assert torch.equal(images[:], plain[:]) and changes == (0, 0, 0)
        assert torch.equal(images[[3, 1, 3]], plain[[3, 1, 3]])
    assert set(decoded.values()) == {1}
    smaller, changes = read_files(files, Reading((4, 4), "crop"), cache=store)  # other settings, other images
    assert smaller.shape == (COUNT, 3, 4, 4) and changes == (COUNT, 0, 0)
    assert torch.equal(smaller[:], read_files(files, Reading((4, 4), "crop"))[0][:])


@pytest.mark.parametrize("small", [0, 2**28])
def test_training_from_the_cache_is_training_from_memory(small, files, store, monkeypatch):
    monkeypatch.setattr(module, "SMALL", small)
    for i, path in enumerate(files):
        (path.parent / "ab"[i % 2]).mkdir(exist_ok=True)
        path.rename(path.parent / "ab"[i % 2] / path.name)
    source = f"imagefolder:{files[0].parent}"
    plain, cached = load_data(source), load_data(source, cache=str(store))
    assert plain.info == cached.info
    for name in ("train", "val", "test"):
        one, other = getattr(plain, name), getattr(cached, name)
        assert torch.equal(one.images[:], other.images[:]) and one.names == other.names


def test_a_changed_file_is_seen_whatever_its_size_and_time(files, store):
    read_files(files, Reading(), cache=store)
    before = files[7].stat()
    raw = bytearray(files[7].read_bytes())
    other = pixels(6, 5, 3, seed=99)
    Image.fromarray(other).save(files[7])
    assert len(raw) == files[7].stat().st_size  # random pixels do not compress
    os.utime(files[7], ns=(before.st_atime_ns, before.st_mtime_ns))
    images, _ = read_files(files, Reading(), cache=store)
    assert np.array_equal(images[7].numpy(), other.transpose(2, 0, 1))


def test_touched_files_are_not_decoded_again(files, store, decoded):
    read_files(files, Reading(), cache=store)
    for path in files:
        path.touch()
    read_files(files, Reading(), cache=store)
    assert sum(decoded.values()) == COUNT


def test_killed_while_it_is_filled_and_continued(files, store, decoded, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STEP", 8)

    def die(part, items, what, done=0):
        for number, item in enumerate(in_parallel(part, items, what, done)):
            if what.startswith("filling") and number == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(module, "in_parallel", die)
        child = forked(partial(read_files, files, Reading(), cache=store), tmp_path / "log")
        assert exit_code(child) == -signal.SIGKILL
    assert (key(store) / "images.bin.part").exists() and not (key(store) / "index.json").exists()
    images, _ = read_files(files, Reading(), cache=store)
    assert torch.equal(images[:], read_files(files, Reading())[0][:])
    assert sum(decoded.values()) == COUNT - 16  # two steps of 8 had been noted


def test_two_at_once(files, store, monkeypatch, tmp_path):
    log = tmp_path / "decoded"

    def slow(path, reading, wanted):
        time.sleep(0.02)
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return read(path, reading, wanted)

    monkeypatch.setattr(module, "read", slow)
    fill = partial(read_files, files, Reading(), cache=store)
    children = [forked(fill, tmp_path / f"log{i}") for i in range(2)]
    assert [exit_code(child) for child in children] == [0, 0]
    assert sorted(log.read_text().split()) == sorted(path.name for path in files)
    assert "another process is filling" in (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()


DAMAGE = {
    "a pixel": lambda place: _flip(place / "images.bin", 6 * 5 * 3 * 11 + 4),
    "cut short": lambda place: os.truncate(place / "images.bin", 100),
    "no sums": lambda place: (place / "sums.bin").unlink(),
    "index of another": lambda place: (place / "index.json").write_text('{"images": 3}'),
    "no index": lambda place: (place / "index.json").write_text("{"),
    "no images": lambda place: (place / "images.bin").unlink(),
}


def _flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("small", [0, 2**28])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, small, files, store, monkeypatch):
    monkeypatch.setattr(module, "SMALL", small)
    read_files(files, Reading(), cache=store)
    DAMAGE[name](key(store))
    with pytest.raises(UserError, match=r"damaged; delete|cut short|cannot read") as caught:
        read_files(files, Reading(), cache=store)[0][[0, 11]]
    assert str(key(store)) in str(caught.value)
    shutil.rmtree(key(store))
    assert len(read_files(files, Reading(), cache=store)[0][:]) == COUNT


@pytest.mark.parametrize("how", ["known before", "while it is written"])
def test_a_full_disk_leaves_nothing(how, files, store, monkeypatch):
    if how == "known before":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=10))
    else:
        monkeypatch.setattr(module.os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(UserError, match=r"cannot fill the cache .*make room or name another `cache`"):
        read_files(files, Reading(), cache=store)
    assert not [path for path in store.iterdir() if path.is_dir()]


def test_an_unreadable_file_leaves_no_half_cache(files, store):
    files[30].write_bytes(files[30].read_bytes()[:70])  # the header is whole
    with pytest.raises(UserError, match=r"cannot read the image .*30.png"):
        read_files(files, Reading(), cache=store)
    assert not [path for path in store.iterdir() if path.is_dir()]


def test_a_folder_that_cannot_be_one(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`cache` .*file cannot be a folder"):
        read_files(files, Reading(), cache=tmp_path / "file")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(30, 6, 5), (30, 6, 5, 3), (30, 3, 17, 18)])
def test_a_compressed_array_is_unpacked(dtype, shape, store, tmp_path, monkeypatch):
    for place in (arrays, module):
        monkeypatch.setattr(place, "SMALL", 0)
    images = pixels(*shape).astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", train_images=images, train_labels=np.arange(30) % 3)
    for _ in range(2):
        part = arrays.Stored(tmp_path / "a.npz", str(store)).part("train_images", "train_labels")
        assert part.images.path.is_relative_to(store)
        wanted = images[:, None] if len(shape) == 3 else images.transpose(0, 3, 1, 2) if shape[3] == 3 else images
        assert np.array_equal(part.images[:].numpy(), wanted.astype(np.uint8 if dtype == np.uint8 else np.float32))
