"""inference.branches as a user runs it: the folder it fills, and what bad input gets."""

import json
from pathlib import Path

import pytest
from helpers import here, refused, script

from pyro_isingvit.data.load import load_data
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning.branches import branches
from pyro_isingvit.pruning.network import CompactViT

FLAGS = ["--dataset", "digits", "--epochs", "2", "--finetune-epochs", "0", "--depth", "3", "--width", "16",
         "--samples", "2", "--train-size", "100", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "r"
    done = here("inference.train", *FLAGS, "--method", "deterministic", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_folder(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "less"
    start = ["inference.branches", "--run", run, "--out", out, "--repeats", 1, "--images", 50]
    done = script(*start, "--share", 0.6, "--finetune", 1)
    assert done.returncode == 0, done.stderr
    assert "transfer entropy" in done.stdout and "multiply-accumulates" in done.stdout and "…" not in done.stdout
    model, data = CompactViT.from_pretrained(out), load_data("digits", train_size=100)
    metrics, found = (json.loads((out / name).read_text()) for name in ("metrics.json", "branches.json"))
    assert len(found["order"]) == 2 and [point["removed"] for point in found["validation"]] == [0, 1, 2]
    assert metrics["removed"] == [removal["block"] for removal in found["order"]]
    assert branches(model, "attention") == sorted({0, 1, 2} - {*metrics["removed"]})
    assert branches(model, "mlp") == [0, 1, 2] and metrics["macs"] < metrics["dense_macs"]
    scores = classification_metrics(model.predict(data.test.images)[0], data.test.labels)
    assert scores["nll"] == pytest.approx(metrics["nll"], abs=1e-5)
    assert metrics["dense_accuracy"] == pytest.approx(json.loads((run / "metrics.json").read_text())["accuracy"])
    refused(here(*start), "already holds a compact network", "--overwrite")
    done = here(*start, "--overwrite", "--branch", "mlp", "--share", 0.3, "--merge", "False")
    assert done.returncode == 0, done.stderr
    assert len(branches(CompactViT.from_pretrained(out), "mlp")) == 2


def test_a_run_with_masks_and_one_block(digits_run: Path, tmp_path: Path) -> None:
    done = here("inference.branches", "--run", digits_run, "--out", tmp_path / "o", "--repeats", 1, "--share", 1)
    assert done.returncode == 0, done.stderr
    assert branches(CompactViT.from_pretrained(tmp_path / "o"), "attention") == []
    done = here("inference.branches", "--run", digits_run, "--out", tmp_path / "p")
    refused(done, "of 1 branches is none", "--share")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--share", "0"), ("--share must lie in (0, 1]",)), (("--share", "1.1"), ("--share",)),
        (("--images", "1"), ("--images must be at least 2",)), (("--repeats", "0"), ("--repeats",)),
        (("--finetune", "1", "--distil", "1"), ("contradict",)), (("--distil", "-1"), ("number of epochs",)),
    ],
)  # fmt: skip
def test_what_cannot_be(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    refused(here("inference.branches", "--run", tmp_path / "r", "--out", tmp_path / "o", *arguments), *words)


def test_zeros_of_single_weights_stay_unless_asked(tmp_path: Path) -> None:
    done = here("inference.train", *FLAGS, "--method", "magnitude", "--sparsity", "0.5", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    zeros = []
    for words in ([], ["--merge", "True"]):
        out = tmp_path / f"o{len(words)}"
        done = here("inference.branches", "--run", tmp_path / "r", "--out", out, "--repeats", 1, *words)
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "metrics.json").read_text())["merged"] == bool(words)
        zeros.append(int((CompactViT.from_pretrained(out).blocks[-1].fc2.weight == 0).sum()))
    assert zeros[0] > 0 == zeros[1]


def test_ensembles_are_refused(tmp_path: Path) -> None:
    done = here("inference.train", *FLAGS, "--method", "ensemble", "--members", "2", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    refused(here("inference.branches", "--run", tmp_path / "r", "--out", tmp_path / "o"), "ensemble has 2 networks")
