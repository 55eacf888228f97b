"""Pretrained transformers in our form: equal logits, both ways, and refusals that say why."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import VisionTransformer

from pyro_isingvit import UserError
from pyro_isingvit.nets.backbones import from_timm, from_torchvision, into_timm, into_torchvision, start_of
from pyro_isingvit.nets.libraries import convertible

timm = pytest.importorskip("timm")
from timm.models import vision_transformer as vt  # noqa: E402

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 5}
# Architectures as timm builds them, by what is special; the shape is small, the options are theirs.
OPTIONS = {
    "vit": {},
    "patch 16, three times the hidden units": {"patch_size": 16, "mlp_ratio": 3},
    "patch 14": {"patch_size": 14, "img_size": 42},
    "grey": {"in_chans": 1},
    "no bias of q, k and v": {"qkv_bias": False},
    "deit3: LayerScale, no position of CLS": {"init_values": 1e-6, "no_embed_class": True},
    "dinov2 with registers": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    "dinov2 without a head": {"init_values": 1e-5, "num_classes": 0},
    "clip": {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "clip, quick gelu": {"pre_norm": True, "act_layer": "quick_gelu"},
    "gelu by tanh": {"act_layer": "gelu_tanh"},
    "mean of the tokens": {"global_pool": "avg", "class_token": False},
    "mean of the tokens, normalised before": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "mean of the patches beside a CLS token": {"global_pool": "avg", "reg_tokens": 2},
    "no positions": {"pos_embed": "none"},
    "oblong images": {"img_size": (16, 40)},
}
NAMED = ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch32_224"]


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter at random, those too that start from 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def images(vit, count=3):
    return torch.randn(count, *vit.image_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OPTIONS)
def test_timm_both_ways(name):
    build = partial(vt.VisionTransformer, **SHAPE | OPTIONS[name])
    net = shaken(build())
    vit, weights = from_timm(net)
    x = images(vit)
    assert_close(vit(weights, x), net(x), rtol=1e-5, atol=1e-5)
    other = shaken(build(), seed=2)
    into_timm(vit, weights, other) if other.num_classes else None
    if other.num_classes:
        assert_close(other(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_timm_by_name(name):
    net = timm.create_model(name, num_classes=7).eval()
    vit, weights = from_timm(net)
    x = images(vit, 2)
    assert_close(vit(weights, x), net(x), rtol=1e-5, atol=1e-5)
    other = shaken(timm.create_model(name, num_classes=7), seed=2)
    into_timm(vit, weights, other)
    assert_close(other(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, hidden", [(2, 64), (4, 16)])
def test_torchvision_both_ways(heads, hidden):
    build = partial(VisionTransformer, 32, 8, num_layers=3, num_heads=heads, hidden_dim=16, mlp_dim=hidden)
    net = shaken(build(num_classes=6))
    vit, weights = from_torchvision(net)
    x = images(vit)
    assert_close(vit(weights, x), net(x), rtol=1e-5, atol=1e-5)
    other = shaken(build(num_classes=6), seed=3)
    into_torchvision(vit, weights, other)
    assert_close(other(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["none", "another"])
def test_torchvision_with_its_head_replaced(head):
    net = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    net.heads = nn.Identity() if head == "none" else nn.Linear(16, 4)
    net = shaken(net)
    vit, weights = from_torchvision(net)
    x = images(vit)
    assert_close(vit(weights, x), net(x), rtol=1e-5, atol=1e-5)
    net.heads = nn.Sequential(nn.Dropout(), nn.Linear(16, 4))
    with pytest.raises(UserError, match=r"place for heads\.1\.weight"):
        from_torchvision(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_16_bits(dtype):
    net = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32).to(dtype)
    vit, weights = from_torchvision(net)
    assert vit.position.dtype == weights["qkv"].dtype == torch.float32
    assert net.conv_proj.weight.dtype == dtype
    start_of(net)


def test_what_works_of_timm_is_listed():
    """Two thousand architectures take minutes; a few stand for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "list_models", lambda families: [*NAMED, "deit_tiny_distilled_patch16_224", "nothing"])
        found = dict(convertible("timm"))
    assert [name for name, reason in found.items() if not reason] == NAMED
    assert "distillation token" in found["deit_tiny_distilled_patch16_224"] and "cannot be built" in found["nothing"]


