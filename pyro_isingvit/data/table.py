"""A table of image files: one line per image, with its path, its label and, if known, part, group and weight.

The table may come from anyone: paths stay below its folder, texts are shown with control characters written out.
"""

import csv
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.paths import is_file
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.arrays import loss_weights
from pyro_isingvit.data.files import read_files, real_paths
from pyro_isingvit.data.named import Parts, UnfitGroupsError, groups_of, path_of, reading_of
from pyro_isingvit.data.split import UNLABELLED, Split, tell_unknown

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("path", "label", "split", "group", "weight")
NEEDED = COLUMNS[:2]
END = "\x1e"  # a line after the last: where a quote is open, it is no line of its own
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip


def csv_table(source: DataConfig) -> Parts:
    """A table with a header: columns path and label, and, or not, split, group and weight.

    Paths start at the table's folder. ``split`` is train, val or test. Images of one group stay in one part. Weights
    are those of the images in the training loss. Labels that are all whole numbers are sorted as such, others as text.

    Raises:
        UserError: a missing or unreadable table, a missing column, or a line that cannot be used; the message names it.
    """
    import pandas as pd  # slow to import; other sources need none of it

    file = path_of(source)
    table = read_table(file, source.columns)
    need(len(table), f"{file} has no lines below its header.")
    paths = files_of(table["path"], file)
    labels, names = table["label"].str.strip(), [printable(path) for path in table["path"]]
    _each(file, table, "label", labels != "", "has no label; label or remove the image")
    said = labels.groupby([str(path) for path in paths]).transform("nunique")
    _each(file, table, "path", said == 1, "is there again with another label; keep one of the lines")
    numeric = labels.str.fullmatch(r"\d{1,9}").all()
    classes = sorted(set(labels), key=lambda label: (int(label) if numeric else 0, label))
    numbers = torch.tensor(labels.map({label: i for i, label in enumerate(classes)}).to_list())
    if "group" in table:
        if source.groups is not None:
            raise UnfitGroupsError(f"{file} has a column of groups; leave out `groups`, or name another column.")
        said = table["group"].str.strip()  # a space more is no other patient
        _each(file, table, "group", said != "", "has no group; name one, or remove the image")
        groups = tuple(map(printable, said))
    else:
        groups = groups_of(names, source.groups)
    weights = _weights(file, table) if "weight" in table else None
    parts = pd.Series("train", table.index)
    if "split" in table:
        parts = _splits(file, table)
        need((parts == "train").any(), f"{file} has no line whose split is train.")
    images, _ = read_files(paths, reading_of(source), cache=source.cache)
    whole = Split(images, numbers, tuple(names), groups, weights)
    found = {name: np.flatnonzero(parts == name) for name in ("train", "val", "test")}
    cut = {name: whole.take(rows) for name, rows in found.items() if len(rows)}
    lost = set(classes) - set(labels[parts == "train"])
    need(not lost, f"{file}: class {printable(min(lost, default=''))!r} has no training image.")
    return cut["train"], cut.get("val"), cut.get("test"), tuple(map(printable, classes))


def training_files(source: DataConfig) -> list[str]:
    """Paths, links to folders followed, of the files in a table whose split is not test.

    Args:
        source: whose ``dataset`` names the table.

    Raises:
        UserError: as ``read_table``, or a split that is none.
    """
    file = path_of(source)
    table = read_table(file, source.columns, ("path",))
    if "split" in table:
        table = table[_splits(file, table) != "test"]
    return real_paths([os.path.join(file.parent, text) for text in table["path"]])


def table_inputs(source: DataConfig, classes: Sequence[str]) -> tuple[list[Path], list[str], torch.Tensor]:
    """The images of a table that are to be predicted: all, or those whose split is test where it has such a column.

    Args:
        source: whose ``dataset`` names the table.
        classes: of the run.

    Returns:
        files, names, and (n,) class numbers: -1 for all where the table has no labels, or one that is no class.

    Raises:
        UserError: as ``csv_table``; no label is needed.
    """
    file = path_of(source)
    table = read_table(file, source.columns, ("path",))
    if "split" in table:
        table = table[_splits(file, table) == "test"]
        need(len(table), f"{file} has no line whose split is test.")
    need(len(table), f"{file} has no lines below its header.")
    known = {name: number for number, name in enumerate(classes)}
    said = [known.get(printable(text.strip()), UNLABELLED) for text in table.get("label", [])]
    tell_unknown(said, [*table["path"]], "its label is empty or no class of the run")
    unknown = UNLABELLED in said or not said
    labels = torch.full((len(table),), UNLABELLED) if unknown else torch.tensor(said)
    return files_of(table["path"], file), [printable(path) for path in table["path"]], labels


