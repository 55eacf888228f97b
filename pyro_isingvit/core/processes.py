"""Several processes that train one network: how they divide the work, gather results, and who writes.

Every process holds the whole data set, the whole network and the same random-number state. It works on its own rows
of each batch, and what depends on the rows is averaged over the processes, so that all stay equal. Without
torch.distributed there is one process, and everything here does nothing.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.launcher import by_torchrun


def launched() -> tuple[int, int]:
    """(processes on this machine, machines) of the torchrun that started this process; (1, 1) without one."""
    if not by_torchrun():
        return 1, 1
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return here, everywhere // here


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """W, how many processes train together."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process, 0 to W - 1."""
    return dist.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process writes files, logs and shows bars: the first one does."""
    return rank() == 0


@torch.no_grad()
def averaged(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes, the same on all; it has the same shape on each."""
    if world() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world()


@torch.no_grad()
def follow_first(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors with those of process 0: machines of different kinds round differently."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that one of several processes no longer answers: gloo and NCCL have words of their own."""
    words = str(error).lower()
    gone = any(each in words for each in ("connection closed by peer", "connection reset by peer", "broken pipe"))
    return world() > 1 and (gone or isinstance(error, dist.DistError))


def own_rows(count: int) -> slice:
    """This process's contiguous share of ``count`` rows, ceil(count / W) of them; the last processes have fewer."""
    size = -(-count // world())
    return slice(min(rank() * size, count), min((rank() + 1) * size, count))


def gathered(part: Tensor, count: int, dim: int, device: torch.device) -> Tensor:
    """Brings together what each process computed for its ``own_rows(count)``.

    Args:
        part: this process's rows, along ``dim``.
        count: rows of all.
        dim: the axis of the rows.
        device: where the processes exchange tensors, that of the network.

    Returns:
        all rows, on the device of ``part``; the same on every process.
    """
    if world() == 1:
        return part
    size = -(-count // world())
    shape = [*part.shape]
    shape[dim] = size  # a collective needs equal shapes
    padded = part.new_zeros(shape)
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    parts = [torch.empty(shape, dtype=part.dtype, device=device) for _ in range(world())]
    dist.all_gather(parts, padded.to(device))
    return torch.cat(parts, dim).narrow(dim, 0, count).to(part.device)


def on_first(call: Callable[[], object]) -> None:
    """Calls on process 0 alone, while the others wait.

    Raises:
        UserError: the call raised one; it is raised on every process, so that all end together.
    """
    if world() == 1:
        call()
        return
    error: UserError | None = None
    if is_first():
        try:
            call()
        except UserError as raised:
            error = raised
    message = [None if error is None else str(error)]
    dist.broadcast_object_list(message, 0)
    if error is not None:
        raise error
    if message[0] is not None:
        raise UserError(message[0])


def part_ways() -> NoReturn:
    """Ends the group of processes, if there is one, and this process, with exit code 0; call it once all is done.

    The interpreter's own end is skipped: threads of gloo that release a tensor only then abort a process that has done
    its work ("terminate called without an active exception").
    """
    if _joined():
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
