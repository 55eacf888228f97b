"""Images in parts: what they are, which files cannot be read, and how far decoding is ahead."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import INFO, write_npz
from PIL import Image

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data import streamed
from pyro_isingvit.data.decode import Look
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.inputs import load_inputs
from pyro_isingvit.data.streamed import FileStream, SplitStream, open_stream


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """23 grey images of 4x4 pixels in folders that are called like the classes a, b and c."""
    made = np.random.default_rng(0)
    for i in range(23):
        folder = tmp_path / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made.integers(0, 256, (4, 4), np.uint8)).save(folder / f"{i:02d}.png")
    return tmp_path / "images"


def whole(stream: streamed.ImageStream, size: int) -> tuple[torch.Tensor, list[int], list[tuple[str, str]]]:
    parts = list(stream.parts(size, range(-(-len(stream) // size))))
    assert [part.number for part in parts] == list(range(len(parts)))
    rows = torch.cat([part.rows for part in parts]).tolist()
    return torch.cat([part.images for part in parts]), rows, [each for part in parts for each in part.unreadable]


@pytest.mark.parametrize("size", [1, 5, 23, 100])
def test_a_folder_is_what_load_inputs_makes_of_it(images: Path, size: int) -> None:
    stream, split = open_stream(str(images), INFO), load_inputs(str(images), INFO)
    assert isinstance(stream, FileStream)
    pixels, rows, unreadable = whole(stream, size)
    assert torch.equal(pixels, split.images[:]) and rows == list(range(23)) and not unreadable
    assert tuple(map(stream.name, rows)) == split.names
    assert stream.labels is not None and torch.equal(stream.labels, split.labels)


def test_some_parts_alone(images: Path) -> None:
    stream = open_stream(str(images), INFO)
    parts = list(stream.parts(5, [4, 1]))
    assert [part.rows.tolist() for part in parts] == [[20, 21, 22], [5, 6, 7, 8, 9]]
    assert list(stream.parts(5, [])) == []


def test_labels_need_a_class_for_every_folder(images: Path) -> None:
    (images / "c").rename(images / "d")
    assert open_stream(str(images), INFO).labels is None


def test_deep_images(tmp_path: Path) -> None:
    made = np.random.default_rng(0).integers(0, 60_000, (3, 4, 4), np.uint16)
    for i, pixels in enumerate(made):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    info = DataInfo("deep", ("a", "b"), 1, 4, 4, (0.5,), (0.25,), "uint16")
    pixels, _, _ = whole(open_stream(str(tmp_path), info), 2)
    assert pixels.dtype == torch.float32 and np.array_equal(pixels[:, 0].numpy(), made)


def test_files_that_cannot_be_read_are_told_of(images: Path) -> None:
    (images / "a" / "00.png").write_bytes(b"nothing")
    (images / "a" / "06.png").write_bytes((images / "a" / "03.png").read_bytes()[:40])
    os.mkfifo(images / "b" / "pipe.png")
    Image.new("RGB", (4, 4)).save(images / "b" / "colour.png")  # becomes grey
    np.save(images / "c" / "two.npy", np.zeros((2, 4, 40), np.uint8))
    stream = open_stream(str(images), INFO)
    (images / "c" / "02.png").unlink()
    pixels, rows, unreadable = whole(stream, 4)
    assert len(pixels) == len(rows) == 21 and len(stream) == 26
    reasons = dict(unreadable)
    assert list(reasons) == ["a/00.png", "a/06.png", "b/pipe.png", "c/02.png", "c/two.npy"]
    assert "identify" in reasons["a/00.png"] and reasons["b/pipe.png"] == "not a file"
    assert "No such file" in reasons["c/02.png"] and "2 channel(s), 1 are expected" in reasons["c/two.npy"]
    assert {stream.name(row) for row in rows}.isdisjoint(reasons)


def test_the_digest_sees_every_change(images: Path) -> None:
    digests = [open_stream(str(images), INFO).digest]
    assert open_stream(str(images), INFO).digest == digests[0]
    os.utime(images / "a" / "00.png", (1, 1))
    digests.append(open_stream(str(images), INFO).digest)
    (images / "a" / "00.png").rename(images / "a" / "01.png")
    digests.append(open_stream(str(images), INFO).digest)
    (images / "b" / "04.png").unlink()
    digests.append(open_stream(str(images), INFO).digest)
    assert len(set(digests)) == 4


def test_a_table_of_files(images: Path) -> None:
    table = images / "table.csv"
    table.write_text("path,label\nb/01.png,b\na/00.png,a\n")
    stream = open_stream(f"csv:{table}", INFO)
    assert isinstance(stream, FileStream) and [stream.name(0), stream.name(1)] == ["b/01.png", "a/00.png"]
    assert stream.labels is not None and stream.labels.tolist() == [1, 0]
    assert torch.equal(whole(stream, 1)[0], load_inputs(f"csv:{table}", INFO).images[:])
    table.write_text("path\nb/01.png\n")
    assert open_stream(f"csv:{table}", INFO).labels is None


def test_arrays_and_caches(images: Path, tmp_path: Path) -> None:
    info = DataInfo("made", ("0", "1", "2"), 1, 6, 6, (0.5,), (0.25,))
    spec = write_npz(tmp_path / "x.npz")
    stream = open_stream(spec, info)
    assert isinstance(stream, SplitStream) and stream.labels is not None and len(stream) == 9
    assert torch.equal(whole(stream, 4)[0], load_inputs(spec, info).images[:])
    assert open_stream(spec, info).digest == stream.digest
    changed = np.load(tmp_path / "x.npz")["test_images"]
    changed[-1, -1, -1] ^= 1
    assert open_stream(write_npz(tmp_path / "y.npz", test_images=changed), info).digest != stream.digest
    cached = open_stream(str(images), INFO, source=DataConfig(cache=str(tmp_path / "cache")))
    assert isinstance(cached, SplitStream) and torch.equal(
        whole(cached, 9)[0], whole(open_stream(str(images), INFO), 9)[0]
    )


def test_what_is_nowhere(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "none"), f"csv:{tmp_path / 'none'}", "npz:nope.npz"):
        with pytest.raises(UserError):
            open_stream(spec, INFO)
    with pytest.raises(UserError, match="empty folder"):
        open_stream(str(tmp_path), INFO)


def test_one_part_is_decoded_ahead_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, size = 4000, 640
    for i in range(count):
        (tmp_path / f"{i:05d}.png").touch()
    done, lock = [0], threading.Lock()

    def read(*_: object) -> tuple[np.ndarray, Look]:
        with lock:
            done[0] += 1
        return np.zeros((1, 4, 4), np.uint8), Look(1, 4, 4, "uint8")

    monkeypatch.setattr(streamed, "read_told", read)
    stream = open_stream(str(tmp_path), INFO)
    for part in stream.parts(size, range(-(-count // size))):
        taken = (part.number + 1) * size
        ahead, limit = min(count, taken + size), time.monotonic() + 20
        while done[0] < ahead and time.monotonic() < limit:  # the network's turn: decoding goes on
            time.sleep(0.002)
        time.sleep(0.02)
        slack = 2 * 64 * (1 + min(32, 2 * (os.cpu_count() or 1)))
        assert ahead <= done[0] <= taken + size + slack
