"""The state of torch's random numbers, to which a computation can go back."""

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError


@contextlib.contextmanager
def undisturbed(seed: int, *devices: torch.device) -> Iterator[None]:
    """Random numbers from a seed, on the CPU and devices; afterwards these and all other GPUs go on as before.

    Args:
        seed: gives the numbers that ``torch.manual_seed`` gives.
        devices: where the block computes.
    """
    with torch.random.fork_rng(devices={device for device in devices if device.type == "cuda"}):
        seed_devices(seed, *devices)
        yield


def seed_devices(seed: int, *devices: torch.device) -> None:
    """``torch.manual_seed`` for the CPU and some devices alone; that seeds every GPU."""
    seed = checked_seed(seed)
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.manual_seed(seed)


def checked_seed(seed: int) -> int:
    """A seed as a whole number.

    Raises:
        UserError: it is none, or more than torch takes.
    """
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)  # a tensor may hold one
    except TypeError:
        number = None
    if number is None or not -(2**63) <= number < 2**63:
        raise UserError(f"`seed` must be a whole number of at most 63 bits, not {seed!r:.60}.")
    return number


@dataclass(frozen=True)
class RandomState:
    """What the next random numbers of torch follow from.

    Attributes:
        cpu: of the CPU's generator.
        cuda: of the GPU's; None where the computation is on the CPU.
    """

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The present state, for a computation on ``device``."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def is_that_of(self, other: "RandomState") -> bool:
        """Whether no random number was taken between the two."""
        gpus = self.cuda is None or other.cuda is None or torch.equal(self.cuda, other.cuda)
        return torch.equal(self.cpu, other.cpu) and gpus

    def restore(self, device: torch.device) -> None:
        """Goes back to it."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
