"""The documents name tests and files that exist."""

import re
import tomllib
from pathlib import Path

import pytest

from pyro_isingvit.core.presets import PRESETS
from pyro_isingvit.methods.registry import METHODS

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


SOURCES = sorted(path for room in ("pyro_isingvit", "inference", "analysis") for path in (ROOT / room).rglob("*.py"))
CITATION = re.compile(r"docs/(\w+\.md), ([A-Z])")


def headings(page: str) -> list[str]:
    path = ROOT / "docs" / page
    return re.findall(r"^#+ (.+?)\s*$", path.read_text(), re.MULTILINE) if path.is_file() else []


def wrong_citations(text: str) -> list[str]:
    """Citations "docs/page.md, Heading" of headings that the page lacks, and of sections by number."""
    words = " ".join(line.strip(" #") for line in text.splitlines())  # a citation may go on in the next line
    wrong = re.findall(r"METHOD(?:\.md)?,? (?:section )?\d+", words)
    for found in CITATION.finditer(words):
        cited = words[found.start(2) :]
        if not any(re.match(rf"{re.escape(heading)}(?!\w)", cited) for heading in headings(found[1])):
            wrong.append(words[found.start() : found.start() + 60])
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_cite_headings_that_exist(path: Path) -> None:
    assert not wrong_citations(path.read_text())


def test_what_counts_as_a_wrong_citation() -> None:
    assert not wrong_citations(
        "# as in docs/method.md, Noise of\n# the masks, and docs/method.md says (docs/method.md, Model)."
    )
    assert wrong_citations("docs/method.md, The two temperings")
    assert wrong_citations("docs/method.md, Models")
    assert wrong_citations("docs/nowhere.md, Model")
    assert wrong_citations("METHOD 4") and wrong_citations("METHOD section 3")


def test_the_method_is_cited() -> None:
    assert sum("docs/method.md, " in path.read_text() for path in SOURCES) >= 8  # or the tests above look at nothing


def test_usage_lists_every_method_and_preset() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|(.*)\|$", (ROOT / "docs" / "usage.md").read_text(), re.MULTILINE)
    listed = {name: rest for names, rest in rows for name in re.findall(r"`([\w-]+)`", names)}
    assert set(METHODS) <= set(listed) and set(PRESETS) <= set(listed)
    numbered = {name for name, row in METHODS.items() if row.knob}
    assert {name for name in METHODS if listed[name].split("|")[-1].strip()} == numbered
    for name in PRESETS:
        if not name.startswith("paper"):
            shape = PRESETS[name]
            patch, width, depth = (int(re.match(r"\d+", cell.strip())[0]) for cell in listed[name].split("|")[:3])
            assert (patch, width, depth) == (shape.patch_size, shape.width, shape.depth)


def test_usage_lists_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "usage.md").read_text(), re.MULTILINE)
    assert set(extras) - {"test"} <= set(listed)
