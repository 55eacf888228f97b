"""A folder whose files appear together or not at all."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyro_isingvit.core.checkpoint import flush_names, uninterrupted
from pyro_isingvit.core.errors import UserError

README = "README.md"
MARK = "<!-- Written by pyro-isingvit. Remove this line to keep changes of your own. -->"


@contextmanager
def staged(folder: Path, replaces: Sequence[str]) -> Iterator[Path]:
    """A new folder in or beside ``folder``; when the block is done, its files move there.

    Args:
        folder: made if it is not there.
        replaces: patterns of earlier files that go when the new ones come. A README.md without ``MARK``, which is
            somebody's own, stays as it is.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; nothing has changed.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder if folder.is_dir() else folder.parent  # of a folder that is there, the one above may be closed
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}.") from error
    try:
        yield temporary
        with uninterrupted():
            _move(temporary, folder, replaces)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path, replaces: Sequence[str]) -> None:
    """The files of one folder into another; what they replace goes first, so that a crash leaves no mixture."""
    folder.mkdir(exist_ok=True)
    ours = is_ours(folder)
    for path in [path for pattern in replaces for path in folder.glob(pattern)]:
        if path.name != README or ours:
            path.unlink()
    for path in [path for path in sorted(temporary.rglob("*")) if path.is_file() and (ours or path.name != README)]:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    flush_names(folder)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder until the block is done.

    Raises:
        UserError: there is no place for one.
    """
    try:
        place = tempfile.TemporaryDirectory()
    except OSError as error:
        raise UserError(f"cannot write a temporary folder: {error.strerror or error}; set TMPDIR.") from error
    with place as name:
        yield Path(name)


def is_ours(folder: Path) -> bool:
    """Whether the folder has no README.md, or one that may be written again."""
    path = folder / README
    return not path.exists() or MARK in path.read_text(errors="replace")
