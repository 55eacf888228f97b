"""docs/sharing.md: its example prints what it shows, and its commands run."""

import shlex
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from helpers import ROOT, here, prints_what_it_shows

PAGE = (ROOT / "docs" / "sharing.md").read_text()


def test_the_example_prints_what_is_shown(tmp_path: Path) -> None:
    prints_what_it_shows(PAGE, tmp_path)


def test_the_commands_run(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **given: sent.append(given["repo_id"]))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits_run, "runs/mine")
    commands = [line for line in PAGE.splitlines() if line.startswith("python -m")]
    for line in commands:
        _, _, module, *words = shlex.split(line)
        told = here(module, *words)
        assert told.returncode == 0, told.stderr
    assert len(commands) == 2 and sent == ["owner/name"]
    assert "Sorting slides before a human sees them." in Path("shared/mine/README.md").read_text()
