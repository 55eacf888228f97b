"""A trained network as a start: other sizes and channels, files, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from pyro_isingvit import UserError, ViTConfig
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.registry import METHODS, with_defaults
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT

SHAPE = ViTConfig(patch_size=4, width=16, heads=2, depth=2, mlp_ratio=2, pool="cls", registers=2, norm_pre=True)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SCALE = Scale(None, (), (), MEAN, STD)


def network(seed=0, shape=SHAPE, channels=3, size=16):
    torch.manual_seed(seed)
    vit = ViT(shape, channels, size, size, classes=5)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit, vit.initial_weights()


def start(**changes):
    vit, weights = network()
    return replace(Start.of(vit, weights, SCALE, "made"), **changes)


def about(channels=3, height=16, width=16, mean=MEAN, std=STD):
    return DataInfo("made", ("a", "b", "c", "d", "e"), channels, height, width, mean, std)


def with_the_head_of(vit, weights, one):
    """A network of one channel that starts from ``one``, with the head of another, and its matrices."""
    ours = ViT(one.vit, 1, 16, 16, classes=5)
    matrices = torch.nn.ParameterDict({k: torch.nn.Parameter(w) for k, w in ours.initial_weights().items()})
    one.copy_to(ours, matrices)
    with torch.no_grad():
        matrices["head"].copy_(weights["head"])
        ours.bias["head"].copy_(vit.bias["head"])
    return ours, dict(matrices)


def test_grey_images_are_read_as_if_in_every_channel():
    vit, weights = network()
    one = start().fitted((1, 16, 16))
    grey = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    ours, matrices = with_the_head_of(vit, weights, one)
    x = about(1).with_scale_of(one.scale).normalise(grey)
    assert_close(ours(matrices, x), vit(weights, about().normalise(grey.expand(-1, 3, -1, -1))))


def test_grey_images_where_every_channel_has_a_range_of_its_own():
    """The same grey pixel in all channels of 16 bits, within all ranges."""
    low, high = (0.0, 100.0, 200.0), (5000.0, 4000.0, 4500.0)
    vit, weights = network()
    colour = replace(about(), kind="uint16", low=low, high=high)
    one = Start.of(vit, weights, Scale("uint16", low, high, MEAN, STD), "made").fitted((1, 16, 16))
    grey = replace(about(1).with_scale_of(one.scale), kind="uint16", low=one.scale.low, high=one.scale.high)
    pixels = torch.randint(200, 4000, (3, 1, 16, 16)).float()
    ours, matrices = with_the_head_of(vit, weights, one)
    found = ours(matrices, grey.normalise(pixels))
    assert_close(found, vit(weights, colour.normalise(pixels.expand(-1, 3, -1, -1))), rtol=1e-4, atol=1e-4)


def test_grey_images_before_a_convolutional_stem():
    """Exact but for the border, where the padding of the first convolution stands for another grey in each channel."""
    vit, weights = network(shape=ViTConfig(patch_size=4, width=16, heads=2, depth=1, stem="conv"))
    one = Start.of(vit, weights, SCALE, "made").fitted((1, 16, 16))
    assert one.vit.stem == "conv"
    ours = ViT(one.vit, 1, 16, 16, classes=5)
    one.copy_to(ours)
    grey = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    theirs = vit.stem.stages[0](about().normalise(grey.expand(-1, 3, -1, -1)))
    found = ours.stem.stages[0](about(1).with_scale_of(one.scale).normalise(grey))
    assert_close(found[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert ours(ours.initial_weights(), about(1).with_scale_of(one.scale).normalise(grey)).shape == (
        3,
        5,
    )


def test_the_same_pixel_becomes_the_same_number(tmp_path):
    """A start of 16 bits, scaled by its own percentiles, and images whose own are others."""
    vit, weights = network(channels=1)
    before = replace(about(1, mean=(0.4,), std=(0.2,)), kind="uint16", low=(100.0,), high=(900.0,))
    scale = Scale("uint16", (100.0,), (900.0,), (0.4,), (0.2,))
    Start.of(vit, weights, scale, "made").save(tmp_path / "a.safetensors")
    start = Start.load(tmp_path / "a.safetensors")
    assert start.scale == scale
    own = replace(about(1, mean=(0.5,), std=(0.3,)), kind="uint16", low=(0.0,), high=(60000.0,))
    info = own.scaled_as(start.scale)
    x = torch.randint(0, 1000, (2, 1, 16, 16)).float()
    assert torch.equal(info.normalise(x), before.normalise(x)) and info.classes == own.classes


def test_pixels_of_another_type_keep_their_range_and_are_said_where_they_are_far(caplog):
    own = replace(about(1, mean=(0.01,), std=(0.3,)), kind="uint16", low=(0.0,), high=(60000.0,))
    info = own.scaled_as(Scale("uint8", (), (), (0.5,), (0.1,)))
    assert (info.low, info.high, info.mean) == ((0.0,), (60000.0,), (0.5,))
    assert "5 standard deviations" in caplog.text


@pytest.mark.parametrize("name, value", [("mean", "[1]"), ("std", "[0, 1, 1]"), ("kind", "3"), ("low", "[1, 2, 3]")])
def test_a_file_whose_pixels_cannot_be_is_refused(tmp_path, name, value):
    path = tmp_path / "a.safetensors"
    start().save(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    save_file(load_file(path), path, {**said, name: value})
    with pytest.raises(UserError, match="damaged"):
        Start.load(path)


def test_positions_are_interpolated_as_timm_does():
    timm = pytest.importorskip("timm")
    larger = start().fitted((3, 24, 32))
    position = start().others["position"][None]
    wanted = timm.layers.resample_abs_pos_embed(position, new_size=(6, 8), num_prefix_tokens=3)
    assert_close(larger.others["position"], wanted[0], rtol=1e-5, atol=1e-6)
    assert larger.image_shape == (3, 24, 32)
    assert start().fitted(about().image_shape).others["position"] is not None


def test_same_images_change_nothing():
    assert_close(dict(start().fitted(about().image_shape).others), dict(start().others))


def test_colours_that_do_not_fit_are_refused():
    grey = Start.of(*network(channels=1), Scale(None, (), (), (0.5,), (0.2,)), "grey one")
    with pytest.raises(UserError, match=r"grey one reads 1 channel\(s\), the images have 3"):
        grey.fitted(about().image_shape)


def test_a_file_gives_back_everything(tmp_path):
    made = start()
    made.save(tmp_path / "a.safetensors")
    again = Start.load(tmp_path / "a.safetensors")
    assert (again.vit, again.image_shape, again.scale) == (made.vit, made.image_shape, SCALE)
    assert_close(dict(again.weights), dict(made.weights), rtol=0, atol=0)
    assert_close(dict(again.others), dict(made.others), rtol=0, atol=0)
    assert "head" not in again.weights


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("weights.qkv"), r"lacks 1 tensor\(s\): weights.qkv"),
    (lambda t: t.update(extra=torch.ones(1)), r"beyond those of the network, 1 tensor\(s\): extra"),
    (lambda t: t.update({"vit.cls": torch.ones(3)}), r"vit.cls is of shape \(3,\), the network needs \(16,\)"),
    (lambda t: t["vit.cls"].fill_(torch.nan), "vit.cls is not finite"),
])  # fmt: skip
def test_a_file_with_other_tensors_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    start().save(path)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=message):
        Start.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        Start.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0rubbish!")
    with pytest.raises(UserError, match="damaged or no start"):
        Start.load(tmp_path / "bad.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="give the architecture too: timm:NAME@FILE"):
        Start.load(tmp_path / "foreign.safetensors")
    start().save(tmp_path / "odd.safetensors")
    save_file(load_file(tmp_path / "odd.safetensors"), tmp_path / "odd.safetensors",
              {"format": "pyro-isingvit start 1", "vit": json.dumps({"wings": 2}), "image_shape": "[3, 16, 16]",
               "mean": "[0]", "std": "[1]"})  # fmt: skip
    with pytest.raises(UserError, match="damaged or no start"):
        Start.load(tmp_path / "odd.safetensors")


def test_another_shape_is_not_copied_to():
    vit = ViT(replace(SHAPE, depth=3), 3, 16, 16, classes=2)
    with pytest.raises(UserError, match="made is another network"):
        start().copy_to(vit)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "laplace"])  # an extra; it is Plain
def test_every_method_starts_from_it(name):
    config = with_defaults(name, RunConfig(vit=SHAPE, init="made"))
    torch.manual_seed(3)
    method = method_class(name)(config, about(), 50)
    method.start_from(start())
    assert method.trained_networks()
    for vit, matrices in method.trained_networks():
        for kind, value in start().weights.items():
            assert_close(matrices[kind].detach(), value, rtol=0, atol=0)
            assert_close(vit.centre(kind), value, rtol=0, atol=0)
        assert not vit.centre("head").any() and matrices["head"].any()
        assert_close(vit.position.detach(), start().others["position"], rtol=0, atol=0)
    heads = [matrices["head"] for _, matrices in method.trained_networks()]
    assert all(not torch.equal(heads[0], head) for head in heads[1:])
