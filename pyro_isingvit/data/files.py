"""Image files: which ones a folder holds, and how they become arrays.

Files may come from anyone: few readers, no links out of the folder, no decompression bombs.
Shapes: N images, C channels (1 or 3), H height, W width; images are (N, C, H, W) uint8.
"""

import logging
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need, why

log = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MOST_PIXELS = 89_478_485  # of one image: Pillow's limit, which any other library can switch off
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # Pillow tries these readers and no other


def list_images(folder: str | Path, within: str | Path | None = None) -> list[Path]:
    """Image files under ``folder``, sorted; no hidden ones, no links out of ``within`` (None: the folder).

    Raises:
        UserError: not a folder, a folder that cannot be listed, or no image in it.
    """
    need(Path(folder).is_dir(), f"no such folder: {folder}.")
    inside, found, other, links = Path(within or folder).resolve(), [], 0, 0
    listing = os.walk(folder, onerror=lambda error: need(False, f"cannot list a folder: {error}."))
    for here, folders, files in listing:
        links += sum(Path(here, name).is_symlink() for name in folders)  # os.walk does not enter them
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(here, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() not in SUFFIXES:
                other += 1
            elif path.is_symlink() and not path.resolve().is_relative_to(inside):
                links += 1
            else:
                found.append(path)
    if other or links:
        log.warning("%s: skipped %d files that are no images and %d links", folder, other, links)
    need(found, f"empty folder {folder}: no image in it (known types: {' '.join(SUFFIXES)}).")
    return sorted(found, key=str)


def subfolders(folder: Path) -> list[Path]:
    """Folders right below ``folder``, sorted; no hidden ones, no links."""
    entries = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in entries if path.is_dir() and not path.is_symlink())


def decode_all(paths: Sequence[Path], size: tuple[int, int] | None, channels: int | None = None) -> tuple[Tensor, int]:
    """Images (N, C, H, W), C = 1 if all are grey unless given; how many were resized to ``size`` (H, W)."""
    from PIL import Image
    from tqdm import tqdm

    arrays: list[np.ndarray] = []  # of (H, W) or (H, W, 3)
    resized, blocks = 0, [paths[i : i + 64] for i in range(0, len(paths), 64)]
    bar = tqdm(total=len(paths), desc="reading images", disable=len(paths) <= 500)
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool, warnings.catch_warnings(), bar:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for block in pool.map(lambda files: [_decode(file, size, channels) for file in files], blocks):
                for array, changed in block:
                    arrays.append(array)
                    resized += changed
                    (h0, w0), (h, w), path = arrays[0].shape[:2], array.shape[:2], paths[len(arrays) - 1]
                    sizes = f"{paths[0]} is {w0}x{h0}, {path} is {w}x{h}"
                    need((h0, w0) == (h, w), f"images differ in size: {sizes}; give one `image_size`.")
                bar.update(len(block))
        finally:
            pool.shutdown(cancel_futures=True)
    depth = 1 if all(array.ndim == 2 for array in arrays) else 3
    images = np.empty((len(arrays), depth, *arrays[0].shape[:2]), dtype=np.uint8)
    for row, array in enumerate(arrays):
        images[row] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(images), resized


def _decode(path: Path, size: tuple[int, int] | None, channels: int | None) -> tuple[np.ndarray, bool]:
    """One file as (H, W) or (H, W, 3) uint8, an alpha channel dropped; and whether it was resized."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            need(image.width * image.height <= MOST_PIXELS, f"{image.width}x{image.height} pixels are too many")
            picture: Image.Image = image
            if image.mode.startswith("I"):  # 16 bits
                deep = np.asarray(image)
                need(0 <= deep.min() <= deep.max() <= 65535, "grey values beyond 16 bits")
                picture = Image.fromarray((deep >> 8).astype(np.uint8))
            need(image.mode != "F", "floating-point pixels have no known range")
            grey = channels == 1 if channels else picture.mode in {"1", "L", "LA"}
            if picture.mode == "P":
                picture = picture.convert("RGBA")  # Pillow warns about transparency otherwise
            picture = picture.convert("L" if grey else "RGB")
            resize = size is not None and picture.size != size[::-1]
            if size and resize:
                picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)  # Pillow's is anti-aliased
            return np.asarray(picture), resize
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise UserError(f"cannot read the image {path} ({why(error)}); repair or remove it.") from error
