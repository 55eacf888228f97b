"""What a network costs: parameters, multiply-accumulates, time, bytes.

Times are medians over repeats that take turns, so that a machine that slows down slows all networks alike. Compare
ratios of such medians: the milliseconds hold for one machine and its load.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from pyro_isingvit.core.errors import need

BATCH = 256
REPEATS = 15
LIMIT_S = 30.0  # of a measurement, beyond which repeats are left out
LEAST = 3  # repeats that are always made
SINGLE = 8  # times as many repeats of single images, which are quick and noisy


@torch.no_grad()
def macs(network: Callable[[Tensor], Tensor], image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image: matrix products and attention, padding included, as PyTorch counts them.

    Args:
        network: (1, channels, height, width) to logits, on the CPU.
        image_shape: channels, height, width.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        network(torch.zeros(1, *image_shape))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def latency(
    networks: Sequence[Callable[[Tensor], Tensor]],
    image_shape: tuple[int, int, int],
    batch: int,
    repeats: int = REPEATS,
    device: str | torch.device = "cpu",
) -> list[float]:
    """Median seconds of one forward pass of each network, repeats interleaved; random states stay as they are.

    Args:
        networks: (batch, channels, height, width) to logits.
        image_shape: channels, height, width.
        batch: images at a time.
        repeats: of each network, after two to warm up; 8 times as many where the batch is 1. Fewer, but at least
            3, where they would take longer than half a minute in all.
        device: where the networks are.

    Raises:
        UserError: repeats below 1.
    """
    need(repeats >= 1, f"`repeats` must be at least 1, not {repeats}.")
    x = torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    cases = {number: partial(network, x) for number, network in enumerate(networks)}
    taken = interleaved(cases, repeats * SINGLE if batch == 1 else repeats, LIMIT_S)
    return [statistics.median(seconds) for seconds in taken.values()]


def interleaved[K](
    cases: Mapping[K, Callable[[], object]], repeats: int, limit_s: float = 60.0, label: str = ""
) -> dict[K, list[float]]:
    """Seconds of every call, repeats taking turns so that a machine that slows down slows all cases.

    Args:
        cases: each is called twice to warm up.
        repeats: of each case; fewer, but at least 3, where all together would take longer than ``limit_s``.
        limit_s: seconds for all repeats of all cases.
        label: of the progress bar; "": none is shown.

    Returns:
        name -> seconds, repeat r of every case from the same turn.
    """
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        finish()
        return time.perf_counter() - start

    functions = list(cases.values())
    for function in functions:
        function()  # warm-up; torch.compile works here
    affordable = int(limit_s / max(sum(map(seconds, functions)), 1e-9))
    taken: list[list[float]] = [[] for _ in functions]
    turns = range(min(repeats, max(LEAST, affordable)))
    for turn in tqdm(turns, desc=label, disable=not label, dynamic_ncols=True, leave=False):
        for i in range(len(functions)):
            number = (turn + i) % len(functions)  # no case always follows the same one
            taken[number].append(seconds(functions[number]))
    return dict(zip(cases, taken, strict=True))


def parameters(network: nn.Module) -> tuple[int, int]:
    """Parameters, and those of them that are not 0."""
    values = list(network.parameters())
    return sum(v.numel() for v in values), sum(int(v.count_nonzero()) for v in values)


def memory(network: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters as they are, and with every matrix in compressed sparse row form where that is smaller.

    Sparse matrices save memory; no speed is claimed for them.
    """
    from scipy.sparse import csr_matrix

    dense = sparse = 0
    for value in network.parameters():
        size = value.numel() * value.element_size()
        dense += size
        if value.dim() == 2:
            rows = csr_matrix(value.detach().cpu().numpy())
            size = min(size, rows.data.nbytes + rows.indices.nbytes + rows.indptr.nbytes)
        sparse += size
    return dense, sparse
