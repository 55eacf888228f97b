"""The generative model as Pyro sees it, and the network against torch's own layers."""

import pyro
import pytest
import torch
from helpers import INFO, TINY, make_pair
from pyro import poutine
from pyro.infer import Predictive
from torch import nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.presets import PRESETS, preset
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.ising.layout import GRANULARITIES
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.nets.vit import ViT

X = torch.randn(6, 1, 4, 4)


def reference(vit: ViT, weights, images):
    """The same network from nn.MultiheadAttention, nn.LayerNorm and F.linear, block by block."""
    config = vit.config
    x = F.conv2d(images, weights["patch"][0].view(config.width, -1, config.patch_size, config.patch_size),
                 vit.bias["patch"][0], stride=config.patch_size).flatten(2).transpose(1, 2)  # fmt: skip
    if config.pool == "cls":
        x = torch.cat([vit.cls.expand(len(x), 1, -1), x], 1)
    x = x + vit.position
    norm = lambda x, i: F.layer_norm(x, x.shape[-1:], vit.norm_gain[i], vit.norm_bias[i])  # noqa: E731
    for b in range(config.depth):
        attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        with torch.no_grad():
            attention.in_proj_weight.copy_(weights["qkv"][b])
            attention.in_proj_bias.copy_(vit.bias["qkv"][b])
            attention.out_proj.weight.copy_(weights["attn_out"][b])
            attention.out_proj.bias.copy_(vit.bias["attn_out"][b])
        h = norm(x, 2 * b)
        x = x + attention(h, h, h, need_weights=False)[0]
        h = F.gelu(F.linear(norm(x, 2 * b + 1), weights["fc1"][b], vit.bias["fc1"][b]))
        x = x + F.linear(h, weights["fc2"][b], vit.bias["fc2"][b])
    x = norm(x, 2 * config.depth)
    x = x[:, 0] if config.pool == "cls" else x.mean(1)
    if config.head == "mlp":
        x = F.relu(F.linear(x, weights["head_hidden"][0], vit.bias["head_hidden"][0]))
    return F.linear(x, weights["head"][0], vit.bias["head"][0])


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_network_equals_the_reference(pool, head) -> None:
    vit = ViT(ViTConfig(patch_size=2, width=8, heads=2, depth=2, mlp_ratio=2, pool=pool, head=head), 3, 4, 6, 5)
    for parameter in vit.parameters():
        nn.init.normal_(parameter)
    weights, images = vit.initial_weights(), torch.randn(4, 3, 4, 6)
    torch.testing.assert_close(vit(weights, images), reference(vit, weights, images), rtol=1e-4, atol=1e-4)


def test_a_sample_axis_equals_a_loop() -> None:
    vit = ViT(ViTConfig(patch_size=2, width=8, heads=2, depth=2, mlp_ratio=2, pool="cls", head="mlp"), 1, 4, 4, 3)
    each = [vit.initial_weights() for _ in range(5)]
    stacked = {kind: torch.stack([w[kind] for w in each]) for kind in each[0]}
    torch.testing.assert_close(vit(stacked, X), torch.stack([vit(w, X) for w in each]), rtol=1e-4, atol=1e-5)


def test_padding_is_zeros_on_the_right_and_below() -> None:
    vit = ViT(ViTConfig(patch_size=3, width=8, heads=2, depth=1), 1, 4, 4, 3)
    assert vit.grid == (2, 2)
    padded = F.pad(X, (0, 2, 0, 2))
    torch.testing.assert_close(vit.patchify(X), vit.patchify(padded[..., :4, :4]))
    assert (vit.patchify(X)[:, 3].reshape(-1, 3, 3)[:, 1:, 1:] == 0).all()


