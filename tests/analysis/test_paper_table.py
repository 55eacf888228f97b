"""The table of the paper's data sizes."""

import json

import pandas as pd
import pytest
from helpers import here, refused

from analysis.comparison_tables import SHOWN
from analysis.paper_table import ARCHIVED, MARKERS, SIZES, table
from pyro_isingvit import UserError


def grid(folder, cells):
    folder.mkdir()
    same = {"epochs": 3, "run": "x", "status": "done"}
    rows = [
        {**dict(zip(("dataset", "train_size", "method", "seed"), cell[:4], strict=True)), **same,
         "metrics": dict.fromkeys(SHOWN, 0.5) | {"accuracy": cell[4]}}
        for cell in cells
    ]  # fmt: skip
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def test_measured_rows_stand_above_the_archived_ones(tmp_path):
    cells = [("mnist", 300, "ising", 0, 0.80), ("mnist", 300, "ising", 1, 0.82), ("mnist", 301, "ising", 0, 0.1),
             ("cifar10-jpeg", 5000, "ising-paper", 0, 0.4567), ("cifar100", 250, "ising", 0, 0.1)]  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}\n{MARKERS[1]}\nafter")
    done = here("analysis.paper_table", "--results", grid(tmp_path / "grid", cells), "--page", page)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert "mnist 300 | mnist 6,000" in head and head.endswith("cifar10 15,000 |")
    assert rows[0] == "| `ising` | 81.0 ± 1.4 |" + " - |" * 8
    assert rows[1] == "| `ising-paper` |" + " - |" * 7 + " 45.7 | - |"
    assert rows[2].startswith("| archived: Ising 0.1 | 46.6 | 91.1 | 95.5 |") and len(rows) == 2 + len(ARCHIVED)


def test_every_archived_row_has_every_size():
    assert all(len(values) == sum(map(len, SIZES.values())) for values in ARCHIVED.values())


def test_a_grid_of_other_sizes(tmp_path):
    refused(here("analysis.paper_table", "--results", grid(tmp_path / "a", [("mnist", 17, "ising", 0, 0.8)])),
            "no cell at the paper's data sets and sizes")  # fmt: skip
    with pytest.raises(UserError, match="no cell at"):
        table(pd.DataFrame([["svhn", 300, "ising", 0.8]], columns=["dataset", "train_size", "method", "accuracy"]))
