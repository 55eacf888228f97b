"""Files are whole or absent, and nothing in them is run."""

import pickle
import random
import signal

import pytest
import torch

from pyro_isingvit.core.checkpoint import (
    SEAL,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    write_atomically,
    write_text,
)
from pyro_isingvit.core.errors import UserError


def test_round_trip_is_bit_identical(tmp_path) -> None:
    state = {"w": torch.randn(5), "n": 3, "list": [1.5, "x"], "none": None}
    save_checkpoint(tmp_path / "a" / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "a" / "c.pt")
    assert torch.equal(loaded["w"], state["w"]) and loaded["list"] == [1.5, "x"] and loaded["none"] is None


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def fail(temporary) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_a_file_is_written(tmp_path, number: int) -> None:
    """netCDF libraries that are interrupted keep their locks: the next write would wait for ever."""

    def stop(*_) -> None:
        raise KeyboardInterrupt

    def write(temporary) -> None:
        temporary.write_text("first half, ")
        signal.raise_signal(number)
        signal.raise_signal(number)
        temporary.write_text("whole")

    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "f.txt", write)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f.txt", "whole")]


def test_a_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_text(tmp_path / "file" / "x.txt", "")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_damaged_and_malicious_files_are_refused(tmp_path, capsys) -> None:
    good = tmp_path / "good.pt"
    save_checkpoint(good, {"w": torch.randn(500)})
    whole = good.read_bytes()
    cases = {
        "empty.pt": b"",
        "short.pt": whole[: len(whole) // 2],
        "text.pt": b"hello",
        "evil.pt": pickle.dumps(Evil()),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    torch.save({"x": Evil()}, tmp_path / "evil2.pt")
    with pytest.raises(UserError, match="evil2"):
        load_checkpoint(tmp_path / "evil2.pt")
    with pytest.raises(UserError, match="missing"):
        load_checkpoint(tmp_path / "none.pt")
    assert "code ran" not in capsys.readouterr().out


STATE = {"w": torch.arange(300.0), "epoch": 3}


def unsealed(path) -> bytes:
    """What version 0.1.0 wrote: the zip file alone."""
    return path.read_bytes()[: -len(SEAL) - 32]


@pytest.mark.parametrize("sealed", [True, False])
def test_every_flipped_bit_and_every_cut_is_seen(tmp_path, sealed: bool) -> None:
    """Without a seal the zip file's own checksums cover the tensors, not every byte of its directory."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes() if sealed else unsealed(path)
    chance = random.Random(0)
    start = whole.index(STATE["w"].numpy().tobytes())
    for _ in range(150):
        harmed = bytearray(whole)
        place = chance.randrange(len(whole)) if sealed else start + chance.randrange(1200)
        harmed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(harmed)
        with pytest.raises(UserError, match=r"c\.pt cannot be read"):
            load_checkpoint(path)
    for length in (0, 1, 8, 21, 40, len(whole) // 2, len(whole) - 41, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"c\.pt cannot be read"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(path)["w"], STATE["w"])


def test_the_checkpoint_before_is_kept_and_stands_in_for_a_damaged_one(tmp_path, caplog) -> None:
    path, before = tmp_path / "c.pt", tmp_path / "c.previous.pt"
    for epoch in (1, 2, 3):
        save_checkpoint(path, STATE | {"epoch": epoch})
    assert load_checkpoint(path)["epoch"] == 3 and load_checkpoint(before)["epoch"] == 2 and not caplog.text
    path.write_bytes(path.read_bytes()[:-5])
    assert load_checkpoint(path)["epoch"] == 2
    assert f"{path} cannot be read" in caplog.text and "c.previous.pt is used, written after epoch 2" in caplog.text
    assert before.exists()  # reading changes nothing
    assert load_checkpoint(path, repair=True)["epoch"] == 2
    assert [load_checkpoint(file)["epoch"] for file in (path, before)] == [2, 2]  # two good ones again
    save_checkpoint(path, STATE | {"epoch": 4})
    assert [load_checkpoint(file)["epoch"] for file in (path, before)] == [4, 2]
    for file in (path, before):
        file.write_bytes(b"no")
    with pytest.raises(UserError, match=r"c\.pt cannot be read.*no better.*c\.previous\.pt cannot be read"):
        load_checkpoint(path)


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path) -> None:
    for name in (".c.pt.abc123.pt", ".c.pt.x.pt", ".c.previous.pt", "c.pt", ".hidden"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, ["c.pt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.previous.pt", ".hidden", "c.pt"]
