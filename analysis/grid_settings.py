"""Settings that the cells of a grid should share, and do not: what a table must say of itself."""

import json
from collections import Counter, defaultdict
from typing import Any

from pyro_isingvit.core.untrusted import plain

Cells = list[dict[str, Any]]
SHARED = {  # part of a run's settings -> the fields that all methods of a column have alike; None: all of them
    "data": None, "vit": None, "train": ("batch_size", "augment", "margin", "samples"), "": ("init",),
}  # fmt: skip
OWN = ("train", "ising", "baseline")  # parts that the seeds of one method have alike
APART = ("seed", "device", "download", "data_root", "cache", "teacher")


def unequal(cells: Cells) -> list[str]:
    """A sentence for every setting in which finished cells of a data set and size differ, though they are compared.

    Args:
        cells: rows of results.json; those without settings, of version 0.2 and before, are not looked at.
    """
    return _unequal(_done(cells))


def _unequal(cells: Cells) -> list[str]:
    columns: dict[tuple[str, int], Cells] = defaultdict(list)
    for cell in cells:
        columns[cell["dataset"], cell["train_size"]].append(cell)
    found: list[str] = []
    for (dataset, size), column in sorted(columns.items()):
        where = f"{plain(dataset)}, {size:,} images"
        found += _told(where, [(cell["method"], _shared(cell)) for cell in column])
        for method in sorted({cell["method"] for cell in column}):
            own = [(f"seed {cell['seed']}", _own(cell)) for cell in column if cell["method"] == method]
            found += _told(f"{where}, {plain(method)}", own)
    return found


def between(cells: Cells, others: Cells, names: tuple[str, str]) -> list[str]:
    """What two grids differ in besides where training starts, for the cells that both have.

    Args:
        cells: rows of a results.json.
        others: rows of another one.
        names: of the two, for the sentences.

    Returns:
        settings that all methods should share, as ``unequal`` tells them; then each method's own.
    """
    grids = [{_key(cell): cell for cell in _done(grid)} for grid in (cells, others)]
    both = grids[0].keys() & grids[1].keys()
    alike = []
    for name, grid in zip(names, grids, strict=True):
        for key in sorted(both):
            cell = grid[key]
            alike.append({**cell, "method": f"{cell['method']}, {name}", "config": {**cell["config"], "init": None}})
    found: dict[str, list[str]] = defaultdict(list)
    for key in sorted(both):
        first, second = (_own(grid[key]) for grid in grids)
        told = [
            f"`{plain(name)}` {plain(str(second[name]))} instead of {plain(str(first[name]))}"
            for name in second
            if name in first and first[name] != second[name]
        ]
        if told:
            where = f"{plain(str(key[0]))} {key[1]:,}"
            seen = found[f"`{plain(str(key[2]))}`, {names[1]}: {', '.join(told)}"]
            seen += [] if where in seen else [where]
    return _unequal(alike) + [f"{text} ({'; '.join(where)})." for text, where in found.items()]


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["dataset"], cell["train_size"], cell["method"], cell["seed"]


def _done(cells: Cells) -> Cells:
    """Finished cells that have settings, which are read."""
    done = (cell for cell in cells if cell["status"] == "done" and "config" in cell)
    return [{**cell, "config": json.loads(cell["config"])} for cell in done]


def _shared(cell: dict[str, Any]) -> dict[str, Any]:
    config, found = cell["config"], {"epochs": cell["epochs"], "version": minor(cell["config"].get("version", ""))}
    for part, names in SHARED.items():
        values = config.get(part, {}) if part else config
        found |= {name: values.get(name) for name in (values if names is None else names)}
    return {name: value for name, value in found.items() if name not in APART}


def _own(cell: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for part in OWN for name, value in cell["config"].get(part, {}).items()}
    known = _shared(cell)
    return {name: value for name, value in values.items() if name not in (*APART, *known)}


def minor(version: str) -> str:
    """0.13 of 0.13.0."""
    return ".".join(version.split(".")[:2])


def _told(where: str, cells: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What most have, and who has something else; a field that older cells lack is not compared with them."""
    found = []
    for name in dict.fromkeys(name for _, settings in cells for name in settings):
        values = [(who, f"{settings[name]}") for who, settings in cells if name in settings]
        (usual, _), *others = Counter(value for _, value in values).most_common()
        cells_of, with_value = Counter(who for who, _ in values), Counter(values)
        told = []
        for value, _ in others:
            whose = [who for who in cells_of if with_value[who, value]]
            parts = {who: f" ({with_value[who, value]} of {cells_of[who]} seeds)" for who in whose
                     if with_value[who, value] < cells_of[who]}  # fmt: skip
            told.append(f"{plain(value)} for {', '.join(f'`{plain(who)}`{parts.get(who, "")}' for who in whose)}")
        if told:
            found.append(f"{where}: `{plain(name)}` is {plain(usual)}, but {'; '.join(told)}.")
    return found
