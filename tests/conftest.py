"""Small networks and data that the tests share."""

from dataclasses import replace

import pytest
import torch

from pyro_isingvit.core.settings import DataConfig, IsingConfig, RunConfig, TrainConfig, ViTConfig
from pyro_isingvit.data.split import DataInfo, ImageData, Split
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.runs.run import build

TINY = ViTConfig(patch_size=2, width=8, heads=2, depth=2, mlp_ratio=2)
INFO = DataInfo("made", ("a", "b", "c"), 1, 4, 4, (0.5,), (0.25,))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_split(count: int, generator: torch.Generator) -> Split:
    """Images whose brightest quadrant tells the class: learnable within a few epochs."""
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 1, 4, 4), generator=generator)
    for row, label in enumerate(labels.tolist()):
        top, left = divmod(label, 2)
        images[row, 0, 2 * top : 2 * top + 2, 2 * left : 2 * left + 2] += 150
    return Split(images.to(torch.uint8), labels)


@pytest.fixture
def data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(make_split(60, generator), make_split(15, generator), make_split(30, generator), INFO)


def make_pair(num_data: int = 50, vit: ViTConfig = TINY, **ising: object) -> tuple[IsingViT, IsingGuide]:
    """Model and guide in the Ising phase, with retention spread between 0.1 and 0.9."""
    config = RunConfig(
        data=DataConfig(), vit=vit, ising=replace(IsingConfig(), **ising), train=TrainConfig(), preset="custom"
    )
    model, guide = build(config, INFO, num_data)
    guide.phase = "ising"
    for name in guide.layout.sites:
        guide.field(name).uniform_(-2.1, 2.1)
        model.prior_logits(name).uniform_(-2.0, 2.0)
    return model, guide
