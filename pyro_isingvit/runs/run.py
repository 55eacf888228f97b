"""A trained network: what ``fit`` returns and a run folder holds.

A folder has config.json, metrics.jsonl (a line per epoch), checkpoint.pt, the one before it, and, once evaluated,
metrics.json and posterior.nc.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.lean import LARGE
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.base import Method, Networks, method_class
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.methods.registry import row
from pyro_isingvit.nets.shape import patch_grid
from pyro_isingvit.nets.vit import Weights
from pyro_isingvit.predictive.calibration import with_shares_of


class Run:
    """A fitted network; ``fit`` and ``load_run`` return the subclass ``TrainedRun``.

    Args:
        config: the settings.
        method: what was trained.
        folder: where the run is kept; None for one that lives in memory alone.
        history: a dictionary per epoch, as in metrics.jsonl.

    Examples:
        >>> from pyro_isingvit import Run, ViTConfig, fit, load_data
        >>> data = load_data("digits", train_size=100)
        >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
        >>> isinstance(run, Run), run.has_masks, len(run.history), run.mask_summary()["masked_weights"]
        (True, True, 2, 976)
    """

    def __init__(
        self, config: RunConfig, method: Method, folder: Path | None = None, history: list[dict[str, Any]] | None = None
    ) -> None:
        self.config, self.method, self.folder = config, method, folder
        self.history = [] if history is None else history

    @property
    def has_masks(self) -> bool:
        """Whether ``model`` and ``guide`` exist: the run is a Pyro model with an Ising guide."""
        return self.method.posterior is not None

    @property
    def model(self) -> IsingViT:
        """The generative model, evaluated with the guide's draws.

        Raises:
            UserError: the method has no masks, or several networks.
        """
        return self._posterior()[0]

    @property
    def guide(self) -> IsingGuide:
        """The posterior.

        Raises:
            UserError: the method has no masks, or several networks.
        """
        return self._posterior()[1]

    def _posterior(self) -> tuple[IsingViT, IsingGuide]:
        if self.method.posterior is None:
            name, method = self.folder or "this run", self.config.method
            lacks = "has several networks" if row(method).networks else "has no masks"
            raise UserError(f"{name} was trained by method {method}, which {lacks}; this needs a run of ising.")
        return self.method.posterior

    def state(self) -> dict[str, Any]:
        """Tensors and history, for a checkpoint."""
        return {**self.method.state(), "history": self.history}

    def load_state(self, state: dict[str, Any], strict: bool = True) -> None:
        """Takes what ``state`` gave; raises KeyError or RuntimeError where it does not fit."""
        self.method.load_state(state, strict)
        self.history[:] = state["history"]

    def to(self, device: str | torch.device) -> "Run":
        """Moves the network; returns the run."""
        self.method.to(device)
        return self

    @property
    def network(self) -> nn.Module:
        """The module whose parameters a prediction reads."""
        return self.method.network

    @property
    def temperature(self) -> torch.Tensor:
        """T of the predictions, a scalar."""
        return self.method.temperature

    @property
    def info(self) -> DataInfo:
        """What the images look like."""
        return self.method.info

    @property
    def class_prior(self) -> tuple[float, ...] | None:
        """Share of each class under which the probabilities are meant, (C,), sum 1.

        That of the training part; equal shares where ``TrainConfig.balance`` made the classes equal (docs/skew.md).
        None where the run does not know the shares: it was trained by version 0.6 or earlier, without their counts.
        """
        return (1 / self.info.num_classes,) * self.info.num_classes if self.balanced else self.info.shares

    @property
    def balanced(self) -> bool:
        """Whether the probabilities are those under equal classes."""
        return self.config.train.balance != "none"

    @property
    def moved_prior(self) -> tuple[float, ...] | None:
        """``class_prior`` where training counted the classes otherwise than by their images, else None.

        ``TrainConfig.balance`` does so, and so do weights of images.
        """
        return self.class_prior if self.balanced or self.info.weighted else None

    def among(self, labels: Tensor, probs: Tensor) -> Tensor:
        """Probabilities (..., C) as they are among images with these labels (n,), where ``moved_prior`` is another."""
        prior = self.moved_prior
        return probs if prior is None else with_shares_of(labels.to(probs.device), probs, prior)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.temperature.device

    @property
    def max_draws(self) -> int | None:
        """How many different networks there are to draw; None: no limit."""
        return self.method.max_draws

    @torch.no_grad()
    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Draws ``count`` networks, after ``first`` others (``Method.draw_networks``)."""
        return self.method.draw_networks(count, first)

    @torch.no_grad()
    def kept(self) -> Weights:
        """Probability that each weight is kept, kind -> (layers, out, in)."""
        return self.method.kept()

    @torch.no_grad()
    def mask_summary(self, threshold: float = 0.5) -> dict[str, float]:
        """retention_mean over all masked weights, pruned_fraction (pi < threshold), masked_weights P."""
        kept = self.kept()
        weights = sum(pi.numel() for pi in kept.values())
        if weights >= LARGE:  # no copy of all of them
            mean = sum(float(pi.sum(dtype=torch.double)) for pi in kept.values()) / weights
            pruned = sum(int((pi < threshold).sum()) for pi in kept.values()) / weights
        else:
            retention = torch.cat([pi.flatten() for pi in kept.values()])
            mean, pruned = float(retention.mean()), float((retention < threshold).float().mean())
        return {"retention_mean": mean, "pruned_fraction": pruned, "masked_weights": weights}

    @torch.no_grad()
    def dropped_layers(self) -> list[tuple[str, int]]:
        """(kind, layer) of every matrix whose masks all but vanish; skip connections carry the signal past them.

        The layers of an ensemble are counted through all its members.
        """
        means = {kind: kept.mean((1, 2)) for kind, kept in self.kept().items()}
        return [(kind, layer) for kind, mean in means.items() for layer, kept in enumerate(mean) if kept < NOTHING]


