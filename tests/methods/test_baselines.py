"""Every baseline trains, draws and is kept like a run; each formula against a reference."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIG, INFO, TINY
from scipy import integrate, stats

from pyro_isingvit import fit
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import BaselineConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.dropout import ConcreteDropout
from pyro_isingvit.methods.ensemble import Ensemble
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.methods.laplace import PRECISIONS, LastLayerLaplace
from pyro_isingvit.methods.plain import Plain, check_baseline
from pyro_isingvit.methods.registry import METHODS, with_defaults
from pyro_isingvit.methods.sparse import L0, GradualMagnitude, SparseVD, sparse_vd_kl
from pyro_isingvit.nets.vit import linear
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.steps import total
from pyro_isingvit.runs.trainer import Trainer

QUICK = {"epochs": 4, "batch_size": 20, "lr": 1e-2, "device": "cpu", "samples": 4}

BASELINES = [name for name in METHODS if not issubclass(method_class(name), IsingMethod)]


def config(method: str, **baseline: object) -> RunConfig:
    ising, train = METHODS[method].ising, METHODS[method].train
    return RunConfig(
        method=method, vit=TINY, ising=ising, train=replace(train, **QUICK), preset="custom",
        baseline=replace(BaselineConfig(), **baseline),
    )  # fmt: skip


def made(method: str, **baseline: object) -> Plain:
    network = method_class(method)(config(method, **baseline), INFO, 50)
    assert isinstance(network, Plain)
    return network


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 1, 4, 4), torch.arange(8) % 3


def test_every_method_has_a_class_and_settings_that_fit_it() -> None:
    for name, row in METHODS.items():
        if name == "laplace":
            continue  # needs an extra
        settings = config(name)
        method_class(name)(settings, INFO, 50).check(row.train)
        assert row.derived_from in {None, *METHODS}
    assert BASELINES and set(BASELINES) < set(METHODS)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "ising-paper"])
def test_trains_draws_and_reloads(method: str, data: ImageData, tmp_path: Path) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    trainer = Trainer(config(method, members=2), data, tmp_path, progress=False)
    run = trainer.fit()
    assert run.history[-1]["nll"] < run.history[0]["nll"]
    draws = draw_predictive(run, data.test.images, 4, seed=1)
    assert len(draws.probs) == min(4, run.max_draws or 4)
    torch.testing.assert_close(draws.probs.sum(-1), torch.ones(draws.probs.shape[:2]))
    again = draw_predictive(open_run(tmp_path), data.test.images, 4, seed=1)
    assert torch.equal(draws.probs, again.probs)
    summary = run.mask_summary()
    assert 0 <= summary["pruned_fraction"] <= 1 and 0 <= summary["retention_mean"] <= 1
    if method.endswith("magnitude"):
        assert summary["pruned_fraction"] == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("method", ["dropout", "magnitude", "gradual-magnitude", "sparse-vd", "ensemble"])
def test_resumes_bit_for_bit(method: str, data: ImageData, tmp_path: Path) -> None:
    whole = Trainer(config(method), data, tmp_path / "whole", progress=False).fit()
    broken = Trainer(config(method), data, tmp_path / "broken", progress=False)

    def stop(at: Trainer) -> None:
        if at.epoch == 2:
            raise KeyboardInterrupt

    broken.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    resumed = Trainer(config(method), data, tmp_path / "broken", progress=False)
    resumed.restore()
    again = resumed.fit()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


@pytest.mark.parametrize("method", [m for m in BASELINES if m not in ("laplace", "magnitude")])
def test_every_parameter_is_trained(method: str) -> None:
    network = method_class(method)(config(method), INFO, 50)
    total(network(*batch())).backward()
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) > 5
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_baseline_has_no_masks(data: ImageData) -> None:
    run = Trainer(config("dropout"), data, None, progress=False).fit()
    assert not run.has_masks
    for name in ("guide", "model"):
        with pytest.raises(UserError, match="dropout, which has no masks"):
            getattr(run, name)


@pytest.mark.parametrize("setting", [{"compile": True}, {"noise": "activations"}])
def test_settings_of_the_fused_step_are_refused(data: ImageData, setting: dict) -> None:
    chosen = config("dropout")
    with pytest.raises(UserError, match="for method ising, not dropout"):
        Trainer(replace(chosen, train=replace(chosen.train, **setting)), data, None, progress=False)


def test_dropout_at_zero_rate_is_the_plain_network() -> None:
    network = made("dropout", drop_rate=1e-9)
    x, _ = batch()
    expected = network.vit(dict(network.loc.items()), x)
    torch.testing.assert_close(network.draw_networks(1)(x)[0], expected)


def test_dropconnect_keeps_the_mean_and_drops_at_its_rate() -> None:
    network = made("dropconnect", drop_rate=0.3)
    draws = torch.stack([network.weights()["qkv"] for _ in range(4000)]).detach()
    assert float((draws == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    means = network.loc["qkv"].detach()
    error = (draws.mean(0) - means).abs() / (means.abs() * math.sqrt(0.3 / 0.7 / 4000))
    assert float(error.mean()) == pytest.approx(math.sqrt(2 / math.pi), rel=0.1)  # of a standard normal


@pytest.mark.parametrize("log_alpha", [-4.0, -2.0, 0.0, 2.0, 4.0])
def test_sparse_vd_kl_against_quadrature(log_alpha: float) -> None:
    """-KL = 0.5 log alpha - E log|e| + C, e ~ N(1, alpha); it falls to 0 as alpha grows, which fixes C."""

    def cross(a: float) -> float:
        scale = math.exp(a / 2)
        pieces = [(1 - 12 * scale, 0.0), (0.0, 1 + 12 * scale)]
        density = stats.norm(1, scale).pdf
        return 0.5 * a - sum(
            integrate.quad(lambda e: density(e) * math.log(abs(e)), low, high, limit=400)[0] for low, high in pieces
        )

    value = float(sparse_vd_kl(torch.tensor(log_alpha)))
    assert value == pytest.approx(cross(14.0) - cross(log_alpha), abs=0.02)


def test_sparse_vd_noise_on_activations_has_the_moments_of_noise_on_weights() -> None:
    network = made("sparse-vd")
    assert isinstance(network, SparseVD)
    network.log_variance["fc1"].data.fill_(-2.0)
    x = torch.randn(1, 2, 8).expand(20_000, 2, 8)
    weight, bias = network.loc["fc1"][0], network.vit.bias["fc1"][0]
    by_activation = network.layer_rule("fc1", 0, x, weight, bias).detach()
    noisy = weight + math.exp(-1.0) * torch.randn(20_000, *weight.shape)
    by_weight = (torch.einsum("bti,boi->bto", x, noisy) + bias).detach()
    torch.testing.assert_close(by_activation.mean(0), by_weight.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(by_activation.std(0), by_weight.std(0), atol=0.0, rtol=0.04)


def test_concrete_dropout_penalty_in_loops() -> None:
    network = made("concrete-dropout", length_scale=0.3)
    assert isinstance(network, ConcreteDropout)
    for logit in network.drop_logit.values():
        logit.data.normal_()
    total = 0.0
    for kind, (layers, _, columns) in network.vit.matrix_shapes.items():
        for layer in range(layers):
            p = float(network.drop_logit[kind][layer].detach().sigmoid())
            squares = float(network.loc[kind][layer].detach().pow(2).sum())
            total += 0.3**2 / (2 * (1 - p)) * squares + columns * (p * math.log(p) + (1 - p) * math.log(1 - p))
    assert float(network.penalty().detach()) == pytest.approx(total, rel=1e-4)


def test_concrete_dropout_drops_at_its_rate() -> None:
    network = made("concrete-dropout", drop_rate=0.25)
    identity, zero = torch.eye(8), torch.zeros(8)
    y = network.layer_rule("attn_out", 0, torch.ones(5000, 4, 8), identity, zero).detach()
    assert float((y < 0.5 / 0.75).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(linear(torch.ones(1, 1, 8), identity, zero), torch.ones(1, 1, 8))


def test_l0_gates_against_their_distribution() -> None:
    """P(gate > 0) as in eq. 12, and the share of exact zeros and ones of the hard concrete."""
    network = made("l0", drop_rate=0.4, l0_penalty=1.0)
    assert isinstance(network, L0)
    log_a = torch.tensor([-2.0, 0.0, 1.5])
    gates = network.sample_gate(log_a, 40_000)
    active = (log_a - L0.BETA * math.log(-L0.GAMMA / L0.ZETA)).sigmoid()
    np.testing.assert_allclose((gates > 0).float().mean(0), active, atol=0.01)
    assert 0 < float((gates == 1).float().mean()) < 1
    expected = sum(
        float((a.detach() - L0.BETA * math.log(-L0.GAMMA / L0.ZETA)).sigmoid().sum()) * network.loc[kind].shape[1]
        for kind, a in network.log_a.items()
    )
    assert float(network.penalty().detach()) == pytest.approx(expected, rel=1e-4)
    network.log_a["fc1"].data[0, :3] = -20.0  # closed gates: their columns are gone
    assert float(network.draw_weights()["fc1"][0, :, :3].detach().abs().sum()) == 0
    assert float(network.kept()["fc1"][0, :, :3].sum()) == 0


def test_magnitude_keeps_the_largest(data: ImageData) -> None:
    network = made("magnitude", sparsity=0.7)
    network.begin("finetune")
    kept = torch.cat([network.kept()[kind].flatten() for kind in network.loc]).bool()
    sizes = torch.cat([weight.abs().flatten() for weight in network.loc.values()])
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.002)
    assert sizes[kept].min() > sizes[~kept].max()


@pytest.mark.parametrize("method", ["magnitude", "gradual-magnitude"])
@pytest.mark.parametrize("epochs", [1, 6])
@pytest.mark.parametrize("finetune_epochs", [0, 2])
def test_magnitude_ends_with_the_share_that_was_asked_for(
    data: ImageData, method: str, epochs: int, finetune_epochs: int
) -> None:
    """However short the training is, and with or without fine-tuning."""
    chosen = config(method, sparsity=0.7)
    train = replace(chosen.train, epochs=epochs, finetune_epochs=finetune_epochs, batch_size=60)
    run = Trainer(replace(chosen, train=train), data, None, progress=False).fit()
    count = run.mask_summary()["masked_weights"]
    assert run.mask_summary()["pruned_fraction"] == pytest.approx(int(0.7 * count) / count)


def test_the_gradual_curve() -> None:
    """s (1 - (1 - t)^3) at t = 0, 1/2 and 1, nothing before and no more after."""
    network = made("gradual-magnitude", sparsity=0.8)
    assert isinstance(network, GradualMagnitude)
    start, end = network.START, network.END
    assert [network.dropped(at) for at in (0.0, start)] == [0, 0]
    assert network.dropped((start + end) / 2) == pytest.approx(0.8 * 7 / 8)
    assert [network.dropped(at) for at in (end, 1.0)] == [0.8, 0.8]
    x, y = batch()
    for step in range(200):
        network.before_step(x, y, "train", step, step / 200)
        share = 1 - float(torch.cat([kept.flatten() for kept in network.kept().values()]).mean())
        assert share <= network.dropped(step / 200) + 1e-6
        if step % network.EVERY == 0 or step / 200 >= end:
            assert share == pytest.approx(network.dropped(step / 200), abs=1e-3)  # of 1,000 weights and more


def test_what_gradual_pruning_dropped_stays_0() -> None:
    """Momentum and weight decay move the numbers under a mask, and so does their average; the weights are 0."""
    network = made("gradual-magnitude", sparsity=0.8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.5)
    averages = {kind: weight.detach().clone() for kind, weight in network.loc.items()}
    gone = {kind: torch.zeros_like(weight, dtype=torch.bool) for kind, weight in network.loc.items()}
    x, y = batch()
    for step in range(60):
        network.before_step(x, y, "train", step, step / 60)
        optimizer.zero_grad()
        total(network(x, y)).backward()
        optimizer.step()
        for kind, weight in network.loc.items():
            averages[kind].lerp_(weight.detach(), 0.2)
            assert not network.draw_weights()[kind][gone[kind]].any()
            assert not network.kept()[kind][gone[kind]].any()  # a dropped weight does not come back
            gone[kind] = network.kept()[kind] == 0
    assert 0.75 < float(torch.cat([at.flatten() for at in gone.values()]).float().mean()) < 0.8001
    assert network.loc["fc1"][gone["fc1"]].abs().sum() > 0  # there was something for the mask to hide
    trained = {kind: weight.detach().clone() for kind, weight in network.loc.items()}
    with torch.no_grad():
        for kind, weight in network.loc.items():
            weight.copy_(averages[kind])
    for kind, weight in network.draw_weights().items():
        assert not weight[gone[kind]].any() and not torch.equal(weight, trained[kind])


def test_members_of_an_ensemble_train_as_they_would_alone(data: ImageData) -> None:
    """Same start, same batches: a member's weights are those of a deterministic run."""
    trainer = Trainer(config("ensemble", members=2), data, None, progress=False)
    ensemble = trainer.run.network
    assert isinstance(ensemble, Ensemble)
    alone = Trainer(config("deterministic"), data, None, progress=False)
    alone.run.network.load_state_dict(ensemble.networks[1].state_dict())
    trainer.fit()
    alone.fit()
    for name, value in alone.run.network.state_dict().items():
        torch.testing.assert_close(ensemble.networks[1].state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_each_draw_of_an_ensemble_is_another_member(data: ImageData, chunk: int) -> None:
    """Whatever the chunk; and there are as many draws as members."""
    run = Trainer(config("ensemble", members=3), data, None, progress=False).fit()
    assert isinstance(run.network, Ensemble)
    probs = draw_predictive(run, data.test.images, num_samples=10, chunk=chunk).probs
    assert len(probs) == 3
    x = run.info.normalise(data.test.images)
    for member, drawn in zip(run.network.networks, probs, strict=True):
        logits = member.vit(dict(member.loc.items()), x) / run.network.temperature
        torch.testing.assert_close(drawn, logits.softmax(-1).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 10_000])
