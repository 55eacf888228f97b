"""What can be trained: one interface for every method, the Ising posterior and the baselines alike.

The trainer (runs/trainer.py) calls ``phases``, ``begin``, ``before_step``, ``forward``, ``validated`` and ``finish``,
in this order; prediction calls ``draw_networks``; pruning and reports ask ``kept``. A method must define
``parameter_groups``, ``forward``, ``draw_networks`` and ``kept``; the rest has defaults.

Shapes: S samples, B batch, C classes, N data size.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.registry import row
from pyro_isingvit.nets.likelihood import Likelihood
from pyro_isingvit.nets.penalties import Penalties
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.nets.weight_terms import Matrices, trained_matrices

Terms = dict[str, Tensor]  # name -> its share of the loss, nats per image; the loss is their sum
Batches = Iterable[tuple[Tensor, Tensor]]  # x (B, ...), y (B,)
Networks = Callable[[Tensor], Tensor]  # normalised images (B, ...) -> logits (S, B, C)


class Method(nn.Module):
    """A network that can be trained, drawn from and asked what it kept.

    Args:
        config: all settings of the run.
        info: what the images look like.
        num_data: N, training images.

    Attributes:
        info: what the images look like.
        num_data: N.
        penalties: further loss terms that the training settings ask for.
        likelihood: what the labels are taken for in training.
        temperature: T of the predictions, a scalar buffer.
        image_noise: the noise of a step is drawn for each image, not for the batch; equal parts of a batch then need
            different random numbers, otherwise the same.
        weighs_images: training can give each image a weight of its own.
        max_draws: how many different networks prediction can draw; None: any number.
    """

    temperature: Tensor
    image_noise = False
    weighs_images = True
    max_draws: int | None = 1

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__()
        self.config, self.info, self.num_data = config, info, num_data
        features = config.vit.width // (2 if config.vit.head == "mlp" else 1)
        self.penalties = Penalties(config.train, num_data, info.num_classes, info.image_shares, features)
        self.penalties.matrices = self.matrices
        self.likelihood = Likelihood(config.train, info.shares)

    # Training ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Terms:
        """The loss of a batch, in parts.

        Args:
            x: (B, channels, height, width), normalised.
            y: (B,) class numbers, or (B, C) probabilities times the weight of the image.
            rows: (B,) numbers of the images within the training part.

        Returns:
            ``nll`` and whatever else the loss is the sum of, nats per image.
        """
        raise NotImplementedError

    def logged(self, terms: dict[str, float]) -> dict[str, float]:
        """The terms as metrics.jsonl shows them: as they are, unless a method has a better unit for some."""
        return terms

    def check(self, settings: TrainConfig) -> None:
        """Refuses settings of training that this method cannot honour.

        Raises:
            UserError: such a setting.
        """
        name = self.config.method
        need(not settings.compile, f"`compile` is for method ising, not {name}.")
        need(settings.noise == "weights", f"`noise` activations is for method ising, not {name}.")
        need(settings.draws in (None, 1), f"`draws` {settings.draws} is for method ising; {name} has one draw a step.")
        need(settings.engine == "auto", f"`engine` {settings.engine} is for method ising, not {name}.")

    @classmethod
    def leaves_unused(cls, config: RunConfig) -> bool:
        """Whether some phase trains without some of the parameters, which DistributedDataParallel must know."""
        return config.train.frozen_blocks > 0

    def settle(self, rows: Tensor) -> None:
        """Called after the gradients of each step, with the numbers (B,) of all its images."""
        self.penalties.settle(rows)

    def take_part(self, part: int, parts: int) -> None:
        """Called before ``forward`` with one of several equal parts of a step's batch: its number and their count."""
        self.penalties.part = (part, parts)

    def phases(self, settings: TrainConfig) -> list[tuple[str, int]]:
        """(name, epochs) of each phase, in order; an empty phase has 0 epochs."""
        return [("train", settings.epochs), ("finetune", settings.finetune_epochs)]

    def begin(self, phase: str) -> None:
        """Called once, before the first epoch of a phase."""

    def few_updates(self, settings: TrainConfig, steps: int) -> int | None:
        """Updates of masks beside the steps, ``steps`` an epoch, where they are too few; None: they are not."""
        return None

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """Called before each optimiser step.

        Args:
            x: (B, channels, height, width), the whole batch; with ``mix`` regmixup its clean half.
            y: (B,) class numbers, or (B, C) probabilities.
            phase: its name.
            step: of the training, counted from 0.
            progress: share of the phase that is over.
        """

    def validation_draws(self, settings: TrainConfig) -> int:
        """How many networks are drawn for the validation part after each epoch."""
        return settings.val_samples

    @property
    def noise(self) -> float | None:
        """max_keep, the level of the noise of the masks; None where there are none."""
        return None

    def set_noise(self, level: float) -> None:
        """Sets ``noise``, which the search for it does (runs/noise_search.py)."""
        raise NotImplementedError

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """Groups for AdamW."""
        raise NotImplementedError

    def trained_networks(self) -> Sequence[tuple[ViT, nn.ParameterDict]]:
        """Every network that is trained, with its matrices."""
        return []

    def matrices(self) -> Matrices:
        """The weights without noise, of one network, which penalties of weights see."""
        [(vit, weights)] = self.trained_networks()
        return trained_matrices(vit, dict(weights.items()))

    def start_from(self, start: Start) -> None:
        """Begins from a trained network instead of random weights; the heads stay fresh.

        Raises:
            UserError: a network of another shape, or a method that cannot.
        """
        networks = self.trained_networks()
        need(networks, f"method {self.config.method} cannot start from a trained network.")
        for vit, weights in networks:
            start.copy_to(vit, weights)

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters whose average over the last steps predicts (runs/averaging.py), by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def clipped(self) -> list[nn.Module]:
        """Modules whose gradients are clipped, each by its own norm."""
        return [self]

    def finish(self, batches: Batches, held_out: Batches) -> None:
        """Called once after the last epoch.

        Args:
            batches: normalised training images and their labels, in order.
            held_out: likewise of the validation part, by which settings may be chosen; empty where predictions are not
                to be calibrated either (``TrainConfig.calibrate``).
        """

    # What was trained -------------------------------------------------------------------------------------------

    def make_temperature(self) -> None:
        """Registers T of the predictions (predictive/calibration.py), 1 until it is fitted."""
        self.register_buffer("temperature", torch.ones(()))

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Draws networks for prediction.

        Args:
            count: how many.
            first: how many were drawn before: a method with a fixed set of networks continues from there.

        Returns:
            a function from normalised images (B, channels, height, width) to logits (count, B, C) at T = 1.
        """
        raise NotImplementedError

    def kept(self) -> Weights:
        """Probability that each weight is kept, kind -> (layers, out, in); 1 where nothing is selected."""
        raise NotImplementedError

    def deployed(self) -> Sequence[tuple[ViT, Weights]]:
        """Networks that a prediction without sampling would need: shape, and matrices with zeros where pi <= 0.5.

        What one forward pass costs follows from it (pruning/deployed.py). Empty, the default: not known.
        """
        return []

    def num_parameters(self) -> int:
        """Numbers of the trained network, of all networks where there are several, without scales and masks."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def network(self) -> nn.Module:
        """The module whose parameters a prediction reads."""
        return self

    @property
    def posterior(self) -> tuple[IsingViT, IsingGuide] | None:
        """Pyro model and guide, of methods with selection masks."""
        return None

    def state(self) -> dict[str, Any]:
        """Tensors for a checkpoint, by part: ``model`` and ``guide``."""
        return {"model": self.state_dict(), "guide": {}}

    def load_state(self, state: dict[str, Any], strict: bool = True) -> None:
        """Takes what ``state`` gave.

        Args:
            state: the parts.
            strict: every tensor must be there.

        Raises:
            KeyError, RuntimeError: it does not fit.
        """
        self.load_state_dict(state["model"], strict=strict)


def method_class(name: str) -> type[Method]:
    """The class of a method, imported now.

    Raises:
        UserError: unknown name.
    """
    module, _, attribute = row(name).home.partition(":")
    found = getattr(import_module(module), attribute)
    assert issubclass(found, Method), f"{found} is no Method"
    return found
