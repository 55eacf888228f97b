"""The measurement of wrong labels: its cells, that it resumes, its tables."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import here, refused, script

from analysis.label_noise import MARKERS, Arguments, Cell, make_cells, read_records, to_tables
from inference.spoil import noisy
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.split import ImageData

SMALL = ["--datasets", "digits", "--train-size", 100, "--seeds", 0, "--detect", 0.2, "--detect-epochs", 2, "--train",
         0.4, "--train-epochs", 2, "--methods", "dropout", "--device", "cpu"]  # fmt: skip


def test_the_cells_of_the_issue() -> None:
    cells = [*make_cells(Arguments(Path("out"), seeds=(0,)))]
    assert len(cells) == len(set(cells)) == 2 * (2 + 2 * 2 * 2)
    assert {(cell.share, cell.method) for cell in cells if cell.kind == "detect"} == {(0.05, "ising"), (0.2, "ising")}
    assert {(cell.share, cell.early_learning) for cell in cells if cell.kind == "train"} == {
        (share, weight) for share in (0.2, 0.4) for weight in (0.0, 3.0)
    }


def test_training_and_validation_labels_are_wrong_and_test_labels_are_not(data: ImageData) -> None:
    spoilt, wrong = noisy(data, 0.3, 1)
    assert wrong.sum() == round(0.3 * len(data.train)) + round(0.3 * len(data.val))
    both = np.concatenate(
        [(a.labels != b.labels).numpy() for a, b in ((spoilt.train, data.train), (spoilt.val, data.val))]
    )
    assert (both == wrong).all() and spoilt.test is data.test


def test_it_resumes_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}\n{MARKERS[1]}\nafter\n")
    words = [*SMALL, "--out", tmp_path / "out", "--page", page]
    first = script("analysis.label_noise", *words, "--cells", 1)
    assert first.returncode == 0, first.stderr
    (record,) = read_records(tmp_path / "out" / "results.json")
    assert record["cell"]["kind"] == "detect" and 0 <= record["scores"]["recall"] <= 1
    second = script("analysis.label_noise", *words)
    assert second.returncode == 0 and "3 cells, 2 to do" in second.stderr
    records = read_records(tmp_path / "out" / "results.json")
    assert len(records) == 3 and record in records
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and text.count("| digits | 100 |") == 3
    third = script("analysis.label_noise", *words)
    assert "0 to do" in third.stderr and page.read_text() == text


def test_tables_have_means_over_the_seeds() -> None:
    cells = [Cell("train", "mnist", 2000, 0.4, "ising", 3.0, 40, seed) for seed in (0, 1)]
    records = [
        {"cell": vars(cell), "scores": {"accuracy": 0.8 + 0.1 * cell.seed, "nll": 1.0, "ece": 0.1}} for cell in cells
    ]
    (_, _, line) = to_tables(records).splitlines()
    assert "0.850 ± 0.071" in line and line.endswith("| 40 | 2 |")


def test_bad_input_is_refused(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    for words, told in (
        (["--detect", 1.5], "--detect takes shares"), (["--methods", "nope"], "nope"),
        (["--jobs", 0], "--jobs must be"), (["--cells", 0], "--cells must be"), (["--train-size", 0], "--train-size"),
    ):  # fmt: skip
        refused(here("analysis.label_noise", *out, *words), told)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for text in ("{", "[1]", json.dumps([{"cell": {"kind": "x"}, "scores": {}}])):
        (tmp_path / "out" / "results.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_records(tmp_path / "out" / "results.json")


def test_versions_that_differ_are_told() -> None:
    cell = {"kind": "train", "dataset": "d", "train_size": 10, "share": 0.2, "method": "ising", "early_learning": 0.0,
            "epochs": 2}  # fmt: skip
    scores = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    made = [{"cell": cell | {"seed": seed}, "version": version, "scores": scores}
            for seed, version in enumerate(("0.6.0", "0.6.1", "0.15.0"))]  # fmt: skip
    assert "Measured with versions 0.15, 0.6, each with its own defaults." in to_tables(made)
    assert "Measured with" not in to_tables(made[:2])
