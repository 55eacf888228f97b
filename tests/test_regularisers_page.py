"""docs/regularisers.md: its command runs, and its table has every name with its usual strength and setting."""

import re
from pathlib import Path

from forks import ROOT
from helpers import here

from pyro_isingvit.core.regularise import REGULARISERS

PAGE = (ROOT / "docs" / "regularisers.md").read_text()
QUICK = ["--epochs", "2", "--samples", "2", "--val-samples", "1", "--device", "cpu", "--train-size", "60"]


def test_its_command_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line, *others = re.findall(r"^python -m ((?!inference\.compare).*)$", PAGE, re.M)  # grids: test_grid_commands.py
    module, *words = line.split()
    done = here(module, *words, *QUICK)
    assert done.returncode == 0, done.stderr
    for other in others:
        module, *words = other.split()
        done = here(module, *words, *QUICK, "--finetune-epochs", "1")
        assert done.returncode == 0, done.stderr
    assert '"logit_penalty": 0.1' in (tmp_path / "runs" / "regularised" / "config.json").read_text()


def test_its_table_has_every_name() -> None:
    rows = {}
    for names, usual, settings in re.findall(r"^\| (`.*?`) \| ([\d.]+) \| (.*?) \|", PAGE, re.M):
        for name in re.findall(r"`(.*?)`", names):
            rows[name] = float(usual), re.findall(r"`(.*?)`", settings)
    assert set(rows) == set(REGULARISERS)
    for name, row in REGULARISERS.items():
        usual, settings = rows[name]
        assert usual == row.strength and set(settings) == {row.setting, *row.sets}
