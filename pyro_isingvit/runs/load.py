"""A run folder opened again."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.device import checked_device
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.runs.folder import CHECKPOINT, CONFIG, is_shared, read_config
from pyro_isingvit.runs.run import Run, blank_run, least_numbers
from pyro_isingvit.runs.shared import open_shared

log = logging.getLogger(__name__)


def open_run(folder: str | Path, device: str | torch.device = "cpu") -> Run:
    """Loads a run's folder, or a shared run's.

    Args:
        folder: where the run was kept.
        device: where to put it.

    Raises:
        UserError: the folder is missing, cut short, damaged or of another version.
    """
    folder = Path(folder)
    where = checked_device(device)
    if is_shared(folder):
        return open_shared(folder, device)
    config = read_config(folder)
    state = load_checkpoint(folder / CHECKPOINT)
    info = _info(folder, state)
    try:
        need(least_numbers(config, info) <= _held(state), "the network is larger than what the file holds")
        run = blank_run(config, info, state["num_data"], folder)
        run.load_state(state)
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise _misfit(folder, error) from error
    if not state.get("finished", True):
        log.warning(
            "the training of %s is not finished: masks, noise and temperature are not what they will be", folder
        )
    return run.to(where)


def read_info(folder: Path) -> DataInfo:
    """What a run's images look like, and how they are normalised.

    Args:
        folder: where the run was kept.

    Raises:
        UserError: there is no readable checkpoint.
    """
    return _info(folder, load_checkpoint(folder / CHECKPOINT))


def _info(folder: Path, state: dict[str, Any]) -> DataInfo:
    try:
        return DataInfo.from_dict(state["info"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _misfit(folder, error) from error


def _misfit(folder: Path, error: Exception) -> UserError:
    reason = why(error)[:160]
    return UserError(f"{folder / CHECKPOINT} does not fit {CONFIG} ({reason}); train the run again.")


def _held(state: dict[str, Any]) -> int:
    """Numbers that a checkpoint really holds: a tensor may be a single one, repeated by its strides."""
    tensors = [x for part in ("model", "guide") for x in state[part].values() if isinstance(x, Tensor)]
    return sum(x.untyped_storage().nbytes() // x.element_size() for x in tensors)
