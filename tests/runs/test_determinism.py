"""The same seed on the same machine gives the same run, bit for bit, for every method."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kills import same, untimed

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.settings import BaselineConfig, DataConfig, RunConfig, ViTConfig
from pyro_isingvit.experiment import train_run
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.predictive.datatree import load_datatree

SIZES = {"train": 40, "val": 12, "test": 12}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    made = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("images") / "x.npz"
    arrays = {f"{part}_images": made.integers(0, 255, (n, 8, 8), dtype=np.uint8) for part, n in SIZES.items()}
    np.savez(path, **arrays, **{f"{part}_labels": np.arange(n) % 3 for part, n in SIZES.items()})
    return f"npz:{path}"


def outcome(images: str, method: str, folder: Path, seed: int) -> tuple[dict, dict]:
    """All saved state and all metrics, without the times."""
    ising, train = METHODS[method].ising, METHODS[method].train
    ising = replace(ising, update_every=2)
    train = replace(
        train, epochs=3, finetune_epochs=int(train.finetune_epochs > 0), batch_size=16, samples=3, val_samples=2,
        device="cpu", seed=seed,
    )  # fmt: skip
    config = RunConfig(
        "small", method, DataConfig(images), ViTConfig(4, 8, 2, 1, 2), ising, train,
        baseline=BaselineConfig(members=2),
    )  # fmt: skip
    metrics = train_run(config, folder, progress=False)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    state = load_checkpoint(folder / "checkpoint.pt")
    return {k: v for k, v in state.items() if k != "seconds"}, untimed(metrics)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_run_twice(images: str, tmp_path: Path, method: str) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    (state, metrics), (again, metrics_again) = (outcome(images, method, tmp_path / name, 7) for name in "ab")
    assert state["epoch"] >= 3 and same(again, state)
    assert repr(metrics_again) == repr(metrics)  # as text: NaN is NaN
    draws, draws_again = (load_datatree(tmp_path / name / "posterior.nc") for name in "ab")
    assert len(draws.children) >= 3 and draws.equals(draws_again)


def test_another_seed_gives_another_run(images: str, tmp_path: Path) -> None:
    states = [outcome(images, "ising", tmp_path / str(seed), seed)[0] for seed in (7, 8)]
    assert not same(*states)
