"""Confusion-aware regularisation: its formula by hand, its gradient, micro-batches, kills and every method."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIG, INFO, make_split, trainer
from kills import same
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.confusion import (
    MOMENTUM,
    column_weights,
    confusion,
    first_confusion,
    settle_confusion,
    soft_confusion,
)
from pyro_isingvit.nets.penalties import Penalties, Seen

SHARES = (0.5, 0.3, 0.2)
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])  # as many of each class as the shares say


@pytest.fixture
def skewed() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pool = make_split(180, generator)
    rows = np.concatenate([np.arange(180)[c::3][:count] for c, count in enumerate((45, 10, 5))])
    return ImageData(pool.take(rows), make_split(30, generator), make_split(30, generator), INFO)


def by_hand(z: Tensor) -> Tensor:
    """C by loops, with the classes' own counts."""
    found = torch.zeros(3, 3)
    for row, j in zip(z, LABELS.tolist(), strict=True):
        for i in {0, 1, 2} - {j}:
            found[i, j] += (row[i] - row[j]).sigmoid() * row.softmax(-1)[i] / int((j == LABELS).sum())
    return found


def step(z: Tensor, memory: dict[str, Tensor]) -> Tensor:
    value = confusion(z, LABELS, SHARES, False, memory)
    settle_confusion(memory, SHARES)
    return value


def test_the_matrix_by_hand() -> None:
    z, shares = torch.randn(10, 3), torch.tensor(SHARES)
    torch.testing.assert_close(soft_confusion(z, LABELS, shares), by_hand(z))
    torch.testing.assert_close(soft_confusion(z, 3.0 * F.one_hot(LABELS, 3), shares), by_hand(z))  # a weight of 3
    both = soft_confusion(torch.stack([z, 2 * z]), LABELS, shares)
    torch.testing.assert_close(both, torch.stack([by_hand(z), by_hand(2 * z)]))
    mixed = 0.25 * F.one_hot(LABELS, 3) + 0.75 * F.one_hot(LABELS.flip(0), 3)
    expected = 0.25 * by_hand(z) + 0.75 * soft_confusion(z, LABELS.flip(0), shares)
    torch.testing.assert_close(soft_confusion(z, mixed, shares), expected)
    rare = soft_confusion(z[:8], LABELS[:8], shares)  # a batch without the last class says nothing of it
    assert not rare[:, 2].any() and rare[:, :2].any()


def test_perfect_logits_give_zero() -> None:
    memory, perfect = first_confusion(10, 3), 80.0 * F.one_hot(LABELS, 3)
    for _ in range(3):
        value = step(perfect, memory)
    assert float(value) < 1e-12 and not memory["mean"].any()


def test_value_and_gradient_are_those_of_the_spectral_norm() -> None:
    """Once M stands still: R = ||M diag(w)||, dR/dM = u1 v1^T, and C enters with 1 - b."""
    memory, z, weights = first_confusion(10, 3), torch.randn(10, 3), column_weights(SHARES)
    assert weights.tolist() == pytest.approx((torch.tensor([0.7, 0.5, 0.4]).rsqrt() / weights.new_tensor(
        [0.7, 0.5, 0.4]).rsqrt().mean()).tolist())  # fmt: skip
    assert float(step(z, memory)) == 0.0  # the first step has nothing to go by
    torch.testing.assert_close(memory["mean"], by_hand(z))
    leaf = z.clone().requires_grad_()
    value = confusion(leaf, LABELS, SHARES, False, memory)
    m = (memory["mean"] * weights).requires_grad_()
    norm = torch.linalg.matrix_norm(m, 2)
    assert float(value.detach()) == pytest.approx(float(norm.detach()), rel=1e-5)
    (slope,) = torch.autograd.grad(norm, m)
    torch.testing.assert_close(slope, torch.outer(memory["left"], memory["right"]))
    (ours,) = torch.autograd.grad(value, leaf)
    again = z.clone().requires_grad_()
    c = soft_confusion(again, LABELS, torch.tensor(SHARES))
    (theirs,) = torch.autograd.grad(c, again, grad_outputs=(1 - MOMENTUM) * slope * weights)
    torch.testing.assert_close(ours, theirs)


