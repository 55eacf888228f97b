"""Rationale invariance: reasons by hand under any masks, the term and its memory, micro-batches, every method."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, trainer
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.penalties import PENALTIES, Penalties, Seen
from pyro_isingvit.nets.rationale import MOMENTUM, contributions, first_rationales, rationale, settle_rationale

METHOD_NAMES = [name for name in METHODS if name != "laplace"]  # which needs an extra


def test_reasons_are_weights_times_features() -> None:
    w, f = torch.randn(3, 5), torch.randn(4, 5)
    probe = torch.zeros(4, 5, requires_grad=True)
    found = contributions((f + probe) @ w.T + 1.0, f, probe)
    torch.testing.assert_close(found, w * f[:, None])


def test_the_term_by_hand() -> None:
    memory, labels = first_rationales(2, 5), torch.tensor([0, 1, 1])
    first, second = torch.randn(3, 2, 5), torch.randn(3, 2, 5, requires_grad=True)
    assert float(rationale(first, labels[:1].expand(3), memory)) == 0.0  # there is no mean yet
    settle_rationale(memory)
    torch.testing.assert_close(memory["mean"][0], first.mean(0))
    assert memory["known"].tolist() == [1, 0] and not memory["mean"][1].any()
    value = rationale(second, labels, memory)  # of class 1 nothing is known
    torch.testing.assert_close(value, (second[0] - first.mean(0)).square().sum() / 3)
    (gradient,) = torch.autograd.grad(value, second)
    torch.testing.assert_close(gradient[0], 2 * (second[0] - first.mean(0)).detach() / 3)
    assert not gradient[1:].any()
    settle_rationale(memory)
    torch.testing.assert_close(memory["mean"][0], (1 - MOMENTUM) * first.mean(0) + MOMENTUM * second[0].detach())
    torch.testing.assert_close(memory["mean"][1], second[1:].detach().mean(0))
    assert not memory["sums"].any() and not memory["counts"].any()


def test_it_is_computed_in_32_bits_under_autocast() -> None:
    """Of |R|^2 - 2 R M + |M|^2 little is left: in 16 bits it comes out below 0."""
    labels, mean = torch.arange(40) % 10, torch.randn(10, 10, 64)
    reasons = mean[labels] + 0.005 * torch.randn(40, 10, 64)
    found = []
    for bf16 in (False, True):
        memory = first_rationales(10, 64)
        memory["mean"].copy_(mean)
        memory["known"].fill_(1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found.append(rationale(reasons, labels, memory))
    assert float(found[0]) > 0
    torch.testing.assert_close(found[0], found[1])


def test_reasons_that_are_those_of_the_class_cost_nothing() -> None:
    memory, labels = first_rationales(3, 4), torch.arange(9) % 3
    reasons = torch.randn(3, 3, 4)[labels]
    for _ in range(3):
        value = rationale(reasons, labels, memory)
        settle_rationale(memory)
    assert float(value) == pytest.approx(0.0, abs=1e-5)
    assert float(rationale(reasons + 1, labels, memory)) == pytest.approx(12.0, rel=1e-4)


def test_shares_of_classes_samples_and_parts() -> None:
    labels = torch.arange(6) % 3
    weighted = 2.0 * F.one_hot(labels, 3).float()  # probabilities times the weight of an image
    reasons, later = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4)
    values = []
    for target, chunks in ((labels, 1), (weighted, 1), (labels, 2)):
        memory = first_rationales(3, 4)
        for each in (reasons, later):
            parts = zip(each.chunk(chunks, 1), target.chunk(chunks), strict=True)
            value = torch.stack([rationale(r, y, memory) for r, y in parts]).mean(0)
            settle_rationale(memory)
        values.append((value, memory["mean"]))
    assert values[0][0].shape == (2,)
    for value, mean in values[1:]:
        torch.testing.assert_close(value, values[0][0])
        torch.testing.assert_close(mean, values[0][1])


def rows_sum_to_logits(seen: Seen) -> Tensor:
    """For a last layer that is linear in its input, reasons differ from the logits by the bias alone."""
    assert seen.probe is not None
    found = contributions(seen.logits, seen.watched["features"][0], seen.probe).sum(-1)
    bias = (seen.logits - found).detach().flatten(0, -2)
    torch.testing.assert_close(bias, bias[:1].expand_as(bias), rtol=1e-3, atol=1e-5)
    return found.square().mean()


@pytest.mark.parametrize("train", [{}, {"engine": "pyro"}, {"draws": 4}, {"granularity": "unit", "draws": "image"}])
def test_reasons_follow_each_draw(train: dict, data: ImageData, monkeypatch) -> None:
    monkeypatch.setitem(PENALTIES, "rationale", replace(PENALTIES["rationale"], term=rows_sum_to_logits))
    ising = replace(CONFIG.ising, granularity=train.pop("granularity", "weight"))
    trainer(data, config=replace(CONFIG, ising=ising), rationale=1.0, epochs=2, **train).fit()


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_methods_take_it(method: str, head: str, data: ImageData) -> None:
    config = replace(CONFIG, method=method, vit=replace(CONFIG.vit, head=head))
    run = trainer(data, config=config, epochs=2, rationale=0.1).fit()
    assert run.history[-1]["rationale"] > 0 and all(math.isfinite(record["loss"]) for record in run.history)


def test_both_engines_agree(data: ImageData) -> None:
    history = [trainer(data, epochs=3, engine=e, draws=1, rationale=0.5).fit().history for e in ("fused", "pyro")]
    for fused, plain in zip(*history, strict=True):
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert fused["rationale"] == pytest.approx(plain["rationale"], rel=1e-3, abs=1e-6)


def test_training_with_it_gives_reasons_that_vary_less(data: ImageData) -> None:
    spread = []
    for weight in (0.0, 300.0):
        config = replace(CONFIG, method="deterministic")
        run = trainer(data, config=config, epochs=8, lr=1e-2, calibrate=False, rationale=weight).fit()
        (vit, weights), y = next(iter(run.method.trained_networks())), data.train.labels
        watch: dict = {"features": []}
        vit(dict(weights.items()), run.info.normalise(data.train.images[:]), watch)
        reasons = weights["head"][0] * watch["features"][0][:, None]
        within = torch.stack([reasons[y == c].var(0).sum() for c in range(3)]).mean()
        spread.append(float(within.detach()))
    assert spread[1] < 0.5 * spread[0]


def test_without_it_nothing_is_remembered() -> None:
    assert not list(Penalties(TrainConfig(), 4, 3, None, 5).buffers())
    assert Penalties(TrainConfig(rationale=1.0), 4, 3, None, 5).memory("rationale")["mean"].shape == (3, 3, 5)
