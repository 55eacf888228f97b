"""What it costs to put a posterior around a pretrained network: a training step and predictions, against plain AdamW.

python -m inference.start_cost --init torchvision:vit_b_16 --out runs/start-cost.json

The networks have random numbers; nothing is downloaded. Every case runs in a fresh process. Memory is the peak that the
training added to what the process held when everything was built, parameters and optimiser included.
"""

import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.cli import check_place, print_table, run_script
from pyro_isingvit.core.errors import UserError, need

if TYPE_CHECKING:
    from torch import nn

PLAIN = "plain AdamW"
EPOCH = 10  # steps, of which one updates the masks: the default


@dataclass(frozen=True)
class CostArguments:
    """What to measure."""

    out: Path
    """JSON file of the numbers."""
    init: str = "torchvision:vit_b_16"
    """Architecture: timm:NAME or torchvision:NAME."""
    batch_size: int = 4
    """Images per step."""
    repeats: int = 3
    """Times that ten steps are timed, after ten that are not."""
    bayesian_blocks: int = 4
    """Last blocks with masks and noise in the partly Bayesian cases."""
    draws: int = 8
    """Draws of the predictions."""
    classes: int = 10
    """Classes of the new head."""
    overwrite: bool = False
    """Replace the file that is there."""


def cost(arguments: CostArguments) -> None:
    """Measure steps, memory and predictions of a posterior around a pretrained network."""
    from pyro_isingvit.core.checkpoint import write_json

    need(arguments.overwrite or not arguments.out.exists(), f"{arguments.out} exists; add --overwrite to replace it.")
    check_place(arguments.out.parent)
    need(min(arguments.batch_size, arguments.repeats, arguments.draws) >= 1 and arguments.classes >= 2,
         "--batch-size, --repeats and --draws must be at least 1, --classes at least 2.")  # fmt: skip
    need(arguments.init.partition(":")[0] in ("timm", "torchvision"), "--init takes timm:NAME or torchvision:NAME.")
    k = arguments.bayesian_blocks
    cases: dict[str, dict[str, Any]] = {
        PLAIN: {},
        "ising": {"bayesian_blocks": None},
        f"ising, last {k} blocks": {"bayesian_blocks": k},
        f"ising, last {k} blocks, others frozen": {"bayesian_blocks": k, "frozen": True},
    }
    rows = {name: {"step_s": _apart(step_seconds, arguments, case), "peak_mb": _apart(peak_mb, arguments, case)}
            for name, case in cases.items()}  # fmt: skip
    plain = rows[PLAIN]
    for row in rows.values():
        row |= {f"{what}_ratio": row[what] / plain[what] for what in ("step_s", "peak_mb")}
    draws = {
        "all of it": _apart(predictions, arguments, None),
        f"last {k} blocks, trunk each time": _apart(predictions, arguments, k, False),
        f"last {k} blocks, one trunk": _apart(predictions, arguments, k, True),
    }
    write_json(arguments.out, {"arguments": {**asdict(arguments), "out": arguments.out.name}, "training": rows,
                               "predictions": draws})  # fmt: skip
    print_table(
        f"{arguments.init}, batches of {arguments.batch_size}: a step, peak memory, both against plain AdamW",
        {name: f"{row['step_s']:.2f} s  {row['peak_mb']:,.0f} MB  {row['step_s_ratio']:.2f}  {row['peak_mb_ratio']:.2f}"
         for name, row in rows.items()},
    )  # fmt: skip
    print_table(
        f"{arguments.draws} draws of {arguments.batch_size} images", {n: f"{s:.2f} s" for n, s in draws.items()}
    )
    print(f"numbers: {arguments.out}")


