"""A new coupling, made here alone: a function and a row of the registry is all it takes."""

import pytest
import torch
from helpers import TINY

from pyro_isingvit import IsingViT, fit
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising.coupling import COUPLINGS
from pyro_isingvit.ising.distributions import log_odds


def number_of_readers(net, update) -> None:
    """c = (matrices that read what this one writes) / (most that any space has), the same for a whole matrix."""
    readers = net.readers
    most = max(len(readers.readers(matrix.writes)) for matrix in readers.matrices)
    for matrix in readers.matrices:
        retention = update(matrix.kind, matrix.layer, net.gain.new_full((1, 1), count(readers, matrix.kind) / most))
        assert retention.shape == matrix.shape and (retention >= 0).all() and (retention <= 1).all()


def count(readers, kind: str) -> int:
    return len(readers.readers(readers.matrix(kind).writes))


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(COUPLINGS, "number of readers", number_of_readers)


@pytest.mark.parametrize("granularity", ["weight", "head"])
def test_it_trains_and_sets_the_prior(data, granularity: str) -> None:
    ising = IsingConfig(coupling="number of readers", granularity=granularity, J=2.0, delta=0.8, update_every=2)
    model = IsingViT.for_data(data, TINY, ising)
    run = fit(model, data, epochs=4, batch_size=20, device="cpu", progress=False)
    assert run.history[-1]["nll"] < run.history[0]["nll"]
    most = count(model.vit.readers, "patch")  # attention and MLP of both blocks, and the head
    assert most == 5
    for name, site in model.layout.sites.items():
        expected = 2.0 * count(model.vit.readers, site.coupled_kind) / most - log_odds(0.8)
        torch.testing.assert_close(model.prior_logits(name), torch.full(site.shape, expected))
