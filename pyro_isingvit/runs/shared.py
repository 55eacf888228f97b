"""A run as others get it: settings as JSON and tensors as safetensors, what predictions need and no more.

The optimiser, the history and what loss terms remember of training images are left out: such a run cannot be resumed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_isingvit.core.checkpoint import write_atomically, write_json
from pyro_isingvit.core.device import checked_device
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.nets.penalties import PENALTIES
from pyro_isingvit.runs.folder import CONFIG, METRICS, SHARED
from pyro_isingvit.runs.run import Run, blank_run, least_numbers
from pyro_isingvit.sharing.folder import README
from pyro_isingvit.sharing.names import shared_config, shared_name

FIGURES = "figures"
PICTURES = f"{FIGURES}/calibration.png", f"{FIGURES}/ood-[0-9]*.png"
FILES = (CONFIG, SHARED, METRICS, README, *PICTURES)  # what a shared run is, as patterns
TYPE = "pyro-isingvit-run"
FORMAT = 1
PARTS = ("model", "guide")
MOST = 2**28  # numbers that loss terms may remember: sizes alone must not fill the memory


def write_shared(run: Run, num_data: int, folder: Path) -> None:
    """Writes config.json and model.safetensors, each whole or not at all; neither names a folder.

    Args:
        run: trained.
        num_data: N, training images.
        folder: where they go.

    Raises:
        UserError: the folder cannot be written to, or settings that config.json cannot hold.
    """
    from safetensors.torch import save

    run.config.check_kept()
    state = {f"{part}.{name}": value for part in PARTS for name, value in run.state()[part].items()}
    state = {name: value for name, value in state.items() if ".penalties." not in name}
    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, x in state.items() if isinstance(x, Tensor)}  # fmt: skip
    info = {name: value for name, value in run.info.to_dict().items() if name != "pool"}  # of files that stay here
    settings = {
        "model_type": TYPE, "format": FORMAT, "run": json.loads(shared_config(run.config).to_json()),
        "info": info | {"dataset": shared_name(info["dataset"])}, "num_data": num_data,
        "state": {name: value for name, value in state.items() if name not in tensors},
    }  # fmt: skip
    content = save(tensors, {"format": "pt"})  # in memory first: safetensors reports a full disk as an error of its own
    write_atomically(folder / SHARED, lambda temporary: temporary.write_bytes(content))
    write_json(folder / CONFIG, settings)


def open_shared(folder: Path, device: str | torch.device = "cpu") -> Run:
    """Loads what ``write_shared`` wrote.

    Raises:
        UserError: files are missing, damaged, or do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    where = checked_device(device)
    for name in (CONFIG, SHARED):
        need((folder / name).is_file(), f"{folder} holds no shared run: {name} is missing; share a run into it again.")
    try:
        raw = json.loads((folder / CONFIG).read_text(errors="replace"))
        need(raw["model_type"] == TYPE, f"{CONFIG} describes no run of pyro-isingvit")
        need(raw["format"] == FORMAT, f"{CONFIG} is of format {raw['format']}, this version reads {FORMAT}")
        config = RunConfig.from_json(json.dumps(raw["run"]), folder / CONFIG)
        info, num_data, kept = DataInfo.from_dict(raw["info"]), raw["num_data"], dict(raw["state"])
        tensors = load((folder / SHARED).read_bytes())
        held = sum(x.numel() for x in tensors.values())
        need(least_numbers(config, info) <= held, "the network is larger than what the file holds")
        remembers = any(getattr(config.train, name, 0) for name in PENALTIES)
        need(type(num_data) is int and 1 <= num_data < 2**53, "num_data is no number of images")
        need(not remembers or num_data * info.num_classes < MOST, "num_data is too large")
        by_class = any(kind.class_memory and getattr(config.train, name, 0) for name, kind in PENALTIES.items())
        need(not by_class or info.num_classes**2 * config.vit.width < MOST, "there are too many classes")
        run = blank_run(config, info, num_data, folder)
        given, own = {**kept, **tensors}, run.state()
        state: dict[str, Any] = {"history": []}
        for part in PARTS:
            fresh = {name: x for name, x in own[part].items() if ".penalties." in f"{part}.{name}"}
            state[part] = fresh | {
                name.removeprefix(f"{part}."): x for name, x in given.items() if name.startswith(f"{part}.")
            }
        run.load_state(state)
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError,
            ZeroDivisionError, RecursionError) as error:  # fmt: skip
        told = f"{folder} holds no shared run that can be read ({why(error)[:160]}); fetch it again, or share it again."
        raise UserError(told) from error
    return run.to(where)
