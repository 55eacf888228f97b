"""Decoded images in a folder, so that they are decoded once and need not fit into memory.

    CACHE/seen-NAMES.npz    digest of every file's content, with the file's size and times when it was taken
    CACHE/KEY/images.bin    the images, one after another; KEY is a digest of all contents and of how they are read
    CACHE/KEY/sums.bin      CRC-32 of each
    CACHE/KEY/index.json    how many, of which shape and type; written last

A file that changes has another digest, and so has the cache. The one who comes first fills it, others wait; one that
was killed is continued. Every image is checked when it is first read. Less than 256 MiB of them are read at once.

Shapes: N images, C channels, H height, W width.
"""

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path

import numpy as np

from pyro_isingvit.core.checkpoint import write_atomically, write_json
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.pixels import KINDS
from pyro_isingvit.data.decode import Look, Reading, common, look, read
from pyro_isingvit.data.images import Images
from pyro_isingvit.data.on_disk import SMALL, OnDisk
from pyro_isingvit.data.parallel import in_parallel

log = logging.getLogger(__name__)
FORMAT = 2  # raised when files become other images than before, or look otherwise
IMAGES, SUMS, INDEX, PART = "images.bin", "sums.bin", "index.json", ".part"
STEP = 256  # images between two notes of how far it is
Rows = Callable[[int], Iterator[np.ndarray]]  # images (C, H, W) from this number on


