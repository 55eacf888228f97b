"""docs/data.md keeps its word: its commands run, on tables, patients and deep images."""

import re
import shlex

import numpy as np
import pytest
import tifffile
from forks import ROOT
from helpers import here
from PIL import Image

from pyro_isingvit import load_run
from pyro_isingvit.data.table import COLUMNS

PAGE = (ROOT / "docs" / "data.md").read_text()
COMMANDS = [line for line in PAGE.splitlines() if line.startswith(".venv/bin/python -m")]
QUICK = ["--epochs", "2", "--samples", "3", "--device", "cpu", "--val-samples", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A study of 16-bit TIFFs with pages, and a folder of photographs of patients."""
    made = np.random.default_rng(0)
    (tmp_path / "study" / "scans").mkdir(parents=True)
    lines = ["file,finding"]
    for i in range(40):
        pages = made.integers(500, 3000, (3, 20 + i % 5, 24), np.uint16)
        tifffile.imwrite(tmp_path / "study" / "scans" / f"{i}.tif", pages, photometric="minisblack")
        lines.append(f"scans/{i}.tif,{'ill' if i % 3 else 'well'}")
        folder = tmp_path / "PATH" / ("round" if i % 2 else "square")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made.integers(0, 256, (30, 26, 3), np.uint8)).save(folder / f"patient{i // 4}_{i}.png")
    (tmp_path / "study" / "table.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_every_command_runs(number, place):
    words = shlex.split(COMMANDS[number])
    result = here(words[2], *words[3:], *QUICK)
    assert result.returncode == 0, result.stderr
    run = load_run(place / words[-1])
    wanted = {"runs/study": (1, "uint16"), "runs/deep": (3, "uint16")}.get(words[-1], (3, "uint8"))
    assert (run.info.channels, run.info.kind) == wanted
    if words[-1] == "runs/deep":
        assert len(run.info.low) == 3 and run.config.data.intensity == "percentile 1 99"


def test_the_table_of_the_page_has_the_known_columns():
    (header,) = re.findall(r"```\n(path,.*)\n", PAGE)
    assert tuple(header.split(",")) == COLUMNS
