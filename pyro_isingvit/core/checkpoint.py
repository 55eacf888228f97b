"""Files of a run: written whole or not at all, read without running code from them.

A checkpoint is torch's zip file, then the SHA-256 of its bytes, then SEAL. The previous checkpoint is kept too.
"""

import contextlib
import glob
import hashlib
import io
import json
import logging
import os
import signal
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pyro_isingvit.core.errors import UserError, why

log = logging.getLogger(__name__)
SEAL = b"IsingViT"  # the last bytes of a checkpoint that has a checksum
ZIP_END = 22  # bytes of the record that ends a zip file, which starts with PK 5 6


class DamagedError(UserError):
    """A checkpoint that is cut short, altered, or none at all."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the block is done; does nothing outside the main thread.

    A netCDF library that is interrupted keeps its locks; its next call would then wait forever.
    """
    came: list[int] = []
    held: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        held = {number: what for number, what in handlers.items() if what not in (None, signal.SIG_IGN)}
    try:
        for number in held:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@uninterrupted()
def write_atomically(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Lets ``write`` fill a temporary file in the same folder, flushes it to disk, then renames it to ``path``.

    Ctrl-C waits until that is done.

    Args:
        path: the file to make or replace.
        write: called with the temporary path.
        previous: what the replaced file is renamed to; None: it is lost.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
            if previous is not None and path.exists():
                path.replace(previous)
            temporary.replace(path)
            flush_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there is unchanged.") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def flush_names(folder: Path) -> None:
    """Flushes renames to disk, so that they outlive a power cut."""
    with contextlib.suppress(OSError):  # some file systems refuse it for folders; the files themselves are flushed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes temporary files of ``names`` that a killed process left behind."""
    for name in names:
        pattern = f".{glob.escape(name)}.*{glob.escape(Path(name).suffix)}"  # as mkstemp names them, unlike editors
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def fingerprint(path: Path) -> tuple[int, bytes]:
    """Size and last bytes of a file, of a checkpoint with its checksum; (0, b"") where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(-min(size, 64), io.SEEK_END)
            return size, file.read()
    except OSError:
        return 0, b""


def previous_of(path: Path) -> Path:
    """Where the previous checkpoint is kept."""
    return path.with_stem(f"{path.stem}.previous")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors, numbers, strings and containers of them, atomically; the previous checkpoint is kept."""
    content = io.BytesIO()  # in memory first: torch reports a full disk as an error of its own
    torch.save(state, content)
    checksum = hashlib.sha256(content.getbuffer()).digest()
    content.seek(0, io.SEEK_END)
    content.write(checksum + SEAL)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()), previous_of(path))


def load_checkpoint(path: Path, repair: bool = False) -> dict[str, Any]:
    """Loads what ``save_checkpoint`` wrote, to the CPU, without unpickling code.

    A damaged checkpoint is replaced by the previous one, with a warning.

    Args:
        path: the checkpoint.
        repair: overwrite a damaged checkpoint with a copy of the previous one.

    Raises:
        UserError: missing, cut short, damaged, or holding anything but plain data, and the previous one is no better;
            or the repair cannot be written.
    """
    previous = previous_of(path)
    try:
        if path.is_file() or not previous.is_file():
            return _read(path)
        trouble = f"{path} is missing"  # killed between two renames
    except DamagedError as error:
        trouble = str(error)
        if not previous.is_file():
            raise
    try:
        state = _read(previous)
    except DamagedError as error:
        raise UserError(f"{trouble} The previous checkpoint is no better: {error} Train the run again.") from error
    log.warning("%s; %s is used, written after epoch %s", trouble.rstrip("."), previous.name, state.get("epoch", "?"))
    if repair:
        write_atomically(path, lambda temporary: temporary.write_bytes(previous.read_bytes()))
    return state


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: the run was cut short or never started; train it again.")
    try:
        state = torch.load(io.BytesIO(_unsealed(path.read_bytes())), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, by what is damaged
        raise DamagedError(f"{path} cannot be read ({why(error)[:160]}); it is damaged or no checkpoint.") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{path} holds no checkpoint; train the run again.")
    return state


def _unsealed(content: bytes) -> bytes:
    """The zip file, once its checksum is known to be right; older files have only the zip file's own."""
    end = len(content) - len(SEAL) - hashlib.sha256().digest_size
    if content.endswith(SEAL) and end > 0:
        if hashlib.sha256(content[:end]).digest() != content[end : -len(SEAL)]:
            raise ValueError("its checksum is wrong")
        return content[:end]
    if not content[-ZIP_END:].startswith(b"PK\5\6"):  # a seal that is itself damaged, or a file cut short
        raise ValueError("its end is missing")
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        if file.testzip() is not None:
            raise ValueError("its checksum is wrong")
    return content
