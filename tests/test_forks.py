"""Forks train whatever ran before them in the tests' process."""

import os
import signal
import time

import pytest
import torch
from forks import Started, can_fork, exit_code, fork
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm.auto import tqdm

pytestmark = pytest.mark.skipif(not can_fork(), reason="CUDA does not live through a fork")


def _train() -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.square().sum().backward()
    print(weight.grad.tolist())


def test_a_fork_trains_after_export_and_training() -> None:
    with FakeTensorMode():  # as torch.export does; it pretends that there is a device of each kind
        torch.ones(2) + 1
    torch.ones(2, requires_grad=True).sum().backward()
    done = Started(_train, ["train"]).wait()
    assert (done.returncode, done.stdout) == (0, "[2.0, 2.0, 2.0]\n"), done.stderr


def test_a_fork_killed_while_it_draws_a_progress_bar_stops_nobody_else(tmp_path) -> None:
    def draws() -> None:
        tqdm.get_lock().acquire()
        (tmp_path / "holds").touch()
        time.sleep(60)

    with (tmp_path / "log").open("w") as log:
        child = fork(draws, log.fileno(), log.fileno())
    limit = time.monotonic() + 60
    while not (tmp_path / "holds").exists() and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL and (tmp_path / "holds").exists()
    assert tqdm.get_lock().acquire(blocking=False)
    tqdm.get_lock().release()
    assert list(tqdm(range(3), disable=True)) == [0, 1, 2]
