"""The README keeps its word: every command and example in it runs, and what it says of CI and make is so."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from forks import ROOT, Started, new_process, ranks, script
from PIL import Image

README = (ROOT / "README.md").read_text()
USAGE = (ROOT / "docs" / "usage.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README + USAGE, re.S)
SHELL = "\n".join(text for language, text in BLOCKS if not language)
PYTHON = [text for language, text in BLOCKS if language == "python"]
ARGUMENTS = {
    "PATH": "images", "FOLDER": "new", "--epochs 60": "--epochs 2", "runs/mine-small": "small", "runs/mine": "mine",
    "runs/grid": "grid", "runs/benchmark": "benchmark", "predictions.nc": "predictions.nc",
    "predictions.parquet": "predictions.parquet",
}  # fmt: skip
QUICKER = {  # what is added to a command, so that the test is short
    "inference.train": ["--samples", 5, "--depth", 2, "--width", 48], "inference.prune": ["--repeats", 1],
    "analysis.ood": ["--samples", 3], "analysis.corruptions": ["--samples", 2],
    "inference.benchmark": ["--repeats", 3, "--depth", 1, "--no-compiled", "--no-variants", "--no-curves",
                            "--no-memory", "--draws", 2, "--images", 8, "--threads", 1],
    "inference.compare": ["--epochs", 1, "--seeds", 0, "--samples", 2, "--depth", 1],
}  # fmt: skip


COMMANDS = [line.split("#")[0].split() for line in SHELL.splitlines() if "python -m" in line]
SHORTER = {"14": "1", "16": "1", "6000": "100", "data": str(ROOT.parent / "shared" / "data")}


def test_the_example_runs_and_prints_what_is_shown(tmp_path: Path) -> None:
    def example() -> None:
        os.chdir(tmp_path)
        exec(compile(PYTHON[0], "README.md", "exec"), {})

    result = Started(example, ["README.md"]).wait()
    assert result.returncode == 0, result.stderr
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) == 6
    (shown,) = [text for language, text in BLOCKS if language == "text"]
    number = re.compile(r"\d+\.\d+")
    assert number.sub("#", result.stdout) == number.sub("#", shown)  # the same words and shapes
    for ours, theirs in zip(number.findall(result.stdout), number.findall(shown), strict=True):
        assert abs(float(ours) - float(theirs)) < 0.05  # machines differ in the last digits


@pytest.mark.parametrize("run", [script, pytest.param(new_process, marks=pytest.mark.slow)])
def test_commands_on_own_images_run_as_shown(tmp_path: Path, run) -> None:
    generator = np.random.default_rng(0)
    for number, name in enumerate(("round", "square")):
        for folder, count in ((tmp_path / "images" / name, 30), (tmp_path / "new", 2)):
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (20, 24, 3), dtype=np.uint8) + np.uint8(120 * number)
                Image.fromarray(pixels).save(folder / f"{name}{i}.png")
    commands = [words for words in COMMANDS if "fashion-mnist" not in words]
    assert [words[2] for words in commands] == [
        "inference.train", "inference.predict", "analysis.report", "inference.prune", "inference.train",
        "inference.predict", "analysis.ood", "analysis.corruptions", "inference.compare", "inference.benchmark",
        "analysis.benchmark",
    ]  # fmt: skip
    for words in commands:
        line = " ".join(words[3:])
        for written, meant in ARGUMENTS.items():
            line = line.replace(written, str(tmp_path / meant) if not meant.startswith("--") else meant)
        result = run(words[2], *line.split(), *QUICKER.get(words[2], []))
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "small" / "compact.onnx").is_file() and (tmp_path / "grid" / "table.md").is_file()
    assert (tmp_path / "predictions.csv").is_file() and (tmp_path / "mine" / "report" / "index.html").is_file()


@pytest.mark.skipif(
    not (ROOT.parent / "shared" / "data").is_dir(), reason="no copy of Fashion-MNIST beside the checkout"
)
def test_the_line_behind_the_figures_runs(tmp_path: Path) -> None:
    (words,) = [words for words in COMMANDS if "fashion-mnist" in words]
    line = [SHORTER.get(word, word) for word in words[3:] if word != "--download"]  # the files are here
    line[line.index("--out") + 1] = str(tmp_path / "r")
    result = script(words[2], *line)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("run", [ranks, pytest.param(new_process, marks=pytest.mark.slow)])
def test_the_line_for_several_processes_runs(tmp_path: Path, run) -> None:
    (line,) = [line for line in SHELL.splitlines() if "torchrun" in line]
    words = line.replace("runs/two", str(tmp_path / "r")).replace("--epochs 60", "--epochs 1 --train-size 100").split()
    words += ["--samples", "2", "--device", "cpu"]
    assert Path(words[0]).name == "torchrun"
    assert words[1:6] == ["--standalone", "--nproc-per-node", "2", "-m", "inference.train"]
    if run is ranks:
        for process in ranks(2, *words[5:]):
            result = process.wait()
            assert result.returncode == 0, result.stderr
    else:
        result = new_process("torch.distributed.run", *words[1:])
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "r" / "metrics.json").is_file()


MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z-]+):[^=\n]*## \S", MAKEFILE, re.M)  # with a line of help each


def made(*words: str) -> str:
    """What make prints."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # CI runs in make
    done = subprocess.run(["make", *words], cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_targets_of_the_readme_and_of_ci_exist() -> None:
    assert TARGETS == ["help", "lint", "format", "test", "test-all", "test-matrix", "demo", "soak", "fuzz", "clean"]
    (phony,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.M)
    assert phony.split() == TARGETS
    assert set(re.findall(r"^make ([\w-]+)", SHELL, re.M)) <= set(TARGETS)
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make ([\w-]+)", ci, re.M) == ["test-all", "demo"]


def test_make_alone_lists_its_targets() -> None:
    assert [line.split()[:2] for line in made().splitlines()] == [["make", target] for target in TARGETS]


def test_make_clean_leaves_the_runs_alone() -> None:
    commands = made("--dry-run", "clean")
    removed = [word for line in commands.splitlines() if line.startswith("rm") for word in line.split()]
    assert ".venv" in removed and not any(word.startswith(("runs", "./runs", "data")) for word in removed)
    assert "./runs/*" in commands  # the caches inside runs stay too


def test_make_test_is_lint_and_the_quick_tests_and_test_all_everything() -> None:
    quick, full = (made("--dry-run", target) for target in ("test", "test-all"))
    for commands in (quick, full):
        for tool in ("ruff check .", "ruff format --check .", "-m mypy", "-m pytest"):
            assert tool in commands, tool
    assert '-m "not slow"' in quick and "slow" not in full.split("-m pytest")[1]
    assert (ROOT / "tests" / "test_doctests.py").is_file()  # the examples of the docstrings, in both


def test_arviz_example_runs_as_shown(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "runs" / "demo"
    result = script(
        "inference.train", "--dataset", "digits", "--epochs", 2, "--train-size", 100, "--samples", 20, "--out", run
    )
    assert result.returncode == 0, result.stderr
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    (example,) = [block for block in PYTHON if "arviz" in block]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own are not ours to fail on
        exec(compile(example, "README.md", "exec"), {})


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"`([A-Z]+\.(?:md|cff))`", README):
        assert (ROOT / name).is_file(), name
    for page in sorted((ROOT / "docs").glob("*.md")):
        for name in re.findall(r"\]\(([\w./-]+\.(?:md|png))\)", page.read_text()):
            assert (page.parent / name).is_file(), f"{page.name} names {name}"


def test_the_examples_of_the_page_on_extending_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    (tmp_path / "mine.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import mine"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["True", "torch.Size([5, 1, 10])"]
    assert "does not read" not in result.stderr  # the setting of a method of one's own


def test_the_svi_script_of_the_page_on_usage_runs(capsys) -> None:
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", USAGE, re.S) if "SVI(" in block]
    exec(compile(example, "usage.md", "exec"), {})
    found = re.fullmatch(r"accuracy (0\.\d+) with (0\.\d+) of the units kept\n", capsys.readouterr().out)
    assert found and float(found[1]) > 0.75 and 0.5 < float(found[2]) < 0.99


def test_the_readme_is_short() -> None:
    prose = re.sub(r"```.*?```|^\|.*?$|<!--.*?-->", "", README, flags=re.S | re.M)
    assert len(prose.split()) <= 750
