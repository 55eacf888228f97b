"""What a run folder holds: names of its files, its settings, its epochs as JSON lines."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyro_isingvit.core.checkpoint import previous_of, remove_leftovers
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.paths import is_dir, is_file
from pyro_isingvit.core.settings import RunConfig

CONFIG, CHECKPOINT, HISTORY, METRICS, POSTERIOR = (
    "config.json", "checkpoint.pt", "metrics.jsonl", "metrics.json", "posterior.nc",
)  # fmt: skip

PREVIOUS = previous_of(Path(CHECKPOINT)).name
FILES = (CONFIG, CHECKPOINT, PREVIOUS, HISTORY, METRICS, POSTERIOR)  # first what makes the folder a run
SHARED = "model.safetensors"  # the tensors of a run that is shared
REPORT = "report"  # folder of the page and its figures
COMPACT = "compact.json"  # what makes a folder a compact network


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return any((folder / name).exists() for name in (CONFIG, CHECKPOINT, PREVIOUS))


def is_evaluated(folder: Path) -> bool:
    """Whether a folder holds metrics and posterior of a run."""
    return all(is_file(folder / name) for name in (METRICS, POSTERIOR))


def need_folder(folder: Path) -> None:
    """Raises UserError where a path cannot be a folder: there is a file."""
    need(not folder.exists() or is_dir(folder), f"{folder} is a file; a run needs a folder.")


def need_room(folder: Path) -> None:
    """Raises UserError where a run cannot be written: there is a file, or files of a run's names that are no run's."""
    need_folder(folder)
    others = [] if holds_run(folder) else [name for name in (*FILES, REPORT, COMPACT) if (folder / name).exists()]
    need(not others, f"{folder} holds {', '.join(others)} but no run, which would replace them; name another folder.")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder within the block; nothing is written, and a kill leaves nothing.

    Raises:
        UserError: another process trains in it, or it cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows cannot lock a folder
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {folder}; wait for it, or name another folder.") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def clear_run(folder: Path) -> None:
    """Removes an earlier run's files, and those alone; ``need_room`` says whether they are a run's.

    Raises:
        UserError: they cannot be removed.
    """
    try:
        clear_report(folder)
        for name in reversed(FILES):  # what makes it a run goes last: an interrupted call can be made again
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}.") from error


def clear_report(folder: Path) -> None:
    """Removes an earlier run's report, and temporary files that a killed process left behind."""
    remove_leftovers(folder, FILES)
    shutil.rmtree(folder / REPORT, ignore_errors=True)


def is_shared(folder: Path) -> bool:
    """Whether a folder holds a shared run, and no run that can be resumed."""
    return is_file(folder / SHARED) and not (folder / CHECKPOINT).exists()


def read_config(folder: Path) -> RunConfig:
    """The settings of a run folder.

    Raises:
        UserError: no such folder, no run in it, or one of another format.
    """
    if not is_dir(folder):
        raise UserError(f"there is no run folder {folder}; name the folder of a trained run.")
    path = folder / CONFIG
    if not is_file(path):
        cut = is_file(folder / COMPACT)
        need(not cut, f"{folder} holds a network that was cut out of a run, and no run; name the run's own folder.")
        raise UserError(f"{folder} holds no run: {CONFIG} is missing.")
    if is_shared(folder):
        raise UserError(
            f"{folder} holds a shared run, which predicts; for what needs its training name its own folder."
        )
    return RunConfig.from_json(path.read_text(errors="replace"), path)


def trained_alike(first: RunConfig, second: RunConfig) -> bool:
    """Whether two runs, apart from their methods, were trained the same: data, start, shape, and settings of training.

    What follows the last epoch may differ: temperature, draws of the evaluation. A start brings its shape, but for the
    head, so that of one whose training has not begun is not known.
    """

    def trained(config: RunConfig) -> tuple[Any, ...]:
        shape = config.vit if config.init is None else config.vit.head
        return replace(config.train, calibrate=True, samples=1), shape, config.data, config.init, config.teacher

    return trained(first) == trained(second)


def to_lines(history: list[dict[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in history)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl.

    Raises:
        UserError: missing or cut short.
    """
    if not is_file(path):
        raise UserError(f"{path} is missing: the run was cut short before its first epoch; train it again.")
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        if not all(isinstance(record, dict) for record in records):
            raise ValueError("a line is no object")
        return records
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); resume the run to write it again.") from error
