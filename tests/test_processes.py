"""Several processes, micro-batches and checkpointed blocks: the run of one process, from torchrun's command line."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_pair
from test_scripts import ROOT, script
from test_training import CONFIG, trainer

from pyro_isingvit.checkpoint import load_checkpoint
from pyro_isingvit.config import METHODS
from pyro_isingvit.errors import UserError
from pyro_isingvit.fused import FusedELBO
from pyro_isingvit.guide import BISECTION_SAMPLE, evenly
from pyro_isingvit.processes import averaged, gathered, is_first, launched, on_first, own_rows, world
from pyro_isingvit.saliency import SALIENCY
from pyro_isingvit.steps import batches, count_steps

# 90 images: two batches of 32, and 26 that 4 parts cannot share out evenly unless 2 are left out.
SMALL = [
    "--dataset", "digits", "--train-size", 90, "--depth", 1, "--width", 8, "--epochs", 4, "--finetune-epochs", 1,
    "--samples", 3, "--val-samples", 2, "--batch-size", 32, "--update-every", 2, "--device", "cpu",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def torchrun(*arguments: object, background: bool = False) -> subprocess.Popen[str]:
    """Two gloo processes of inference.train on the CPU."""
    words = [*TORCHRUN, "-m", "inference.train", *map(str, arguments)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if not background:
        process.texts = process.communicate(timeout=240)  # type: ignore[attr-defined]
    return process


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(folder: Path, other: Path) -> None:
    """The same losses, scores, weights and masks to rounding, and the same random numbers in the end."""
    ours, theirs = history(folder), history(other)
    assert [r["phase"] for r in ours] == ["pilot", "ising", "ising", "ising", "finetune"]
    for record, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "nll", "weight_kl", "mask_kl", "retention", "val_nll", "lr"):
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


def test_two_processes_train_the_run_of_one(single: Path, tmp_path: Path) -> None:
    """Pilot, Ising and frozen phase; two processes with one micro-batch each, validation and evaluation shared out."""
    done = torchrun(*SMALL, "--out", tmp_path / "r")
    out, err = done.texts
    assert done.returncode == 0, err
    assert_alike(tmp_path / "r", single)
    assert out.count("accuracy") == 1 and out.count("run: ") == 1 and err.count("training, ") == 1
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(path.name for path in single.iterdir())


def test_begun_by_two_processes_and_finished_by_one(single: Path, tmp_path: Path) -> None:
    """Killed after an epoch, resumed with another number of processes; and resumed by two when it is finished."""
    process = torchrun(*SMALL, "--epochs", 400, "--out", tmp_path / "r", background=True)
    while not (tmp_path / "r" / "checkpoint.previous.pt").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    kept = len(history(tmp_path / "r"))
    assert "go on with: python -m inference.train --resume" in err and err.count("interrupted in epoch") == 1, err
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    config["train"] |= {"epochs": kept, "finetune_epochs": 1}
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    result = script("inference.train", "--resume", tmp_path / "r")
    assert result.returncode == 0, result.stderr
    assert len(history(tmp_path / "r")) == kept + 1
    (tmp_path / "r" / "metrics.json").unlink()
    again = torchrun("--resume", tmp_path / "r")
    assert again.returncode == 0, again.texts[1]
    assert (tmp_path / "r" / "metrics.json").is_file() and len(history(tmp_path / "r")) == kept + 1


@pytest.mark.parametrize(
    ("wrong", "word"),
    [(["--lr", -1], "lr must be"), (["--batch-size", 33], "multiple of that"), (["--epochs", "x"], "Error parsing")],
)
def test_bad_input_is_one_message(wrong: list, word: str, tmp_path: Path) -> None:
    done = torchrun(*SMALL, *wrong, "--out", tmp_path / "r")
    out, err = done.texts
    assert done.returncode != 0 and not (tmp_path / "r").exists()
    assert (out + err).count(word) == 1, err
    assert "exitcode  : 2" in err and 'File "' not in err.split(word)[0]


@pytest.mark.parametrize("granularity", ["weight", "head"])
@pytest.mark.parametrize(("accumulate", "draws"), [(2, 4), (4, 4), (4, 2), (2, 1)])
def test_micro_batches_leave_the_loss_as_it_is(data, granularity, accumulate, draws) -> None:
    records, weights = [], []
    for pieces in (1, accumulate):
        config = replace(CONFIG, ising=replace(CONFIG.ising, granularity=granularity))
        run = trainer(data, config=config, draws=draws, accumulate=pieces).fit()  # 60 images, batches of 20
        records.append(run.history)
        weights.append(torch.cat([p.flatten() for p in run.guide.loc.values()]))
    for record, expected in zip(*records, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["retention"] == pytest.approx(expected["retention"], rel=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("draws", "parts", "taken"),
    [(4, 1, 4), (4, 2, 4), (4, 4, 4), (2, 4, 2), (4, 3, 3), (1, 2, 1), (8, 6, 6), (4, 6, 3), (7, 2, 6)],
)
def test_parts_of_a_batch_add_up_to_its_loss_and_gradient(draws: int, parts: int, taken: int) -> None:
    """Several draws a part, several parts a draw, and numbers that do not divide one another."""
    model, guide = make_pair()
    elbo, whole = FusedELBO(model, guide, draws), FusedELBO(model, guide, taken)
    x, y = torch.randn(24, 1, 4, 4), torch.arange(24) % 3
    state = torch.get_rng_state()
    expected = whole(x, y)
    after, means = torch.get_rng_state(), list(guide.loc.values())
    total = torch.zeros(())
    for part, (images, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        torch.set_rng_state(state)
        elbo.part = (part, parts)
        assert elbo.own_draws(24 // parts)[0] == taken
        total = total + elbo(images, labels) / parts
        assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    pairs = zip(torch.autograd.grad(total, means), torch.autograd.grad(expected, means), strict=True)
    for grad, wanted in pairs:
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("laplace", "temperature")])
def test_every_method_takes_micro_batches(data, method: str) -> None:
    """The same loss where the noise is the batch's; noise of each image differs between the parts, not between runs."""
    ising, settings = METHODS[method]
    settings = replace(settings, epochs=2, finetune_epochs=0, batch_size=20, draws=1, device="cpu", val_samples=1)
    config = replace(CONFIG, method=method, ising=replace(ising, update_every=2), train=settings)
    whole, parts, again = (trainer(data, config=config, accumulate=n).fit() for n in (1, 2, 2))
    assert repr(parts.history) == repr(again.history)
    alike = [r["loss"] == pytest.approx(s["loss"], rel=1e-4) for r, s in zip(parts.history, whole.history, strict=True)]
    assert all(alike) == (method not in ("dropout", "concrete-dropout", "sparse-vd", "l0"))