def test_no_last_layer_of_laplace_is_drawn_twice(data: ImageData, chunk: int) -> None:
    pytest.importorskip("laplace")
    run = Trainer(config("laplace"), data, None, progress=False).fit()
    probs = draw_predictive(run, data.test.images, num_samples=20, chunk=chunk).probs
    assert len(probs.unique(dim=0)) == 20
    x, network = run.info.normalise(data.test.images), run.network
    assert isinstance(network, LastLayerLaplace)
    classes, width = network.loc["head"].shape[1:]
    last = network.heads[19]
    logits = network._features(x) @ last[: classes * width].view(classes, width).T + last[classes * width :]
    torch.testing.assert_close(probs[19], (logits / network.temperature).softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["temperature", "laplace"])
def test_adopting_deterministic_weights_equals_training(method: str, data: ImageData, tmp_path: Path) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    Trainer(config("deterministic"), data, tmp_path / "plain", progress=False).fit()
    adopting = Trainer(config(method), data, None, progress=False)
    adopting.adopt(tmp_path / "plain")
    run, trained = adopting.fit(), Trainer(config(method), data, None, progress=False).fit()
    for name, value in trained.network.state_dict().items():
        assert torch.equal(run.network.state_dict()[name], value), name
    other = Trainer(replace(config(method), vit=replace(TINY, depth=1)), data, None, progress=False)
    with pytest.raises(UserError, match="other settings"):
        other.adopt(tmp_path / "plain")


