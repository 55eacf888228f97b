"""A new saliency, made here alone: a function and a row of the registry is all it takes."""

import pytest
import torch
from helpers import TINY
from torch.nn import functional as F

from pyro_isingvit import IsingViT, fit
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising.curvature import SALIENCY


def fisher_of_one_image(vit, weights, images, labels):
    """h = g^2 of the first image at the true label; of the matrix fc2 alone, so that it shows who was asked."""
    loc = weights["fc2"].detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(vit(weights | {"fc2": loc}, images[:1]), labels[:1])
        (grad,) = torch.autograd.grad(loss, loc)
    seen.append(len(images))
    return {kind: torch.zeros_like(w) for kind, w in weights.items() if kind != "fc2"} | {"fc2": grad**2}


seen: list[int] = []


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    seen.clear()
    monkeypatch.setitem(SALIENCY, "one image", fisher_of_one_image)


def test_it_trains_and_guides_the_masks(data) -> None:
    ising = IsingConfig(
        granularity="weight", tau_0=1e-3, tau_1=0.3, target_retention=0.5,
        saliency="one image", coupling="none", omega=0.0,  # the likelihood alone tells masks apart
        kappa_mask=100.0, delta=0.5, max_keep=1.0, mask_damping=1.0, update_every=2, curvature_batch=5,
    )  # fmt: skip
    run = fit(IsingViT.for_data(data, TINY, ising), data, epochs=5, batch_size=20, pilot_fraction=0.4,
              weight_decay=0.0, device="cpu", progress=False)  # fmt: skip
    assert seen == [5] * -(-5 * 3 // 2)  # every second of 15 steps, on curvature_batch images
    guide = run.guide
    assert guide.curvature("fc2").max() > 0 and all((guide.curvature(k) == 0).all() for k in guide.kinds if k != "fc2")
    assert all(float(guide.retention(kind).std()) < 1e-6 for kind in guide.kinds if kind != "fc2")
    gain = (guide.curvature("fc2") * guide.loc["fc2"] ** 2).detach().flatten()
    kept = guide.retention("fc2").detach().flatten()
    order = gain.argsort()
    assert kept[order[-20:]].mean() > kept[order[:20]].mean() + 0.1
    assert run.history[-1]["loss"] < run.history[0]["loss"]
