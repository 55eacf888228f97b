"""Two gloo processes on the CPU, started by torchrun: the run of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ROOT, ranks, script

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT

# 90 images: two batches of 32, and 26 that 4 parts cannot share out evenly unless 2 are left out.
SMALL = [
    "--dataset", "digits", "--train-size", 90, "--depth", 1, "--width", 8, "--epochs", 4, "--finetune-epochs", 1,
    "--pilot-fraction", 0.4, "--samples", 3, "--val-samples", 2, "--batch-size", 32, "--update-every", 2,
    "--device", "cpu",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def torchrun(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and messages of two gloo processes of inference.train on the CPU."""
    done = subprocess.run(
        [*TORCHRUN, "-m", "inference.train", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True, check=False, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def two_forks(*arguments: object) -> tuple[int, str, str]:
    """The same without torchrun and ten seconds of imports for each process."""
    done = [process.wait() for process in ranks(2, "inference.train", *arguments)]
    return max(abs(r.returncode) for r in done), "".join(r.stdout for r in done), "".join(r.stderr for r in done)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(folder: Path, other: Path) -> None:
    """The same losses, scores, weights and masks to rounding, and the same random numbers in the end."""
    ours, theirs = history(folder), history(other)
    assert [r["phase"] for r in ours] == ["pilot", "pilot", "ising", "ising", "finetune"]
    for record, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "nll", "weight_kl", "mask_kl", "retention", "val_nll", "max_keep", "lr"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name
    state, wanted = (load_checkpoint(f / "checkpoint.pt") for f in (folder, other))
    for part in ("model", "guide"):
        for name, value in wanted[part].items():
            if isinstance(value, torch.Tensor):
                found = state[part][name]
                if name == "vit.bias.qkv":  # softmax ignores the keys' bias: AdamW makes steps of pure rounding there
                    found, value = (bias[:, [*range(8), *range(16, 24)]] for bias in (found, value))
                torch.testing.assert_close(found, value, rtol=1e-3, atol=2e-4)
    assert torch.equal(state["rng"], wanted["rng"]) and state["step"] == wanted["step"]
    metrics, expected = (json.loads((f / "metrics.json").read_text()) for f in (folder, other))
    assert metrics["nll"] == pytest.approx(expected["nll"], rel=1e-3) and set(metrics) == set(expected)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "r"
    assert script("inference.train", *SMALL, "--out", folder).returncode == 0
    return folder


@pytest.mark.parametrize("start", [two_forks, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_the_run_of_one(single: Path, tmp_path: Path, start) -> None:
    """Pilot, Ising and frozen phase; two processes with one micro-batch each, validation and evaluation shared out."""
    code, out, err = start(*SMALL, "--out", tmp_path / "r")
    assert code == 0, err
    assert_alike(tmp_path / "r", single)
    assert out.count("macro F1") == 1 and out.count("run: ") == 1 and err.count("training, ") == 1
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(path.name for path in single.iterdir())


def test_two_processes_share_out_mixed_images_and_their_tokens(tmp_path: Path) -> None:
    """Crops, mixtures and visible tokens are drawn for the whole batch: the run of one process.

    88 images: the last batch of 24 is shared out in pairs whether there are one or two processes.
    """
    words = [
        *SMALL, "--train-size", 88, "--augment", "crop", "--margin", 1, "--mix", "regmixup", "--label-smoothing", 0.1,
        "--token-masking", 0.5, "--log-barrier", 0.02, "--rate-rule", "uniform",
    ]  # fmt: skip
    assert script("inference.train", *words, "--out", tmp_path / "one").returncode == 0
    code, _, err = two_forks(*words, "--out", tmp_path / "two")
    assert code == 0, err
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_two_processes_mix_the_same_states_and_keep_the_same_units(tmp_path: Path) -> None:
    words = [*SMALL, "--train-size", 88, "--mix", "manifold", "--nested-dropout", 0.5, "--rate-rule", "uniform"]
    assert script("inference.train", *words, "--out", tmp_path / "one").returncode == 0
    code, _, err = two_forks(*words, "--accumulate", 2, "--out", tmp_path / "two")
    assert code == 0, err
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_two_processes_remember_what_both_said_of_their_images(tmp_path: Path) -> None:
    """Early-learning regularisation: the table of all images is that of one process, in micro-batches too."""
    words = [*SMALL, "--train-size", 88, "--early-learning", 2, "--accumulate", 2, "--rate-rule", "uniform"]
    assert script("inference.train", *words, "--out", tmp_path / "one").returncode == 0
    code, _, err = two_forks(*words, "--out", tmp_path / "two")
    assert code == 0, err
    assert_alike(tmp_path / "two", tmp_path / "one")
    assert "penalties.early_learning.targets" in load_checkpoint(tmp_path / "two" / "checkpoint.pt")["model"]


@pytest.mark.parametrize(
    "balance",
    [["sampler", "--confusion", 3], ["loss", "--mix", "mixup", "--label-smoothing", 0.1], ["logit", "--confusion", 3]],
)
def test_two_processes_balance_classes_as_one_does(balance: list[object], tmp_path: Path) -> None:
    """The order of the images, their weights, the classes' shares, and what the confusion of all parts adds up to."""
    made = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    images = made.integers(0, 120, (100, 8, 8), dtype=np.uint8) + (60 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    words = [*SMALL, "--dataset", f"npz:{tmp_path / 'x.npz'}", "--balance", *balance]
    assert script("inference.train", *words, "--out", tmp_path / "one").returncode == 0
    code, _, said = two_forks(*words, "--out", tmp_path / "two")
    assert code == 0, said
    assert_alike(tmp_path / "two", tmp_path / "one")
    if "--confusion" in balance:
        ours, theirs = (history(tmp_path / name)[-1]["confusion"] for name in ("two", "one"))
        assert ours == pytest.approx(theirs, rel=1e-3) and theirs > 0


WEIGHT_TERMS = ["--regularise", "group-lasso-heads:0.01", "gor:0.01", "spectral:0.01", "mhe:0.1"]


@pytest.mark.parametrize("words", [
    WEIGHT_TERMS, ["--method", "hypersparse", "--hypersparse-weight", 0.01, "--weight-decay", 0],
    ["--method", "lobster", "--lobster-weight", 0.01],
])  # fmt: skip
def test_two_processes_penalise_weights_as_one_does(words: list[object], tmp_path: Path) -> None:
    """Each of them sees all weights; LOBSTER the gradient of the whole batch."""
    words = [*SMALL, "--train-size", 88, "--accumulate", 2, "--rate-rule", "uniform", *words]
    assert script("inference.train", *words, "--out", tmp_path / "one").returncode == 0
    code, _, err = two_forks(*words, "--out", tmp_path / "two")
    assert code == 0, err
    if words[-len(WEIGHT_TERMS) :] == WEIGHT_TERMS:
        assert_alike(tmp_path / "two", tmp_path / "one")
    for record, expected in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
        for name in ("loss", "val_nll", "pruned_fraction"):
            assert record[name] == pytest.approx(expected[name], rel=1e-3), name


def test_two_processes_start_from_a_trained_network(tmp_path: Path) -> None:
    """A trunk whose first block is frozen, rates of each layer, and a decay towards the start."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(patch_size=2, width=8, heads=4, depth=2, mlp_ratio=2), 1, 8, 8, classes=2)
    scale = Scale(None, (), (), (0.3,), (0.4,))
    Start.of(vit, vit.initial_weights(), scale, "made").save(tmp_path / "start.safetensors")
    shape = [*SMALL[:4], *SMALL[8:]]  # without depth and width, which the start has
    words = [*shape, "--init", tmp_path / "start.safetensors", "--bayesian-blocks", 1, "--frozen-blocks", 1]
    assert script("inference.train", *words, "--out", tmp_path / "one").returncode == 0
    code, _, said = two_forks(*words, "--out", tmp_path / "two")
    assert code == 0, said
    assert_alike(tmp_path / "two", tmp_path / "one")


def interrupted(folder: Path, start) -> str:
    """Begins a run by two processes and sends SIGTERM once an epoch is kept; returns what they say."""
    words = [*SMALL, "--epochs", 400, "--out", folder]
    if start is torchrun:
        torchruns = subprocess.Popen(
            [*TORCHRUN, "-m", "inference.train", *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    else:
        forks = ranks(2, "inference.train", *words)
    limit = time.monotonic() + 120
    while not (folder / "checkpoint.previous.pt").is_file() and time.monotonic() < limit:
        time.sleep(0.05)
    if start is torchrun:
        torchruns.terminate()
        return torchruns.communicate(timeout=120)[1]
    for process in forks:
        os.kill(process.child, signal.SIGTERM)
    return "".join(process.wait().stderr for process in forks)


@pytest.mark.parametrize("start", [two_forks, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_begun_by_two_processes_and_finished_by_one(tmp_path: Path, start) -> None:
    """Stopped after an epoch, resumed with another number of processes; and resumed by two when it is finished."""
    err = interrupted(tmp_path / "r", start)
    kept = len(history(tmp_path / "r"))
    assert "go on with: python -m inference.train --resume" in err and err.count("interrupted in epoch") == 1, err
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    config["train"] |= {"epochs": kept, "finetune_epochs": 1}
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    result = script("inference.train", "--resume", tmp_path / "r")
    assert result.returncode == 0, result.stderr
    assert len(history(tmp_path / "r")) == kept + 1
    (tmp_path / "r" / "metrics.json").unlink()
    code, _, err = start("--resume", tmp_path / "r")
    assert code == 0, err
    assert (tmp_path / "r" / "metrics.json").is_file() and len(history(tmp_path / "r")) == kept + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "word"),
    [(["--lr", -1], "lr must be"), (["--batch-size", 33], "multiple of 2"), (["--epochs", "x"], "Error parsing")],
)
def test_bad_input_is_one_message(wrong: list, word: str, tmp_path: Path) -> None:
    code, out, err = torchrun(*SMALL, *wrong, "--out", tmp_path / "r")
    assert code != 0 and not (tmp_path / "r").exists()
    assert (out + err).count(word) == 1, err
    assert "exitcode  : 2" in err and 'File "' not in err.split(word)[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_killed_the_other_ends_and_the_run_resumes(victim: int, tmp_path: Path) -> None:
    """SIGKILL, as the kernel sends it where memory is short: resumed by two, the run is that of two undisturbed."""
    words = [*SMALL, "--epochs", 60]
    forks = ranks(2, "inference.train", *words, "--out", tmp_path / "r")
    limit = time.monotonic() + 120
    while not (tmp_path / "r" / "checkpoint.previous.pt").is_file() and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(forks[victim].child, signal.SIGKILL)
    died, other = forks[victim].wait(), forks[1 - victim].wait()
    assert died.returncode == -signal.SIGKILL and other.returncode == 1, other.stderr
    assert "another process of this training was lost" in other.stderr and "Traceback" not in other.stderr
    assert 1 <= len(history(tmp_path / "r")) < 61
    code, _, said = two_forks("--resume", tmp_path / "r")
    assert code == 0, said
    code, _, said = two_forks(*words, "--out", tmp_path / "whole")
    assert code == 0, said
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("r", "whole"))
    for part in ("model", "guide"):
        for name, value in theirs[part].items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, ours[part][name]), name
    assert torch.equal(ours["rng"], theirs["rng"])