def test_laplace_draws_spread_around_the_trained_head(data: ImageData) -> None:
    pytest.importorskip("laplace")
    run = Trainer(config("laplace"), data, None, progress=False).fit()
    network = run.network
    head = torch.cat([network.loc["head"].flatten(), network.vit.bias["head"].flatten()]).detach()
    error = (network.heads.mean(0) - head).abs() / (network.heads.std(0) / math.sqrt(len(network.heads)))
    assert float(error.max()) < 4.5 and float(network.heads.std(0).min()) > 0


class GivenLaplace:
    """A posterior of last layers around one, as wide as its precision says; no package is needed for it."""

    def __init__(self, head: torch.Tensor) -> None:
        self.head, self.prior_precision = head, 1.0

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.head + torch.randn(count, len(self.head), generator=generator) / math.sqrt(self.prior_precision)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # laplace-torch's
def test_the_precision_of_laplace_is_that_of_lowest_held_out_nll(data: ImageData, monkeypatch) -> None:
    """Sure and right: no noise. Sure where labels are at random, far from the classes' means: wide noise."""
    monkeypatch.setattr("pyro_isingvit.methods.laplace._import_laplace", lambda: None)
    network = method_class("laplace")(replace(CONFIG, method="laplace"), INFO, 60)
    assert isinstance(network, LastLayerLaplace)
    classes, width = network.loc["head"].shape[1:]
    head = torch.zeros(classes, width)
    head[range(classes), range(classes)] = 8.0  # class c where feature c is 1
    posterior = GivenLaplace(torch.cat([head.flatten(), torch.zeros(classes)]))
    labels = torch.arange(60) % classes
    features = torch.zeros(60, width)
    features[range(60), labels] = 1.0
    monkeypatch.setattr(network, "_features", lambda x: x)
    assert network._precision(posterior, [(features, labels)]) >= 1000
    features[:, -1] = torch.where(torch.arange(60) < 30, 6.0, 0.0)  # a feature that only noise reads
    wrong = torch.where(torch.arange(60) < 30, labels.roll(7), labels)
    assert network._precision(posterior, [(features, wrong)]) < 100
    assert network._precision(posterior, []) is None


