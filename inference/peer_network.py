"""The job that every peer gets, and a training loop for any module.

Shapes: S samples, B batch, C classes.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.batches import batches, count_steps
from pyro_isingvit.data.images import as_images
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.nets.plain import PlainViT
from pyro_isingvit.runs.optimiser import make_optimizer, make_schedule, with_decay
from pyro_isingvit.runs.run import build_run

CHUNK = 500  # images per forward pass in prediction


@dataclass(frozen=True)
class Job:
    """The same data, shape, schedule and seed for every method.

    Attributes:
        config: of the deterministic method; ``config.train`` has epochs, batch size, rates, seed and draws S.
        data: the split.
        device: where to train.
    """

    config: RunConfig
    data: ImageData
    device: torch.device

    def network(self, dropout: float = 0.0) -> PlainViT:
        """A plain network with the initial weights of the library's own deterministic run of this seed."""
        torch.manual_seed(self.config.train.seed)
        start = build_run(self.config, self.data.info, len(self.data.train)).network
        assert isinstance(start, Plain)
        return PlainViT(start.vit, dropout).copy_from(start.vit, start.weights()).to(self.device)

    @property
    def train(self) -> TrainConfig:
        """How to train, with the number for `weight_decay` that `shrinkage` stands for."""
        return with_decay(self.config.train, self.steps)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return count_steps(len(self.data.train), self.config.train.batch_size)

    def in_chunks(self, images: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        """Class probabilities (S, B, C) of all images (uint8), on the CPU; ``predict`` takes normalised ones."""
        with torch.no_grad():
            ready = as_images(images).batches(CHUNK, self.data.info.normalise, self.device)
            parts = [predict(x).cpu() for x in ready]
        return torch.cat(parts, dim=1)


class Clock:
    """Measures epochs.

    Args:
        pause: called after each epoch, outside the measured time; processes that take turns wait there.

    Attributes:
        seconds: of each epoch.
        resumed: when the last pause ended.
    """

    def __init__(self, pause: Callable[[], object] = lambda: None) -> None:
        self.pause, self.seconds, self.resumed = pause, list[float](), time.perf_counter()

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Measures one epoch."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.note(time.perf_counter() - start)

    def note(self, seconds: float) -> None:
        """Records the end of an epoch."""
        self.seconds.append(seconds)
        self.pause()
        self.resumed = time.perf_counter()


def decayed(network: PlainViT, settings: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups of the library's own deterministic method: the matrices decay, everything else does not.

    Args:
        network: whose parameters are grouped.
        settings: `weight_decay`, as ``with_decay`` gives it.
    """
    matrices = [linear.weight for linears in network.linears().values() for linear in linears]
    known = {id(matrix) for matrix in matrices}
    others = [p for p in network.parameters() if id(p) not in known]
    return [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]


def train(
    job: Job, module: nn.Module, groups: list[dict[str, Any]], loss: Callable[[Tensor, Tensor], Tensor], clock: Clock
) -> None:
    """The library's own loop for any module: AdamW, warm-up and cosine, clipping, the same batches in the same order.

    Args:
        job: data and settings.
        module: switched to training mode; its parameters are clipped together.
        groups: for AdamW.
        loss: normalised images and labels to nats per image.
        clock: measures the epochs.

    Raises:
        FloatingPointError: the loss was not finite.
    """
    settings, split = job.config.train, job.data.train
    optimizer = make_optimizer(groups, settings)
    scheduler = make_schedule(optimizer, settings, job.steps)
    value = torch.zeros(())
    module.train()
    for epoch in range(settings.epochs):
        with clock.epoch():
            for images, labels, _ in batches(split, settings.batch_size, settings.seed, epoch):
                value = loss(job.data.info.normalise(images), labels)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(module.parameters(), settings.clip_norm)
                optimizer.step()
                scheduler.step()
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss became {value.item()} in epoch {epoch + 1}")
    module.eval()
