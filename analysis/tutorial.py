"""Run docs/tutorial.md from top to bottom, and put what it prints and draws into the page.

python -m analysis.tutorial --page docs/tutorial.md
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from inference.cli import run_script
from pyro_isingvit.core.errors import need

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(python|sh)\n(.*?)```(\n\n```text\n.*?```)?", re.S)
FIGURE = re.compile(r"!\[[^\]]*\]\((tutorial/(\w+\.png))\)")


@dataclass(frozen=True)
class Arguments:
    """Which page to run."""

    page: Path
    """The page; its figures go to the folder that it names."""


def filled(text: str, shell: Callable[[list[str]], str]) -> str:
    """The page with the outputs that its code really gives.

    Python blocks share one namespace and run in the current folder, with their outputs on stdout.

    Args:
        text: the page.
        shell: runs one command, given as words, and returns what it prints.
    """
    names: dict[str, Any] = {}

    def run(block: re.Match[str]) -> str:
        language, code = block[1], block[2]
        if language == "python":
            printed = io.StringIO()
            with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(printed):
                step = Path(place, f"step_at_{block.start()}.py")
                step.write_text(code)
                names.update(runpy.run_path(str(step), names))
            output = printed.getvalue()
        else:
            output = "".join(shell(shlex.split(line)) for line in code.replace("\\\n", " ").splitlines())
        lines = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
        return f"```{language}\n{code}```" + (f"\n\n```text\n{lines}\n```" if lines else "")

    return BLOCK.sub(run, text)


def figures(text: str, folder: Path) -> dict[str, Path]:
    """Figures that a page shows, as it writes them, and the files of that name that its code drew in a folder."""
    return {shown: next(folder.rglob(name)) for shown, name in FIGURE.findall(text)}


def command(words: list[str]) -> str:
    """Runs ``python -m ...`` with this interpreter in the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *words[1:]], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def tutorial(arguments: Arguments) -> None:
    """Run the tutorial in a temporary folder and renew its outputs and figures."""
    import matplotlib

    from pyro_isingvit.core.checkpoint import write_atomically, write_text

    matplotlib.use("Agg")
    page = arguments.page.resolve()
    need(page.is_file(), f"there is no page {arguments.page}.")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = filled(page.read_text(), command)
        for shown, drawn in figures(text, Path(folder)).items():
            write_atomically(page.parent / shown, partial(shutil.copyfile, drawn))
    write_text(page, text)
    print(f"outputs and figures renewed: {arguments.page}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(tutorial, Arguments, argv)


if __name__ == "__main__":
    main()
