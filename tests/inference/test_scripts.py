"""Every script as a user runs it: a small real run from end to end, and what bad input gets."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import QUICK_FLAGS, ROOT, SCRIPTS, here, new_process, refused, script
from kills import untimed

import inference.train
from inference.cli import with_clear_errors
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.runs.folder import read_config

KEYS = {
    "accuracy", "f1_macro", "precision_macro", "recall_macro", "fpr_macro", "nll", "brier", "ece", "retention_mean",
    "pruned_fraction", "masked_weights", "train_seconds", "samples", "seed", "train_size", "dataset", "method",
    "macs", "ms_per_image",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(digits_run: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "r"))


def test_train_fills_the_folder(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    assert metrics["train_size"] == 100 and metrics["seed"] == 3 and metrics["samples"] == 5
    assert metrics["method"] == "ising" and metrics["dataset"] == "digits"
    config = json.loads((run / "config.json").read_text())
    assert config["vit"]["depth"] == 1 and config["vit"]["patch_size"] == 2  # the data set's own preset, overridden
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    tree = load_datatree(run / "posterior.nc")
    assert {"posterior", "posterior_predictive", "observed_data", "constant_data"} <= set(tree.children)


def test_a_run_is_not_overwritten_unless_asked(run: Path) -> None:
    before = (run / "checkpoint.pt").read_bytes()
    refused(script("inference.train", *QUICK_FLAGS, "--out", run), "already holds a run", "--overwrite", "--resume")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_run_that_lost_its_settings_is_not_said_to_resume(run: Path, tmp_path: Path) -> None:
    lost = Path(shutil.copytree(run, tmp_path / "lost"))
    (lost / "config.json").unlink()
    result = script("inference.train", *QUICK_FLAGS, "--out", lost)
    refused(result, "whose config.json is lost", "--overwrite")
    assert "--resume" not in result.stderr


def test_a_reader_that_leaves_ends_a_script_without_a_word() -> None:
    command = f"{sys.executable} -m inference.train --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.startswith("usage") and "Traceback" not in done.stderr, done.stderr


def test_another_pipe_that_breaks_is_not_taken_for_the_reader() -> None:
    def worker_died() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        with_clear_errors(worker_died)


def test_overwrite_with_bad_data_loses_nothing(run: Path) -> None:
    before = (run / "checkpoint.pt").read_bytes()
    result = script("inference.train", *QUICK_FLAGS, "--dataset", "npz:none.npz", "--out", run, "--overwrite")
    refused(result, "none.npz")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_resume_of_a_finished_run_evaluates_again(run: Path) -> None:
    before = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    assert script("inference.train", "--resume", run).returncode == 0
    after = json.loads((run / "metrics.json").read_text())
    assert after["train_seconds"] == before["train_seconds"] and untimed(after) == untimed(before)


def test_report(run: Path) -> None:
    result = script("analysis.report", "--run", run)
    assert result.returncode == 0, result.stderr
    assert (run / "report" / "index.html").is_file() and "index.html" in result.stdout


def test_predict_a_data_set(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.nc"
    result = script(
        "inference.predict", "--run", run, "--input", "digits", "--samples", 4, "--out", out, "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout
    tree = load_datatree(out)
    assert tree["posterior_predictive"]["probs"].shape == (4, 360, 10)
    rows = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    assert len(rows) == 360
    mean = tree["posterior_predictive"]["probs"].values.mean(0)
    top = mean.argmax(-1)
    for i in (0, 100, 359):
        assert rows[i]["class"] == str(top[i])
        assert float(rows[i]["probability"]) == pytest.approx(mean[i, top[i]], abs=1e-5)
        assert float(rows[i]["p05"]) <= float(rows[i]["probability"]) + 0.5
    assert set(rows[0]) == {"file", "class", "probability", "p05", "p95", "entropy", "mutual_information"}
    refused(script("inference.predict", "--run", run, "--input", "digits", "--out", out), "exists", "--overwrite")


def test_predict_folder_and_npz(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / f"<b>{i}.png")
    result = script("inference.predict", "--run", run, "--input", folder, "--samples", 3, "--out", tmp_path / "f.nc")
    assert result.returncode == 0, result.stderr
    names = [row["file"] for row in csv.DictReader((tmp_path / "f.csv").read_text().splitlines())]
    assert [Path(name).name for name in names] == ["<b>0.png", "<b>1.png", "<b>2.png"]
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8))
    result = script(
        "inference.predict", "--run", run, "--input", tmp_path / "x.npz", "--samples", 3, "--out", tmp_path / "n.nc"
    )
    assert result.returncode == 0, result.stderr


def test_bad_predictions_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "p.nc", "--device", "cpu"]
    np.savez(tmp_path / "rgb.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "nan.npz", images=np.full((2, 8, 8), np.nan))
    refused(here("inference.predict", "--run", tmp_path / "none", "--input", "digits", *out), "no run folder")
    refused(here("inference.predict", "--run", tmp_path / "empty", "--input", "digits", *out), "holds no run")
    refused(here("inference.predict", "--run", run, "--input", tmp_path / "empty", *out), "empty")
    refused(here("inference.predict", "--run", run, "--input", tmp_path / "rgb.npz", *out), "rgb.npz")
    refused(here("inference.predict", "--run", run, "--input", tmp_path / "nan.npz", *out), "NaN")
    refused(here("inference.predict", "--run", run, "--input", "digits", *out, "--samples", 0), "at least 1")
    refused(
        here("inference.predict", "--run", run, "--input", "digits", "--out", tmp_path / "p.txt"),
        ".nc, .parquet or .csv",
    )
    assert not (tmp_path / "p.nc").exists()


def test_a_run_cut_short_or_of_another_version_is_refused(run: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(run, tmp_path / name))

    predict = ["--input", "digits", "--out", tmp_path / "p.nc"]
    cut = broken("cut")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (cut / name).unlink()
    refused(here("inference.predict", "--run", cut, *predict), "checkpoint.pt", "missing")
    refused(here("inference.train", "--resume", cut), "checkpoint.pt", "missing")
    half = broken("half")
    content = (half / "checkpoint.pt").read_bytes()
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (half / name).write_bytes(content[: len(content) // 2])
    refused(here("inference.predict", "--run", half, *predict), "checkpoint.pt", "no better")
    old = broken("old")
    (old / "config.json").write_text((run / "config.json").read_text().replace('"format": 1', '"format": 0'))
    refused(here("inference.predict", "--run", old, *predict), "format 0")
    other = broken("other")
    (other / "config.json").write_text((run / "config.json").read_text().replace('"width": 16', '"width": 32'))
    refused(here("inference.predict", "--run", other, *predict), "does not fit")
    no_posterior = broken("no_posterior")
    (no_posterior / "posterior.nc").unlink()
    refused(here("analysis.report", "--run", no_posterior), "posterior.nc")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "nope"], ["nope", "fashion-mnist"]),
        (["--dataset", "mnist", "--data-root", "/nonexistent"], ["/nonexistent", "--download"]),
        (["--patch-size", "9"], ["--patch-size 9", "at most 8"]),
        (["--width", "30"], ["--width 30", "--heads 4"]),
        (["--preset", "nope"], ["paper-28"]),
        (["--epochs", "x"], ["epochs"]),
        (["--lr", "-1"], ["lr"]),
        (["--train-size", "3"], ["3"]),
        (["--val-fraction", "2"], ["--val-fraction"]),
        (["--delta", "1.5"], ["delta"]),
        (["--saliency", "nope"], ["gnb"]),
        (["--granularity", "nope"], ["granularity"]),
        (["--nope"], ["nope"]),
        (["--method", "dropout:a"], ["'a' is no number"]),
        (["--method", "deterministic:2"], ["takes no number"]),
    ],
)
def test_bad_training_arguments_are_refused(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    refused(here("inference.train", *arguments, "--device", "cpu", "--out", tmp_path / "r"), *words)
    assert not (tmp_path / "r").exists()


def test_out_is_required() -> None:
    refused(script("inference.train", "--dataset", "digits"), "--out")


@pytest.mark.parametrize("module", SCRIPTS)
def test_help_in_a_new_process(module: str) -> None:
    result = new_process(module, "--help")
    assert result.returncode == 0 and "--" in result.stdout


@pytest.mark.slow
def test_a_run_in_new_processes(tmp_path: Path) -> None:
    """What the other tests do in forks, as a user does it."""
    run = tmp_path / "r"
    for module, *arguments in (
        ("inference.train", *QUICK_FLAGS, "--out", run), ("analysis.report", "--run", run),
        ("inference.predict", "--run", run, "--input", "digits", "--out", tmp_path / "p.nc"),
        ("inference.prune", "--run", run, "--keep", 0.6, "--repeats", 1, "--no-plot", "--out", tmp_path / "small"),
    ):  # fmt: skip
        result = new_process(module, *arguments)
        assert result.returncode == 0, result.stderr


def test_a_method_takes_its_number_after_a_colon(tmp_path: Path) -> None:
    done = script("inference.train", *QUICK_FLAGS, "--method", "dropout:0.1", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "r")
    assert (config.method, config.baseline.drop_rate, config.train.shrinkage) == ("dropout", 0.1, 3.0)


@pytest.mark.parametrize(("flags", "expected"), [
    ((), (48, 32)), (("--epochs", 5), (3, 2)), (("--epochs=5", "--finetune-epochs=1"), (5, 1)),
    (("--finetune_epochs", 0), (48, 0)),
])  # fmt: skip
def test_epochs_are_those_in_all(flags: tuple, expected: tuple[int, int], tmp_path: Path, monkeypatch) -> None:
    asked: list[RunConfig] = []
    monkeypatch.setattr(inference.train, "_train_and_report", lambda config, *rest, **more: asked.append(config))
    inference.train.main(["--method", "ising-sparse", "--out", str(tmp_path / "r"), *map(str, flags)])
    assert [(config.train.epochs, config.train.finetune_epochs) for config in asked] == [expected]
