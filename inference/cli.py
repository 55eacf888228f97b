"""What every script shares: arguments by tyro, errors that are the user's to mend, a closing table."""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import tyro

from pyro_isingvit.errors import UserError

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
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pyro_isingvit").setLevel(logging.INFO)
    extra: dict[str, Any] = {} if default is None else {"default": default}
    parsed = tyro.cli(arguments, args=argv, config=FLAT, description=main.__doc__, **extra)
    with_clear_errors(lambda: main(parsed))


def with_clear_errors(call: Callable[[], object]) -> None:
    """Runs ``call``; a ``UserError`` leaves with its message and exit code 2."""
    try:
        call()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Prints names and values as a table; floats with four decimals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for name, value in rows.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