def test_padding_is_said_in_the_log(caplog) -> None:
    with caplog.at_level("INFO"):
        ViT(ViTConfig(patch_size=3, width=8, heads=2, depth=1), 1, 4, 4, 3)
    assert "zero-padded to 6x6" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "not divisible by `heads`"), ({"patch_size": 5}, "does not fit"), ({"heads": 0}, "at least 1"),
        ({"depth": 0}, "at least 1"), ({"width": 3, "heads": 1, "head": "mlp"}, "odd"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViT(ViTConfig(**{"patch_size": 2, "width": 8, "heads": 2, "depth": 1, **change}), 1, 4, 4, 3)


def test_images_of_another_shape_are_refused() -> None:
    vit = ViT(TINY, 1, 4, 4, 3)
    with pytest.raises(UserError, match="the network reads"):
        vit(vit.initial_weights(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name: str) -> None:
    side, channels = {"digits": (8, 1), "cifar": (32, 3), "cifar-linear": (32, 3), "paper-32": (32, 3)}.get(
        name, (28, 1)
    )
    vit = ViT(preset(name), channels, side, side, 10)
    assert not any(vit.padding)
    assert vit(vit.initial_weights(), torch.randn(2, channels, side, side)).shape == (2, 10)


def test_paper_presets_are_those_of_the_paper() -> None:
    small, large = preset("paper-28"), preset("paper-32")
    assert (small.patch_size, small.width, small.heads, small.depth, small.mlp_ratio) == (7, 64, 8, 2, 16)
    assert (large.patch_size, large.width, large.heads, large.depth, large.mlp_ratio) == (4, 128, 16, 2, 16)
    assert small.pool == large.pool == "mean" and small.head == large.head == "mlp"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sites_are_one_mask_and_one_weight_per_kind_outside_the_plate(granularity: str) -> None:
    model, guide = make_pair(granularity=granularity)
    y = torch.zeros(6, dtype=torch.long)
    trace = poutine.trace(model).get_trace(X, y)
    sites = {name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "data"}
    assert sites == {f"xi_{n}" for n in guide.layout.sites} | {f"w_{k}" for k in guide.kinds} | {"y"}
    for name in sites - {"y"}:
        assert not trace.nodes[name]["cond_indep_stack"]
    assert [frame.name for frame in trace.nodes["y"]["cond_indep_stack"]] == ["data"]
    assert trace.nodes["w_qkv"]["value"].shape == (2, 24, 8)


def test_data_plate_scales_to_the_training_set() -> None:
    model, _ = make_pair(num_data=50)
    trace = poutine.trace(model).get_trace(X, torch.zeros(6, dtype=torch.long))
    assert trace.nodes["y"]["scale"] == pytest.approx(50 / 6)


def test_prior_draws_follow_masks_and_slab() -> None:
    model, _ = make_pair()
    for name in model.layout.sites:
        model.prior_logits(name).fill_(0.0)
    draws = Predictive(model, num_samples=200)(X)
    kept = draws["xi_fc1"].bool()
    w = draws["w_fc1"]
    assert w[kept].std() == pytest.approx(0.3, rel=0.05) and w[~kept].std() == pytest.approx(1e-3, rel=0.05)
    assert kept.float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("samples", [1, 4, 6])  # 6 is the batch size: a mix-up of the axes would go unseen elsewhere
def test_predictive_parallel_equals_a_manual_loop(granularity: str, samples: int) -> None:
    model, guide = make_pair(granularity=granularity)
    torch.manual_seed(3)
    draws = Predictive(model, guide=guide, num_samples=samples, parallel=True)(X)
    weights = Predictive(guide, num_samples=samples, parallel=True)
    torch.manual_seed(3)
    weights = weights(X)
    assert draws["probs"].shape == (samples, 6, 3) and draws["y"].shape == (samples, 6)
    for s in range(samples):
        one = {kind: weights[f"w_{kind}"][s].detach() for kind in guide.kinds}
        expected = model.vit(one, X).softmax(-1)
        torch.testing.assert_close(draws["probs"][s], expected, rtol=1e-4, atol=1e-5)


def test_predictive_sequential_equals_parallel_in_distribution() -> None:
    model, guide = make_pair()
    mean = [
        Predictive(model, guide=guide, num_samples=600, parallel=parallel)(X)["probs"] for parallel in (True, False)
    ]
    error = (mean[0].var(0) / 600 + mean[1].var(0) / 600).sqrt()
    assert ((mean[0].mean(0) - mean[1].mean(0)).abs() < 5 * error + 1e-4).all()


def test_predictive_handles_more_images_than_the_training_set() -> None:
    model, guide = make_pair(num_data=4)
    assert Predictive(model, guide=guide, num_samples=2, parallel=True)(X)["y"].shape == (2, 6)


def test_nothing_enters_the_param_store() -> None:
    pyro.clear_param_store()
    model, guide = make_pair()
    poutine.trace(guide).get_trace(X)
    assert not list(pyro.get_param_store().keys())
    assert isinstance(model, IsingViT) and DataInfo.from_dict(INFO.to_dict()) == INFO
