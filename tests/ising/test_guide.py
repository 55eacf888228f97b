"""The guide's masks: the mean-field field, its limits, and what an update may not do."""

import dataclasses
import math

import pytest
import torch
from helpers import INFO, TINY, make_pair
from pyro import poutine

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising.coupling import COUPLINGS
from pyro_isingvit.ising.curvature import SALIENCY
from pyro_isingvit.ising.distributions import slab_kl
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.layout import GRANULARITIES
from pyro_isingvit.ising.masks import LOGIT_BOUND
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.ising.tempering import tempering
from pyro_isingvit.methods.registry import PAPER_ISING

X, Y = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_reduce_is_the_adjoint_of_expand(granularity: str) -> None:
    model, guide = make_pair(granularity=granularity)
    fields = {kind: torch.randn(shape) for kind, shape in model.vit.matrix_shapes.items()}
    values = {name: torch.randn(site.shape) for name, site in guide.layout.sites.items()}
    spread = sum((guide.layout.expand(kind, values) * field).sum() for kind, field in fields.items())
    summed = sum((values[name] * guide.layout.reduce(site, fields)).sum() for name, site in guide.layout.sites.items())
    torch.testing.assert_close(spread, summed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_weight_is_under_exactly_one_mask(granularity: str) -> None:
    model, guide = make_pair(granularity=granularity)
    ones = {name: torch.ones(site.shape) for name, site in guide.layout.sites.items()}
    covered = {kind: torch.ones(shape) for kind, shape in model.vit.matrix_shapes.items()}
    assert all((guide.layout.expand(kind, ones) == 1).all() for kind in covered)
    total = sum(guide.layout.reduce(site, covered).sum() for site in guide.layout.sites.values())
    assert total == model.num_masked_weights


def test_head_masks_take_the_whole_head() -> None:
    _, guide = make_pair(granularity="head")
    values = {name: torch.ones(site.shape) for name, site in guide.layout.sites.items()}
    values["attention"][1, 0] = 0.0  # layer 1, head 0
    width, d = TINY.width, TINY.width // TINY.heads
    qkv = guide.layout.expand("qkv", values).expand(2, 3 * width, width)
    out = guide.layout.expand("attn_out", values).expand(2, width, width)
    for part in range(3):
        assert (qkv[1, part * width : part * width + d] == 0).all()
        assert (qkv[1, part * width + d : (part + 1) * width] == 1).all()
    assert (out[1, :, :d] == 0).all() and (out[1, :, d:] == 1).all() and (out[0] == 1).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_update_solves_the_field_equation(granularity: str) -> None:
    """Without coupling: logit pi = -logit(delta) + kappa N h m^2 / 2 - omega KL_e, summed over what a mask covers."""
    model, guide = make_pair(
        granularity=granularity, coupling="none", mask_damping=1.0, max_keep=1.0, kappa_mask=7.0, omega=0.5, delta=0.8
    )
    for kind in guide.kinds:
        guide.get_buffer(f"curvature_{kind}").uniform_(0, 0.05)
    guide.curvature_updates += 10_000
    guide.update(model)
    for name, site in guide.layout.sites.items():
        gain = {k: 0.5 * 50 * guide.get_buffer(f"curvature_{k}") * m.detach() ** 2 for k, m in guide.loc.items()}
        cost = {k: slab_kl(m.detach(), guide.log_scale[k].detach().exp(), 0.3) for k, m in guide.loc.items()}
        expected = -math.log(0.8 / 0.2) + 7.0 * guide.layout.reduce(site, gain) - 0.5 * guide.layout.reduce(site, cost)
        torch.testing.assert_close(guide.logits(name), expected.clamp(-LOGIT_BOUND, LOGIT_BOUND), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.prior_logits(name), torch.full(site.shape, -math.log(4.0)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("saliency", SALIENCY)
def test_updates_stay_finite_and_within_bounds(granularity: str, coupling: str, saliency: str) -> None:
    model, guide = make_pair(granularity=granularity, coupling=coupling, saliency=saliency, kappa_mask=1e6)
    for _ in range(3):
        guide.observe(model, X, Y)
        guide.update(model)
    for name in guide.layout.sites:
        logits = guide.logits(name)
        assert torch.isfinite(logits).all() and torch.isfinite(model.prior_logits(name)).all()
        assert (guide.retention(name) <= 0.9 + 1e-6).all() and (logits >= -LOGIT_BOUND).all()


def test_coupling_raises_the_prior_of_what_is_read() -> None:
    model, guide = make_pair(coupling="nearest", J=2.0, mask_damping=1.0)
    guide.field("fc2").fill_(-8.0)
    guide.field("fc2")[..., 0] = 2.0  # only hidden unit 0 is still read
    # fc2 itself is updated in the sweep before fc1: hold it where it is
    guide.get_buffer("curvature_fc2")[..., 0] = 1e6
    guide.curvature_updates += 10_000
    guide.update(model)
    prior = model.prior_logits("fc1")
    assert (prior[:, 0] > prior[:, 1:].max()).all()


def test_more_prior_dropping_keeps_less() -> None:
    kept = []
    for delta in (0.1, 0.5, 0.9):
        torch.manual_seed(0)
        model, guide = make_pair(delta=delta, mask_damping=1.0)
        guide.update(model)
        kept.append(float(guide.retention("fc1").mean()))
    assert kept[0] > kept[1] > kept[2]


def test_damping_bounds_the_step() -> None:
    model, guide = make_pair(mask_damping=0.1, kappa_mask=1e9)
    before = {name: guide.logits(name).clone() for name in guide.layout.sites}
    guide.observe(model, X, Y)
    guide.update(model)
    for name, old in before.items():
        assert ((guide.logits(name) - old).abs() <= 0.1 * 2 * LOGIT_BOUND + 1e-5).all()


def test_saliency_guides_the_masks() -> None:
    """Weights with more curvature are kept more often."""
    model, guide = make_pair(coupling="none", omega=0.0, mask_damping=1.0, kappa_mask=1e3, max_keep=1.0)
    guide.observe(model, X, Y)
    guide.update(model)
    gain = guide.curvature("fc1") * guide.loc["fc1"].detach() ** 2
    order = gain.flatten().argsort()
    retention = guide.retention("fc1").flatten()[order]
    assert (retention[1:] >= retention[:-1] - 1e-6).all() and retention[-1] > retention[0]


def test_empirical_slab_is_the_closed_form_and_stays_above_the_spike() -> None:
    model, guide = make_pair(empirical_tau_1=True)
    keep = guide.weight_retention("fc1")
    second = guide.loc["fc1"].detach() ** 2 + (2 * guide.log_scale["fc1"].detach()).exp()
    expected = ((keep * second).sum((1, 2)) / keep.sum((1, 2))).sqrt()
    guide.update(model)
    torch.testing.assert_close(model.tau_1("fc1").flatten(), expected)
    guide.loc["fc1"].data.zero_()
    guide.log_scale["fc1"].data.fill_(-30.0)
    guide.update(model)
    assert (model.tau_1("fc1") >= 10 * 1e-3 - 1e-9).all()


def test_pilot_keeps_every_weight() -> None:
    model = IsingViT(TINY, INFO)
    guide = IsingGuide(model, 50)
    trace = poutine.trace(guide).get_trace(X)
    assert all((trace.nodes[f"xi_{name}"]["value"] == 1).all() for name in guide.layout.sites)
    assert guide.kl_terms(model)[1] == pytest.approx(0.0, abs=1e-3)


def test_frozen_masks_do_not_move() -> None:
    model, guide = make_pair()
    expected = {name: (guide.retention(name) > 0.5).float() for name in guide.layout.sites}
    guide.freeze(model)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(X)
        assert all((trace.nodes[f"xi_{name}"]["value"] == kept).all() for name, kept in expected.items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_plain_draws_have_the_moments_of_the_guide(granularity: str) -> None:
    _, guide = make_pair(granularity=granularity)
    for parameter in guide.log_scale.values():
        parameter.data.fill_(-1.5)
    draws = guide.draw(4000)
    for kind, loc in guide.loc.items():
        pi, m, s = guide.weight_retention(kind), loc.detach(), guide.log_scale[kind].detach().exp()
        mean, second = pi * m, pi * (m**2 + s**2) + (1 - pi) * 1e-6
        error = ((second - mean**2) / 4000).sqrt()
        assert ((draws[kind].mean(0) - mean).abs() < 5 * error + 1e-4).all()
        torch.testing.assert_close((draws[kind] ** 2).mean(0).mean(), second.mean(), rtol=0.05, atol=1e-4)


def test_shared_scale_is_frozen() -> None:
    _, guide = make_pair(posterior_scale="shared")
    assert not any(parameter.requires_grad for parameter in guide.log_scale.parameters())


def test_tempering() -> None:
    assert tempering("exact", 1000, 10) == 1.0
    assert tempering("data_emphasis", 1000, 10) == 100.0
    assert tempering("data_emphasis", 10, 1000) == 1.0
    assert tempering(2.5, 10, 1000) == 2.5
    with pytest.raises(UserError, match="positive"):
        tempering(0.0, 10, 10)


@pytest.mark.parametrize(
    "setting",
    [
        {"saliency": "nope"}, {"coupling": "nope"}, {"granularity": "nope"}, {"delta": 0.0}, {"delta": 1.0},
        {"max_keep": 1.5}, {"target_retention": 0.0}, {"tau_0": 1.5}, {"tau_1": -1.0}, {"temperature": 0.0},
        {"decay": 2.0}, {"mask_damping": 0.0}, {"update_every": 0}, {"kappa_weights": -1.0}, {"mask_posterior": "nope"},
        {"curvature_factor": 0.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(UserError, match=next(iter(setting)).split("_")[0]):
        IsingGuide(IsingViT(TINY, INFO, IsingConfig(**setting)), 50)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_auto_kappa_mask_meets_the_target_retention(granularity: str, target: float) -> None:
    model, guide = make_pair(granularity=granularity, target_retention=target, mask_damping=1.0, max_keep=0.8)
    for _ in range(30):
        guide.observe(model, X, Y)
    for _ in range(5):
        guide.update(model)
    kept = torch.cat([guide.weight_retention(kind).flatten() for kind in guide.kinds]).mean()
    assert kept == pytest.approx(0.8 * target, abs=0.02) and guide.kappa_mask > 0


def test_auto_kappa_mask_lowers_retention_gradually() -> None:
    model, guide = make_pair(target_retention=0.4, mask_damping=1.0)
    guide.start_masks()
    guide.observe(model, X, Y)
    kept = []
    for progress in (0.0, 0.1, 0.25, 0.5, 1.0):
        guide.update(model, progress)
        kept.append(float(torch.cat([guide.weight_retention(kind).flatten() for kind in guide.kinds]).mean()))
    assert kept[0] > 0.85 and kept[0] > kept[1] > kept[2] > kept[3]
    assert kept[3] == pytest.approx(0.4 * guide.max_keep, abs=0.03)


def test_block_masks_take_whole_branches() -> None:
    _, guide = make_pair(granularity="block")
    values = {name: torch.ones(site.shape) for name, site in guide.layout.sites.items()}
    values["mlp"][0] = 0.0
    for kind, dropped in (("fc1", 0.0), ("fc2", 0.0), ("qkv", 1.0), ("attn_out", 1.0)):
        spread = guide.layout.expand(kind, values).expand_as(guide.loc[kind])
        assert (spread[0] == dropped).all() and (spread[1] == 1).all()


def test_learned_masks_follow_their_parameters_and_take_the_ising_field_as_prior() -> None:
    model, guide = make_pair(mask_posterior="learned", coupling="none", delta=0.8)
    guide.start_masks()
    before = guide.retention("fc1").detach()
    guide.update(model)
    assert torch.equal(guide.retention("fc1"), before)  # the field does not move them
    torch.testing.assert_close(model.prior_logits("fc1"), torch.full((2, 16, 8), -math.log(4.0)))
    guide.mask_logit["fc1"].data.fill_(-50.0)
    assert (guide.logits("fc1") == -LOGIT_BOUND).all()
    guide.logits("fc1").sum().backward()
    assert (guide.mask_logit["fc1"].grad == 1).all()  # also beyond the bound: they can come back


def test_hybrid_masks_are_the_field_and_a_correction() -> None:
    model, guide = make_pair(mask_posterior="hybrid", mask_damping=1.0)
    guide.update(model)
    field = guide.field("fc1").clone()
    guide.mask_logit["fc1"].data.fill_(0.25)
    torch.testing.assert_close(guide.logits("fc1"), (field + 0.25).clamp(max=math.log(9.0)))


def test_temperature_falls_geometrically() -> None:
    model, guide = make_pair(temperature=0.8, final_temperature=0.2)
    for progress, expected in ((0.0, 0.8), (0.5, 0.4), (1.0, 0.2)):
        guide.update(model, progress)
        assert float(guide.temperature) == pytest.approx(expected)


def test_the_phase_travels_with_the_state() -> None:
    model, guide = make_pair(mask_posterior="learned")
    guide.start_masks()
    other = IsingGuide(model, 50)
    other.load_state_dict(guide.state_dict())
    assert other.phase == "ising" and torch.equal(other.retention("fc1"), guide.retention("fc1"))


def test_paper_setting_is_equation_3() -> None:
    """logit pi = J c - logit(delta) + h m^2 / 2 on the batch mean, no KL anywhere, pi not clipped."""
    model, guide = make_pair(**{**dataclasses.asdict(PAPER_ISING), "coupling": "none"})
    for kind in guide.kinds:
        guide.get_buffer(f"curvature_{kind}").uniform_(0, 50)
    guide.curvature_updates += 10_000
    guide.update(model)
    expected = -math.log(0.1 / 0.9) + 0.5 * guide.get_buffer("curvature_fc1") * guide.loc["fc1"].detach() ** 2
    torch.testing.assert_close(guide.logits("fc1"), expected, rtol=1e-4, atol=1e-4)
    assert guide.kappa_weights == 1e30 and (PAPER_ISING.J, PAPER_ISING.coupling) == (2.0, "nearest")
    assert all(not p.requires_grad for p in guide.log_scale.parameters())


def test_a_small_curvature_batch_costs_little_precision() -> None:
    """Relative variance of gnb over random batches: a quarter of the images, less than twice the noise."""
    model, _ = make_pair()
    images, labels = torch.randn(256, 1, 4, 4), torch.zeros(256, dtype=torch.long)
    weights = model.vit.initial_weights()
    noise = {}
    for size in (16, 64):
        draws = []
        for _ in range(300):
            rows = torch.randperm(256)[:size]
            estimate = SALIENCY["gnb"](model.vit, weights, images[rows], labels[rows])
            draws.append(torch.cat([h.flatten() for h in estimate.values()]))
        stacked = torch.stack(draws)
        noise[size] = float(stacked.var(0).sum() / stacked.mean(0).pow(2).sum())
    assert noise[16] < 2 * noise[64]


# What is kept between steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["shared", "learned"])
def test_scales_follow_what_is_written(scale: str) -> None:
    _, guide = make_pair(posterior_scale=scale, init_scale=0.01)
    kind = guide.kinds[0]
    other = make_pair(posterior_scale=scale, init_scale=0.5)[1]
    torch.testing.assert_close(guide.scale(kind).expand_as(guide.loc[kind]), torch.full_like(guide.loc[kind], 0.01))
    with torch.no_grad():
        guide.log_scale[kind][0, 0, 0] = 0.0
    expected = torch.full_like(guide.loc[kind], 0.01)
    expected[0, 0, 0] = 1.0
    torch.testing.assert_close(guide.scale(kind).expand_as(expected), expected)
    guide.load_state_dict(other.state_dict())
    torch.testing.assert_close(guide.scale(kind).expand_as(expected), torch.full_like(expected, 0.5))
    assert guide.scale(kind).requires_grad == (scale == "learned")


def test_masks_move_in_double_precision_too() -> None:
    model, guide = make_pair()
    guide.update(model)
    model.double(), guide.double()
    guide.update(model)
    assert guide.field(next(iter(guide.layout.sites))).dtype == torch.float64


def test_curvature_images_are_shared_out_evenly(monkeypatch) -> None:
    """Three processes and 16 curvature images: each sees 5 of its own, so that all draw as many random numbers."""
    x, y, seen = torch.randn(16, 1, 4, 4), torch.arange(16) % 3, []

    def estimate(vit, weights, images, labels):
        seen.append(images)
        return {kind: torch.zeros_like(weight) for kind, weight in weights.items()}

    monkeypatch.setitem(SALIENCY, "gnb", estimate)
    monkeypatch.setattr("pyro_isingvit.ising.guide.world", lambda: 3)
    model, guide = make_pair(curvature_batch=16)
    for rank in range(3):
        monkeypatch.setattr(
            "pyro_isingvit.ising.guide.own_rows",
            lambda count, rank=rank: slice(rank * count // 3, (rank + 1) * count // 3),
        )
        guide.observe(model, x, y)
    torch.testing.assert_close(torch.cat(seen), x[:15])
    assert {len(images) for images in seen} == {5}


def test_hybrid_masks_meet_the_target_with_their_correction() -> None:
    model, guide = make_pair(mask_posterior="hybrid", mask_damping=1.0, target_retention=0.4, max_keep=1.0)
    guide.start_masks()
    for logit in guide.mask_logit.values():
        logit.data.fill_(-2.0)
    for _ in range(30):
        guide.observe(model, X, Y)
    for _ in range(5):
        guide.update(model)
    kept = torch.cat([guide.weight_retention(kind).flatten() for kind in guide.kinds]).mean()
    assert float(kept.detach()) == pytest.approx(0.4, abs=0.03)
