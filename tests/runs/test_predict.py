"""Posterior predictive draws: against a manual loop, in chunks, and their decomposition."""

import numpy as np
import pytest
import torch
from helpers import around, make_pair

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.random_state import RandomState, undisturbed
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data import images as images_module
from pyro_isingvit.data.images import CPU_CHUNK, network_chunk
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.nets.plain import PlainViT
from pyro_isingvit.nets.shape import widest_activation
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run

IMAGES = torch.randint(0, 256, (7, 1, 4, 4)).to(torch.uint8)


def make_run(**ising) -> Run:
    model, guide = make_pair(**ising)
    return around(model, guide)


def test_against_a_manual_loop() -> None:
    run = make_run()
    draws = draw_predictive(run, IMAGES, num_samples=5, seed=3)
    torch.manual_seed(3)
    x = run.info.normalise(IMAGES)
    expected = torch.stack([run.model.vit(run.guide.draw(), x).softmax(-1) for _ in range(5)]).detach()
    torch.testing.assert_close(draws.probs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 1000])
def test_chunks_do_not_change_the_draws(chunk: int) -> None:
    run = make_run(granularity="head")
    whole = draw_predictive(run, IMAGES, num_samples=6, chunk=10_000).probs
    torch.testing.assert_close(
        draw_predictive(run, IMAGES, num_samples=6, chunk=chunk).probs, whole, rtol=1e-4, atol=1e-5
    )


def test_at_most_chunk_pairs_pass_through_the_network_at_a_time(monkeypatch) -> None:
    run = make_run()
    seen = []
    forward = run.model.vit.forward

    def spy(weights, x):
        logits = forward(weights, x)
        seen.append(logits.numel() // 3)
        return logits

    monkeypatch.setattr(run.model.vit, "forward", spy)
    for chunk in (2, 5, 14, 30):
        seen.clear()
        draw_predictive(run, IMAGES, num_samples=6, chunk=chunk)
        assert max(seen) <= max(chunk, 1) and sum(seen) == 6 * 7
    seen.clear()
    many = torch.randint(0, 256, (CPU_CHUNK + 44, 1, 4, 4)).to(torch.uint8)
    probs = draw_predictive(run, many, num_samples=2).probs
    assert seen == [CPU_CHUNK, 44] * 2  # the caches of a CPU hold what passes
    torch.testing.assert_close(
        probs[:, -44:], draw_predictive(run, many[-44:], num_samples=2).probs, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mlp_ratio", [1, 2, 16])
def test_the_widest_activation_is_that_of_a_forward_pass(mlp_ratio: int) -> None:
    config = ViTConfig(patch_size=3, width=8, heads=2, depth=2, mlp_ratio=mlp_ratio)
    network, seen = PlainViT(ViT(config, 1, 8, 10, 3)), []
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, out: seen.append(out[0].numel()))
    network(torch.zeros(5, 1, 8, 10))
    assert max(seen) == widest_activation(config, 8, 10)


def test_a_wide_network_is_given_fewer_images_on_a_cpu(monkeypatch) -> None:
    run, seen = make_run(), []
    whole = draw_predictive(run, IMAGES, num_samples=3).probs
    widest = widest_activation(run.config.vit, 4, 4)
    monkeypatch.setattr(images_module, "CPU_VALUES", 3 * widest + 1)
    forward = run.model.vit.forward

    def spy(weights, images):
        seen.append(len(images))
        return forward(weights, images)

    monkeypatch.setattr(run.model.vit, "forward", spy)
    probs = draw_predictive(run, IMAGES, num_samples=3).probs
    assert seen == [3, 3, 1] * 3
    torch.testing.assert_close(probs, whole, rtol=1e-4, atol=1e-5)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert network_chunk(256, cpu, 10**9) == 1 and network_chunk(256, cuda, 10**9) == 256


def test_few_images_are_normalised_once(monkeypatch) -> None:
    run, asked = make_run(), []
    normalise = DataInfo.normalise

    def spy(info, images):
        asked.append(len(images))
        return normalise(info, images)

    monkeypatch.setattr(DataInfo, "normalise", spy)
    many = torch.randint(0, 256, (CPU_CHUNK + 44, 1, 4, 4)).to(torch.uint8)
    draw_predictive(run, many, num_samples=3)
    assert asked == [1, CPU_CHUNK, 44]  # the first is the check that images fit
    asked.clear()
    draw_predictive(run, many, num_samples=3, chunk=CPU_CHUNK)
    assert asked == [1] + 3 * [CPU_CHUNK, 44]


def test_the_global_random_state_is_left_alone() -> None:
    run = make_run()
    state = torch.get_rng_state()
    first = draw_predictive(run, IMAGES, num_samples=3, seed=1).probs
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw_predictive(run, IMAGES, num_samples=3, seed=1).probs, first)
    assert not torch.equal(draw_predictive(run, IMAGES, num_samples=3, seed=2).probs, first)


def test_seeds_reach_no_other_device(monkeypatch) -> None:
    """What draws on the CPU leaves the GPUs' random numbers alone, and gives those of torch.manual_seed."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    before = torch.get_rng_state()
    with undisturbed(7):
        found = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.default_generator.manual_seed(7)
    assert torch.equal(found, torch.rand(3))
    for seed in (np.int64(7), torch.tensor(7)):
        with undisturbed(seed):
            assert torch.equal(found, torch.rand(3))


def test_a_draw_notices_whether_random_numbers_were_taken() -> None:
    state = RandomState.now(torch.device("cpu"))
    assert state.is_that_of(RandomState.now(torch.device("cpu")))
    torch.rand(1)
    assert not state.is_that_of(RandomState.now(torch.device("cpu")))
    state.restore(torch.device("cpu"))
    assert state.is_that_of(RandomState.now(torch.device("cpu")))


def test_uncertainty_decomposes() -> None:
    draws = draw_predictive(make_run(), IMAGES, num_samples=20)
    torch.testing.assert_close(draws.entropy, draws.expected_entropy + draws.mutual_information)
    assert (draws.mutual_information > 0).all()
    same = PredictiveDraws(draws.probs[:1].expand(4, -1, -1))
    torch.testing.assert_close(same.mutual_information, torch.zeros(7), atol=1e-6, rtol=0)


def test_intervals_hold_their_mass() -> None:
    probs = torch.rand(1000, 2, 3)
    low, high = PredictiveDraws(probs).interval(0.9)
    inside = ((probs >= low) & (probs <= high)).float().mean(0)
    torch.testing.assert_close(inside, torch.full((2, 3), 0.9), atol=0.005, rtol=0)
    with pytest.raises(UserError, match="mass"):
        PredictiveDraws(probs).interval(1.0)


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"chunk": 0}])
def test_counts_below_one_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="at least 1"):
        draw_predictive(make_run(), IMAGES, **wrong)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError):
        draw_predictive(make_run(), torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(UserError):
        draw_predictive(make_run(), torch.zeros(2, 1, 4, 4))
