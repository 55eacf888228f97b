"""Every regulariser, trained one after another by one or several processes; what came of it, as JSON.

main([method, file])        under the variables of torchrun, or without
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import CONFIG, INFO, make_split, trainer

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.processes import on_first, part_ways
from pyro_isingvit.core.regularise import REGULARISERS, regularised
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.split import ImageData


def config_of(name: str, method: str = "ising", **train: Any) -> RunConfig:
    """A tiny run with one regulariser at its usual strength."""
    settings = regularised(replace(CONFIG.train, epochs=4, calibrate=False, **train), [name])
    return replace(CONFIG, method=method, train=settings)


def trained(method: str) -> dict[str, Any]:
    """Name -> the history of its run, or why it was refused."""
    generator = torch.Generator().manual_seed(0)
    data = ImageData(make_split(60, generator), make_split(15, generator), make_split(30, generator), INFO)
    found: dict[str, Any] = {}
    for name in REGULARISERS:
        try:
            found[name] = trainer(data, config=config_of(name, method)).fit().history
        except UserError as error:
            found[name] = str(error)
    return found


def main(words: list[str]) -> None:
    """Trains, and writes the file on the first process."""
    method, file = words
    found = trained(method)
    on_first(lambda: Path(file).write_text(json.dumps(found)))
    part_ways()
