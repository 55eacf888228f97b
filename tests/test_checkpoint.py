"""Files are whole or absent, and nothing in them is run."""

import pickle

import pytest
import torch

from pyro_isingvit.checkpoint import load_checkpoint, save_checkpoint, write_atomically, write_text
from pyro_isingvit.errors import UserError


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
