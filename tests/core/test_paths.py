"""Paths that are not there are told of, not tripped over."""

from pathlib import Path

import numpy as np
import pytest

from pyro_isingvit import UserError, load_data, load_run
from pyro_isingvit.core.paths import is_dir, is_file, with_home
from pyro_isingvit.data.load import load_unlabelled
from pyro_isingvit.starts import load_start

LONG = ["x" * 300, "a/" * 3000, "~nobody-of-this-name/x"]


def test_what_is_there(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert is_file(tmp_path / "file") and not is_dir(tmp_path / "file")
    assert is_dir(tmp_path) and not is_file(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_home("~/file") == tmp_path / "file" and with_home(Path("a")) == Path("a")


@pytest.mark.parametrize("name", LONG)
def test_names_of_no_file_are_told_of(name: str, tmp_path: Path) -> None:
    assert not is_file(Path(name)) and not is_dir(Path(name))
    for kind in ("imagefolder", "csv", "npz", "npy"):
        with pytest.raises(UserError, match=r"no such (file|folder)"):
            load_data(f"{kind}:{name}")
    for read in (load_start, load_run, load_unlabelled):
        with pytest.raises(UserError):
            read(name)
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.uint8))
    (tmp_path / "table.csv").write_text(f"path,label\na.npy,x\n{name},y\n")
    with pytest.raises(UserError, match="there is no such file"):
        load_data(f"csv:{tmp_path / 'table.csv'}")
