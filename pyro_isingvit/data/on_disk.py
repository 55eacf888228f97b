"""Images that stay in a file and are read row by row: NPY, members of an uncompressed npz, a cache.

Rows are read by ``pread``. Mapped into memory, every page that was touched would count as the process's own, and a file
that is cut short while it is used would kill the process.

Shapes: N images, C channels, H height, W width.
"""

import os
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.pixels import KINDS, Kind
from pyro_isingvit.data.images import MOST_CHANNELS, Images, InMemory

Layout = Literal["grey", "first", "last"]
AXES: tuple[tuple[Layout, int], ...] = (("last", 3), ("first", 1))
SMALL = 2**28  # bytes of images that are read into memory at once
NAME_AT, HEADER = 26, 30  # of a zip's local header: where the lengths of name and extra field stand, and its size


class OnDisk(Images):
    """Rows of equal size in a file.

    Args:
        path: the file.
        shape: (N, H, W), (N, C, H, W) or (N, H, W, C), as stored.
        layout: which of these.
        kind: type of the pixels, little-endian.
        offset: of the first row, in bytes.
        sums: (N,) CRC-32 of the rows, each checked when it is first read; None: not known.

    Raises:
        UserError: the file is missing or too short; when read, a row is missing or damaged.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        layout: Layout,
        kind: Kind,
        offset: int = 0,
        sums: np.ndarray | None = None,
    ) -> None:
        self.path, self.stored, self.layout, self.kind, self.offset, self.sums = path, shape, layout, kind, offset, sums
        count, *row = shape
        channels = 1 if layout == "grey" else row[0 if layout == "first" else 2]
        height, width = row[:2] if layout == "last" else row[-2:]
        self.shape = (count, channels, height, width)
        self.row = np.empty(0, kind).itemsize * int(np.prod(row))
        self.unchecked = None if sums is None else np.ones(count, bool)
        self._open()

    def _open(self) -> None:
        try:
            self.file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({why(error)}).") from error
        weakref.finalize(self, os.close, self.file)
        size, needed = os.fstat(self.file).st_size, self.offset + self.shape[0] * self.row
        need(size >= needed, f"{self.path} is cut short: {size:,} bytes where {needed:,} are needed; write it again.")

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which a copy opens itself."""
        return {name: value for name, value in vars(self).items() if name != "file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens the file again."""
        vars(self).update(state)
        self._open()

    def in_memory(self) -> InMemory:
        """All images, read and checked, as they are stored."""
        return InMemory(self._images(np.arange(len(self))))

    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index`` (n,); neighbouring rows are read at once."""
        images = self._images(index.numpy())
        return images.float() if self.kind == "uint16" else images

    def _images(self, numbers: np.ndarray) -> Tensor:
        array = np.empty((len(numbers), *self.stored[1:]), self.kind)
        if len(numbers) == 1 + numbers[-1] - numbers[0] and (np.diff(numbers) == 1).all():
            self._read(array, int(numbers[0]))
        else:
            for row, number in zip(array, numbers.tolist(), strict=True):
                self._read(row, number)
        if self.unchecked is not None and self.sums is not None:
            for i in np.flatnonzero(self.unchecked[numbers]):
                self._check(array[i], int(numbers[i]))
        if self.kind == "float32" and not np.isfinite(array).all():
            bad = next(i for i, each in zip(numbers, array, strict=True) if not np.isfinite(each).all())
            raise UserError(f"image {bad} of {self.path} has NaN or infinite pixels; repair or remove it.")
        images = torch.from_numpy(array)
        if self.layout == "grey":
            return images[:, None]
        return images if self.layout == "first" else images.permute(0, 3, 1, 2).contiguous()

    def _read(self, into: np.ndarray, row: int) -> None:
        view, at = memoryview(into).cast("B"), self.offset + row * self.row
        while len(view):  # one call reads at most 2 GiB
            got = os.preadv(self.file, [view], at)
            need(got > 0, f"{self.path} was cut short while it was read; write it again.")
            view, at = view[got:], at + got

    def _check(self, pixels: np.ndarray, row: int) -> None:
        assert self.sums is not None and self.unchecked is not None
        right = zlib.crc32(memoryview(pixels).cast("B")) == self.sums[row]
        need(
            right, f"image {row} in {self.path} is damaged; delete the folder {self.path.parent} to have it made anew."
        )
        self.unchecked[row] = False


def open_npy(path: Path) -> OnDisk | None:
    """Images of an .npy file; None where they cannot stay there (another type or order).

    Raises:
        UserError: no readable array of images.
    """
    try:
        with path.open("rb") as file:
            return _open_array(path, file, 0)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as an array ({why(error)}).") from error


def open_member(path: Path, key: str) -> OnDisk | None:
    """Images of one array of an .npz file; None where they cannot stay there (compressed, or another type or order).

    Raises:
        UserError: the member cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{key}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                return None
        with path.open("rb") as file:
            file.seek(member.header_offset + NAME_AT)
            name, extra = np.frombuffer(file.read(4), "<u2").tolist()
            start = member.header_offset + HEADER + name + extra
            file.seek(start)
            return _open_array(path, file, start)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {key} of {path} ({why(error)}).") from error


def array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of the NPY array that begins here; the file then stands at its data.

    Raises:
        ValueError: no such array.
    """
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"NPY version {version}")
    return read[version](file)


def layout_of(shape: tuple[int, ...]) -> Layout | None:
    """Which layout an array of images (N, H, W), (N, H, W, C) or (N, C, H, W) has; None: it is none, or may be two."""
    if len(shape) == 3:
        return "grey"
    if len(shape) != 4:
        return None
    fits: list[Layout] = [name for name, axis in AXES if shape[axis] <= MOST_CHANNELS]
    sure = [name for name, axis in AXES if shape[axis] in (1, 3)]
    return fits[0] if len(fits) == 1 else sure[0] if len(sure) == 1 else None


def _open_array(path: Path, file: BinaryIO, start: int) -> OnDisk | None:
    shape, fortran, dtype = array_header(file)
    layout = layout_of(shape)
    if fortran or dtype.str not in {np.dtype(kind).str for kind in KINDS} or layout is None or 0 in shape:
        return None
    return OnDisk(path, shape, layout, dtype.name, file.tell())  # type: ignore[arg-type]
