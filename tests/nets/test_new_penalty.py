"""A new loss term is one function and one field: this file makes both and touches no other."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, TINY, trainer
from torch import Tensor

from pyro_isingvit import fit
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.penalties import PENALTIES, Penalty, Seen

ROWS: list[Tensor] = []


def squared_logits(seen: Seen) -> Tensor:
    """Half the mean squared logit (spectral decoupling): mean over images of |z|^2 / (2 C)."""
    assert seen.rows is not None
    ROWS.append(seen.rows)
    return 0.5 * seen.logits.pow(2).mean()


def feature_penalty(seen: Seen) -> Tensor:
    """Half the mean squared feature, of what the last matrix reads."""
    (features,) = seen.watched["features"]
    return 0.5 * features.pow(2).mean()


@dataclass(frozen=True)
class Settings(TrainConfig):
    """The fields that weight them."""

    squared_logits: float = 0.0
    feature_penalty: float = 0.0


@pytest.fixture(autouse=True)
def rows(monkeypatch) -> None:
    ROWS.clear()
    monkeypatch.setitem(PENALTIES, "squared_logits", Penalty(squared_logits))
    monkeypatch.setitem(PENALTIES, "feature_penalty", Penalty(feature_penalty, ("features",)))


def settings(**changes: float) -> Settings:
    return Settings(
        weight_decay=0.0, epochs=10, lr=1e-2, batch_size=20, samples=2, val_samples=2, device="cpu", **changes
    )


METHOD_NAMES = [name for name in METHODS if name != "laplace"]  # which needs an extra


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_takes_it(method: str, data: ImageData) -> None:
    fitted = {}
    for weight in (0.0, 5.0):
        train = replace(settings(squared_logits=weight), finetune_epochs=int(method == "magnitude"))
        run = trainer(data, None, replace(CONFIG, method=method, train=train)).fit()
        fitted[weight] = run.draw_networks(1)(run.info.normalise(data.test.images)).detach()
        assert all(("squared_logits" in record) == (weight > 0) for record in run.history)
    assert fitted[5.0].pow(2).mean() < fitted[0.0].pow(2).mean()
    assert all(math.isfinite(record["loss"]) for record in run.history)
    assert {int(row) for seen in ROWS for row in seen} == set(range(60))  # each image by its number


@pytest.mark.parametrize("engine", ["fused", "pyro"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_ising_posterior_takes_it_on_both_engines(engine: str, accumulate: int, data: ImageData) -> None:
    train = replace(settings(squared_logits=0.5, feature_penalty=0.1), engine=engine, accumulate=accumulate)
    run = trainer(data, None, replace(CONFIG, train=train)).fit()
    record = run.history[-1]
    assert record["squared_logits"] > 0 and record["feature_penalty"] > 0
    first = []
    for weight in (0.1, 0.2):
        once = replace(train, feature_penalty=weight, epochs=1)
        first.append(trainer(data, None, replace(CONFIG, train=once)).fit())
    ratio = first[1].history[0]["feature_penalty"] / first[0].history[0]["feature_penalty"]
    assert ratio == pytest.approx(2.0, rel=0.2)  # the weight counts once


def test_its_gradient_is_that_of_the_formula(data: ImageData) -> None:
    """d/dz of CE + lambda/2 mean z^2 is (p - y)/B + lambda z / (B C)."""
    z = torch.randn(4, 3, requires_grad=True)
    y, weight = torch.tensor([0, 1, 2, 0]), 0.7
    loss = torch.nn.functional.cross_entropy(z, y) + weight * squared_logits(Seen(z, y, torch.arange(4)))
    (grad,) = torch.autograd.grad(loss, z)
    expected = (z.softmax(-1) - torch.nn.functional.one_hot(y, 3)) / 4 + weight * z / 12
    torch.testing.assert_close(grad, expected.detach())


def test_a_folder_would_not_give_the_field_back(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kept in a folder: feature_penalty, squared_logits; keep the run"):
        trainer(data, tmp_path / "run", replace(CONFIG, train=settings(squared_logits=1.0))).fit()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="cannot be kept in a folder"):  # at once, before anything is removed
        trainer(data, tmp_path / "run", replace(CONFIG, train=settings(squared_logits=1.0)))
    run = fit(TINY, data, train=settings(squared_logits=1.0), epochs=1, progress=False)
    with pytest.raises(ValueError, match="cannot be kept in a folder"):
        run.save(tmp_path / "run")


def test_a_negative_weight_is_refused(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`squared_logits` must not be negative"):
        trainer(data, tmp_path, replace(CONFIG, train=settings(squared_logits=-1.0)))
