"""``analysis.adaptation`` as a user runs it, and the other prevalence that it makes."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import here, refused

from analysis.adaptation import MARKERS, SKEW, main, skewed, table
from inference.spoil import CORRUPTIONS
from pyro_isingvit.data.split import Split


@pytest.fixture(autouse=True)
def quiet(caplog) -> None:
    caplog.set_level(logging.CRITICAL)


def test_two_runs_and_a_page(digits_run: Path, tmp_path: Path, capsys) -> None:
    runs = [shutil.copytree(digits_run, tmp_path / name) for name in ("first", "second")]
    page = tmp_path / "page.md"
    page.write_text("\n".join(("before", *MARKERS, "after")))
    main(["--run", *map(str, runs), "--out", str(tmp_path / "o"), "--samples", "2", "--max-images", "30",
          "--severities", "5", "--device", "cpu", "--page", str(page)])  # fmt: skip
    found = json.loads((tmp_path / "o" / "adaptation" / "results.json").read_text(), parse_constant=pytest.fail)
    records, kinds = found["records"], list(found["adaptations"])
    assert kinds[0] == "none" and len(kinds) == 7
    assert len(records) == 2 * 7 * (2 + len(CORRUPTIONS))
    first, second = ([r | {"run": ""} for r in records if r["run"] == name] for name in ("first", "second"))
    assert first == second  # a copy of the same run, and every cell starts from it
    text = page.read_text()
    assert text.startswith("before") and text.rstrip().endswith("after")
    assert text.count("| all corrupted | ") == 7 and "prevalence, 1 to 10" in text and "± 0.000" in text
    refused(here("analysis.adaptation", "--run", runs[0], "--samples", 0), "--samples")
    refused(here("analysis.adaptation", "--run", runs[0], "--lr", -1), "--lr")
    refused(here("analysis.adaptation", "--run", runs[0], "--severities", 6), "severity must be 1 to 5")


def test_the_other_prevalence() -> None:
    labels = torch.arange(1000) % 4
    part = skewed(Split(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), labels), 3)
    counts = sorted(torch.bincount(part.labels).tolist())
    assert counts[-1] == 250 and counts[0] == 250 // SKEW
    assert counts[1] / counts[0] == pytest.approx(counts[2] / counts[1], rel=0.1)


def test_the_table_by_hand() -> None:
    def record(run: str, cell: str, accuracy: float) -> dict[str, object]:
        return {
            "run": run,
            "cell": cell,
            "adaptation": "none",
            "used": None,
            "accuracy": accuracy,
            "nll": 1.0,
            "ece": 0.1,
        }

    records = [record(run, cell, value) for run, cell, value in
               [("a", "clean", 0.9), ("b", "clean", 0.7), ("a", "blur", 0.5), ("a", "noise", 0.3), ("b", "blur", 0.2),
                ("b", "noise", 0.2)]]  # fmt: skip
    rows = {row[0]: row[2] for row in table(records)[1:]}
    assert rows["clean"] == "0.800 ± 0.141" and rows["all corrupted"] == "0.300 ± 0.141"
