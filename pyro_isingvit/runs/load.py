"""A run folder opened again."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.registry import row
from pyro_isingvit.runs.folder import CHECKPOINT, CONFIG, read_config
from pyro_isingvit.runs.run import Run, build_run


def open_run(folder: str | Path, device: str = "cpu") -> Run:
    """Loads a run folder.

    Args:
        folder: where the run was kept.
        device: where to put it.

    Raises:
        UserError: the folder is missing, cut short, damaged or of another version.
    """
    folder = Path(folder)
    config = read_config(folder)
    state = load_checkpoint(folder / CHECKPOINT)
    try:
        info = DataInfo.from_dict(state["info"])
        need(_numbers(config, info) <= _held(state), "the network is larger than what the file holds")
        run = build_run(config, info, state["num_data"], folder)
        run.load_state(state)
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        reason = why(error)[:160]
        raise UserError(f"{folder / CHECKPOINT} does not fit {CONFIG} ({reason}); train the run again.") from error
    return run.to(device)


def _numbers(config: RunConfig, info: DataInfo) -> int:
    """Numbers that the network needs at least: a small JSON file must not fill the memory."""
    vit, patch = config.vit, config.vit.patch_size
    tokens = -(-info.height // patch) * -(-info.width // patch)
    blocks = vit.depth * (4 + 2 * vit.mlp_ratio) * vit.width
    networks = getattr(config.baseline, row(config.method).networks or "", 1)
    return networks * vit.width * (blocks + tokens + info.channels * patch**2)


def _held(state: dict[str, Any]) -> int:
    """Numbers that a checkpoint really holds: a tensor may be a single one, repeated by its strides."""
    tensors = [x for part in ("model", "guide") for x in state[part].values() if isinstance(x, Tensor)]
    return sum(x.untyped_storage().nbytes() // x.element_size() for x in tensors)
