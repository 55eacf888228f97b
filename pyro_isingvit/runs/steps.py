"""What a training step is made of: device and processes, gradients of a batch's parts."""

import inspect
import logging
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.processes import launched, own_rows, rank, world
from pyro_isingvit.core.random_state import RandomState, seed_devices
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.methods.base import Method, Terms, method_class
from pyro_isingvit.nets.view import View, viewing

if TYPE_CHECKING:  # slow to import; a process that only loads and predicts needs none of it
    import lightning_fabric as lf
    from lightning_fabric.wrappers import _FabricModule

PRECISION = {"32": "32-true", "bf16": "bf16-mixed"}


def set_up_fabric(config: RunConfig) -> "lf.Fabric":
    """Fabric for one device; under torchrun for this process's own, joined with the others by DDP.

    Raises:
        UserError: fewer GPUs than processes.
    """
    from lightning_fabric.strategies import DDPStrategy

    settings, (here, machines) = config.train, launched()
    kwargs: dict[str, Any] = {"devices": 1}
    if here * machines > 1:
        gpus = torch.cuda.device_count()
        if settings.device != "cpu" and 0 < gpus < here:
            cause = f"{here} processes need as many GPUs, and there are {gpus}"
            raise UserError(f"{cause}; start fewer, or set `device` to cpu.")
        learns = method_class(config.method).leaves_unused(config)
        # Masks and curvature are the same everywhere; DDP would send them round at every step. torch 2.15 renames this.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        silent: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        strategy = DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=learns, **silent)
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # every process would introduce itself
        kwargs = {"devices": here, "num_nodes": machines, "strategy": strategy}
    fabric = make_fabric(settings.device, settings.precision, **kwargs)
    if here * machines > 1:
        fabric.launch()
    return fabric


def make_fabric(device: str, precision: str, **kwargs: Any) -> "lf.Fabric":
    """Fabric as settings name a device and a precision; "auto" is CUDA where it is: others lack numbers of 64 bits."""
    import lightning_fabric as lf

    gpu = torch.cuda.is_available()
    if not gpu:  # importing Fabric sets it: each step of an optimiser would look for NVIDIA's library for 0.1 ms
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    accelerator = device if device != "auto" else "cuda" if gpu else "cpu"
    return lf.Fabric(accelerator=accelerator, precision=PRECISION[precision], **kwargs)  # type: ignore[arg-type]


def total(terms: Terms) -> Tensor:
    """The loss, nats per image: the sum of its terms."""
    return torch.stack([*terms.values()]).sum()


def backward(
    fabric: "lf.Fabric",
    wrapped: "_FabricModule",
    method: Method,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    pieces: int,
    view: View | None = None,
) -> Terms:
    """Adds the gradient of a batch's loss to the parameters' gradients.

    With W processes the batch has W * pieces equal, contiguous parts; each process computes its own, one after another,
    and DDP averages the gradients after the last. All start from the same random-number state and leave it alike: that
    of one process that computes the whole batch, unless the method draws noise for each image.

    Args:
        fabric: holds the processes together.
        wrapped: ``method`` as Fabric wraps it.
        method: what is trained.
        x: (B, channels, height, width) normalised, the whole batch; W * pieces divides B.
        y: (B,) or (B, C).
        rows: (B,) numbers of the images.
        pieces: micro-batches of each process.
        view: what was drawn for the whole batch besides; None: nothing.

    Returns:
        the mean terms of this process's parts, detached.
    """
    parts = world() * pieces
    if parts == 1:
        with viewing(method, view):
            terms = wrapped(x, y, rows)
        fabric.backward(total(terms))
        return {name: term.detach() for name, term in terms.items()}
    seed = int(torch.randint(2**62, ())) if method.image_noise else None
    state = RandomState.now(fabric.device)
    mine, sums = own_rows(len(x)), dict[str, Tensor]()
    views = [None] * pieces if view is None else view[mine].chunk(pieces)
    shares = zip(x[mine].chunk(pieces), y[mine].chunk(pieces), rows[mine].chunk(pieces), views, strict=True)
    for piece, (images, labels, numbers, part_view) in enumerate(shares):
        part = rank() * pieces + piece
        state.restore(fabric.device)
        if seed is not None:
            seed_devices(seed + part, fabric.device)
        method.take_part(part, parts)
        with nullcontext() if piece == pieces - 1 else fabric.no_backward_sync(wrapped):
            with viewing(method, part_view):
                terms = wrapped(images, labels, numbers)
            fabric.backward(total(terms) / pieces)
        for name, term in terms.items():
            sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach() / pieces
    if seed is not None:
        state.restore(fabric.device)  # the parts drew different numbers; the next step's must be the same everywhere
    return sums
