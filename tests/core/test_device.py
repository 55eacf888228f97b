"""Devices by name."""

import pytest
import torch

from pyro_isingvit import load_run
from pyro_isingvit.core.device import checked_device
from pyro_isingvit.core.errors import UserError


def test_names_of_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked_device("auto") == checked_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [checked_device(name) for name in ("auto", "cuda", "cuda:1")] == [
        torch.device(name) for name in ("cuda", "cuda", "cuda:1")
    ]
    with pytest.raises(UserError, match="no CUDA device cuda:2 here"):
        checked_device("cuda:2")


@pytest.mark.parametrize(("device", "told"), [("gpu", "not 'gpu'"), (None, "not None"), ("cuda", "no CUDA device")])
def test_what_is_no_device_here(device, told: str, digits_run, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=told):
        load_run(digits_run, device=device)
