"""Forks train whatever ran before them in the tests' process."""

import pytest
import torch
from forks import Started, can_fork
from torch._subclasses.fake_tensor import FakeTensorMode

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
