"""Every line of the tutorial runs, in order, and prints what the page shows, up to its numbers."""

import os
import re
from pathlib import Path

import pytest
from forks import Started
from helpers import ROOT

from analysis.tutorial import BLOCK, FIGURE, command, figures, filled

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
NUMBER = re.compile(r"-?\d[\d,.]*(?:e[+-]?\d+)?")
SHORT = {"epochs=60": "epochs=8"}


def run(page: str, folder: Path) -> str:
    """The page with its outputs, run in a process of its own whose current folder is ``folder``."""

    def everything() -> None:
        import matplotlib

        matplotlib.use("Agg")
        os.chdir(folder)
        text = filled(page, command)
        (folder / "page.md").write_text(text)
        assert {path.stat().st_size > 1000 for path in figures(text, folder).values()} == {True}

    result = Started(everything, ["tutorial"]).wait()
    assert result.returncode == 0, result.stderr
    return (folder / "page.md").read_text()


def outputs(page: str) -> list[str]:
    return [block[3] or "" for block in BLOCK.finditer(page)]


def test_every_step_runs(tmp_path: Path) -> None:
    page = PAGE
    for long, short in SHORT.items():
        assert long in page
        page = page.replace(long, short)
    made = run(page, tmp_path)
    assert [bool(text) for text in outputs(made)] == [bool(text) for text in outputs(PAGE)]
    assert (tmp_path / "runs" / "digits" / "report" / "index.html").is_file()
    assert (tmp_path / "runs" / "digits-small" / "compact.onnx").is_file()
    assert (tmp_path / "runs" / "threes.csv").is_file()


@pytest.mark.slow
def test_it_prints_what_the_page_shows(tmp_path: Path) -> None:
    made = run(PAGE, tmp_path)
    accuracy = [float(re.search(r"^accuracy +(0\.\d+)", page, re.M)[1]) for page in (made, PAGE)]
    assert min(accuracy) > 0.94 and abs(accuracy[0] - accuracy[1]) < 0.03
    for ours, theirs in zip(outputs(made), outputs(PAGE), strict=True):
        words = [re.sub(r"[\s─━┬┴┐┌└┘│]+", " ", NUMBER.sub("#", text)) for text in (ours, theirs)]
        if "mean      sd" not in theirs and "a 7, called" not in theirs and "runs/digits on" not in theirs:
            assert words[0] == words[1]


def test_its_figures_are_there() -> None:
    assert len(FIGURE.findall(PAGE)) >= 4
    for shown, _ in FIGURE.findall(PAGE):
        assert (ROOT / "docs" / shown).stat().st_size < 200_000
