"""The formula for the memory of training, against the bytes of the tensors that a step really holds."""

from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, INFO, TINY, make_pair, trainer
from torch import Tensor

from pyro_isingvit.core.settings import IsingConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.fused import FusedELBO
from pyro_isingvit.ising.layout import GRANULARITIES
from pyro_isingvit.ising.memory import training_memory
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.runs.trainer import Trainer

WIDE = ViTConfig(patch_size=2, width=64, heads=2, depth=2, mlp_ratio=2)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", ["likelihood_guided", "learned"])
@pytest.mark.parametrize("scale", ["shared", "learned", "curvature"])
def test_what_lasts_is_counted_to_the_byte(data, granularity: str, mode: str, scale: str) -> None:
    ising = IsingConfig(granularity, mode, posterior_scale=scale, update_every=2)
    t = trainer(data, config=replace(CONFIG, ising=ising), epochs=2, pilot_fraction=0.0)
    guide, model = t.fit().guide, t.run.model
    taken = training_memory(model, guide, t.settings)
    assert taken["weight_means"] == size(guide.loc.values())
    kept = (
        [guide.scale(kind) for kind in guide.kinds] if scale == "curvature" else []
    )  # otherwise a number, or made anew
    assert taken["posterior_scale"] == size([*guide.log_scale.values(), *kept])
    assert taken["curvature"] == size(guide.get_buffer(f"curvature_{kind}") for kind in guide.kinds)
    assert taken["mask_logits"] == size(guide.field(name) for name in guide.layout.sites)
    assert taken["prior_logits"] == size(model.prior_logits(name) for name in guide.layout.sites)
    assert taken["other_parameters"] == size([*model.parameters(), *guide.mask_logit.values()])
    assert taken["gradients"] == size(p.grad for p in t.method.parameters() if p.grad is not None)
    moments = [value for state in t.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert taken["adamw"] == size(moments)
    assert taken["average"] == size(t.averaging._average.parameters()) > 0
    assert taken["total"] == sum(n for name, n in taken.items() if name not in ("total", "per_masked_weight"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scale", ["shared", "learned"])
@pytest.mark.parametrize(("draws", "accumulate"), [(1, 1), (4, 1), (4, 2), (4, 4), (2, 4)])
def test_draws_kept_for_the_backward_pass(granularity: str, scale: str, draws: int, accumulate: int) -> None:
    """Storages that autograd and the ELBO keep, without those that last; a few hundred activations on top."""
    model, guide = make_pair(vit=WIDE, granularity=granularity, posterior_scale=scale)
    lasting = [v for module in (model, guide) for v in module.state_dict().values() if isinstance(v, Tensor)]
    known = {value.untyped_storage().data_ptr() for value in lasting}
    saved: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        saved[value.untyped_storage().data_ptr()] = value  # held, so that no address is used twice
        return value

    elbo = FusedELBO(model, guide, draws)
    elbo.part = (0, accumulate)
    images = 4 // accumulate
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        elbo(torch.randn(images, 1, 4, 4), torch.arange(images) % 3)
    for retention in elbo._retention.values():  # kept from step to step
        pack(retention)
    held = sum(value.untyped_storage().nbytes() for address, value in saved.items() if address not in known)
    taken = training_memory(model, guide, TrainConfig(draws=draws, accumulate=accumulate))["draws"]
    assert taken <= held <= 1.2 * taken + 4 * model.num_masked_weights * 0.4


def test_bytes_of_a_masked_weight_as_documented() -> None:
    for granularity, draws, expected in (("weight", 4, 92), ("weight", 1, 56), ("block", 4, 64), ("block", 1, 40)):
        model, guide = make_pair(vit=replace(WIDE, width=256), granularity=granularity)
        taken = training_memory(model, guide, TrainConfig(draws=draws))
        assert taken["per_masked_weight"] == pytest.approx(expected, abs=1)
        without = training_memory(model, guide, TrainConfig(draws=draws, average=0.0))
        assert without["average"] == 0 and without["per_masked_weight"] == pytest.approx(expected - 4, abs=1)


@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_frozen_blocks_have_no_gradients_and_no_moments(data, frozen: int) -> None:
    shape = replace(TINY, depth=4)
    vit = ViT(shape, 1, 4, 4, classes=3)
    start = Start.of(vit, vit.initial_weights(), INFO.scale, "made")
    config = replace(CONFIG, vit=shape, ising=IsingConfig(bayesian_blocks=1), init="made")
    config = replace(config, train=replace(config.train, epochs=1, frozen_blocks=frozen))
    t = Trainer(config, data, None, False, start=start)
    t.fit()
    taken = training_memory(t.run.model, t.run.guide, t.settings)
    assert taken["gradients"] == size(p.grad for p in t.method.parameters() if p.grad is not None)
    moments = [value for state in t.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert taken["adamw"] == size(moments)
