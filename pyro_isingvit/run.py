"""A trained model with its posterior: what ``fit`` returns and a run folder holds.

A folder has config.json, metrics.jsonl (a line per epoch), checkpoint.pt, and, once evaluated, metrics.json and
posterior.nc.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_isingvit.checkpoint import load_checkpoint
from pyro_isingvit.config import RunConfig
from pyro_isingvit.data import DataInfo
from pyro_isingvit.errors import UserError
from pyro_isingvit.guide import IsingGuide
from pyro_isingvit.model import IsingViT

CONFIG, CHECKPOINT, HISTORY, METRICS, POSTERIOR = (
    "config.json", "checkpoint.pt", "metrics.jsonl", "metrics.json", "posterior.nc",
)  # fmt: skip


@dataclass
class Run:
    """A model and its fitted guide.

    Attributes:
        config: the settings.
        model: the generative model, evaluated with the guide's draws.
        guide: the posterior.
        folder: where the run is kept; None for one that lives in memory alone.
        history: a dictionary per epoch, as in metrics.jsonl.
    """

    config: RunConfig
    model: IsingViT
    guide: IsingGuide
    folder: Path | None
    history: list[dict[str, Any]]

    @property
    def info(self) -> DataInfo:
        """What the images look like."""
        return self.model.info

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.vit.position.device

    @torch.no_grad()
    def mask_summary(self, threshold: float = 0.5) -> dict[str, float]:
        """retention_mean over all masked weights, pruned_fraction (pi < threshold), masked_weights P."""
        retention = torch.cat([self.guide.weight_retention(kind).flatten() for kind in self.guide.loc])
        return {
            "retention_mean": float(retention.mean()),
            "pruned_fraction": float((retention < threshold).float().mean()),
            "masked_weights": retention.numel(),
        }

    @torch.no_grad()
    def dropped_layers(self) -> list[tuple[str, int]]:
        """(kind, layer) of every matrix whose masks all but vanish; skip connections carry the signal past them."""
        means = {kind: self.guide.weight_retention(kind).mean((1, 2)) for kind in self.guide.kinds}
        return [(kind, layer) for kind, mean in means.items() for layer, kept in enumerate(mean) if kept < NOTHING]


NOTHING = 0.02  # a layer that keeps less than this share of its weights is as good as dropped


def build(
    config: RunConfig, info: DataInfo, num_data: int, model: IsingViT | None = None
) -> tuple[IsingViT, IsingGuide]:
    """A model (fresh unless given) and its guide with fresh weights, tied by N and kappa_weights."""
    model = model or IsingViT(config.vit, info, config.ising)
    guide = IsingGuide(model, num_data)
    model.num_data, model.kappa_weights = num_data, guide.kappa_weights
    return model, guide


def read_config(folder: Path) -> RunConfig:
    """The settings of a run folder.

    Raises:
        UserError: no such folder, no run in it, or one of another format.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}; --run takes a folder that inference.train wrote.")
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no run: {CONFIG} is missing.")
    return RunConfig.from_json(path.read_text(errors="replace"), path)


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """Loads a run folder.

    Args:
        folder: what ``--out`` of training named.
        device: where to put it.

    Raises:
        UserError: the folder is missing, cut short, damaged or of another version.
    """
    folder = Path(folder)
    config = read_config(folder)
    state = load_checkpoint(folder / CHECKPOINT)
    try:
        model, guide = build(config, DataInfo.from_dict(state["info"]), state["num_data"])
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
        history = list(state["history"])
    except (KeyError, TypeError, RuntimeError) as error:
        line = str(error).splitlines()[0][:160]
        raise UserError(f"{folder / CHECKPOINT} does not fit {CONFIG} ({line}); train the run again.") from error
    return Run(config, model.to(device), guide.to(device), folder, history)
