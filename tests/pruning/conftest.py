"""A run with unit masks, trained for a moment, that the tests of pruning share; none of them may change it."""

import pytest
import torch
from helpers import INFO, TINY, make_split

from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.experiment import fit
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.runs.run import Run


@pytest.fixture(scope="module")
def trained() -> tuple[Run, ImageData]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = ImageData(make_split(150, generator), make_split(60, generator), make_split(300, generator), INFO)
    ising = IsingConfig(granularity="unit", target_retention=0.5)
    model = IsingViT(TINY, INFO, ising)
    return fit(model, data, epochs=12, batch_size=16, progress=False), data