NOTHING = 0.02  # a layer that keeps less than this share of its weights is as good as dropped


@single_precision()
def build_run(
    config: RunConfig, info: DataInfo, num_data: int, folder: Path | None = None, model: IsingViT | None = None
) -> Run:
    """An untrained run of any method.

    Args:
        config: the settings; ``config.method`` says what is built.
        info: what the images look like.
        num_data: N, training images.
        folder: where it is kept.
        model: for methods with one set of masks: a model to start from.

    Raises:
        UserError: unknown method, settings out of their range, or a model for a method that takes none.
    """
    kind = method_class(config.method)
    if model is None:
        return Run(config, kind(config, info, num_data), folder)
    need(issubclass(kind, IsingMethod), f"`model` is for methods with one set of masks, unlike {config.method}.")
    assert issubclass(kind, IsingMethod)
    return Run(config, kind(config, info, num_data, model), folder)


def blank_run(config: RunConfig, info: DataInfo, num_data: int, folder: Path | None) -> Run:
    """An untrained run that is to take a state; the caller's random numbers go on as if nothing had been drawn.

    Args, and errors: as ``build_run``.
    """
    with torch.random.fork_rng(devices=[]):  # it starts from random weights
        return build_run(config, info, num_data, folder)


def least_numbers(config: RunConfig, info: DataInfo) -> int:
    """Numbers that the network needs at least: a small JSON file must not fill the memory."""
    vit, patch = config.vit, config.vit.patch_size
    rows, columns = patch_grid(info.height, info.width, patch, vit.stride)[0]
    tokens = rows * columns + vit.prefix + vit.registers  # their positions, and the registers themselves
    blocks = vit.depth * (4 + 2 * vit.mlp_ratio) * vit.width
    networks = getattr(config.baseline, row(config.method).networks or "", 1)
    embedding = 0 if vit.stem != "none" else info.channels * patch**2
    return networks * vit.width * (blocks + tokens + embedding)
