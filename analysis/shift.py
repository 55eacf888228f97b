"""Shared by the analyses of shifted images: runs to compare, their test images, images fitted to a run.

Shapes: B images, C channels (1 or 3), H height, W width; images are (B, C, H, W) uint8.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from pyro_isingvit.core.device import checked_device
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.load import is_named, load_data
from pyro_isingvit.data.split import Split
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.runs.folder import POSTERIOR
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run

log = logging.getLogger(__name__)
STORED = (("constant_data", "pixels"), ("observed_data", "y"))  # what posterior.nc keeps of the test part


def load_runs(folders: Sequence[Path], device: str) -> dict[str, Run]:
    """Loads the runs to compare, named by their folders.

    Args:
        folders: at least one; if two have the same name, the folder above is named too.
        device: auto, cpu or cuda.

    Raises:
        UserError: no folder, a folder named twice or without a run, runs of different data, or no CUDA device.
    """
    need(folders, "`run` needs the folder of a run.")
    place = checked_device(device)
    paths = [folder.resolve() for folder in folders]
    need(len(set(paths)) == len(paths), "`run` names a folder twice.")
    short = [path.name for path in paths]
    names = [
        name if short.count(name) == 1 else f"{path.parent.name}/{name}"
        for path, name in zip(paths, short, strict=True)
    ]
    need(len(set(names)) == len(names), f"runs need different folder names, got {', '.join(names)}.")
    runs = {name: open_run(folder, place) for name, folder in zip(names, folders, strict=True)}
    first, *others = runs.items()
    for name, run in others:
        pools = {run.info.pool, first[1].info.pool, ""}  # not known before version 0.18
        same = data_of(run) == data_of(first[1]) and len(pools) < 3
        need(
            same,
            f"{first[0]} and {name} were trained on different data, or on data that were read or divided otherwise: "
            f"{first[1].info.dataset}, {run.info.dataset}.",
        )
    return runs


def data_of(run: Run) -> tuple[object, ...]:
    """What must be the same for runs to have one test part, images as the same network reads them included."""
    info, data = run.info, run.config.data
    read = data.groups, data.columns, data.image_size, data.resize, data.pages, data.intensity
    return info.dataset, info.classes, info.channels, info.height, info.width, *read


def own_test_part(run: Run, data_root: str | None, max_images: int, seed: int) -> Split:
    """The run's own test part, or what posterior.nc keeps of it if the data are gone.

    Args:
        run: as ``open_run`` gave it.
        data_root: folder of the torchvision data sets; None: the run's own.
        max_images: from a larger test part, this many images are chosen at random.
        seed: of that choice.

    Raises:
        UserError: neither the data nor posterior.nc can be read, or max_images below 1, or a negative seed.
    """
    need(max_images >= 1, f"`max_images` must be at least 1, not {max_images}.")
    need(seed >= 0, f"`seed` must not be negative, got {seed}.")
    need(
        run.info.visible,
        f"corruptions and other images have 8 bits, grey or colour; this run has {run.info.channels} channels of "
        f"{run.info.kind}{', scaled by percentiles' if run.info.low else ''}.",
    )
    path = None if run.folder is None else run.folder / POSTERIOR
    kept = path if path is not None and path.is_file() else None
    config = run.config.data
    if not is_named(config.dataset):
        if kept is None:
            raise UserError(
                f"{run.folder or 'the run'} was shared or trained on images given in memory, and keeps no test images: "
                "evaluate it in Python, `run.evaluate(data)`, and save it."
            )
        return _chosen(_stored(kept), max_images, seed)
    config = replace(config, download=False, data_root=data_root or config.data_root)
    try:
        data = load_data(**asdict(config), seed=run.config.train.seed)
        told = f"{config.dataset} has other images now than in training, and is divided otherwise."
        need(data.info.has_images_of(run.info), told)
        split = data.test
    except UserError as error:
        if kept is None:
            raise
        log.warning("%s\nusing the test images in %s instead", error, kept)
        split = _stored(kept)
    return _chosen(split, max_images, seed)


def _chosen(split: Split, most: int, seed: int) -> Split:
    return split.take(choose(len(split), most, seed))


def _stored(path: Path) -> Split:
    tree = load_datatree(path)
    try:
        pixels, labels = (np.asarray(tree[group][name]) for group, name in STORED)
    except KeyError as error:
        raise UserError(
            f"{path} keeps no test images ({error}); give the folder of the data as `data_root`."
        ) from error
    finally:
        tree.close()
    return Split(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels.astype(np.int64)))


def mean_of(run: Run, samples: int, seed: int, images: Tensor) -> Tensor:
    """Mean prediction (B, C) of networks drawn from a run."""
    return draw_predictive(run, images, samples, seed=seed).mean


def choose(count: int, most: int, seed: int) -> np.ndarray:
    """At most ``most`` of ``count`` positions, at random, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def fit_images(images: Tensor, info: DataInfo) -> tuple[Tensor, str]:
    """Images in the channels and size of a run, and a description of what was done to them.

    Args:
        images: (B, C, H, W) uint8 of any size, 1 or 3 channels.
        info: what the run expects.
    """
    done = []
    _, channels, height, width = images.shape
    need(channels in (1, 3), f"other images must have 1 or 3 channels, not {channels}.")
    if channels > info.channels:
        images = tv.rgb_to_grayscale(images)
        done.append("RGB to grey")
    elif channels < info.channels:
        images = tv.grayscale_to_rgb(images)
        done.append("grey to RGB")
    if (height, width) != (info.height, info.width):
        size = [info.height, info.width]
        images = tv.resize(images, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
        done.append(f"resized from {width}x{height} to {info.width}x{info.height} (bilinear, antialiased)")
    return images.contiguous(), ", ".join(done) or "as they are"


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table with a header; floats with four decimals, None as a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=printable(title), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 or isinstance(rows[0][i], str) else "right")
    for row in rows:
        table.add_row(*("-" if x is None else f"{x:.4f}" if isinstance(x, float) else printable(str(x)) for x in row))
    Console(markup=False, emoji=False).print(table)  # a run may be called [/b] or :smile:
