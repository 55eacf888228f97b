"""Arrays with MedMNIST's keys: train_images, train_labels; the same of val and test, or not; groups where known.

They lie in one .npz file, or as .npy files in a folder. Small ones are read into memory, large ones row by row.

Shapes: N images, C channels (1 to 16), H height, W width.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.paths import is_dir, is_file
from pyro_isingvit.core.pixels import KINDS
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import check_archive, printable
from pyro_isingvit.data.cache import Cache, digest_of
from pyro_isingvit.data.decode import Look
from pyro_isingvit.data.images import MOST_CHANNELS, Images, InMemory, from_numpy
from pyro_isingvit.data.named import Parts, UnfitGroupsError, path_of
from pyro_isingvit.data.on_disk import SMALL, Layout, array_header, layout_of, open_member, open_npy
from pyro_isingvit.data.split import UNLABELLED, Split

PARTS = ("train", "val", "test")


class Stored:
    """Arrays by name, in an .npz file or a folder of .npy files; each is read when it is asked for.

    Args:
        path: the file or folder.
        cache: folder where compressed arrays are unpacked if they are large; None: memory.

    Raises:
        UserError: there is no such file or folder, it is damaged, or a decompression bomb.
    """

    def __init__(self, path: Path, cache: str | None = None) -> None:
        self.path, self.cache, self.folder = path, cache, is_dir(path)
        need(self.folder or is_file(path), f"no such file: {path}.")
        if self.folder:
            self.names = sorted(each.stem for each in path.glob("*.npy"))
            return
        check_archive(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        except Exception as error:  # a damaged file makes the readers raise almost anything
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        kind = ".npy files" if self.folder else ".npz"
        return UserError(f"cannot read {self.path} as {kind} without object arrays ({why(error)}).")

    def array(self, key: str) -> np.ndarray:
        """One array, in memory."""
        try:
            if self.folder:
                return np.load(self.path / f"{key}.npy", allow_pickle=False)
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return archive[key]
        except Exception as error:
            raise self._unreadable(error) from error

    def images(self, key: str) -> Images:
        """One array as images.

        Raises:
            UserError: an array that is no images.
        """
        shape, dtype, packed = self._header(key)
        need(not dtype.hasobject, f"cannot read {self.path}: {key} holds objects, and object arrays are refused.")
        fix = "convert values from 0 to 255 by images.astype('uint8')"
        usable = dtype.kind == "f" or dtype.newbyteorder("=") in (np.uint8, np.uint16, np.bool_)
        need(usable, f"{self.path}: {key} is {dtype}; uint8, uint16 or floats are expected; {fix}.")
        layout = layout_of(shape)
        need(
            layout is not None and 0 not in shape,
            f"{self.path}: {key} is {shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W), not empty, and one axis "
            f"that is surely that of 1 to {MOST_CHANNELS} channels.",
        )
        assert layout is not None
        if int(np.prod(shape)) * dtype.itemsize > SMALL:
            there: Images | None = open_npy(self.path / f"{key}.npy") if self.folder else open_member(self.path, key)
            if there is None and self.cache is not None and packed and dtype.name in KINDS:
                there = self._unpacked(key, shape, dtype, layout)
            if there is not None:
                return there
        array = as_rows(self.array(key), layout)
        bad = int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0
        need(not bad, f"{self.path}: {key} has {bad} NaN or infinite values; repair or remove those images.")
        return InMemory(from_numpy(array))

    def _header(self, key: str) -> tuple[tuple[int, ...], np.dtype, bool]:
        """Shape and type of an array, and whether it is compressed row by row."""
        try:
            if self.folder:
                with (self.path / f"{key}.npy").open("rb") as file:
                    shape, _, dtype = array_header(file)
                return shape, dtype, False
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as member:
                shape, fortran, dtype = array_header(member)  # type: ignore[arg-type]
                stored = archive.getinfo(f"{key}.npy").compress_type == zipfile.ZIP_STORED
                return shape, dtype, not (stored or fortran)
        except Exception as error:
            raise self._unreadable(error) from error

    def _unpacked(self, key: str, shape: tuple[int, ...], dtype: np.dtype, layout: Layout) -> Images:
        """The images of a compressed array, unpacked into the cache."""
        count, *rest = shape
        row = dtype.itemsize * int(np.prod(rest))

        def rows(start: int) -> Iterator[np.ndarray]:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as member:
                array_header(member)  # type: ignore[arg-type]
                for number in range(count):
                    data = member.read(row)
                    need(len(data) == row, f"{self.path}: {key} is cut short; write it again.")
                    if number >= start:
                        yield as_rows(np.frombuffer(data, dtype).reshape(1, *rest), layout)[0]

        sample = as_rows(np.zeros((1, *rest), dtype), layout)
        channels, height, width = sample.shape[1:]
        wanted = Look(channels, height, width, sample.dtype.name)  # type: ignore[arg-type]
        return Cache(Path(self.cache or "")).images(digest_of(self.path), {"array": key}, count, wanted, rows)

    def part(self, images: str, labels: str | None, groups: str | None = None) -> Split:
        """Checked images and labels as a part.

        Args:
            images: name of their array.
            labels: the same; None: there are none.
            groups: the same; None or not there: there are none.

        Raises:
            UserError: an array that is missing or not as it must be.
        """
        for key in (images, labels):
            found = ", ".join(map(printable, self.names)) or "none"
            need(key is None or key in self.names, f"{self.path} has no array {key!r}; found: {found}.")
        pixels = self.images(images)
        numbers = np.full(len(pixels), UNLABELLED) if labels is None else self._labels(labels)
        counts = f"{len(pixels)} {images}, {len(numbers)} {labels}"
        need(len(numbers) == len(pixels), f"{self.path}: label count mismatch: {counts}.")
        named: tuple[str, ...] = ()
        if groups in self.names:
            array = self.array(str(groups)).reshape(-1)
            need(
                array.dtype.kind in "iuSU" and len(array) == len(pixels),
                f"{self.path}: {groups} is {array.dtype} {array.shape}, expected {len(pixels)} numbers or texts.",
            )
            named = tuple(printable(str(each)) for each in array.tolist())
        return Split(pixels, torch.from_numpy(numbers.astype(np.int64)), (), named)

    def _labels(self, key: str) -> np.ndarray:
        labels = self.array(key)
        if labels.dtype.kind == "f":
            bad = int((~np.isfinite(labels)).sum())
            need(not bad, f"{self.path}: {key} has {bad} NaN or infinite values; repair or remove those images.")
        shaped = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
        kind = f"{self.path}: {key} is {labels.dtype} {labels.shape}, expected integers (N,) or (N, 1)."
        need(shaped and labels.dtype.kind in "iu", kind)
        labels = labels.reshape(-1)
        negative = len(labels) and labels.astype(np.int64).min() < 0
        need(not negative, f"{self.path}: {key} has negative labels; number the classes 0, 1, 2, ...")
        return labels


def as_rows(array: np.ndarray, layout: Layout) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) of any type as (N, C, H, W) uint8, uint16 or float32."""
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    array = array[:, None] if layout == "grey" else array.transpose(0, 3, 1, 2) if layout == "last" else array
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def npz(source: DataConfig) -> Parts:
    """An .npz file, or a folder of .npy files, with the keys that head this module.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W), uint8, uint16 or floats; labels (N,) or (N, 1) integers from 0.

    Raises:
        UserError: missing or damaged file, an array that is not as above, a class without training image.
    """
    path = path_of(source)
    if source.groups is not None:
        raise UnfitGroupsError(f"`groups` is for names of files; give {path} an array train_groups instead.")
    stored = Stored(path, source.cache)
    given = [name for name in PARTS if name == "train" or f"{name}_images" in stored.names]
    parts = {name: stored.part(f"{name}_images", f"{name}_labels", f"{name}_groups") for name in given}
    shapes = {name: tuple(part.images.shape[1:]) for name, part in parts.items()}
    need(len(set(shapes.values())) == 1, f"{path}: the parts' images differ in (C, H, W): {shapes}.")
    kinds = {name: part.images.kind for name, part in parts.items()}
    need(len(set(kinds.values())) == 1, f"{path}: the parts' images differ in type: {kinds}.")
    last = max(int(part.labels.max()) for part in parts.values())
    present = np.unique(parts["train"].labels.numpy())
    gap = next(i for i, label in enumerate([*present, -1]) if i != label)
    empty = f"{path}: empty class {gap}: labels go up to {last}, but no training image has label {gap}"
    need(gap > last, f"{empty}; number the classes 0, 1, 2, ... without gaps.")
    return parts["train"], parts.get("val"), parts.get("test"), tuple(map(str, range(gap)))


def npy(source: DataConfig) -> Parts:
    """A folder of .npy files: train_images.npy, train_labels.npy and so on.

    Raises:
        UserError: no such folder, or as ``npz``.
    """
    path = path_of(source)
    need(is_dir(path), f"no such folder: {path}; npy:FOLDER needs one with train_images.npy and train_labels.npy.")
    return npz(source)
