"""Test-time adaptation: what moves, what it follows, and that everything comes back."""

import math

import pytest
import torch

from pyro_isingvit import Adaptation, ViTConfig, adapted, fit, load_data
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.predictive.metrics import entropy
from pyro_isingvit.runs import adapt
from pyro_isingvit.runs.run import Run

SMALL = ViTConfig(patch_size=4, width=16, heads=2, depth=1)
KINDS = [("tent", False), ("eata", False), ("eata-c", False), ("tent", True), ("eata-c", True)]


@pytest.fixture(scope="module")
def trained() -> tuple[Run, ImageData]:
    data = load_data("digits", train_size=400)
    return fit(SMALL, data, epochs=8, progress=False), data


def everything(run: Run) -> dict[str, torch.Tensor]:
    named = [*run.method.named_parameters(), *run.method.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


@pytest.mark.parametrize(("kind", "crowd"), KINDS)
def test_only_norms_move_and_come_back_exactly(trained, kind: str, crowd: bool) -> None:
    run, data = trained
    before, asked = everything(run), [p.requires_grad for p in run.method.parameters()]
    state = torch.get_rng_state()
    dark = data.test.images[:] // 2
    with adapted(run, dark, Adaptation(kind, crowd=crowd, lr=0.05)) as done:
        moved = {name for name, value in everything(run).items() if not torch.equal(value, before[name])}
        inside = run.predict(dark[:50], 5).mean
    assert moved and all(name.split(".")[-1] in adapt.NORMS for name in moved) and done.moved > 0
    assert 0 < done.used <= done.images == len(dark)
    assert all(torch.equal(value, before[name]) for name, value in everything(run).items())
    assert [p.requires_grad for p in run.method.parameters()] == asked
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(inside, run.predict(dark[:50], 5).mean)


def test_it_comes_back_after_an_error(trained) -> None:
    run, data = trained
    before = everything(run)
    with pytest.raises(RuntimeError, match="stop"), adapted(run, data.test.images, Adaptation("tent")):
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in everything(run).items())


def test_no_reliable_image_no_change(trained) -> None:
    """A margin of 0 calls no prediction reliable."""
    run, data = trained
    before = everything(run)
    with adapted(run, data.test.images, Adaptation("eata", margin=0.0)) as done:
        assert done.used == 0 and done.moved == 0.0
        assert all(torch.equal(value, before[name]) for name, value in everything(run).items())


def test_tent_makes_the_predictions_surer(trained) -> None:
    run, data = trained
    dark = data.test.images[:] // 2
    before = float(entropy(run.predict(dark, 20).mean).mean())
    with adapted(run, dark, Adaptation("tent", lr=0.02, passes=2)):
        assert float(entropy(run.predict(dark, 20).mean).mean()) < before


def test_the_losses_by_hand() -> None:
    probs = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.7, 0.3], [0.2, 0.8]]], dtype=torch.double)
    mean = probs.mean(0)
    unsure, limit = entropy(mean), 0.4 * math.log(2)
    h = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.8, 0.55)]
    each = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.9, 0.7, 0.2)]
    information = [h[0] - (each[0] + each[1]) / 2, h[1] - (each[0] + each[2]) / 2]
    weight = [math.exp(limit - value) for value in h]
    wanted = {
        "tent": h,
        "eata": [w * value for w, value in zip(weight, h, strict=True)],
        "eata-c": [weight[0] * (information[0] + 0.1 * h[0]), weight[1] * (information[1] - 0.1 * h[1])],
    }
    for kind, values in wanted.items():
        got = adapt._losses(probs, mean, unsure, Adaptation(kind), limit)
        torch.testing.assert_close(got, torch.tensor(values, dtype=torch.double))


def test_the_mutual_information_is_the_mean_divergence() -> None:
    probs = torch.rand(5, 3, 4).softmax(-1)
    mean = probs.mean(0)
    divergence = (probs * (probs / mean).log()).sum(-1).mean(0)
    torch.testing.assert_close(entropy(mean) - entropy(probs).mean(0), divergence)


def test_the_pull_keeps_norms_near(trained) -> None:
    run, data = trained
    dark, moved = data.test.images[:] // 2, []
    for fisher in (0.0, 1e3):
        with adapted(run, dark, Adaptation("eata", lr=0.02, fisher=fisher, redundancy=1.0, passes=3)) as done:
            moved.append(done.moved)
    assert moved[1] < moved[0]


def test_the_crowd_leaves_images_out(trained) -> None:
    run, data = trained
    dark, used = data.test.images[:] // 2, []
    for crowd in (False, True):
        with adapted(run, dark, Adaptation("tent", crowd=crowd, lr=0.05, passes=2)) as done:
            used.append(done.used)
    assert used[1] < used[0]


def test_what_cannot_be(trained) -> None:
    run, data = trained
    for how, word in [
        (Adaptation("best"), "must be one of tent"), (Adaptation(lr=0.0), "lr"), (Adaptation(passes=0), "passes"),
        (Adaptation(redundancy=0.0), "redundancy"), (Adaptation(margin=-1.0), "margin"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=word), adapted(run, data.test.images, how):
            pass
    with pytest.raises(UserError, match="none to adapt"), adapted(run, data.test.images[:0]):
        pass
    with pytest.raises(UserError, match="expected images"), adapted(run, torch.zeros(2, 1, 9, 9, dtype=torch.uint8)):
        pass
    several = fit(SMALL, data, method="ensemble", epochs=1, progress=False)
    with pytest.raises(UserError, match="method ensemble"), adapted(several, data.test.images):
        pass
