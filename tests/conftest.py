"""Small networks and data that the tests share."""

import fcntl
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the networks are small, the workers several

import pytest
import torch
from helpers import INFO, QUICK_FIT, QUICK_FLAGS, TINY, make_split, script

from pyro_isingvit import TrainedRun, fit
from pyro_isingvit.core.checkpoint import save_checkpoint
from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.runs.run import build_run

# The first backward pass starts a thread per device, and export pretends that there are some: a fork after that could
# not train. So the first pass comes before.
torch.ones((), requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(make_split(60, generator), make_split(15, generator), make_split(30, generator), INFO)


@pytest.fixture(scope="module")
def images() -> ImageData:
    """As ``data``, for whatever a whole module trains once."""
    generator = torch.Generator().manual_seed(0)
    return ImageData(make_split(60, generator), make_split(15, generator), make_split(30, generator), INFO)


@pytest.fixture(scope="module")
def shared(images: ImageData) -> TrainedRun:
    """A quick run with masks on units."""
    return fit(TINY, images, granularity="unit", target_retention=0.5, **QUICK_FIT)


@pytest.fixture
def run(shared: TrainedRun) -> TrainedRun:
    """A copy of it that lives in memory alone and is not evaluated."""
    return pickle.loads(pickle.dumps(shared))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder: settings and checkpoint, untrained."""
    config = RunConfig(data=DataConfig("made"), vit=TINY, train=TrainConfig(device="cpu"), preset="custom")
    run = build_run(config, INFO, 50)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    state = {"info": INFO.to_dict(), "num_data": 50, **run.state()}
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", state)
    return tmp_path / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 260 kB: room for some checkpoints of the small network, not for three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=260k", "tmpfs", disk], capture_output=True, check=False
    ).returncode
    if made:
        pytest.skip("no right to mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on the digits with a mask for each unit, trained once for all workers; copy it to change it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "first"
    with (shared / "first.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "metrics.json").exists():
            result = script("inference.train", *QUICK_FLAGS, "--granularity", "unit", "--seed", 3, "--out", folder)
            assert result.returncode == 0, result.stderr
            assert "accuracy" in result.stdout and "analysis.report" in result.stdout
    return folder
