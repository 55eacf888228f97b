"""The table of two grids that differ in where their networks start."""

import json

import pandas as pd
import pytest
from helpers import here, refused

from analysis.comparison_tables import SHOWN
from analysis.starts import MARKERS, table
from pyro_isingvit import UserError


def grid(folder, shift, methods=("ising", "dropout"), seeds=(0, 1)):
    folder.mkdir()
    cells = []
    for method in methods:
        for seed in seeds:
            metrics = dict.fromkeys(SHOWN, 0.5) | {
                "accuracy": 0.5 + shift + 0.1 * seed,
                "nll": 1.0 - shift,
                "ece": 0.02,
            }
            cells.append({"dataset": "made", "train_size": 300, "method": method, "seed": seed, "epochs": 3,
                          "run": "x", "status": "done", "metrics": metrics})  # fmt: skip
    (folder / "results.json").write_text(json.dumps(cells))
    return folder


def test_means_over_the_seeds_that_both_grids_have(tmp_path):
    nothing, started = grid(tmp_path / "a", 0.0), grid(tmp_path / "b", 0.2, methods=("ising",), seeds=(0, 1, 2))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter")
    done = here("analysis.starts", "--nothing", nothing, "--started", started, "--page", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| made")]
    cells = ["made", "300", "`ising`", "0.550 ± 0.071", "0.750 ± 0.071", "1.000 ± 0.000", "0.800 ± 0.000"]
    assert row == f"| {' | '.join([*cells, *['0.020 ± 0.000'] * 2])} |"
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    shown = here("analysis.starts", "--nothing", nothing, "--started", started)
    assert row in shown.stdout


def test_grids_without_a_common_cell(tmp_path):
    nothing, started = grid(tmp_path / "a", 0.0, methods=("l0",)), grid(tmp_path / "b", 0.2)
    refused(here("analysis.starts", "--nothing", nothing, "--started", started), "no cell in common")
    with pytest.raises(UserError, match="no cell in common"):
        keys = ["dataset", "train_size", "method", "seed"]
        table(pd.DataFrame([["a", 1, "x", 0]], columns=keys), pd.DataFrame([["b", 1, "x", 0]], columns=keys))
