"""Small networks and data that the tests share."""

from pathlib import Path

import pytest
import torch
from helpers import INFO, TINY, make_split

from pyro_isingvit.core.checkpoint import save_checkpoint
from pyro_isingvit.core.settings import DataConfig, RunConfig, TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.runs.run import build_run


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(make_split(60, generator), make_split(15, generator), make_split(30, generator), INFO)


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
