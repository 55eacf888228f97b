"""inference.prune as a user runs it: the folder it fills, and what bad input gets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import QUICK_FLAGS, here, refused, script

from pyro_isingvit import compact, fit
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning.export import run_onnx
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.pruning.onnx_predict import predict_onnx


@pytest.fixture(scope="module")
def run(digits_run: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "r"))


@pytest.fixture(scope="module")
def small(run: Path) -> Path:
    out = run.parent / "small"
    result = script("inference.prune", "--run", run, "--out", out, "--keep", 0.6, "--repeats", 1,
                    "--export", "onnx", "torch", "--finetune", 1, "--members", 3, "--int8")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "frontier" in result.stdout and "multiply-accumulates" in result.stdout and "…" not in result.stdout
    return out


def test_the_folder(run: Path, small: Path) -> None:
    metrics = json.loads((small / "metrics.json").read_text())
    assert metrics["kept_fraction"] <= 0.6 and metrics["parameters"] < metrics["dense_parameters"]
    assert metrics["macs_ratio"] == pytest.approx(metrics["dense_macs"] / metrics["macs"]) and metrics["macs_ratio"] > 1
    assert metrics["throughput_ratio"] > 0 and metrics["onnx_difference"] <= 1e-4
    assert metrics["full_accuracy"] == json.loads((run / "metrics.json").read_text())["accuracy"]
    for name in ("safetensors", "bayes", "onnx", "torch"):
        assert metrics[f"bytes_{name}"] > 0
    points = json.loads((small / "frontier.json").read_text())["points"]
    assert len(points) > 3 and {"threshold", "macs", "latency_1", "latency_256", "nll"} <= set(points[0])
    page = (small / "report" / "index.html").read_text()
    assert "Frontier" in page and (small / "report" / "structure.png").is_file()


def test_the_networks_give_the_metrics_written(small: Path) -> None:
    data = load_data("digits", train_size=100, val_fraction=0.1, seed=3)
    metrics = json.loads((small / "metrics.json").read_text())
    model, bayes = CompactViT.from_pretrained(small), CompactViT.from_pretrained(small / "bayes")
    scores = classification_metrics(model.predict(data.test.images)[0], data.test.labels)
    assert scores["nll"] == pytest.approx(metrics["nll"], abs=1e-5)
    scores = classification_metrics(bayes.predict(data.test.images, 5, 3).mean(0), data.test.labels)
    assert scores["nll"] == pytest.approx(metrics["bayes_nll"], abs=1e-5)
    x = model.normalise(data.test.images[:7])
    torch.testing.assert_close(run_onnx(small / "compact.onnx", x), model(x).detach(), atol=1e-4, rtol=0)


def test_deployed_files(small: Path) -> None:
    data = load_data("digits", train_size=100, val_fraction=0.1, seed=3)
    metrics = json.loads((small / "metrics.json").read_text())
    rows = metrics["deploy"]
    files = {"compact.onnx", "members.onnx", "compact.int8.onnx", "members.int8.onnx"}
    assert set(rows) == files | {"5 draws in Python"} and metrics["members_difference"] <= 1e-5
    for name in files:
        row, found = rows[name], predict_onnx(small / name, data.test.images)
        scores = classification_metrics(found.probs, data.test.labels)
        assert row["nll"] == pytest.approx(scores["nll"], abs=1e-5) and 0 <= row["val_ece"] <= 1
        assert row["bytes"] == (small / name).stat().st_size and min(row["latency_1"], row["latency_256"]) > 0
    draws = PredictiveDraws(CompactViT.from_pretrained(small / "bayes").predict(data.test.images, 3, metrics["seed"]))
    found = predict_onnx(small / "members.onnx", data.test.images)
    torch.testing.assert_close(found.probs, draws.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.mutual_information, draws.mutual_information, atol=1e-5, rtol=0)


def test_max_accuracy_drop(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    result = script("inference.prune", "--run", run, "--out", out, "--max-accuracy-drop", 100, "--repeats", 1,
                    "--no-plot")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((out / "frontier.json").read_text())
    assert found["chosen"]["macs"] == min(point["macs"] for point in found["points"])
    assert not (out / "report").exists()


def test_distilled_from_two_runs_on_unlabelled_images(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    result = script("inference.prune", "--run", run, "--out", out, "--macs", 0.6, "--repeats", 1, "--no-plot",
                    "--distil", 1, "--teacher", run, run, "--unlabelled", "digits")  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics["macs"] <= 0.6 * metrics["dense_macs"] and metrics["macs_share"] == 0.6
    assert metrics["distil_epochs"] == 1 and metrics["teachers"] == 2 and metrics["merged"] is True
    points = json.loads((tmp_path / "o" / "frontier.json").read_text())["points"]
    assert all({"accuracy", "nll", "ece"} == set(point["unmerged"]) for point in points)


def test_what_is_there_stays_unless_asked(run: Path, small: Path) -> None:
    before = (small / "compact.safetensors").read_bytes()
    refused(here("inference.prune", "--run", run, "--out", small), "already holds", "--overwrite")
    refused(here("inference.prune", "--run", run, "--out", run), "own folder")
    refused(here("inference.prune", "--run", run, "--out", run.parent), "holds the run")
    assert (small / "compact.safetensors").read_bytes() == before
    words = ["--run", small, "--input", "digits", "--out", small.parent / "p.nc"]
    refused(here("inference.predict", *words), "was cut out of a run", "name the run's own folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--threshold", "1.5"), ("between 0 and 1", "1.5")),
        (("--threshold", "0"), ("between 0 and 1",)),
        (("--keep", "-1"), ("between 0 and 1",)),
        (("--threshold", "0.5", "--keep", "0.2"), ("--threshold and --keep contradict",)),
        (("--keep", "0.2", "--max-accuracy-drop", "1"), ("contradict",)),
        (("--macs", "0.2", "--keep", "0.2"), ("--keep and --macs contradict",)),
        (("--macs", "0.0001"), ("--macs 0.0001 leaves nothing",)),
        (("--keep", "0.00001"), ("nothing is left", "raise --keep")),
        (("--max-accuracy-drop", "-1"), ("percentage points",)),
        (("--threshold", "0.99999"), ("nothing is left", "--threshold")),
        (("--finetune", "-1"), ("--finetune",)),
        (("--repeats", "0"), ("--repeats",)),
        (("--members", "3"), ("--members is for ONNX", "--export onnx")),
        (("--int8",), ("--int8 is for ONNX", "--export onnx")),
        (("--export", "onnx", "--members", "0"), ("--members must lie between", "not 0")),
        (("--export", "onnx", "--members", "501"), ("not 501",)),
        (("--distil", "-1"), ("--distil",)),
        (("--distil", "1", "--finetune", "1"), ("--finetune and --distil contradict",)),
        (("--unlabelled", "digits"), ("--unlabelled", "--distil")),
        (("--teacher", "there"), ("--teacher", "--distil")),
        (("--distil", "1", "--teacher", "nowhere"), ("nowhere", "no run folder")),
        (("--distil", "1", "--unlabelled", "nowhere"), ("nowhere",)),
    ],
)
def test_bad_input(run: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(here("inference.prune", "--run", run, "--out", tmp_path / "o", *arguments), *words)
    assert not (tmp_path / "o").exists()


def test_folders_without_masks(tmp_path: Path) -> None:
    refused(here("inference.prune", "--run", tmp_path / "none", "--out", tmp_path / "o"), "no run folder")
    plain = tmp_path / "plain"
    result = script("inference.train", *QUICK_FLAGS, "--method", "deterministic", "--out", plain)
    assert result.returncode == 0, result.stderr
    refused(here("inference.prune", "--run", plain, "--out", tmp_path / "o"), "no masks")


def test_a_folder_with_other_things_keeps_them(run: Path, tmp_path: Path) -> None:
    for name in ("bayes", "report"):
        (tmp_path / "o" / name).mkdir(parents=True)
        (tmp_path / "o" / name / "mine.txt").write_text("mine")
    words = ["--run", run, "--out", tmp_path / "o", "--repeats", 1, "--no-plot"]
    assert script("inference.prune", *words).returncode == 0
    assert all((tmp_path / "o" / name / "mine.txt").exists() for name in ("bayes", "report"))
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["run_macs"] > 0


def test_what_is_measured_stays_when_a_later_step_fails(run: Path, tmp_path: Path, monkeypatch) -> None:
    from inference import prune

    def fails(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(prune, "_export", fails)
    with pytest.raises(UserError, match="the disk is full"):
        prune.prune(prune.PruneArguments(run, tmp_path / "o", macs=0.6, repeats=1, plot=False))
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["accuracy"] > 0
    assert (tmp_path / "o" / "frontier.json").exists()


def test_the_full_posterior_is_judged_on_the_test_part_whatever_the_run_was_judged_on(
    run: Path, tmp_path: Path
) -> None:
    """A run may have been evaluated on other images, with other draws, before it was kept."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps(metrics | {"accuracy": 0.123, "nll": 9.0}))
    words = ["--run", copy, "--out", tmp_path / "o", "--repeats", 1, "--no-plot"]
    assert script("inference.prune", *words).returncode == 0
    found = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert (found["full_accuracy"], found["full_nll"]) == pytest.approx((metrics["accuracy"], metrics["nll"]), abs=1e-6)


