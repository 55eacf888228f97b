"""Out-of-distribution images for analysis.ood: their sources, and how they are fitted to a run.

Shapes: B images, C channels, H height, W width; images are (B, C, H, W) uint8.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.shift import choose, fit_images
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.paths import with_home
from pyro_isingvit.core.untrusted import check_archive
from pyro_isingvit.data.decode import Reading
from pyro_isingvit.data.files import list_images, read_files
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.sources import DATASETS

KNOWN = ", ".join([*DATASETS, "noise", "shuffled", "imagefolder:PATH", "npz:PATH"])


def strange_images(
    spec: str, info: DataInfo, inside: Tensor, data_root: str, most: int, seed: int
) -> tuple[Tensor, str]:
    """Out-of-distribution images in the run's channels and size.

    Args:
        spec: as the setting ``ood`` takes it.
        info: what the run expects.
        inside: (B, C, H, W) uint8, the test images; ``noise`` and ``shuffled`` make as many.
        data_root: folder of the torchvision data sets.
        most: from a larger set, this many images are chosen at random.
        seed: of the choice and of the noise.

    Returns:
        (B', C, H, W) uint8, and a description of what was done to the images.

    Raises:
        UserError: unknown, missing or unreadable images.
    """
    kind, _, path = spec.partition(":")
    random = torch.Generator().manual_seed(seed)
    if spec == "noise":
        return torch.randint(0, 256, inside.shape, generator=random, dtype=torch.uint8), "uniform pixels"
    if spec == "shuffled":
        pixels = inside.flatten(2)  # (B, C, H W): the channels of a pixel stay together
        order = torch.rand(len(inside), pixels.shape[2], generator=random).argsort(1)
        moved = pixels.gather(2, order[:, None].expand_as(pixels)).view_as(inside)
        return moved, "the test images, each with its pixels in a random order"
    if kind == "imagefolder" and path:
        return _from_folder(with_home(path), info, most, seed)
    images: Images
    if kind == "npz" and path:
        images = as_images(_from_npz(with_home(path)))
    else:
        need(spec in DATASETS, f"unknown images {spec!r}; `ood` takes {KNOWN}.")
        images = load_data(spec, data_root=data_root, val_fraction=0).test.images
    return fit_images(images[torch.from_numpy(choose(len(images), most, seed))], info)


def _from_folder(folder: Path, info: DataInfo, most: int, seed: int) -> tuple[Tensor, str]:
    """Images of any sizes and channels, one by one; classes do not matter."""
    paths = list_images(folder)
    fitted = [fit_images(read_files([paths[i]], Reading())[0][:], info) for i in choose(len(paths), most, seed)]
    done = sorted({words for _, words in fitted})
    words = done[0] if len(done) == 1 else f"of several sizes, fitted to {info.channels}x{info.height}x{info.width}"
    return torch.cat([images for images, _ in fitted]), words


def _from_npz(path: Path) -> Tensor:
    """``test_images`` or else ``images``: (B, H, W) or (B, H, W, 1 or 3) uint8."""
    need(path.is_file(), f"no such file: {path}.")
    check_archive(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            key = next((name for name in ("test_images", "images") if name in archive.files), None)
            images = None if key is None else archive[key]
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(f"cannot read {path} as .npz without object arrays ({why(error)}).") from error
    if images is None:
        raise UserError(f"{path} has neither test_images nor images.")
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in {1, 3})
    fits = shaped and images.dtype == np.uint8 and images.size > 0
    need(fits, f"{path}: {key} is {images.dtype} {images.shape}, expected uint8 (B, H, W) or (B, H, W, 1 or 3).")
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images))


def file_names(specs: list[str]) -> list[str]:
    """A PNG name for each, such as ood-mnist.png or ood-imagefolder-cats.png; equal names are numbered."""
    names: list[str] = []
    for spec in specs:
        kind, _, path = spec.partition(":")
        words = [kind, Path(path).stem] if path else [kind]
        stem = "ood-" + re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(words)).strip("-")[:80]
        names.append(f"{stem}.png" if f"{stem}.png" not in names else f"{stem}-{len(names) + 1}.png")
    return names
