"""Files of a run: written whole or not at all, read without running code from them."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyro_isingvit.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, flushes it to disk, then renames it into place.

    Args:
        path: the file to make or replace.
        write: called with the temporary path.

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
            temporary.replace(path)
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


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors, numbers, strings and containers of them, atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what ``save_checkpoint`` wrote, to the CPU, without unpickling code.

    Raises:
        UserError: missing, cut short, damaged, or holding anything but plain data.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: the run was cut short or never started; train it again.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, by what is damaged
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({first_line[:160]}); it is damaged or no checkpoint.") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no checkpoint; train the run again.")
    return state