@pytest.mark.parametrize("members", [True, False])
def test_draws_that_are_much_worse_than_the_one_network_are_warned_of(caplog, members: bool) -> None:
    from inference.prune import _compare_forms

    class Says:
        def __init__(self, right: float) -> None:
            self.right = right

        def predict(self, images, samples):
            probs = torch.full((1, 4, 2), 0.5)
            probs[0, :, 0], probs[0, :, 1] = self.right, 1 - self.right
            return probs

    part = Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    with caplog.at_level("WARNING", "pyro_isingvit"):
        _compare_forms(Says(0.9), Says(0.8), part, members)  # both are right
        _compare_forms(Says(0.4), Says(0.6), part, members)
        _compare_forms(Says(0.9), Says(0.2), part.take(np.arange(0)), members)
        assert not caplog.messages
        _compare_forms(Says(0.9), Says(0.2), part, members)
    assert "accuracy 0.000 on the validation part, the one network has 1.000" in caplog.text
    assert ("of which members.onnx is made" in caplog.text) == members


def test_a_run_of_images_in_memory_is_cut_in_python(tmp_path: Path) -> None:
    data = ImageData.from_arrays(np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8), [0, 1] * 30)
    fit("digits", data, epochs=1, progress=False).save(tmp_path / "run")
    refused(here("inference.prune", "--run", tmp_path / "run", "--out", tmp_path / "o"), "in memory", "run.prune(...)")


def test_the_card_says_which_shares_its_probabilities_stand_for(tmp_path: Path) -> None:
    """Equal ones where training made the classes equal; metrics of draws are not those of one network."""
    data = ImageData.from_arrays(np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8), [0, 0, 1] * 20)
    for balance, shares in (("none", "0 0.674, 1 0.326"), ("loss", "0 0.500, 1 0.500")):  # of 43 images: 29 and 14
        small = compact(fit("digits", data, epochs=1, balance=balance, progress=False))
        small.save_pretrained(tmp_path, metrics={"accuracy": 0.5, "samples": 8})
        card = (tmp_path / "README.md").read_text()
        assert f"Shares: {shares}." in card and "Posterior draws" not in card
        again = CompactViT.from_pretrained(tmp_path)
        assert again.config.class_prior == pytest.approx(small.config.class_prior)
    assert json.loads((tmp_path / "metrics.json").read_text())["samples"] == 8
