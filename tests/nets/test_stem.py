"""The convolutional stem, and overlapping patches: shapes, gradients, and everything after training."""

from dataclasses import replace

import pytest
import torch
from helpers import TINY
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_isingvit import UserError, ViTConfig, export_onnx, fit
from pyro_isingvit.nets.masked import MaskedImages
from pyro_isingvit.nets.plain import PlainViT
from pyro_isingvit.nets.shape import patch_grid
from pyro_isingvit.nets.stem import ConvStem
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.pruning.export import run_onnx
from pyro_isingvit.runs import predict

OVERLAPPING = replace(TINY, patch_size=3, patch_stride=1)
STEM = replace(TINY, stem="conv")


@pytest.mark.parametrize("height, width, size, stride", [(28, 28, 7, 7), (28, 20, 8, 4), (5, 9, 3, 2), (4, 4, 4, 1)])
def test_patches_cover_the_image(height, width, size, stride):
    (rows, columns), (_, right, _, bottom) = patch_grid(height, width, size, stride)
    assert (rows - 1) * stride + size == height + bottom and (columns - 1) * stride + size == width + right
    assert 0 <= bottom < stride and 0 <= right < stride


def test_overlapping_patches_are_those_of_unfold():
    vit = ViT(OVERLAPPING, 2, 5, 6, classes=3)
    x = torch.randn(2, 2, 5, 6)
    assert_close(vit.patchify(x), F.unfold(x, 3, stride=1).transpose(1, 2))
    assert vit.position.shape == (12, TINY.width) and vit.matrix_shapes["patch"] == (1, TINY.width, 18)


def test_a_stem_gives_one_vector_for_each_patch():
    stem = ConvStem(3, 8, 32)
    assert [stage.out_channels for stage in stem.stages] == [16, 16, 32]
    assert stem(torch.zeros(2, 3, 16, 24)).shape == (2, 32, 2, 3)
    vit = ViT(ViTConfig(patch_size=8, width=32, heads=2, depth=1, stem="conv"), 3, 20, 24, classes=3)
    assert vit.grid == (3, 3) and vit.matrix_shapes["patch"] == (1, 32, 32)
    loss = vit(vit.initial_weights(), torch.randn(2, 3, 20, 24)).square().sum()
    grads = torch.autograd.grad(loss, list(vit.stem.parameters()))
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("vit", [OVERLAPPING, STEM], ids=["overlapping", "stem"])
@pytest.mark.parametrize("saliency", ["gnb", "lm"])
def test_everything_after_training_works(vit, saliency, data, tmp_path):
    run = fit(vit, data, epochs=4, batch_size=20, device="cpu", progress=False, saliency=saliency, max_keep=0.9,
              target_retention=0.5, pilot_fraction=0.25)  # fmt: skip
    x = data.test.images[:4]
    assert run.predict(x, 3).mean.shape == (4, 3)
    small = run.prune(form="mean", weighting="slab")
    [(net, weights)] = run.method.deployed()
    z = run.info.normalise(x)
    assert_close(small(z), net(weights, z) / small.temperature, rtol=1e-4, atol=1e-5)
    export_onnx(small, tmp_path / "a.onnx")
    assert_close(run_onnx(tmp_path / "a.onnx", z), small(z).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ising", "dropout", "ensemble"])
def test_draws_share_the_stem(method, data, monkeypatch):
    run = fit(STEM, data, method=method, epochs=2, batch_size=20, device="cpu", progress=False)
    x, seen = data.test.images[:7], []
    forward = ConvStem.forward
    monkeypatch.setattr(ConvStem, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    shared = run.predict(x, 5).probs
    assert sum(seen) == 7 * (5 if method == "ensemble" else 1)  # each member has a stem of its own
    monkeypatch.setattr(predict, "with_trunk", lambda _: [])
    assert torch.equal(run.predict(x, 5).probs, shared)


@pytest.mark.parametrize("change, message", [
    ({"patch_stride": 3}, "leaves pixels out"), ({"patch_stride": 0}, "leaves pixels out"),
    ({"stem": "conv", "patch_size": 3}, "no power of two"), ({"stem": "conv", "patch_stride": 1}, "windows of its own"),
    ({"registers": -1}, "`registers`"), ({"norm_eps": 0.0}, "`norm_eps`"),
    ({"final_norm": "pooled", "pool": "cls"}, "`final_norm`"),
])  # fmt: skip
def test_shapes_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        ViT(replace(TINY, **change), 1, 8, 8, classes=3)


def test_where_a_stem_cannot_be():
    vit = ViT(STEM, 1, 8, 8, classes=3)
    with pytest.raises(UserError, match="see the pixels of hidden patches"):
        MaskedImages(vit, 0.5)
    with pytest.raises(UserError, match="plain networks"):
        PlainViT(vit)