def test_laplace_without_a_validation_part_takes_the_marginal_likelihood(data: ImageData, monkeypatch) -> None:
    pytest.importorskip("laplace")
    seen = []
    real = LastLayerLaplace._precision
    monkeypatch.setattr(LastLayerLaplace, "_precision", lambda *given: seen.append(real(*given)) or seen[-1])
    for calibrate in (True, False):
        settings = config("laplace")
        settings = replace(settings, train=replace(settings.train, calibrate=calibrate))
        assert Trainer(settings, data, None, progress=False).fit().network.heads.any()
    assert seen[0] in PRECISIONS and seen[1] is None


@pytest.mark.parametrize(
    "bad",
    [
        {"drop_rate": 0.0},
        {"drop_rate": 1.0},
        {"members": 0},
        {"sparsity": 1.0},
        {"l0_penalty": -1.0},
        {"kl_weight": math.nan},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        check_baseline(replace(BaselineConfig(), **bad))


def test_runs_written_before_baselines_load() -> None:
    raw = json.loads(RunConfig().to_json())
    del raw["baseline"], raw["train"]["engine"]
    assert RunConfig.from_json(json.dumps(raw)) == RunConfig()
    assert TrainConfig().engine == "auto"


def test_the_kl_of_sparse_vd_stays_in_fine_tuning() -> None:
    method = made("sparse-vd")
    x, y, risen = torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), []
    for phase, progress in (("train", 0.0), ("train", 0.25), ("train", 1.0), ("finetune", 0.0), ("finetune", 0.1)):
        method.before_step(x, y, phase, 0, progress)
        risen.append(method.risen)
    assert risen == [0.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("number", "wanted"), [("", 1.5), (":0.05", 1.5), (":0.1", 3.0), (":0.2", 3.0)])
def test_dropout_at_higher_rates_decays_more(number: str, wanted: float) -> None:
    train = with_defaults(f"dropout{number}", RunConfig()).train
    assert train == replace(METHODS["dropout"].train, shrinkage=wanted)
    started = with_defaults(f"dropout{number}", RunConfig(init="made")).train
    assert started.shrinkage == wanted and started.layer_decay < 1


@pytest.mark.parametrize(
    "settings",
    [
        *({"method": name} for name in ("sparse-vd", "l0", "concrete-dropout", "ising")),
        {"method": "deterministic", "sigma_reparam": 1.0},
    ],
)
def test_parameters_are_those_of_the_network_alone(data: ImageData, settings: dict) -> None:
    counts = {
        fit(TINY, data, epochs=1, progress=False, **chosen).method.num_parameters()
        for chosen in ({"method": "deterministic"}, settings)
    }
    assert len(counts) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit")  # laplace-torch's
def test_laplace_is_validated_by_the_trained_head_until_it_has_draws(data: ImageData, monkeypatch) -> None:
    monkeypatch.setattr("pyro_isingvit.methods.laplace._import_laplace", lambda: None)
    method = method_class("laplace")(replace(CONFIG, method="laplace"), INFO, 60)
    x = torch.randn(4, 1, 4, 4)
    drawn = method.draw_networks(2)(x)
    assert torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0], method.vit(dict(method.loc.items()), x))
    method.heads.normal_()
    assert not torch.equal(*method.draw_networks(2)(x))
