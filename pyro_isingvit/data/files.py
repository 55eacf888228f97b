"""Image files: which ones a folder holds, and how all of them become images, in memory or in a cache.

Shapes: N images, C channels, H height, W width.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.paths import is_dir
from pyro_isingvit.data.cache import Cache
from pyro_isingvit.data.decode import SUFFIXES, Look, Reading, common, look, read
from pyro_isingvit.data.images import Images, InMemory
from pyro_isingvit.data.parallel import in_parallel

log = logging.getLogger(__name__)


def list_images(folder: str | Path, within: str | Path | None = None) -> list[Path]:
    """Image files under ``folder``, sorted; no hidden ones, no links out of ``within`` (None: the folder).

    Raises:
        UserError: not a folder, a folder that cannot be listed, or no image in it.
    """
    return [Path(folder, name) for name in image_names(folder, within)]


def image_names(folder: str | Path, within: str | Path | None = None) -> list[str]:
    """``list_images`` as texts that are relative to the folder: a tenth of the memory of paths.

    Raises:
        UserError: as ``list_images``.
    """
    need(is_dir(Path(folder)), f"no such folder: {folder}.")
    inside, found, other, links, root = Path(within or folder).resolve(), list[str](), 0, 0, str(Path(folder))
    listing = os.walk(root, onerror=lambda error: need(False, f"cannot list a folder: {error}."))
    for here, folders, files in listing:
        links += sum(os.path.islink(os.path.join(here, name)) for name in folders)  # os.walk does not enter them
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(here, name)
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() not in SUFFIXES:
                other += 1
            elif os.path.islink(path) and not Path(path).resolve().is_relative_to(inside):
                links += 1
            else:
                found.append(os.path.relpath(path, root) if here != root else name)
    if other or links:
        log.warning("%s: skipped %d files that are no images and %d links", folder, other, links)
    need(found, f"empty folder {folder}: no image in it (known types: {' '.join(SUFFIXES)}).")
    return sorted(found)


def subfolders(folder: Path) -> list[Path]:
    """Folders right below ``folder``, sorted; no hidden ones, no links."""
    entries = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in entries if is_dir(path) and not path.is_symlink())


def real_paths(paths: Sequence[str | Path]) -> list[str]:
    """Files with the links in their folders followed, each folder once; a file that is a link stays one."""
    texts = [os.path.split(path) for path in paths]
    real = {folder: os.path.realpath(folder) for folder in {folder for folder, _ in texts}}
    return [os.path.join(real[folder], name) for folder, name in texts]


class Changes(NamedTuple):
    """How many files are not as they were wanted.

    Attributes:
        resized: of another size.
        greyed: with colours, where grey images are wanted.
        cut: of 16 bits, of which the upper 8 are kept.
    """

    resized: int
    greyed: int
    cut: int

    @classmethod
    def of(cls, looks: Iterable[Look], wanted: Look) -> "Changes":
        """Counts by what the files' headers say."""
        all_looks = list(looks)
        return cls(
            sum((one.height, one.width) != (wanted.height, wanted.width) for one in all_looks),
            sum(one.channels == 3 and wanted.channels == 1 for one in all_looks),
            sum((one.kind, wanted.kind) == ("uint16", "uint8") for one in all_looks),
        )


def changes_of(paths: Sequence[Path], reading: Reading, wanted: Look) -> Changes:
    """What ``read_files`` would do to files, by their headers alone.

    Raises:
        UserError: a file that cannot be read.
    """
    return Changes.of(in_parallel(lambda path: look(path, reading), paths, "reading headers"), wanted)


def read_files(
    paths: Sequence[Path], reading: Reading, wanted: Look | None = None, cache: str | Path | None = None
) -> tuple[Images, Changes]:
    """Every file as an image; how many were changed for it.

    Args:
        paths: the files, at least one.
        reading: how files become images.
        wanted: what all shall become; None: what they have in common.
        cache: folder where decoded images are kept, and read from by row from then on; None: all are held in memory.

    Raises:
        UserError: a file that cannot be read, files that cannot be brought together, or a cache that cannot be written.
    """
    if cache is not None:
        images: Images
        images, looks = Cache(Path(cache)).of_files(paths, reading, wanted)
    else:
        looks = list(in_parallel(lambda path: look(path, reading), paths, "reading headers"))
        wanted = wanted or common(looks, paths, reading)
        array = np.empty((len(paths), wanted.channels, wanted.height, wanted.width), wanted.kind)
        read_in = in_parallel(lambda path: read(path, reading, wanted), paths, "reading images")
        for row, pixels in enumerate(read_in):
            array[row] = pixels
        images = InMemory(torch.from_numpy(array))
    _, channels, height, width = images.shape
    return images, Changes.of(looks, Look(channels, height, width, images.kind))
