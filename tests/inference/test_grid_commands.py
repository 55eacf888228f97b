"""The commands by which pages say how grids are run: they take hours; here their words are parsed, and cells made."""

import re
from string import Template

import pytest
import tyro
from forks import ROOT

from inference.cli import FLAT
from inference.compare import CompareArguments, make_cells
from inference.regularisers import make_cells as make_regulariser_cells
from pyro_isingvit.core.regularise import REGULARISERS

PAGES = {"comparison.md": 3, "more-methods.md": 3, "paper.md": 3, "regularisers.md": 13}


def commands(page: str) -> list[list[str]]:
    """The words of every call of inference.compare on a page, with the shell's variables filled in."""
    found = []
    for block in re.findall(r"```\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        variables: dict[str, str] = {}
        for line in block.splitlines():
            if given := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[given[1]] = Template(given[2]).safe_substitute(variables)
            elif call := re.fullmatch(r"\S*python -m inference\.compare (.*)", line):
                found.append(Template(call[1]).substitute(variables).split())
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_make_their_cells(page: str) -> None:
    calls = commands(page)
    assert len(calls) >= PAGES[page]
    for words in calls:
        arguments = tyro.cli(CompareArguments, args=words, config=FLAT)
        cells = make_cells(arguments)
        assert len(cells) == len(arguments.methods) * len(arguments.seeds) * len(arguments.train_sizes)
        if arguments.regularisers:
            plain = [(cell.dataset, cell.method, cell.config) for cell in cells]
            made = make_regulariser_cells(plain, arguments.regularisers, arguments.flipped)
            several = len(REGULARISERS) if arguments.regularisers == ("all",) else len(arguments.regularisers)
            assert len(made) == len(cells) * (1 + several)
