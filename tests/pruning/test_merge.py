"""What dropped units wrote, refitted into those that are left."""

from dataclasses import replace

import pytest
import torch
from helpers import INFO, TINY, cut, make_split, network

from pyro_isingvit import compact, merge_units
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.images import as_images
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning.assembly import assemble
from pyro_isingvit.pruning.choose import dense_network
from pyro_isingvit.pruning.cost import macs
from pyro_isingvit.pruning.frontier import frontier
from pyro_isingvit.pruning.merge import _refit
from pyro_isingvit.runs.run import Run


def images(count: int = 400) -> object:
    return make_split(count, torch.Generator().manual_seed(1)).images


@pytest.mark.parametrize("kind", ["hidden", "value", "uniform"])
def test_a_duplicate_is_taken_over_exactly(kind: str) -> None:
    """Unit 1 does what unit 0 does; without it, its readers' weights belong to unit 0."""
    vit, weights = network(TINY, INFO, 3)
    half = TINY.width // 2
    columns = {"hidden": [1], "value": [1, 1 + half], "uniform": [1 + half]}
    with torch.no_grad():
        if kind == "hidden":
            weights["fc1"][0, 1] = weights["fc1"][0, 0]
            vit.bias["fc1"][0, 1] = vit.bias["fc1"][0, 0]
        else:  # two value channels of each of the two heads
            if kind == "uniform":  # the second head averages over the tokens
                for first in (half, TINY.width + half):
                    weights["qkv"][0, first : first + half] = 0.0
                    vit.bias["qkv"][0, first : first + half] = 0.0
            for first in (2 * TINY.width, 2 * TINY.width + half):
                weights["qkv"][0, first + 1] = weights["qkv"][0, first]
                vit.bias["qkv"][0, first + 1] = vit.bias["qkv"][0, first]
    less = {name: weight.clone() for name, weight in weights.items()}
    less["fc2" if kind == "hidden" else "attn_out"][0, :, columns[kind]] = 0.0
    reference, model = assemble(vit, INFO, weights), assemble(vit, INFO, less)
    assert bool(model.blocks[0].attention.shape.uniform) == (kind == "uniform")
    x = torch.randn(6, *vit.image_shape)
    assert macs(model, vit.image_shape) < macs(reference, vit.image_shape)
    assert not torch.allclose(model(x), reference(x), atol=1e-3)
    merge_units(model, reference, images(), ridge=1e-9)
    torch.testing.assert_close(model(x), reference(x), atol=2e-4, rtol=1e-3)


def test_the_same_network_stays_as_it_is() -> None:
    vit, weights = network(TINY, INFO, 0)
    model, reference = assemble(vit, INFO, weights), assemble(vit, INFO, weights)
    merge_units(model, reference, images())
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_the_closed_form_is_the_minimum() -> None:
    """Against gradient descent's own test: the gradient of the ridge objective vanishes at W', b'."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3)
    start, h, y = linear.weight.detach().clone(), torch.randn(40, 6, 5), torch.randn(40, 6, 3)
    h = h + 2.0  # means that are not 0
    ridge = 0.1
    with torch.no_grad():
        _refit(linear, linear, [h[:25], h[25:]], [y[:25], y[25:]], ridge)
    flat = h.flatten(0, 1)
    scale = float(flat.var(0, correction=0).mean())
    error = (y - (h @ linear.weight.T + linear.bias)).square().sum(-1).mean()
    loss = error + ridge * scale * (linear.weight - start).square().sum()
    for gradient in torch.autograd.grad(loss, [linear.weight, linear.bias]):
        assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("shape", [TINY, replace(TINY, pool="cls", head="mlp"), replace(TINY, patch_size=3, heads=4)])
@pytest.mark.parametrize("granularity", ["unit", "head", "block"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_it_comes_closer_whatever_is_left(shape, granularity: str, share: float) -> None:
    """On the images that it is fitted on, the logits come closer to the large network's; costs stay."""
    vit, weights = network(shape, INFO, 5)
    try:
        model = assemble(vit, INFO, cut(vit, weights, granularity, share, 5))
    except UserError:
        pytest.skip("nothing left")
    reference = assemble(vit, INFO, weights)
    x, size = model.normalise(images()[:]), macs(model, vit.image_shape)

    @torch.no_grad()
    def distance() -> float:
        return float((model(x) - reference(x)).square().mean())

    before = distance()
    merge_units(model, reference, images())
    after = distance()
    assert after < 0.9 * before and macs(model, vit.image_shape) == size


def test_a_trained_run_cut_below_its_target(trained: tuple[Run, ImageData]) -> None:
    """Unseen images: the loss falls where units are missing; the frontier has both."""
    run, data = trained
    scores = []
    for merge in (None, data.train.images):
        model = compact(run, keep=0.25, val=data.val, merge=merge)
        scores.append(classification_metrics(model.predict(data.test.images)[0], data.test.labels)["nll"])
    assert scores[1] < scores[0]
    found = frontier(run, data.val, repeats=1, merge=data.train.images)
    small = found[-1].point
    assert small.unmerged is not None and small.nll <= small.unmerged["nll"]
    assert all(candidate.point.unmerged is None for candidate in frontier(run, data.val, repeats=1))


def test_what_cannot_be(trained: tuple[Run, ImageData]) -> None:
    run, data = trained
    reference, model = dense_network(run, None), compact(run, keep=0.5)
    with pytest.raises(UserError, match="form 'mean'"):
        merge_units(compact(run, "bayes"), reference, data.train.images)
    with pytest.raises(UserError, match="form 'mean'"):
        compact(run, "bayes", merge=data.train.images)
    with pytest.raises(UserError, match="ridge"):
        merge_units(model, reference, data.train.images, ridge=0.0)
    with pytest.raises(UserError, match="no images"):
        merge_units(model, reference, as_images(torch.zeros(0, 1, 4, 4, dtype=torch.uint8)))
    vit, weights = network(replace(TINY, depth=1), INFO, 0)
    with pytest.raises(UserError, match="not cut from"):
        merge_units(model, assemble(vit, INFO, weights), data.train.images)
