"""What the trainer minimises, and what it does between the steps: one interface for every method."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pyro_isingvit.core.settings import TrainConfig


class Objective(nn.Module):
    """A loss, ``forward(x, y)`` in nats per image, with phases.

    Shapes: x (B, channels, height, width) normalised, y (B,) class numbers or (B, C) probabilities of the C classes.

    Attributes:
        image_noise: the noise of a step is drawn for each image, not for the batch; equal parts of a batch then need
            different random numbers, otherwise the same.
    """

    image_noise = False

    def take_part(self, part: int, parts: int) -> None:
        """Called before ``forward`` with one of several equal parts of a step's batch: its number and their count."""

    def phases(self, settings: TrainConfig) -> list[tuple[str, int]]:
        """(name, epochs) of each phase, in order; an empty phase has 0 epochs."""
        return [("train", settings.epochs), ("finetune", settings.finetune_epochs)]

    def begin(self, phase: str) -> None:
        """Called once, before the first epoch of a phase."""

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """Called before each optimiser step with the whole batch; ``progress``: share of the phase behind, 0 to 1."""

    def validated(self, probs: Tensor, labels: Tensor, epochs: int, left: int) -> dict[str, float]:
        """Called after each epoch with probabilities (S, B, C) of the validation images and their labels (B,).

        The phase has ``epochs``, of which ``left`` are to come. Returns what to add to the history.
        """
        return {}

    def terms(self, loss: float) -> dict[str, float]:
        """What the last loss was made of: nll (nats per image), and penalties in nats over all images."""
        raise NotImplementedError

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """Groups for AdamW."""
        raise NotImplementedError

    def clipped(self) -> list[nn.Module]:
        """Modules whose gradients are clipped, each by its own norm."""
        return [self]

    def finish(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Called once after the last epoch with the training images in order."""
