"""What readers of a user's own files share: path, way of reading, groups in the files' names."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pyro_isingvit.core.errors import UserError, why
from pyro_isingvit.core.paths import with_home
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.decode import Reading
from pyro_isingvit.data.split import Split


class UnfitGroupsError(UserError):
    """The settings' ``groups`` cannot be found in the names of a data set's files, or it has groups of its own."""


Parts = tuple[Split, Split | None, Split | None, tuple[str, ...]]  # official train, val, test; class names


def path_of(source: DataConfig) -> Path:
    """The path after the colon of ``name:PATH``."""
    return with_home(source.dataset.partition(":")[2])


def is_own(spec: str, source: DataConfig) -> bool:
    """Whether ``name:PATH`` is the data set of the settings, however its path is spelled."""
    kinds = spec.partition(":")[0], source.dataset.partition(":")[0]
    same = kinds[0] == kinds[1] and ":" in spec
    return spec == source.dataset or (
        same and path_of(replace(source, dataset=spec)).resolve() == path_of(source).resolve()
    )


def reading_of(source: DataConfig) -> Reading:
    """How files become images."""
    size = source.image_size
    return Reading((size, size) if size else None, source.resize, source.pages)


def groups_of(names: Sequence[str], pattern: str | None) -> tuple[str, ...]:
    """The group that each file's name tells: what the first parentheses of the pattern hold, or all that it matches.

    Args:
        names: paths below the data's folder, with forward slashes.
        pattern: a regular expression; None: no groups.

    Raises:
        UserError: no regular expression.
        UnfitGroupsError: a name in which it finds nothing.
    """
    if pattern is None:
        return ()
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"`groups` {pattern!r} is no regular expression ({why(error)}).") from error
    found = [search(name) for name in names]
    told = [match and match[min(1, match.re.groups)] for match in found]
    lost = next((name for name, group in zip(names, told, strict=True) if not group), None)
    if lost is not None:
        raise UnfitGroupsError(f"`groups` {pattern!r} finds no group in the file name {printable(lost)!r}.")
    return tuple(printable(group or "") for group in told)