def read_table(file: Path, renamed: str = "", needed: Sequence[str] = NEEDED) -> "pd.DataFrame":
    """The table as texts, its known columns called as in ``COLUMNS``; others are left out.

    Args:
        file: comma, semicolon or tab between the columns; UTF-8.
        renamed: "path=file,label=finding" where the columns have other names.
        needed: columns that must be there.

    Returns:
        one row per image, whose index is the line of the file that it starts in.

    Raises:
        UserError: a missing or unreadable table, a missing or doubled column, or a line with more fields than columns.
    """
    import pandas as pd

    names = _names(renamed)
    need(is_file(file), f"no such file: {file}.")
    head, starts, rows = _rows(file)
    have = ", ".join(map(printable, head))
    for known, name in names.items():
        optional = known not in needed and (name == known or needed != NEEDED)
        count = head.count(name)
        need(count or optional, f"{file} has no column {name!r}; it has: {have}. `columns` names others.")
        need(count <= 1, f"{file} has {count} columns {name!r}; keep one.")
    here = {known: head.index(name) for known, name in names.items() if name in head}
    return pd.DataFrame(
        {known: [row[at] for row in rows] for known, at in here.items()}, pd.Index(starts, dtype=int), dtype=str
    )


def _names(renamed: str) -> dict[str, str]:
    """Known column -> what the table calls it, for ``columns``; a name given to one is no longer that of another."""
    given = dict[str, str]()
    for pair in filter(None, renamed.split(",")):
        known, equals, name = (text.strip() for text in pair.partition("="))
        wrong = (
            f"`columns` must be like 'path=file,label=finding', with {', '.join(COLUMNS)} on the left, not {renamed!r}."
        )
        need(equals and name and known in COLUMNS, wrong)
        given[known] = name
    names = given | {known: known for known in COLUMNS if known not in given and known not in given.values()}
    lost = [known for known in NEEDED if known not in names]
    twice = next((name for name in given.values() if list(given.values()).count(name) > 1), lost and lost[0])
    need(not twice, f"`columns` {renamed!r} takes column {twice!r} twice; say which one is meant.")
    return names


def _rows(file: Path) -> tuple[list[str], list[int], list[list[str]]]:
    """Names of the columns, the line that each row starts in, and the rows, each as long as the names.

    Raises:
        UserError: a file that is no such table, or a row with more fields than there are names.
    """
    starts, rows, limit = [1], list[list[str]](), csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            separator = max(",;\t", key=first.count)
            reader = csv.reader(itertools.chain(lines, [END]), delimiter=separator, skipinitialspace=True)
            for row in reader:
                rows.append(row)
                starts.append(reader.line_num + 1)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {file} as a table in UTF-8 ({why(error)}).") from error
    finally:
        csv.field_size_limit(limit)
    need(rows.pop() == [END], f"cannot read {file} as a table (line {starts[-2]}: a quote is not closed).")
    head, starts = [name.strip() for name in rows.pop(0)] if rows else [], starts[1:-2]
    need(any(head), f"cannot read {file} as a table (its first line has no names of columns).")
    for line, row in zip(starts, rows, strict=True):
        if len(row) > len(head):
            fix = f"line {line} has {len(row)} fields, and there are {len(head)} columns; quote what holds a separator"
            need(not any(text.strip() for text in row[len(head) :]), f"cannot read {file} as a table ({fix}).")
        row += [""] * (len(head) - len(row))
    return head, starts, rows


def files_of(texts: "pd.Series[str]", file: Path) -> list[Path]:
    """The files that a table names.

    Raises:
        UserError: a path that leaves the table's folder, or a file that is not there.
    """
    folder = file.parent.resolve()
    inside = f"lies outside of {folder}; paths are relative to the table's folder and stay in it"
    paths, known = [], dict[str, bool]()  # folder -> whether it lies inside, links followed
    for line, text in texts.items():
        where = f"{file}, line {line}: path '{printable(text)}'"
        need(text.strip() and "\0" not in text, f"{where} is no path of a file.")
        joined = os.path.normpath(os.path.join(folder, text))
        above = os.path.dirname(joined)
        if above not in known:
            known[above] = Path(above).resolve().is_relative_to(folder)
        need(known[above], f"{where} {inside}.")
        path = Path(joined)
        need(is_file(path), f"{where}: there is no such file.")
        need(not path.is_symlink() or path.resolve().is_relative_to(folder), f"{where} {inside}.")
        paths.append(path)
    return paths


def _splits(file: Path, table: "pd.DataFrame") -> "pd.Series[str]":
    """The part of each line."""
    said = table["split"].str.strip().str.lower()
    _each(file, table, "split", said.isin(list(SPLITS)), "is none of train, val and test")
    return said.map(SPLITS)


def _weights(file: Path, table: "pd.DataFrame") -> torch.Tensor | None:
    import pandas as pd

    numbers = pd.to_numeric(table["weight"], errors="coerce")
    _each(file, table, "weight", np.isfinite(numbers) & (numbers > 0), "is no positive number")
    return loss_weights(numbers.to_numpy())


def _each(file: Path, table: "pd.DataFrame", column: str, good: "pd.Series[bool]", problem: str) -> None:
    """Raises UserError for the first line that is not good."""
    bad = np.flatnonzero(~good.to_numpy())
    if len(bad):
        text = printable(str(table[column].iloc[bad[0]]))
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(f"{file}, line {table.index[bad[0]]}: {column} '{text}' {problem}{more}.")
