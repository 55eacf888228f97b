"""The compact network: equal to the masked full network, with whatever is gone; saved, loaded, and without Pyro."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import INFO, TINY, cut, make_pair, network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.presets import PRESETS, preset
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.ising.layout import GRANULARITIES
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.pruning.assembly import assemble
from pyro_isingvit.pruning.network import WEIGHTS, CompactViT
from pyro_isingvit.pruning.shapes import CONFIG, CompactConfig

SHAPES = {
    "tiny": TINY,
    "cls": replace(TINY, pool="cls", head="mlp"),
    "padded": replace(TINY, patch_size=3, heads=4, depth=1),
}


def check_equal(vit: ViT, weights: Weights, info: DataInfo, seed: int = 0) -> CompactViT:
    model = assemble(vit, info, weights)
    x = torch.randn(5, *vit.image_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        torch.testing.assert_close(model(x), vit(weights, x), atol=1e-5, rtol=1e-5)
    return model


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    granularity=st.sampled_from(sorted(GRANULARITIES)),
    share=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_equals_the_masked_network(shape: str, granularity: str, share: float, seed: int) -> None:
    vit, weights = network(SHAPES[shape], INFO, seed)
    check_equal(vit, cut(vit, weights, granularity, share, seed), INFO, seed)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.booleans(), min_size=48, max_size=48),
    columns=st.lists(st.booleans(), min_size=16, max_size=16),
    hidden=st.lists(st.booleans(), min_size=32, max_size=32),
    readers=st.lists(st.booleans(), min_size=32, max_size=32),
    zero_bias=st.booleans(),
)
def test_equals_it_for_any_rows_and_columns(rows, columns, hidden, readers, zero_bias) -> None:
    """Rows and columns on their own: what no granularity gives, such as a key without its query."""
    vit, weights = network(TINY, INFO, 1)
    if zero_bias:
        vit.bias["qkv"].data.zero_()
    weights["qkv"] = weights["qkv"] * torch.tensor(rows).view(2, 24, 1)
    weights["attn_out"] = weights["attn_out"] * torch.tensor(columns).view(2, 1, 8)
    weights["fc1"] = weights["fc1"] * torch.tensor(hidden).view(2, 16, 1)
    weights["fc2"] = weights["fc2"] * torch.tensor(readers).view(2, 1, 16)
    check_equal(vit, weights, INFO)


@pytest.mark.parametrize("granularity", sorted(GRANULARITIES))
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_and_granularity(name: str, granularity: str) -> None:
    size = {"digits": 8, "small": 28, "paper-28": 28}.get(name, 32)
    info = replace(INFO, height=size, width=size)
    vit, weights = network(preset(name), info, 3)
    for parameter in vit.parameters():
        parameter.data.mul_(0.3)
    model = check_equal(vit, cut(vit, weights, granularity, 0.4, 3), info)
    dense = assemble(vit, info, weights)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, dense)]
    assert sizes[0] < sizes[1] or granularity == "weight"


def test_an_attention_branch_is_gone_with_all_its_heads() -> None:
    vit, weights = network(TINY, INFO, 0)
    weights["attn_out"][1] = 0.0
    model = check_equal(vit, weights, INFO)
    assert not model.blocks[1].has_attention and model.blocks[0].has_attention
    weights["qkv"][0, 16:] = 0.0  # no values: only their constants are left
    assert not check_equal(vit, weights, INFO).blocks[0].has_attention


def test_an_mlp_is_gone_with_all_its_units_and_may_have_one() -> None:
    vit, weights = network(TINY, INFO, 0)
    weights["fc1"][0] = 0.0
    weights["fc2"][1, :, 1:] = 0.0
    config = check_equal(vit, weights, INFO).config
    assert [layer.hidden for layer in config.layers] == [0, 1]


def test_all_branches_gone_leaves_patches_and_classifier() -> None:
    vit, weights = network(TINY, INFO, 0)
    for kind in ("qkv", "attn_out", "fc1", "fc2"):
        weights[kind].zero_()
    model = check_equal(vit, weights, INFO)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"patch", "position", "norm", "head"}


def test_score_channels() -> None:
    """Without keys a head is a mean over tokens; constant queries add up to one channel."""
    vit, weights = network(TINY, INFO, 0)
    weights["qkv"][0, 8:12] = 0.0  # keys of head 0
    weights["qkv"][1, :8] = 0.0  # all queries
    layers = check_equal(vit, weights, INFO).config.layers
    assert (layers[0].heads, layers[0].query, layers[0].uniform) == (1, 4, 4)
    assert (layers[1].heads, layers[1].query) == (2, 1)
    vit.bias["qkv"].data.zero_()
    assert check_equal(vit, weights, INFO).config.layers[1].heads == 0


def test_dropped_features_and_classifier_units() -> None:
    vit, weights = network(SHAPES["cls"], INFO, 0)
    weights["head_hidden"][0, :, :3] = 0.0
    weights["head_hidden"][0, 2:] = 0.0
    config = check_equal(vit, weights, INFO).config
    assert config.features == 5 and config.head_hidden == 2
    weights["head"].zero_()
    with pytest.raises(UserError, match="nothing is left"):
        assemble(vit, INFO, weights)


def test_weight_zeros_stay_zeros() -> None:
    vit, weights = network(TINY, INFO, 0)
    weights["fc1"][0, 3, :4] = 0.0
    model = check_equal(vit, weights, INFO)
    assert int((model.blocks[0].fc1.weight == 0).sum()) == 4


def test_saved_and_loaded(tmp_path: Path) -> None:
    vit, weights = network(TINY, INFO, 0)
    model = assemble(vit, INFO, cut(vit, weights, "unit", 0.6, 0))
    model.temperature.fill_(1.7)
    model.save_pretrained(tmp_path / "a")
    again = CompactViT.from_pretrained(tmp_path / "a")
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(model(x), again(x)) and again.config == model.config and not again.training
    images = torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(again.predict(images)[0], model(INFO.normalise(images)).softmax(-1))


def test_damaged_folders(tmp_path: Path) -> None:
    vit, weights = network(TINY, INFO, 0)
    with pytest.raises(UserError, match="no compact network"):
        CompactViT.from_pretrained(tmp_path)
    assemble(vit, INFO, weights).save_pretrained(tmp_path)
    state = load((tmp_path / WEIGHTS).read_bytes())
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        CompactViT.from_pretrained(tmp_path)
    state.pop("position")
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="does not fit"):
        CompactViT.from_pretrained(tmp_path)
    for text in ("{", "[]", '{"format": 1}', '{"format": 99}'):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(UserError):
            CompactViT.from_pretrained(tmp_path)


def test_images_that_do_not_fit() -> None:
    vit, weights = network(TINY, INFO, 0)
    model = assemble(vit, INFO, weights)
    with pytest.raises(UserError, match="the network reads"):
        model.predict(torch.zeros(1, 1, 5, 4, dtype=torch.uint8))
    with pytest.raises(UserError, match="at least 1"):
        model.predict(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), chunk=0)
    with pytest.raises(UserError, match="bayes"):
        model.draw()


def test_configuration_round_trip() -> None:
    model, _ = make_pair()
    config = assemble(model.vit, INFO, model.vit.initial_weights()).config
    assert CompactConfig.from_json(config.to_json()) == config


def test_runs_without_pyro() -> None:
    code = "import sys, pyro_isingvit; pyro_isingvit.CompactViT; sys.exit('pyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
