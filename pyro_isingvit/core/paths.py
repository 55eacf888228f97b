"""Paths as users and tables write them. ``Path`` raises for some that simply are not there."""

import os
from pathlib import Path


def with_home(text: str | Path) -> Path:
    """The path, with ~ replaced where that user is known."""
    return Path(os.path.expanduser(text))


def is_file(path: Path) -> bool:
    """Whether there is such a file; False too where the name is too long for any."""
    return os.path.isfile(path)


def is_dir(path: Path) -> bool:
    """Whether there is such a folder; False too where the name is too long for any."""
    return os.path.isdir(path)
