"""Runs in forks that are killed or get signals, and go on; what came of them, as bits."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from forks import exit_code, fork

from inference.train import main as train_script
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.settings import DataConfig, IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.experiment import train_run
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.runs.folder import holds_run

SIZES = {"train": 48, "val": 12, "test": 12}
ISING = IsingConfig(update_every=2)
HYBRID = replace(ISING, mask_posterior="hybrid", posterior_scale="learned", granularity="unit", empirical_tau_1=True)


def make_config(folder: Path, ising: IsingConfig) -> RunConfig:
    """Seven epochs in three phases on made-up images."""
    if not (folder / "x.npz").exists():
        made = np.random.default_rng(0)
        arrays = {f"{part}_images": made.integers(0, 255, (n, 8, 8), dtype=np.uint8) for part, n in SIZES.items()}
        np.savez(folder / "x.npz", **arrays, **{f"{part}_labels": np.arange(n) % 3 for part, n in SIZES.items()})
    train = replace(
        METHODS["ising"].train,
        epochs=5,
        finetune_epochs=2,
        batch_size=16,
        samples=3,
        val_samples=2,
        device="cpu",
        lr=1e-2,
        draws=2 if ising is ISING else 1,  # masks that are learned take one
    )
    data = DataConfig(dataset=f"npz:{folder / 'x.npz'}")
    return RunConfig("small", "ising", data, ViTConfig(4, 8, 2, 1, 2), ising, train)


def forked(action: Callable[[], object], log: Path) -> int:
    """Runs ``action`` in a fork that prints to a file; returns its process id."""
    with log.open("w") as file:
        return fork(action, file.fileno(), file.fileno())


def die_at_call(count: int, hits: Path) -> None:
    """Kills this process at its ``count``-th call that touches a file: half a write, a flush, a rename."""
    left = count

    def trap(owner: Any, name: str, half: bool) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                with hits.open("a") as file:
                    file.write(f"{name}\n")
                if half:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, name, call)

    trap(Path, "write_bytes", half=True)
    trap(Path, "write_text", half=True)
    trap(os, "fsync", half=False)
    trap(os, "replace", half=False)
    trap(os, "unlink", half=False)


def go_on(config: RunConfig, folder: Path, aim: int, hits: Path) -> None:
    """What a user does after a kill: resume, or start again where no epoch was finished. ``aim``: die at that call."""
    if aim:
        die_at_call(aim, hits)
    resume = any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    assert resume or not holds_run(folder) or not (folder / "metrics.json").exists()
    train_run(config, folder, resume=resume, progress=False)


def same(ours: Any, theirs: Any) -> bool:
    """Bit-identical, containers and tensors."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json holds, without the times: they differ from one call to the next."""
    return {**metrics, "train_seconds": 0.0, "ms_per_image": 0.0}


def differences(folder: Path, whole: Path) -> list[str]:
    """What of a run is not as in the uninterrupted one; times aside."""
    states = [load_checkpoint(path / "checkpoint.pt") for path in (folder, whole)]
    wrong = [key for key in states[1] if key != "seconds" and not same(states[0].get(key), states[1][key])]
    metrics = [untimed(json.loads((path / "metrics.json").read_text())) for path in (folder, whole)]
    texts = [(path / "metrics.jsonl").read_text() for path in (folder, whole)]
    names = [sorted(entry.name for entry in path.iterdir()) for path in (folder, whole)]
    pairs = {"metrics.json": metrics, "metrics.jsonl": texts, "files": names}
    return wrong + [f"{what}: {a} {b}" if what == "files" else what for what, (a, b) in pairs.items() if a != b]


class Reference(NamedTuple):
    """An uninterrupted run."""

    config: RunConfig
    folder: Path
    seconds: float


def uninterrupted(root: Path) -> list[Reference]:
    """One run whose masks follow the likelihood, one whose masks are learned as well."""
    references = []
    for name, ising in (("ising", ISING), ("hybrid", HYBRID)):
        config, folder, start = make_config(root, ising), root / f"{name}-whole", time.monotonic()
        if exit_code(forked(partial(train_run, config, folder, progress=False), root / "log")):
            raise RuntimeError((root / "log").read_text())
        references.append(Reference(config, folder, time.monotonic() - start))
    return references


def killed_chains(root: Path, references: list[Reference], kills: int) -> dict[str, Any]:
    """Runs that are killed again and again until ``kills`` are spent; every other kill is aimed at a file."""
    chance, log = random.Random(0), root / "log"
    report: dict[str, Any] = {"timed": 0, "aimed": 0, "errors": [], "differences": [], "runs": 0, "hits": []}
    while report["timed"] + report["aimed"] < kills or report["runs"] < len(references):
        config, whole, seconds = references[report["runs"] % len(references)]
        folder = root / f"run{report['runs']}"
        for life in range(2 * kills):
            kind = ("timed", "aimed")[life % 2] if report["timed"] + report["aimed"] < kills else ""
            aim = chance.randrange(1, 35) if kind == "aimed" else 0
            child = forked(partial(go_on, config, folder, aim, root / "hits"), log)
            if kind == "timed":
                time.sleep(chance.uniform(0, 0.7 * seconds))
                os.kill(child, signal.SIGKILL)
            code = exit_code(child)
            if code == -signal.SIGKILL:
                report[kind] += 1
                continue
            if code:
                report["errors"].append(log.read_text())
            break
        report["runs"] += 1
        report["differences"] += differences(folder, whole) if not report["errors"] else []
    if (root / "hits").exists():
        report["hits"] = (root / "hits").read_text().split()
    return report


def signalled(root: Path, whole: Reference, number: int, epochs: int) -> dict[str, Any]:
    """``inference.train`` gets a signal once ``epochs`` are on disk, then --resume."""
    folder, log = root / f"signal{number}-{epochs}", root / "log"
    words = {"--dataset": whole.config.data.dataset, "--preset": "small", "--patch-size": 4, "--width": 8, "--heads": 2,
             "--depth": 1, "--epochs": 5, "--finetune-epochs": 2, "--batch-size": 16, "--samples": 3,
             "--val-samples": 2, "--device": "cpu", "--lr": 1e-2, "--draws": 2, "--update-every": 2,
             "--out": folder}  # fmt: skip
    argv = [str(word) for pair in words.items() for word in pair]
    child = forked(partial(train_script, argv), log)
    waits_for = folder / ("metrics.jsonl" if epochs else "config.json")
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if waits_for.exists() and (not epochs or len(waits_for.read_text().splitlines()) >= epochs):
            break
        time.sleep(0.005)
    os.kill(child, number)
    report: dict[str, Any] = {"code": exit_code(child), "text": log.read_text(), "folder": str(folder)}
    again = ["--resume", str(folder)] if epochs else [*argv, "--overwrite"]
    report["again"] = exit_code(forked(partial(train_script, again), log))
    report["differences"] = differences(folder, whole.folder) if report["again"] == 0 else [log.read_text()]
    return report
