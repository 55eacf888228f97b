"""inference.predict --adapt: other predictions, the same run, and what it is refused with."""

import json
from pathlib import Path

import pytest
from helpers import here, refused

from pyro_isingvit.predictive.datatree import load_datatree


def test_adapted_predictions(digits_run: Path, tmp_path: Path) -> None:
    before = (digits_run / "checkpoint.pt").read_bytes()
    words = ["--run", digits_run, "--input", "digits", "--samples", 3, "--device", "cpu"]
    plain = here("inference.predict", *words, "--out", tmp_path / "plain.nc")
    result = here("inference.predict", *words, "--adapt", "tent", "--adapt-crowd", "--out", tmp_path / "a.nc")
    assert plain.returncode == result.returncode == 0, result.stderr
    assert "images adapted to" in result.stdout and "images adapted to" not in plain.stdout
    tree = load_datatree(tmp_path / "a.nc")
    how = json.loads(tree.attrs["adaptation"])
    assert how["kind"] == "tent" and how["crowd"] is True
    assert (tmp_path / "a.csv").read_text() != (tmp_path / "plain.csv").read_text()
    assert (digits_run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--adapt-crowd"], "--adapt"), (["--adapt", "tent", "--coverage", "0.9"], "--coverage"),
        (["--adapt", "tent", "--prevalence", "estimate"], "--prevalence"), (["--adapt", "nope"], "--adapt"),
        (["--adapt", "tent", "--out", "x.csv"], "--adapt"),
    ],
)  # fmt: skip
def test_what_cannot_be(digits_run: Path, tmp_path: Path, words: list[str], told: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(here("inference.predict", "--run", digits_run, "--input", "digits", *words), told)
    assert not list(tmp_path.iterdir())
