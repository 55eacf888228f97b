"""A compact network back in the form that trains: equal logits, and zeros where units were cut."""

from dataclasses import replace

import pytest
import torch
from helpers import INFO, TINY
from torch.testing import assert_close

from pyro_isingvit.core.settings import IsingConfig, RunConfig
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.pruning.assembly import assemble
from pyro_isingvit.pruning.expand import expanded

SHAPES = {
    "mean": {},
    "cls and registers": {"pool": "cls", "registers": 2, "norm_pre": True, "norm_eps": 1e-6},
    "stem": {"stem": "conv", "patch_size": 2},
    "two layers": {"head": "mlp", "activation": "quick_gelu"},
    "pooled, overlapping": {"final_norm": "pooled", "registers": 1, "patch_stride": 1, "activation": "gelu_tanh"},
}


def shaken(shape, seed=0):
    torch.manual_seed(seed)
    vit = replace(TINY, width=16, heads=4, **shape)
    method = method_class("ising")(RunConfig(vit=vit, ising=IsingConfig()), INFO, 50)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return method.model.vit, {kind: loc.detach() for kind, loc in method.guide.loc.items()}


def cut(weights, seed=1):
    """Units, heads and branches away, so that every kind of removal occurs."""
    generator = torch.Generator().manual_seed(seed)
    weights = {kind: value.clone() for kind, value in weights.items()}
    weights["fc1"][:, torch.rand(weights["fc1"].shape[1], generator=generator) < 0.5] = 0
    weights["qkv"][0, :4] = 0  # the first head's queries are constants
    weights["qkv"][0, 20:24] = 0  # the second's keys: uniform attention
    weights["qkv"][0, 32 + 8 : 32 + 12] = 0  # the third's values
    weights["fc2"][1] = 0  # a branch
    weights["head"][..., torch.rand(weights["head"].shape[2], generator=generator) < 0.3] = 0
    return weights


@pytest.mark.parametrize("name", SHAPES)
def test_equal_logits(name):
    vit, weights = shaken(SHAPES[name])
    weights = cut(weights)
    x = torch.randn(5, 1, 4, 4)
    small = assemble(vit, INFO, weights)
    assert_close(small(x), vit(weights, x), rtol=1e-4, atol=1e-5)
    again, matrices = expanded(small)
    assert_close(again(matrices, x), small(x), rtol=1e-4, atol=1e-5)
    hidden = matrices["fc1"].any(2) & matrices["fc2"].any(1)
    assert hidden.float().mean() < 0.7


def test_what_was_cut_has_no_gradient():
    vit, weights = shaken({})
    again, matrices = expanded(assemble(vit, INFO, cut(weights)))
    leaves = {kind: value.requires_grad_() for kind, value in matrices.items()}
    again(leaves, torch.randn(5, 1, 4, 4)).sum().backward()
    gone = ~(matrices["fc1"].detach().any(2) & matrices["fc2"].detach().any(1))
    assert gone.any() and not leaves["fc1"].grad[gone].any()
