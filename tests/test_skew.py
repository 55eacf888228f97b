"""docs/skew.md keeps its word: its example prints what it shows, and its commands run."""

import re
from pathlib import Path

import numpy as np
import pytest
from forks import ROOT
from helpers import here, prints_what_it_shows
from skewed import SHOWN, table

PAGE = (ROOT / "docs" / "skew.md").read_text()
QUICK = ["--epochs", "2", "--samples", "3", "--device", "cpu", "--val-samples", "1", "--depth", "1", "--width", "8"]


def test_the_example_prints_what_is_shown(tmp_path: Path) -> None:
    prints_what_it_shows(PAGE, tmp_path)


def test_its_commands_run(tmp_path: Path, monkeypatch, capsys) -> None:
    """On two classes of 27 and 3 images; the table of the page is made of such runs."""
    monkeypatch.chdir(tmp_path)
    made, labels = np.random.default_rng(0), np.repeat([0, 1], [36, 9])
    images = made.integers(0, 120, (45, 8, 8), dtype=np.uint8) + (30 * labels[:, None, None]).astype(np.uint8)
    np.savez("x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    for line in re.findall(r"^\.venv/bin/python -m (.*)$", PAGE, re.M):
        module, *words = line.replace("npz:FILE", "npz:x.npz").split()
        done = here(module, *words, *(QUICK if module == "inference.train" else []))
        assert done.returncode == 0, done.stderr
        assert "balanced accuracy" in done.stdout.lower() and " to " in done.stdout
    page = (tmp_path / "runs" / "skewed" / "report" / "index.html").read_text()
    assert 'id="ranking"' in page and "Each class" in page
    (tmp_path / "runs" / "skewed").rename(tmp_path / "runs" / "logit-0")
    table([tmp_path / "runs" / "logit-0"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| logit | ") and row.count("±") == len(SHOWN)


@pytest.mark.parametrize("flags", [["--balance", "nope"], ["--confusion", "-1"]])
def test_what_cannot_be_is_refused(flags: list[str], tmp_path: Path) -> None:
    done = here("inference.train", "--dataset", "digits", *flags, "--out", tmp_path / "r")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert flags[0] in done.stderr and not (tmp_path / "r").exists()
