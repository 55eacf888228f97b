"""The examples in the library's docstrings give what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
from forks import ROOT

NAMES = [module.name for module in pkgutil.walk_packages([str(ROOT / "pyro_isingvit")], "pyro_isingvit.")]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes is thrown away
    found = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert not found.failed
