"""The documents name tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    """``test_file.py``, ``test_file.py::test_name``, and ``::test_name`` after one of them."""
    here = ""
    for file, name in re.findall(r"`(?:tests/(?:\w+/)?)?(test_\w+\.py)?(?:::(test_\w+))?`", page.read_text()):
        here = file or here
        if not (file or name):
            continue
        found = [*(ROOT / "tests").rglob(here)]
        assert len(found) == 1, f"{page.name} names {here}, found {found}"
        (path,) = found
        assert not name or f"def {name}(" in path.read_text(), f"{page.name} names {here}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_and_pages_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:inference|analysis)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{page.name} names {module}"
    for name in re.findall(r"`((?:docs|pyro_isingvit|inference|analysis)/\w+\.\w+)`", text):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"
