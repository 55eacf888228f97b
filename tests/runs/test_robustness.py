"""Kills, signals, damaged checkpoints, full and read-only disks: nothing is lost, and what goes on goes on exactly."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import ROOT, import_everything
from helpers import CONFIG, INFO, here, make_split, refused, trainer
from kills import Reference, killed_chains, same, signalled, uninterrupted

from inference.cli import run_script, with_clear_errors
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.runs.trainer import Trainer

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module", autouse=True)
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so does what it starts itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> list[Reference]:
    import_everything()
    return uninterrupted(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_identical_to_uninterrupted(references, tmp_path, kills: int) -> None:
    """Weights, masks, curvature, phase, optimiser, schedule, random numbers, history, metrics, and no litter."""
    found = killed_chains(tmp_path, references, kills)
    assert found["timed"] + found["aimed"] == kills and found["aimed"] >= 2 and len(found["hits"]) == found["aimed"]
    assert found["errors"] == [] and found["differences"] == [] and found["runs"] >= 2, found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_with_a_line_that_says_how_to_go_on(references, tmp_path, number: int, code: int) -> None:
    outcome = signalled(tmp_path, references[0], number, epochs=2)
    assert outcome["code"] == code, outcome["text"]
    line = outcome["text"].splitlines()[-1]
    kept = int(line.split("epochs 1 to ")[1].split()[0])
    assert kept >= 2 and line.startswith(f"interrupted in epoch {kept + 1};")
    assert line.endswith(f"go on with: python -m inference.train --resume {outcome['folder']}")
    assert "Traceback" not in outcome["text"]
    assert outcome["again"] == 0 and outcome["differences"] == []


def test_ctrl_c_before_the_first_epoch_ends_says_how_to_start_again(references, tmp_path) -> None:
    outcome = signalled(tmp_path, references[0], signal.SIGINT, epochs=0)
    assert outcome["code"] == 130 and "Traceback" not in outcome["text"]
    assert "no epoch is finished: start again with the same command and --overwrite" in outcome["text"]
    assert outcome["again"] == 0 and outcome["differences"] == []


def test_other_scripts_leave_signals_without_a_traceback(capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with pytest.raises(SystemExit) as leave:
            with_clear_errors(lambda number=number: (os.kill(os.getpid(), number), time.sleep(5)))
        assert leave.value.code == code and capsys.readouterr().err.strip() == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_while_flags_are_read_leaves_without_a_traceback(capsys, monkeypatch) -> None:
    monkeypatch.setattr("tyro.cli", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as leave:
        run_script(print, DataConfig, [])
    assert leave.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"


# Damage ---------------------------------------------------------------------------------------------------------


def stopped_after(data, folder: Path, epochs: int, config=CONFIG) -> None:
    """Trains a run that ends as if killed once ``epochs`` are kept."""
    run = trainer(data, folder, config)

    def stop(at: Trainer) -> None:
        if at.epoch == epochs:
            raise RuntimeError("killed")

    run.on_epoch = stop
    with pytest.raises(RuntimeError, match="killed"):
        run.fit()


def final(folder: Path) -> dict:
    return {key: value for key, value in load_checkpoint(folder / "checkpoint.pt").items() if key != "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run on the fixture ``data``; nobody changes it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    made = torch.Generator().manual_seed(0)
    trainer(ImageData(*(make_split(count, made) for count in (60, 15, 30)), INFO), folder).fit()
    return folder


@pytest.mark.parametrize("harm", ["flipped", "short", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(data, tmp_path, whole, caplog, harm: str) -> None:
    folder = tmp_path / "broken"
    stopped_after(data, folder, 4)
    path = folder / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    harmed = {"flipped": bytes(content), "short": bytes(content[:-100]), "empty": b""}
    path.unlink() if harm == "missing" else path.write_bytes(harmed[harm])
    again = trainer(data, folder)
    again.restore()
    assert again.epoch == 3 and str(path) in caplog.text and "after epoch 3" in caplog.text
    assert (folder / "metrics.jsonl").read_text().count("\n") == 3  # as the checkpoint that is used
    stop = trainer(data, folder)  # the damaged one never takes the place of the good one
    stop.restore()
    assert stop.epoch == 3
    again.fit()
    assert same(final(folder), final(whole))
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_both_checkpoints_damaged_is_a_clear_error(data, tmp_path) -> None:
    stopped_after(data, tmp_path, 3)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be read.*checkpoint\.previous\.pt cannot be read"):
        trainer(data, tmp_path).restore()


def test_either_checkpoint_of_a_finished_run_holds_the_end(tmp_path, whole) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "checkpoint.pt").write_bytes(b"")
    assert final(whole)["finished"] and same(final(copy), final(whole))


def test_a_run_killed_between_the_last_two_renames_has_both_checkpoints_again(data, tmp_path, whole) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "checkpoint.pt").unlink()
    again = trainer(data, copy)
    again.restore()
    again.fit()
    for path in (copy / "checkpoint.pt", copy / "checkpoint.previous.pt"):
        assert same({**load_checkpoint(path), "seconds": 0}, {**final(whole), "seconds": 0})


def test_a_finished_run_is_not_finished_twice(data, tmp_path) -> None:
    """What comes after the last epoch draws random numbers in some methods (laplace): again would be otherwise."""
    pytest.importorskip("laplace")
    config = replace(CONFIG, method="laplace", train=replace(CONFIG.train, epochs=2))
    trainer(data, tmp_path, config).fit()
    expected = final(tmp_path)
    again = trainer(data, tmp_path, config)
    again.restore()
    again.fit()
    assert torch.equal(again.run.network.heads, expected["model"]["heads"])
    assert same(final(tmp_path), expected)


# Disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(os, "fsync", 2), (os, "fsync", 9), (os, "replace", 2), (os, "replace", 9), (Path, "write_bytes", 1),
     (Path, "write_bytes", 4), (Path, "write_text", 3)],
)  # fmt: skip
def test_a_disk_that_fills_at_any_write_keeps_the_last_checkpoint(
    data, tmp_path, whole, monkeypatch, owner, name: str, call: int
) -> None:
    folder, real, left = tmp_path / "full", getattr(owner, name), call

    def fail(*arguments, **options):
        nonlocal left
        left -= 1
        if left <= 0 and not (name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            trainer(data, folder).fit()
    assert not [path for path in folder.glob(".*")]
    again = trainer(data, folder)
    if (folder / "checkpoint.pt").exists() or (folder / "checkpoint.previous.pt").exists():
        again.restore()
        assert again.epoch >= 1
    again.fit()
    assert same(final(folder), final(whole))


SCRIPT = ["--dataset", "digits", "--depth", "1", "--width", "16", "--samples", "2", "--train-size", "60", "--epochs",
          "3", "--device", "cpu"]  # fmt: skip


def test_a_disk_that_is_really_full_and_really_read_only(small_disk: Path) -> None:
    run = small_disk / "r"
    refused(here("inference.train", *SCRIPT, "--out", run), "cannot write", "No space left on device")
    kept = load_checkpoint(run / "checkpoint.pt")["epoch"]
    assert kept >= 1 and not [path for path in run.glob(".*")]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for arguments in (["--resume", str(run)], [*SCRIPT, "--out", str(run), "--overwrite"],
                      [*SCRIPT, "--out", str(small_disk / "new")]):  # fmt: skip
        refused(here("inference.train", *arguments), "cannot write", "Read-only file system")
    assert load_checkpoint(run / "checkpoint.pt")["epoch"] == kept


def test_a_read_only_folder_is_named_before_training(tmp_path, monkeypatch) -> None:
    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", fail)
    refused(here("inference.train", *SCRIPT, "--out", tmp_path / "r"), "cannot write", "config.json", "Read-only")


# Workers --------------------------------------------------------------------------------------------------------

POOL = """
import sys, time
from inference.cli import with_clear_errors
from inference.workers import workers

def work():
    with workers(2) as pool:
        waiting = [pool.submit(time.sleep, 0.01 if i < 2 else 300) for i in range(6)]
        for future in waiting:
            future.result()
            print("one is done", flush=True)

if __name__ == "__main__":
    with_clear_errors(work)
"""


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_workers_end_with_the_script(tmp_path, number: int, code: int) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "one is done\n"
        assert len(members(process.pid)) >= 3  # the script and its two workers
        os.kill(process.pid, number)
        assert process.wait(30) == code
        limit = time.monotonic() + 20
        while members(process.pid) and time.monotonic() < limit:
            time.sleep(0.05)
        assert members(process.pid) == []
    finally:
        for member in members(process.pid):
            os.kill(member, signal.SIGKILL)
        process.communicate()
