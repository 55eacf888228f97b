"""A trained model with its posterior: what ``fit`` returns and a run folder holds.

A folder has config.json, metrics.jsonl (a line per epoch), checkpoint.pt, the one before it, and, once evaluated,
metrics.json and posterior.nc.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.split import DataInfo
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.classes import BASELINES
from pyro_isingvit.methods.ensemble import Ensemble
from pyro_isingvit.methods.plain import Baseline
from pyro_isingvit.methods.registry import ISING_METHODS, METHODS
from pyro_isingvit.nets.vit import Weights, stack


class Run:
    """A fitted network.

    Args:
        config: the settings.
        network: an ``IsingViT``, or a ``Baseline``.
        guide: the posterior of an ``IsingViT``; None for a baseline.
        folder: where the run is kept; None for one that lives in memory alone.
        history: a dictionary per epoch, as in metrics.jsonl.
    """

    def __init__(
        self,
        config: RunConfig,
        network: IsingViT | Baseline | Ensemble,
        guide: IsingGuide | None,
        folder: Path | None,
        history: list[dict[str, Any]],
    ) -> None:
        self.config, self.network, self.folder, self.history = config, network, folder, history
        self._guide = guide

    @property
    def has_masks(self) -> bool:
        """Whether ``model`` and ``guide`` exist: the run is a Pyro model with an Ising guide."""
        return self._guide is not None

    @property
    def model(self) -> IsingViT:
        """The generative model, evaluated with the guide's draws.

        Raises:
            UserError: the run is a baseline.
        """
        if not isinstance(self.network, IsingViT):
            raise UserError(self._no_masks())
        return self.network

    @property
    def guide(self) -> IsingGuide:
        """The posterior.

        Raises:
            UserError: the run is a baseline.
        """
        if self._guide is None:
            raise UserError(self._no_masks())
        return self._guide

    def _no_masks(self) -> str:
        name = self.folder or "this run"
        return f"{name} was trained by method {self.config.method}, which has no masks; this needs a run of ising."

    def state(self) -> dict[str, Any]:
        """Tensors and history, for a checkpoint."""
        guide = {} if self._guide is None else self._guide.state_dict()
        return {"model": self.network.state_dict(), "guide": guide, "history": self.history}

    def load_state(self, state: dict[str, Any], strict: bool = True) -> None:
        """Takes what ``state`` gave; raises KeyError or RuntimeError where it does not fit."""
        self.network.load_state_dict(state["model"], strict=strict)
        if self._guide is not None:
            self._guide.load_state_dict(state["guide"])
        self.history[:] = state["history"]

    def to(self, device: str | torch.device) -> "Run":
        """Moves network and guide; returns the run."""
        self.network.to(device)
        if self._guide is not None:
            self._guide.to(device)
        return self

    @property
    def info(self) -> DataInfo:
        """What the images look like."""
        return self.network.info

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.network.temperature.device

    @property
    def max_draws(self) -> int | None:
        """How many different networks there are to draw; None: no limit."""
        return None if isinstance(self.network, IsingViT) else self.network.max_draws

    @torch.no_grad()
    def draw_networks(self, count: int, first: int = 0) -> Callable[[Tensor], Tensor]:
        """Draws ``count`` networks.

        Args:
            count: how many.
            first: how many were drawn before: a method with a fixed set of networks goes on from there.

        Returns:
            a function from normalised images (B, channels, height, width) to logits (count, B, C) at T = 1.
        """
        if not isinstance(self.network, IsingViT):
            return self.network.draw_networks(count, first)
        guide, vit = self.guide, self.network.vit
        weights = stack([guide.draw() for _ in range(count)])
        return lambda x: vit(weights, x).float().view(count, len(x), -1)

    @torch.no_grad()
    def kept(self) -> Weights:
        """Probability that each weight is kept, kind -> (layers, out, in)."""
        if not isinstance(self.network, IsingViT):
            return self.network.kept()
        return {kind: self.guide.weight_retention(kind) for kind in self.guide.kinds}

    @torch.no_grad()
    def mask_summary(self, threshold: float = 0.5) -> dict[str, float]:
        """retention_mean over all masked weights, pruned_fraction (pi < threshold), masked_weights P."""
        retention = torch.cat([kept.flatten() for kept in self.kept().values()])
        return {
            "retention_mean": float(retention.mean()),
            "pruned_fraction": float((retention < threshold).float().mean()),
            "masked_weights": retention.numel(),
        }

    @torch.no_grad()
    def dropped_layers(self) -> list[tuple[str, int]]:
        """(kind, layer) of every matrix whose masks all but vanish; skip connections carry the signal past them."""
        means = {kind: kept.mean((1, 2)) for kind, kept in self.kept().items()}
        return [(kind, layer) for kind, mean in means.items() for layer, kept in enumerate(mean) if kept < NOTHING]


NOTHING = 0.02  # a layer that keeps less than this share of its weights is as good as dropped


def build_run(
    config: RunConfig, info: DataInfo, num_data: int, folder: Path | None = None, model: IsingViT | None = None
) -> Run:
    """An untrained run of any method.

    Args:
        config: the settings; ``config.method`` says what is built.
        info: what the images look like.
        num_data: N, training images.
        folder: where it is kept.
        model: for methods with masks: a model to start from.

    Raises:
        UserError: unknown method, or settings out of their range.
    """
    if config.method in ISING_METHODS:
        ising, guide = build(config, info, num_data, model)
        return Run(config, ising, guide, folder, [])
    if config.method not in BASELINES:
        raise UserError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}.")
    return Run(config, BASELINES[config.method](config, info, num_data), None, folder, [])


def build(
    config: RunConfig, info: DataInfo, num_data: int, model: IsingViT | None = None
) -> tuple[IsingViT, IsingGuide]:
    """A model (fresh unless given) and its guide with fresh weights, tied by N and kappa_weights."""
    model = model or IsingViT(config.vit, info, config.ising)
    guide = IsingGuide(model, num_data)
    model.num_data, model.kappa_weights = num_data, guide.kappa_weights
    return model, guide