@pytest.mark.parametrize("mode", ["learned", "hybrid"])
def test_the_pyro_path_takes_micro_batches(data, mode: str) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, mask_posterior=mode))
    whole, parts = (trainer(data, config=config, accumulate=n).fit().history for n in (1, 4))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_the_last_batch_is_cut_to_a_multiple_of_the_parts(data) -> None:
    for size, parts, lengths in ((16, 1, [16, 16, 16, 12]), (16, 8, [16, 16, 16, 8]), (16, 16, [16, 16, 16])):
        assert [len(y) for _, y in batches(data.train, size, 0, 0, parts)] == lengths
        assert count_steps(60, size, parts) == len(lengths)
    assert count_steps(5, 16, 4) == 1 and len(next(batches(data.train, 100, 0, 0, 8))[1]) == 56
    for settings in ({"accumulate": 0}, {"accumulate": 3}, {"accumulate": 64, "batch_size": 64}):
        with pytest.raises(UserError, match="accumulate"):
            trainer(data, **settings)


# Activation checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
def test_checkpointed_blocks_give_the_same_loss_and_gradients(draws: int) -> None:
    model, guide = make_pair(posterior_scale="learned")
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    found, saved = [], []
    for again in (False, True):
        model.vit.checkpoint_activations = again
        torch.manual_seed(3)
        count = 0

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = FusedELBO(model, guide, draws)(x, y)
        saved.append(count)
        parameters = [p for module in (model, guide) for p in module.parameters()]
        found.append((loss, *torch.autograd.grad(loss, parameters)))
    assert saved[1] < 0.8 * saved[0]
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ising", "dropout", "ensemble"])
def test_checkpointed_training_is_the_same_run(data, method: str) -> None:
    """Noise of the layers is that of the first pass."""
    config = replace(CONFIG, method=method)
    first, second = (trainer(data, config=config, checkpoint_activations=flag).fit() for flag in (False, True))
    assert first.history == second.history


@pytest.mark.parametrize("name", SALIENCY)
def test_every_saliency_is_the_same_with_checkpointing(name: str) -> None:
    model, guide = make_pair()
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4) % 3
    found = []
    for flag in (False, True):
        model.vit.checkpoint_activations = flag
        torch.manual_seed(2)
        found.append(SALIENCY[name](model.vit, dict(guide.loc.items()), x, y))
        assert model.vit.checkpoint_activations is flag
    for kind, value in found[0].items():
        torch.testing.assert_close(found[1][kind], value, rtol=0, atol=0)


# One process ----------------------------------------------------------------------------------------------------


def test_one_process_is_left_alone(monkeypatch) -> None:
    value = torch.randn(3)
    assert world() == 1 and is_first() and averaged(value) is value and own_rows(7) == slice(0, 7)
    assert gathered(value, 3, 0, torch.device("cpu")) is value
    with pytest.raises(UserError, match="full"):
        on_first(lambda: (_ for _ in ()).throw(UserError("full")))
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's own; torchrun sets more
    assert launched() == (1, 1)
    for name, number in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, number)
    assert launched() == (2, 2)


@pytest.mark.parametrize("count", [3, BISECTION_SAMPLE, BISECTION_SAMPLE + 1, 86_292_480, 2**31 - 1])
def test_the_masks_looked_at_exist(count: int) -> None:
    """Of a large network too: single precision rounds the last number up."""
    rows = evenly(count, torch.device("cpu"))
    assert int(rows.min()) == 0 and int(rows.max()) == count - 1
    assert len(rows.unique()) == len(rows) == min(count, BISECTION_SAMPLE)
