"""analysis.decisions: the promises tried on a run's predictions."""

import json
import shutil
from pathlib import Path

from helpers import here, refused

from analysis.decisions import stored
from pyro_isingvit.predictive.datatree import load_datatree, save_datatree
from pyro_isingvit.predictive.validation import GROUP


def test_it_measures_shifts_sets_and_limits(digits_run: Path, tmp_path: Path) -> None:
    few = ["--shifts", 3, "--images", 300, "--splits", 20, "--calibration", 100, "--max-error", 0.4]
    result = here("analysis.decisions", "--run", digits_run, "--out", tmp_path, "--coverage", 0.8, *few)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    for name in ("middle", "strong"):
        row = found["shifts"][name]
        assert row["accuracy_given"] > row["accuracy_before"] and row["nll_given"] < row["nll_before"]
        assert 0 <= row["interval_coverage"] <= 1 and row["l1_estimated"] > 0
    plain = found["splits"]["sets"]["plain"]
    assert len(plain["every"]) == 20 and abs(plain["mean"] - 0.8) < 0.03 and plain["size"] >= 1
    assert abs(plain["sd"] / plain["sd_expected"] - 1) < 0.6
    assert found["splits"]["limit"]["broken"] <= 0.2 and found["splits"]["calibration"] == 100
    assert (tmp_path / "decisions.png").read_bytes().startswith(b"\x89PNG")
    assert "prediction sets over 20 splits" in result.stdout
    refused(here("analysis.decisions", "--run", digits_run, "--out", tmp_path), "exists", "--overwrite")


def test_what_cannot_be_is_refused(digits_run: Path, tmp_path: Path) -> None:
    run = ["--run", digits_run, "--out", tmp_path / "out"]
    refused(here("analysis.decisions", *run, "--splits", 0), "--splits must be at least 1")
    refused(here("analysis.decisions", *run, "--coverage", 1.2), "--coverage must lie in (0, 1)")
    refused(here("analysis.decisions", *run, "--max-error", 0), "--max-error must lie in (0, 1)")
    refused(here("analysis.decisions", *run, "--shifts", 1, "--images", 20, "--calibration", 360), "--calibration")
    old = Path(shutil.copytree(digits_run, tmp_path / "old"))
    tree = load_datatree(old / "posterior.nc")
    del tree[GROUP]
    save_datatree(tree, old / "posterior.nc")
    refused(here("analysis.decisions", "--run", old), "keeps no predictions for the validation part")
    settings = json.loads((old / "config.json").read_text())
    settings["data"]["val_fraction"] = 0.0
    (old / "config.json").write_text(json.dumps(settings))
    assert len(stored(Path(shutil.copytree(digits_run, tmp_path / "whole")))[2]) > 0
    (tmp_path / "whole" / "config.json").write_text(json.dumps(settings))
    assert len(stored(tmp_path / "whole")[2]) > 0  # it was evaluated with validation images of its own
    refused(here("analysis.decisions", "--run", old), "was trained without a validation part", "train anew")
    assert not (tmp_path / "out").exists()
