"""What a deployed network costs: counted by hand, against the compact network, and for every kind of sparsity."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import CONFIG, INFO, TINY, trainer

from pyro_isingvit.core.settings import BaselineConfig, IsingConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.evaluation import evaluate
from pyro_isingvit.methods.base import Method
from pyro_isingvit.methods.ensemble import Ensemble
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.methods.sparse import L0, Magnitude
from pyro_isingvit.pruning import deployed
from pyro_isingvit.pruning.choose import compact
from pyro_isingvit.pruning.cost import macs
from pyro_isingvit.pruning.deployed import deployed_networks, deployment_cost
from pyro_isingvit.runs.run import Run, build_run

SHAPE = (1, 4, 4)


def by_hand() -> int:
    """T tokens of width D: patches; in each block qkv, scores and values, output, MLP; the head reads one vector."""
    t, d = 4, TINY.width
    block = 3 * t * d * d + 2 * t * t * d + t * d * d + 2 * t * d * TINY.mlp_ratio * d
    return t * 4 * d + TINY.depth * block + 3 * d


def made(method: str, ising: IsingConfig | None = None) -> Run:
    config = replace(CONFIG, method=method, baseline=BaselineConfig(members=3), ising=ising or METHODS[method].ising)
    return build_run(config, INFO, 50)


def counted(run: Run) -> int:
    cost = deployment_cost(run.method)
    assert cost is not None and cost.ms_per_image > 0
    return cost.macs


def set_masks(method: Method, share: float) -> IsingMethod:
    """Past the pilot phase, each mask kept with a probability of ``share``."""
    assert isinstance(method, IsingMethod)
    method.guide.phase = "ising"
    for name in method.guide.layout.sites:
        field = method.guide.field(name)
        field.copy_(torch.where(torch.rand_like(field) < share, 3.0, -3.0))
    return method


@pytest.mark.parametrize("method", [name for name in METHODS if name != "laplace"])
def test_a_dense_network_costs_what_is_counted_by_hand(method: str) -> None:
    networks = 3 if METHODS[method].networks else 1
    assert counted(made(method)) == networks * by_hand()


@pytest.mark.parametrize("granularity", ["unit", "head"])
def test_structured_masks_cost_what_the_compact_network_does(granularity: str) -> None:
    run = made("ising", IsingConfig(granularity=granularity))
    set_masks(run.method, 0.5)
    small = compact(run, threshold=0.5, weighting="slab")
    assert counted(run) == macs(small, SHAPE) < by_hand()
    (network,) = deployed_networks(run.method)
    [(vit, weights)] = run.method.deployed()
    x = torch.randn(5, *SHAPE)
    torch.testing.assert_close(network(x), vit(weights, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(x), small(x), rtol=1e-4, atol=1e-5)


def test_single_zeros_save_nothing() -> None:
    run = made("ising", IsingConfig(granularity="weight"))
    set_masks(run.method, 0.7)
    assert run.mask_summary()["pruned_fraction"] > 0.2 and counted(run) == by_hand()
    pruned = made("magnitude").method
    assert isinstance(pruned, Magnitude)
    pruned.begin("finetune")
    x = torch.randn(2, *SHAPE)
    (network,) = deployed_networks(pruned)
    torch.testing.assert_close(network(x), pruned.draw_networks(1)(x)[0], rtol=1e-4, atol=1e-5)


def test_closed_gates_of_another_method_save_as_much() -> None:
    """Half of the hidden units are read by nobody: half of both products of every MLP are gone."""
    method = made("l0").method
    assert isinstance(method, L0)
    method.log_a["fc2"].data[:, :8] = -20.0
    cost = deployment_cost(method)
    assert cost is not None and cost.macs == by_hand() - TINY.depth * 2 * 4 * 8 * 8


def test_the_network_of_l0_predicts_with_its_gates() -> None:
    """They are numbers between 0 and 1: a half-open gate is not an open one."""
    run = made("l0")
    for log_a in run.method.log_a.values():
        log_a.data.normal_(0, 2)
    (network,), x = deployed_networks(run.method), torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(network(x), run.draw_networks(1)(x)[0], rtol=1e-4, atol=1e-5)


def test_members_of_an_ensemble_add_up() -> None:
    method = made("ising-ensemble", IsingConfig(granularity="unit")).method
    assert isinstance(method, Ensemble)
    costs = [deployment_cost(set_masks(member, share)) for member, share in zip(method.networks, (0.9, 0.5, 1.0))]  # noqa: B905
    assert len({cost.macs for cost in costs if cost}) == 3
    whole = deployment_cost(method)
    assert whole is not None and whole.macs == sum(cost.macs for cost in costs if cost)


def test_a_network_of_which_nothing_would_be_left_counts_whole() -> None:
    run = made("ising", IsingConfig(granularity="unit"))
    set_masks(run.method, 0.0)
    assert counted(run) == by_hand()


def test_a_method_that_does_not_say_has_no_cost(data: ImageData, monkeypatch) -> None:
    monkeypatch.setattr(Plain, "deployed", Method.deployed)
    run = trainer(data, None, replace(CONFIG, method="deterministic")).fit()
    assert deployment_cost(run.method) is None
    metrics = judged(run, data)
    assert metrics["macs"] is None and metrics["ms_per_image"] is None


def judged(run: Run, data: ImageData) -> dict[str, Any]:
    return evaluate(run, data.test, data.val, train_size=60, train_seconds=1.0, num_samples=2).metrics


def test_an_evaluation_has_both_and_leaves_random_numbers_and_network_alone(data: ImageData) -> None:
    run = trainer(data, None, replace(CONFIG, ising=IsingConfig(granularity="unit", update_every=2))).fit()
    before = torch.get_rng_state(), {name: value.clone() for name, value in run.network.state_dict().items()}
    metrics = judged(run, data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in run.network.state_dict().items())
    assert metrics["macs"] == counted(run) and metrics["ms_per_image"] > 0


def test_milliseconds_are_those_of_one_image_and_large_networks_take_smaller_batches(monkeypatch) -> None:
    seen: list[int] = []

    def latency(networks: Sequence[object], shape: object, batch: int, *_: object) -> list[float]:
        seen.append(batch)
        return [0.5] * len(networks)

    monkeypatch.setattr(deployed, "latency", latency)
    method = made("ensemble").method
    cost = partial(deployment_cost, method)
    first = cost()
    monkeypatch.setattr(deployed, "WORK", 10.5 * by_hand())
    second = cost()
    monkeypatch.setattr(deployed, "WORK", 1.0)
    third = cost()
    assert seen == [256, 10, 1]
    assert [c.ms_per_image for c in (first, second, third) if c] == [1500 / 256, 150.0, 1500.0]