def _apart(function: Any, *args: Any) -> Any:
    if function is peak_mb:  # otherwise what is freed stays with the process, and the peak is that of its allocator
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    else:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _network(spec: str) -> "nn.Module":
    library, _, name = spec.partition(":")
    try:
        if library == "timm":
            import timm

            return timm.create_model(name)
        from torchvision.models import get_model

        return get_model(name)
    except Exception as error:
        raise UserError(f"{spec} cannot be built: {error}") from error


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _reset_peak() -> float:
    """Starts the count of the peak again, where Linux allows it; what is held now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def step_seconds(arguments: CostArguments, case: dict[str, Any]) -> float:
    """Seconds of a step, updates of the masks at their usual rate included: the median of the repeats."""
    import torch

    torch.manual_seed(0)
    ten_steps = _ising_steps(arguments, **case) if case else _plain_steps(arguments)
    taken = []
    for _ in range(1 + arguments.repeats):
        start = time.perf_counter()
        ten_steps()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / EPOCH


def peak_mb(arguments: CostArguments, case: dict[str, Any]) -> float:
    """What parameters, optimiser and steps take together at most, MB."""
    import torch
    import torchvision

    import pyro_isingvit.experiment
    import pyro_isingvit.runs.trainer  # noqa: F401

    torch.manual_seed(0)
    torch.zeros(8, requires_grad=True).sum().backward()  # what the libraries take themselves does not count
    assert torchvision
    before = _reset_peak()
    ten_steps = _ising_steps(arguments, **case) if case else _plain_steps(arguments)
    _reset_peak()
    ten_steps()
    return _peak_mb() - before


def _images(arguments: CostArguments, shape: tuple[int, ...], count: int) -> Any:
    import torch

    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.arange(count) % arguments.classes


def _plain_steps(arguments: CostArguments) -> Any:
    """Fine-tuning as one would write it: the library's network, AdamW, clipped gradients."""
    import torch
    from torch.nn import functional as F

    network: Any = _network(arguments.init)
    head = network.heads.head if hasattr(network, "heads") else network.head
    new = torch.nn.Linear(head.in_features, arguments.classes)
    if hasattr(network, "heads"):
        network.heads.head = new
    else:
        network.head = new
    size = getattr(network, "image_size", None) or network.patch_embed.img_size[0]
    images, labels = _images(arguments, (3, size, size), arguments.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def ten_steps() -> None:
        for _ in range(EPOCH):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(images.float() / 255), labels).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()

    return ten_steps


def _ising_steps(arguments: CostArguments, bayesian_blocks: int | None, frozen: bool = False) -> Any:
    """An epoch of the trainer itself, of ten steps, without validation."""
    from pyro_isingvit.core.settings import RunConfig
    from pyro_isingvit.data.info import DataInfo
    from pyro_isingvit.data.split import UNLABELLED, ImageData, Split
    from pyro_isingvit.experiment import begun
    from pyro_isingvit.methods.registry import with_defaults
    from pyro_isingvit.nets.backbones import start_of
    from pyro_isingvit.runs.trainer import Trainer

    start = start_of(_network(arguments.init))
    images, labels = _images(arguments, start.image_shape, EPOCH * arguments.batch_size)
    names = tuple(map(str, range(arguments.classes)))
    part = Split(images, labels)
    none = Split(images[:0], labels[:0] * 0 + UNLABELLED)
    data = ImageData(part, none, part, DataInfo("random", names, *start.image_shape, start.scale.mean, start.scale.std))
    config = with_defaults("ising", RunConfig(init=arguments.init))
    depth = start.vit.depth
    train = replace(
        config.train, batch_size=arguments.batch_size, average=0.0, pilot_fraction=0.0,
        epochs=1 + arguments.repeats, device="cpu", frozen_blocks=depth - (bayesian_blocks or 0) if frozen else 0,
    )  # fmt: skip
    ising = replace(config.ising, max_keep=0.98, bayesian_blocks=bayesian_blocks)
    config, data, start = begun(replace(config, train=train, ising=ising), data, start)
    trainer = Trainer(config, data, None, False, start=start)
    del start
    epochs = count()

    def ten_steps() -> None:
        trainer.take_steps(next(epochs))

    return ten_steps


def predictions(arguments: CostArguments, bayesian_blocks: int | None, shared: bool = True) -> float:
    """Seconds of all draws of a batch, the second time."""
    from contextlib import nullcontext
    from unittest.mock import patch

    import torch

    from pyro_isingvit.core.settings import IsingConfig, RunConfig
    from pyro_isingvit.data.info import DataInfo
    from pyro_isingvit.nets.backbones import start_of
    from pyro_isingvit.runs import predict
    from pyro_isingvit.runs.run import build_run

    torch.manual_seed(0)
    start = start_of(_network(arguments.init))
    names = tuple(map(str, range(arguments.classes)))
    info = DataInfo("random", names, *start.image_shape, start.scale.mean, start.scale.std)
    config = RunConfig(vit=start.vit, init=arguments.init, ising=IsingConfig(bayesian_blocks=bayesian_blocks))
    run = build_run(config, info, 100)
    run.method.start_from(start)
    run.guide.start_masks()
    images, _ = _images(arguments, start.image_shape, arguments.batch_size)
    taken = 0.0
    with nullcontext() if shared else patch.object(predict, "with_trunk", lambda module: []):
        for _ in range(2):
            began = time.perf_counter()
            predict.draw_predictive(run, images, arguments.draws)
            taken = time.perf_counter() - began
    return taken


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(cost, CostArguments, argv)


if __name__ == "__main__":
    main()
