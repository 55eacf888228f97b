"""What every script shares: arguments by tyro, errors that the user can fix, a closing table.

The library knows nothing of command lines: its messages name settings in backticks, such as `patch_size`. Where a
script has that setting, the message shows its flag, --patch-size; other names lose their backticks.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import tyro

from pyro_isingvit.core.errors import ProcessLost, UserError, need
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.launcher import by_torchrun
from pyro_isingvit.core.untrusted import printable

# torchrun starts a script several times; the first process on each machine prints errors, the first of all reports.
SPEAKS = not by_torchrun() or os.environ["LOCAL_RANK"] == "0"
REPORTS = not by_torchrun() or os.environ["RANK"] == "0"
PATIENCE_S = 30.0  # how long the other processes hold their message back
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def run_script[T](
    main: Callable[[T], object], arguments: type[T], argv: list[str] | None = None, default: T | None = None
) -> None:
    """Parses ``argv`` and runs ``main``; a ``UserError`` is one message on stderr and exit code 2.

    Args:
        main: called with the parsed arguments.
        arguments: a dataclass.
        argv: the command line; None: ``sys.argv``.
        default: values to start from.
    """
    logging.basicConfig(level=logging.WARNING if SPEAKS else logging.CRITICAL, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pyro_isingvit").setLevel(logging.INFO if SPEAKS else logging.CRITICAL)
    extra: dict[str, Any] = {} if default is None else {"default": default}

    def everything() -> None:
        parsed = _parsed(lambda: tyro.cli(arguments, args=argv, config=FLAT, description=main.__doc__, **extra))
        check_fields(parsed)
        main(parsed)

    with_clear_errors(everything, arguments)


def in_flags(message: str, arguments: type | None) -> str:
    """A library's message in the words of a command line.

    Args:
        message: names settings and arguments in backticks.
        arguments: the script's dataclass; its fields, including nested ones, become flags. None: no name does.
    """
    names = set() if arguments is None else set(_field_names(arguments))

    def word(match: re.Match[str]) -> str:
        name = match[1]
        return f"--{name.replace('_', '-')}" if name in names else name

    return re.sub(r"`([A-Za-z_][\w.]*)`", word, message)


def _field_names(arguments: type) -> Iterator[str]:
    for field in dataclasses.fields(arguments):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _field_names(field.type)
        else:
            yield field.name


def _parsed[T](parse: Callable[[], T]) -> T:
    if SPEAKS:
        return parse()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return parse()
        except SystemExit as stop:
            leave = stop
    if leave.code:
        _fail(said.getvalue())
    raise leave


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C: open files are closed, half-written ones removed."""


def with_clear_errors(call: Callable[[], object], arguments: type | None = None) -> None:
    """Runs ``call``; errors and signals end the script with their message alone, in the script's own words.

    Exit codes: 2 for a ``UserError``, 130 for Ctrl-C, 143 for SIGTERM, 141 where the reader of stdout
    has left, 1 where another process of a training is lost.

    Args:
        call: takes nothing; its result is dropped.
        arguments: the script's dataclass; its fields become flags in the message (``in_flags``).
    """

    def terminate(*_: object) -> NoReturn:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        call()
    except UserError as error:
        _fail(f"error: {in_flags(str(error), arguments)}\n")
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush at the exit
        raise SystemExit(141) from None
    except ProcessLost as lost:  # each process that is left says so: which ones are is not known
        sys.stderr.write(f"error: {in_flags(str(lost), arguments)}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt as stop:
        if SPEAKS:
            sys.stderr.write(f"\n{in_flags(str(stop), arguments)}\n" if stop.args else "\ninterrupted\n")
        raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _reader_left() -> bool:
    """Whether nobody reads what is printed any more, such as head; other pipes, of workers, break too."""
    try:
        print(flush=True)  # a pipe says so when something is written
    except BrokenPipeError:
        return True
    return False


def _fail(text: str) -> NoReturn:
    """Leaves with a message and exit code 2.

    torchrun terminates all processes when the first one fails. The other processes therefore wait to be terminated. A
    process that is still running afterwards failed alone, and prints its message.
    """
    if not SPEAKS:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE_S)
    sys.stderr.write(text)
    raise SystemExit(2) from None


def results_file(folder: Path, name: str, overwrite: bool) -> Path:
    """Where a script writes its results.

    Raises:
        UserError: ``folder`` is a file, or it already holds such results and they must not be replaced.
    """
    path = folder / name
    need(overwrite or not path.exists(), f"{path} exists; choose another --out, or replace it with --overwrite.")
    check_place(folder)
    return path


def check_place(folder: Path) -> None:
    """Whether a folder can be made or written to, before any work is done; nothing is left there.

    Raises:
        UserError: it cannot, or is a file.
    """
    need(not folder.exists() or folder.is_dir(), f"{folder} is a file; --out takes a folder.")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another --out.") from error


def show_results(module: str, flag: str, folder: Path, what: str) -> None:
    """Lets a script of analysis/, which those of this folder do not import, draw what a folder holds.

    Raises:
        UserError: it could not.
    """
    done = subprocess.run([sys.executable, "-m", module, flag, str(folder)], check=False)
    need(done.returncode == 0, f"{what} of {folder} could not be made, for the reason above; all else is kept.")


def earlier_records(path: Path, check: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """Records of earlier calls; none where there is no file.

    Args:
        path: a JSON list.
        check: raises ValueError, KeyError, TypeError or AttributeError for what is no record.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text())
        for record in records:
            check(record)
        return list(records)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away and run again.") from error


def resumes(argv: list[str]) -> bool:
    """Whether a command line asks to continue what a folder holds, with the settings of the folder."""
    return any(word == "--resume" or word.startswith("--resume=") for word in argv)


def with_interval(metrics: Mapping[str, Any], name: str) -> object:
    """A metric for ``print_table``: its value, with its 95% interval where it has one."""
    value, ends = metrics[name], metrics.get("intervals", {}).get(name)
    return f"{value:.4f} ({ends[0]:.3f} to {ends[1]:.3f})" if ends else value


def scores_shown(metrics: Mapping[str, Any]) -> dict[str, object]:
    """Rows for ``print_table`` of how good predictions were; what is not known is left out."""
    names = {"balanced accuracy": "balanced_accuracy", "AUROC, macro": "auroc_macro", "sensitivity": "sensitivity",
             "specificity": "specificity"}  # fmt: skip
    shown = {"accuracy": metrics["accuracy"], "NLL (nats)": metrics["nll"], "ECE (15 bins)": metrics["ece"]}
    return shown | {title: with_interval(metrics, k) for title, k in names.items() if metrics.get(k) is not None}


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Prints names and values as a table; floats with four decimals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=printable(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for name, value in rows.items():
        table.add_row(printable(name), f"{value:.4f}" if isinstance(value, float) else printable(str(value)))
    Console(markup=False, emoji=False).print(table)  # a class may be called [/b] or :smile:
