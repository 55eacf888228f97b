"""Checks of files and names of unknown origin, before they are unpacked, shown or written.

No torch here: command lines are checked before anything heavy is loaded.
"""

import re
import unicodedata
import zipfile
from pathlib import Path

from pyro_isingvit.core.errors import need

FREE = 2**30  # bytes that any file may unpack to
RATIO = 200  # and beyond those, bytes for each byte on disk; deflate alone can make 1,032
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes a spreadsheet run a cell


def check_expansion(path: Path, expanded: int) -> None:
    """Refuses a file that is small on disk and huge in memory.

    Args:
        path: the file.
        expanded: bytes that it says it unpacks to.

    Raises:
        UserError: more than 1 GiB and more than 200 times its size.
    """
    size = path.stat().st_size
    huge = f"{path} has {size:,} bytes and would unpack to {expanded:,}: a decompression bomb"
    need(expanded <= max(FREE, RATIO * size), f"{huge}; if it is yours, save it without compression.")


def check_archive(path: Path) -> None:
    """Refuses an .npz file that is a decompression bomb; its reader finds whatever else is wrong.

    Raises:
        UserError: it would unpack to far more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(member.file_size for member in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return
    check_expansion(path, expanded)


def printable(name: str) -> str:
    r"""A name with control characters, line ends and broken Unicode written out: \x1b, \x00, \udcff."""
    return "".join(c.encode("unicode_escape").decode() if _unseen(c) else c for c in name)


def _unseen(character: str) -> bool:
    """Whether a character is invisible: control characters, line ends, surrogates, changes of direction."""
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"  # the direction of writing
    return turns or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


def file_stem(name: str, most: int = 80) -> str:
    """A name as part of a file's: letters, digits, dots, dashes and underscores, no leading dot, cut to ``most``."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", name).lstrip(".")[:most] or "_"


def plain(name: str) -> str:
    """A name without what Markdown, HTML, TeX and terminals give a meaning to; those characters become underscores."""
    return re.sub(r"[\\|<>&$`*\[\]{}\"]", "_", printable(name))


def csv_text(text: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe in front, unless it is a plain number."""
    if not text.startswith(FORMULA):
        return text
    return text if re.fullmatch(r"[+-]?\d+(\.\d+)?", text) else f"'{text}"
