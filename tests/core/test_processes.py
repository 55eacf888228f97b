"""Micro-batches, checkpointed blocks and what processes share: the run of one process and one batch."""

from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, make_pair, trainer

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.processes import averaged, gathered, is_first, launched, on_first, own_rows, world
from pyro_isingvit.data.batches import batches, count_steps
from pyro_isingvit.ising.curvature import SALIENCY
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.ising.masks import BISECTION_SAMPLE, evenly
from pyro_isingvit.methods.registry import METHODS


@pytest.mark.parametrize("granularity", ["weight", "head"])
@pytest.mark.parametrize(("accumulate", "draws"), [(2, 4), (4, 4), (4, 2), (2, 1)])
def test_micro_batches_leave_the_loss_as_it_is(data, granularity, accumulate, draws) -> None:
    records, weights = [], []
    for pieces in (1, accumulate):
        config = replace(CONFIG, ising=replace(CONFIG.ising, granularity=granularity))
        run = trainer(data, config=config, draws=draws, accumulate=pieces).fit()  # 60 images, batches of 20
        records.append(run.history)
        weights.append(torch.cat([p.flatten() for p in run.guide.loc.values()]))
    for record, expected in zip(*records, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["retention"] == pytest.approx(expected["retention"], rel=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("draws", "parts", "taken"),
    [(4, 1, 4), (4, 2, 4), (4, 4, 4), (2, 4, 2), (4, 3, 3), (1, 2, 1), (8, 6, 6), (4, 6, 3), (7, 2, 6)],
)
def test_parts_of_a_batch_add_up_to_its_loss_and_gradient(draws: int, parts: int, taken: int) -> None:
    """Several draws a part, several parts a draw, and numbers that do not divide one another."""
    model, guide = make_pair()
    elbo, whole = FusedELBO(model, guide, draws), FusedELBO(model, guide, taken)
    x, y = torch.randn(24, 1, 4, 4), torch.arange(24) % 3
    state = torch.get_rng_state()
    expected = whole(x, y)
    after, means = torch.get_rng_state(), list(guide.loc.values())
    total = torch.zeros(())
    for part, (images, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        torch.set_rng_state(state)
        elbo.part = (part, parts)
        assert elbo.own_draws(24 // parts)[0] == taken
        total = total + elbo(images, labels) / parts
        assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    pairs = zip(torch.autograd.grad(total, means), torch.autograd.grad(expected, means), strict=True)
    for grad, wanted in pairs:
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("laplace", "temperature")])
def test_every_method_takes_micro_batches(data, method: str) -> None:
    """The same loss where the noise is the batch's; noise of each image differs between the parts, not between runs."""
    ising, settings = METHODS[method].ising, METHODS[method].train
    settings = replace(settings, epochs=2, finetune_epochs=0, batch_size=20, draws=1, device="cpu", val_samples=1)
    config = replace(CONFIG, method=method, ising=replace(ising, update_every=2), train=settings)
    whole, parts, again = (trainer(data, config=config, accumulate=n).fit() for n in (1, 2, 2))
    assert repr(parts.history) == repr(again.history)
    alike = [r["loss"] == pytest.approx(s["loss"], rel=1e-4) for r, s in zip(parts.history, whole.history, strict=True)]
    assert all(alike) == (method not in ("dropout", "concrete-dropout", "sparse-vd", "l0"))


@pytest.mark.parametrize("mode", ["learned", "hybrid"])
def test_the_pyro_path_takes_micro_batches(data, mode: str) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, mask_posterior=mode))
    whole, parts = (trainer(data, config=config, accumulate=n).fit().history for n in (1, 4))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_the_last_batch_is_cut_to_a_multiple_of_the_parts(data) -> None:
    for size, parts, lengths in ((16, 1, [16, 16, 16, 12]), (16, 8, [16, 16, 16, 8]), (16, 16, [16, 16, 16])):
        assert [len(y) for _, y, _ in batches(data.train, size, 0, 0, parts)] == lengths
        assert count_steps(60, size, parts) == len(lengths)
    assert count_steps(5, 16, 4) == 1 and len(next(batches(data.train, 100, 0, 0, 8))[1]) == 56
    for settings in ({"accumulate": 0}, {"accumulate": 3}, {"accumulate": 64, "batch_size": 64}):
        with pytest.raises(UserError, match="accumulate"):
            trainer(data, **settings)


# Activation checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
def test_checkpointed_blocks_give_the_same_loss_and_gradients(draws: int) -> None:
    model, guide = make_pair(posterior_scale="learned")
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    found, saved = [], []
    for again in (False, True):
        model.vit.checkpoint_activations = again
        torch.manual_seed(3)
        count = 0

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = FusedELBO(model, guide, draws)(x, y)
        saved.append(count)
        parameters = [p for module in (model, guide) for p in module.parameters()]
        found.append((loss, *torch.autograd.grad(loss, parameters)))
    assert saved[1] < 0.8 * saved[0]
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ising", "dropout", "ensemble"])
def test_checkpointed_training_is_the_same_run(data, method: str) -> None:
    """Noise of the layers is that of the first pass."""
    config = replace(CONFIG, method=method)
    first, second = (trainer(data, config=config, checkpoint_activations=flag).fit() for flag in (False, True))
    assert first.history == second.history


@pytest.mark.parametrize("name", SALIENCY)
def test_every_saliency_is_the_same_with_checkpointing(name: str) -> None:
    model, guide = make_pair()
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4) % 3
    found = []
    for flag in (False, True):
        model.vit.checkpoint_activations = flag
        torch.manual_seed(2)
        found.append(SALIENCY[name](model.vit, dict(guide.loc.items()), x, y))
        assert model.vit.checkpoint_activations is flag
    for kind, value in found[0].items():
        torch.testing.assert_close(found[1][kind], value, rtol=0, atol=0)


# One process ----------------------------------------------------------------------------------------------------


def test_one_process_is_left_alone(monkeypatch) -> None:
    value = torch.randn(3)
    assert world() == 1 and is_first() and averaged(value) is value and own_rows(7) == slice(0, 7)
    assert gathered(value, 3, 0, torch.device("cpu")) is value
    with pytest.raises(UserError, match="full"):
        on_first(lambda: (_ for _ in ()).throw(UserError("full")))
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's own; torchrun sets more
    assert launched() == (1, 1)
    for name, number in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, number)
    assert launched() == (2, 2)


@pytest.mark.parametrize("count", [3, BISECTION_SAMPLE, BISECTION_SAMPLE + 1, 86_292_480, 2**31 - 1])
def test_the_masks_looked_at_exist(count: int) -> None:
    """Of a large network too: single precision rounds the last number up."""
    rows = evenly(count, torch.device("cpu"))
    assert int(rows.min()) == 0 and int(rows.max()) == count - 1
    assert len(rows.unique()) == len(rows) == min(count, BISECTION_SAMPLE)