REFUSED = {
    "q_norm": ({"qk_norm": True}, "queries and keys are normalised"),
    "attention norm": ({"scale_attn_norm": True}, "attention is normalised"),
    "attention pooling": ({"global_pool": "map", "class_token": False}, "pools by attention"),
    "maximum": ({"global_pool": "max"}, "pools by 'max'"),
    "SwiGLU": ({"mlp_layer": timm.layers.SwiGLUPacked}, "SwiGLU|GluMlp"),
    "hidden units": ({"mlp_ratio": 2.5, "embed_dim": 21}, "52 hidden units .* no multiple of its width 21"),
    "activation": ({"act_layer": "silu"}, "activation SiLU"),
    "parallel": ({"block_fn": vt.ParallelScalingBlock}, "built from ParallelScalingBlock"),
    "registers in the mean": ({"global_pool": "avg", "pool_include_prefix": True}, "has CLS and registers in it"),
    "no final norm": ({"final_norm": False}, "no final LayerNorm"),
    "other sizes": ({"dynamic_img_size": True}, "dynamic_img_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        from_timm(vt.VisionTransformer(**SHAPE | options))


def test_other_classes_of_networks_are_refused():
    with pytest.raises(UserError, match=r"VisionTransformerDistilled; it has a distillation token"):
        from_timm(timm.create_model("deit_tiny_distilled_patch16_224"))
    with pytest.raises(UserError, match="built from Eva"):
        from_timm(timm.create_model("eva02_tiny_patch14_224"))
    with pytest.raises(UserError, match="built from Linear"):
        from_torchvision(nn.Linear(2, 2))
    with pytest.raises(UserError, match="hidden layer with tanh"):
        from_torchvision(VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3, representation_size=8))


def test_what_no_rule_foresees_is_refused_by_its_logits():
    net = vt.VisionTransformer(**SHAPE)
    net.blocks[0].attn.scale = 3.0  # the fused kernel of timm has the usual scale; the plain one takes this
    net.blocks[0].attn.fused_attn = False
    with pytest.raises(UserError, match="logits differ"):
        from_timm(shaken(net))


def test_another_shape_is_not_written_into():
    vit, weights = from_timm(vt.VisionTransformer(**SHAPE))
    with pytest.raises(UserError, match="differ in shape"):
        into_timm(vit, weights, vt.VisionTransformer(**SHAPE | {"depth": 3}))
    with torch.no_grad():
        vit.bias["qkv"].fill_(1.0)
    with pytest.raises(UserError, match="a bias of ours"):
        into_timm(vit, weights, vt.VisionTransformer(**SHAPE | {"qkv_bias": False}))


@pytest.mark.parametrize("name", ["deit3: LayerScale, no position of CLS", "dinov2 with registers"])
def test_positions_that_theirs_has_not_go_into_its_tokens(name):
    """Training moves the positions of CLS and registers, which those networks do not have."""
    build = partial(vt.VisionTransformer, **SHAPE | OPTIONS[name])
    vit, weights = from_timm(build())
    shaken(vit, seed=3)
    other = build().eval()
    into_timm(vit, weights, other)
    x = images(vit)
    assert_close(other(x), vit(weights, x), rtol=1e-5, atol=1e-5)


def test_a_head_of_zeros_hides_nothing():
    net = shaken(vt.VisionTransformer(**SHAPE))
    net.head.weight.data.zero_()
    net.head.bias.data.zero_()
    weights = from_timm(net)[1]
    assert not weights["head"].any() and not net.head.weight.any() and not net.training
    net.blocks[0].attn.scale = 3.0
    net.blocks[0].attn.fused_attn = False
    with pytest.raises(UserError, match="logits differ"):
        from_timm(net)


def test_a_check_that_fails_leaves_the_network_as_it_was():
    net = shaken(vt.VisionTransformer(**SHAPE)).train()
    before = net.head.weight.clone()

    def stop(*_):
        raise KeyboardInterrupt

    net.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        from_timm(net)
    assert torch.equal(net.head.weight, before) and net.training