def test_the_average_follows_and_the_norm_with_it() -> None:
    memory, first, second = first_confusion(10, 3), torch.randn(10, 3), torch.randn(10, 3)
    step(first, memory)
    step(second, memory)
    torch.testing.assert_close(memory["mean"], MOMENTUM * by_hand(first) + (1 - MOMENTUM) * by_hand(second))
    u, s, v = torch.linalg.svd(memory["mean"] * column_weights(SHARES))
    torch.testing.assert_close(torch.outer(memory["left"], memory["right"]), torch.outer(u[:, 0], v[0]))
    still = confusion(first, LABELS, SHARES, False, memory)
    assert float(still) <= float(s[0]) + 0.2
    mixed = MOMENTUM * memory["mean"] + (1 - MOMENTUM) * by_hand(first)
    torch.testing.assert_close(still, u[:, 0] @ (mixed * column_weights(SHARES)) @ v[0])


def test_parts_of_a_step_have_its_value_as_their_mean() -> None:
    z = torch.randn(3, 10, 3)
    whole, cut = first_confusion(10, 3), first_confusion(10, 3)
    for logits in z:
        value = step(logits, whole)
        parts = [confusion(logits[rows], LABELS[rows], SHARES, False, cut) for rows in (slice(0, 5), slice(5, 10))]
        settle_confusion(cut, SHARES)
        assert float(value) == pytest.approx(float(sum(parts)) / 2, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value)


def test_with_the_sampler_every_class_is_drawn_alike() -> None:
    z, even = torch.randn(9, 3), torch.arange(9) % 3
    memory = first_confusion(9, 3)
    confusion(z, even, SHARES, True, memory)
    expected = torch.stack([soft_confusion(z[c::3], even[c::3], torch.ones(3))[:, c] for c in range(3)], 1)
    torch.testing.assert_close(memory["parts"], expected)


def test_it_needs_the_shares() -> None:
    penalties = Penalties(TrainConfig(confusion=1.0), 4, 3)
    with pytest.raises(ValueError, match="training images of each class"):
        penalties.terms(Seen(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "laplace"])  # which needs an extra
def test_every_method_takes_it(method: str, skewed: ImageData) -> None:
    run = trainer(skewed, config=replace(CONFIG, method=method), confusion=1.0, epochs=3).fit()
    assert run.history[0]["confusion"] == 0.0  # looked at in its first step, which has nothing to go by
    assert all(record["confusion"] > 0 and math.isfinite(record["loss"]) for record in run.history[1:])


@pytest.mark.parametrize("engine", ["fused", "pyro"])
def test_it_makes_the_small_classes_be_mistaken_less(engine: str, skewed: ImageData) -> None:
    norms = []
    for weight in (0.0, 10.0):
        run = trainer(skewed, confusion=weight, engine=engine, epochs=8, calibrate=False).fit()
        logits = run.draw_networks(8)(run.info.normalise(skewed.train.images[:])).detach()
        found = soft_confusion(logits, skewed.train.labels, torch.tensor(skewed.info.shares)).mean(0)
        norms.append(float(torch.linalg.matrix_norm(found * column_weights(skewed.info.shares or ()), 2)))
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize("settings", [{}, {"mix": "regmixup", "label_smoothing": 0.1, "balance": "loss"}])
def test_micro_batches_give_the_same_run(settings: dict, skewed: ImageData) -> None:
    config = replace(CONFIG, method="deterministic")
    runs = [trainer(skewed, config=config, confusion=3.0, accumulate=n, **settings).fit() for n in (1, 2)]
    for record, expected in zip(runs[0].history, runs[1].history, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["ising", "ensemble"])
def test_resumed_equals_uninterrupted_bit_for_bit(method: str, skewed: ImageData, tmp_path: Path) -> None:
    config = replace(CONFIG, method=method)
    trainer(skewed, tmp_path / "whole", config, confusion=1.0).fit()

    def stop(at) -> None:
        if at.epoch == 3:
            raise KeyboardInterrupt

    cut = trainer(skewed, tmp_path / "cut", config, confusion=1.0)
    cut.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = trainer(skewed, tmp_path / "cut", config, confusion=1.0)
    again.restore()
    again.fit()
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("cut", "whole"))
    assert same({**ours, "seconds": 0}, {**theirs, "seconds": 0})
    assert any(name.endswith("penalties.confusion.mean") and value.any() for name, value in theirs["model"].items())