class Cache:
    """A folder of decoded images.

    Args:
        folder: made if it is not there; may serve any number of data sets.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            need(os.access(folder, os.W_OK), f"`cache` {folder} cannot be written to; name another folder.")
        except OSError as error:
            raise UserError(f"`cache` {folder} cannot be a folder ({why(error)}); name another one.") from error

    def of_files(self, paths: Sequence[Path], reading: Reading, wanted: Look | None) -> tuple[Images, list[Look]]:
        """Images of files, decoded if they are not there yet; and what the files hold.

        Args:
            paths: the files.
            reading: how they are read.
            wanted: what all become; None: what they have in common.

        Raises:
            UserError: a file that cannot be read, a full disk, or a damaged cache.
        """
        content, looks = self.seen(paths, reading)
        chosen = wanted or common(looks, paths, reading)

        def rows(start: int) -> Iterator[np.ndarray]:
            left = paths[start:]
            return in_parallel(lambda path: read(path, reading, chosen), left, "filling the cache", start)

        how: dict[str, str] = {"how": reading.how, "pages": reading.pages}
        return self.images(content, how, len(paths), chosen, rows), looks

    def images(self, content: bytes, how: dict[str, str], count: int, wanted: Look, rows: Rows) -> Images:
        """Images that ``rows`` gives, kept under the digest of ``content`` and of how it was read.

        Args:
            content: a digest of what the images come from.
            how: settings that change the images.
            count: N.
            wanted: what they are.
            rows: reads or makes them, from a number on.

        Raises:
            UserError: a full disk, or a damaged cache; whatever ``rows`` raises.
        """
        import filelock

        about = {"format": FORMAT, "images": count, **asdict(wanted)}
        key = blake2b(json.dumps({**about, **how}).encode() + content, digest_size=16).hexdigest()
        place = self.folder / key
        try:
            place.mkdir(exist_ok=True)
            lock = filelock.FileLock(place / "lock")
            if not (place / INDEX).exists():
                try:
                    lock.acquire(timeout=0)
                except filelock.Timeout:
                    log.warning("another process is filling %s; waiting for it", place)
                    lock.acquire()
                try:
                    if not (place / INDEX).exists():
                        self._fill(place, about, count, wanted, rows)
                finally:
                    lock.release()
        except OSError as error:
            raise self._cannot(place, error) from error
        except UserError:  # a file is to be mended, and then the digest is another
            shutil.rmtree(place, ignore_errors=True)
            raise
        return self._open(place, about, count, wanted)

    def seen(self, paths: Sequence[Path], reading: Reading) -> tuple[bytes, list[Look]]:
        """Digests of the files' contents, one after another, and what each holds; only touched files are read again.

        Raises:
            UserError: a file cannot be read.
        """
        names = "\0".join([str(FORMAT), reading.pages, *(str(path.resolve()) for path in paths)])
        digest = blake2b(names.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        store, count = self.folder / f"seen-{digest}.npz", len(paths)
        touched = np.array([_touched(path) for path in paths], np.int64)  # (N, 4)
        digests, held, fresh = np.zeros((count, 16), np.uint8), np.zeros((count, 4), np.int64), np.ones(count, bool)
        try:
            with np.load(store, allow_pickle=False) as kept:
                same = (kept["touched"] == touched).all(1)
                digests[same], held[same], fresh = kept["digests"][same], kept["held"][same], ~same
        except Exception:  # missing or damaged: the files themselves are there
            log.debug("%s is made anew", store)
            fresh[:] = True
        changed = np.flatnonzero(fresh)
        results = in_parallel(
            lambda path: (digest_of(path), look(path, reading)), [paths[i] for i in changed.tolist()], "looking"
        )
        for row, (found, one) in zip(changed, results, strict=True):
            digests[row] = np.frombuffer(found, np.uint8)
            held[row] = one.channels, one.height, one.width, KINDS.index(one.kind)
        if len(changed):
            write_atomically(store, lambda path: _save(path, touched=touched, digests=digests, held=held))
        looks = [Look(channels, height, width, KINDS[kind]) for channels, height, width, kind in held.tolist()]
        return digests.tobytes(), looks

    def _fill(self, place: Path, about: dict[str, object], count: int, wanted: Look, rows: Rows) -> None:
        """Writes what is missing; where a killed process stopped, it goes on."""
        size = wanted.channels * wanted.height * wanted.width * np.empty(0, wanted.kind).itemsize
        images, sums = (place / f"{name}{PART}" for name in (IMAGES, SUMS))
        flags = os.O_RDWR | os.O_CREAT
        target, notes = os.open(images, flags, 0o644), os.open(sums, flags, 0o644)
        try:
            done = min(os.fstat(notes).st_size // 4, os.fstat(target).st_size // size, count)
            self._reserve(target, place, count * size)
            if done:
                log.info("%s: %d of %d images are there already", place, done, count)
            found: list[int] = []
            for row, pixels in enumerate(rows(done), start=done):
                data = np.ascontiguousarray(pixels).astype(wanted.kind, copy=False).tobytes()
                _write(target, data, row * size)
                found.append(zlib.crc32(data))
                if len(found) == STEP or row == count - 1:
                    os.fdatasync(target)
                    _write(notes, np.array(found, "<u4").tobytes(), (row + 1 - len(found)) * 4)
                    found.clear()
            os.truncate(notes, 4 * count)
            os.fsync(notes)
        finally:
            os.close(target)
            os.close(notes)
        images.rename(place / IMAGES)
        sums.rename(place / SUMS)
        write_json(place / INDEX, about)

    def _reserve(self, target: int, place: Path, size: int) -> None:
        """Takes the space on disk before any work, where the file system can."""
        free = shutil.disk_usage(place).free + os.fstat(target).st_blocks * 512
        if size > free:
            raise OSError(errno.ENOSPC, f"{size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(target, 0, size)
        else:
            os.truncate(target, size)

    def _open(self, place: Path, about: dict[str, object], count: int, wanted: Look) -> Images:
        damaged = f"the cache {place} is damaged; delete this folder to have it made anew"
        try:
            written = json.loads((place / INDEX).read_text())
            sums = np.frombuffer((place / SUMS).read_bytes(), "<u4")
        except (OSError, ValueError) as error:
            raise UserError(f"{damaged} ({why(error)}).") from error
        need(written == about and len(sums) == count, f"{damaged}.")
        shape = (count, wanted.channels, wanted.height, wanted.width)
        images = OnDisk(place / IMAGES, shape, "first", wanted.kind, sums=sums)
        return images.in_memory() if count * images.row <= SMALL else images

    def _cannot(self, place: Path, error: OSError) -> UserError:
        """What to say when writing fails; a full disk is given back what was written."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full:
            shutil.rmtree(place, ignore_errors=True)
        fix = "make room or name another `cache`" if full else "name another `cache`"
        return UserError(f"cannot fill the cache {place} ({why(error)}); {fix}.")


def _touched(path: Path) -> tuple[int, int, int, int]:
    """What changes when a file does: the time of the last change cannot be set by hand."""
    try:
        about = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path} ({why(error)}).") from error
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def digest_of(path: Path) -> bytes:
    """16 bytes of BLAKE2 over a file's content.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file_digest(file, partial(blake2b, digest_size=16)).digest()
    except OSError as error:
        raise UserError(f"cannot read {path} ({why(error)}).") from error


def _write(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        wrote = os.pwrite(file, view, at)
        view, at = view[wrote:], at + wrote


def _save(path: Path, **arrays: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
