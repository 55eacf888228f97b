"""More training of what pruning left: on labels, and towards a posterior's mean prediction."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pyro_isingvit import Distillation, compact, distil
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.images import as_images
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning import finetune as module
from pyro_isingvit.pruning.choose import dense_network
from pyro_isingvit.pruning.finetune import finetune, log_shares
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run


def test_finetuning_keeps_zeros_and_lowers_the_loss(trained: tuple[Run, ImageData]) -> None:
    run, data = trained
    model = compact(run, keep=0.3)
    zeros = [value == 0 for value in model.parameters()]

    def loss() -> float:
        return classification_metrics(model.predict(data.train.images)[0], data.train.labels)["nll"]

    before = loss()
    finetune(model, data.train, 4, lr=1e-3, batch_size=16)
    assert loss() < before
    assert all(bool((value[zero] == 0).all()) for value, zero in zip(model.parameters(), zeros, strict=True))
    with pytest.raises(UserError, match="form 'mean'"):
        finetune(compact(run, "bayes"), data.train, 1)
    with pytest.raises(UserError, match="epochs"):
        finetune(model, data.train, -1)


# Distillation ---------------------------------------------------------------------------------------------------------


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean KL(teacher | student) of probabilities (B, C), in nats."""
    return float(F.kl_div(student.log(), teacher, reduction="batchmean"))


def test_it_comes_closer_to_the_mean_prediction(trained: tuple[Run, ImageData]) -> None:
    run, data = trained
    model = compact(run, keep=0.35)
    zeros = [value == 0 for value in model.parameters()]
    wanted = draw_predictive(run, data.test.images, 200).mean
    before = divergence(wanted, model.predict(data.test.images)[0])
    assert distil(model, run, data.train, how=Distillation(10, lr=3e-3, batch_size=16)) is model
    model.temperature.fill_(1.0)
    assert divergence(wanted, model.predict(data.test.images)[0]) < 0.5 * before
    assert all(bool((value[zero] == 0).all()) for value, zero in zip(model.parameters(), zeros, strict=True))


def test_it_needs_no_labels_and_takes_unlabelled_images(trained: tuple[Run, ImageData]) -> None:
    run, data = trained
    how = Distillation(3, batch_size=16)
    with_labels = distil(compact(run, keep=0.35), run, data.train, how=how)
    without = distil(compact(run, keep=0.35), run, data.train.images, how=how)
    more = distil(compact(run, keep=0.35), run, data.train, data.val.images, how)
    probs = [model.predict(data.test.images)[0] for model in (with_labels, without, more)]
    assert torch.equal(probs[0], probs[1]) and not torch.equal(probs[0], probs[2])


def test_a_student_that_agrees_has_no_gradient(trained: tuple[Run, ImageData], monkeypatch: pytest.MonkeyPatch) -> None:
    """d loss / d logits = (p - q) / B: nothing moves where both agree, and it is that difference elsewhere."""
    run, data = trained
    model = compact(run, keep=0.5)
    sizes = []

    def measured(model, losses, steps, lr, progress=False):
        gradients = torch.autograd.grad(next(losses), list(model.parameters()), allow_unused=True)
        sizes.append(max(float(g.abs().max()) for g in gradients if g is not None))

    monkeypatch.setattr(module, "optimise", measured)
    distil(model, run, data.train)
    monkeypatch.setattr(
        module, "mean_prediction", lambda run, x, *_: (model(x) * model.temperature).softmax(-1).detach()
    )
    distil(model, run, data.train)
    assert sizes[0] > 1e-3 and sizes[1] < 1e-6
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.randn(4, 3).softmax(-1)
    F.cross_entropy(logits, target).backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - target).detach() / 4)


def test_the_target_is_the_posterior_mean_on_average(trained: tuple[Run, ImageData]) -> None:
    """Few draws a step, many steps: the mean of the targets is the mean of many draws, within Monte Carlo error."""
    run, data = trained
    x = run.info.normalise(data.test.images[:40])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        targets = torch.stack([module.mean_prediction(run, x, run.info, 2, step) for step in range(300)])
    wanted = draw_predictive(run, data.test.images[:40], 600, seed=5).mean
    error = (targets.var(0) / 300).sqrt()
    assert bool(((targets.mean(0) - wanted).abs() < 5 * 2**0.5 * error + 1e-3).all())


def test_several_teachers_count_alike_and_read_their_own_scale(trained: tuple[Run, ImageData]) -> None:
    run, data = trained
    x = run.info.normalise(data.test.images[:6])
    other = replace(run.info, mean=(0.3,), std=(0.5,))
    again = Run.__new__(Run)
    vars(again).update(vars(run))
    again.method = run.method
    torch.manual_seed(0)
    ours = module.mean_prediction(run, x, run.info, 3, 0)
    torch.manual_seed(0)
    theirs = module.mean_prediction(run, other.normalise(data.test.images[:6]), other, 3, 0)
    torch.testing.assert_close(ours, theirs)


def test_mixtures_lie_between_two_images() -> None:
    x = torch.arange(10.0).view(10, 1, 1, 1)
    torch.manual_seed(0)
    mixed = module._mixed(x, Distillation(mixed=0.5))
    assert torch.equal(mixed[5:], x[5:]) and not torch.equal(mixed[:5], x[:5])
    assert bool(((mixed >= 0) & (mixed <= 9)).all())
    assert module._mixed(x, Distillation(mixed=0.0)) is x


def test_every_unlabelled_image_comes_before_any_comes_again() -> None:
    images = as_images(torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1))
    parts = module._endless(images, Distillation(batch_size=3))
    seen = torch.cat([next(parts) for _ in range(7)]).flatten()
    assert sorted(seen[:7].tolist()) == sorted(seen[7:14].tolist()) == list(range(7))


def test_the_seed_settles_everything_and_the_global_state_stays(trained: tuple[Run, ImageData]) -> None:
    run, data = trained
    models = [compact(run, keep=0.5) for _ in range(3)]
    state = torch.get_rng_state()
    first, again, other = (
        distil(model, run, data.train, how=Distillation(1, seed=seed))
        for model, seed in zip(models, (0, 0, 1), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, again.head.weight) and not torch.equal(first.head.weight, other.head.weight)


def test_a_single_network_may_teach(trained: tuple[Run, ImageData]) -> None:
    """Methods with a limited number of networks give them in turn."""
    run, data = trained
    single = Run.__new__(Run)
    vars(single).update(vars(run))
    asked = []

    class Counted:
        max_draws = 3

        def __getattr__(self, name):
            return getattr(run.method, name)

        def draw_networks(self, count, first=0):
            asked.append((count, first))
            return lambda x: torch.zeros(count, len(x), 3)

    single.method = Counted()
    x = run.info.normalise(data.test.images[:2])
    for step in range(4):
        module.mean_prediction(single, x, run.info, 2, step)
    assert all(count >= 1 and first + count <= 3 for count, first in asked)


def test_what_cannot_be(trained: tuple[Run, ImageData]) -> None:
    run, data = trained
    model = compact(run, keep=0.5)
    for how, word in [
        (Distillation(0), "epochs"), (Distillation(lr=0.0), "lr"), (Distillation(mixed=1.5), "mixed"),
        (Distillation(draws=0), "draws"), (Distillation(mix_alpha=0), "mix_alpha"),
        (Distillation(batch_size=0), "batch"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=word):
            distil(model, run, data.train, how=how)
    with pytest.raises(UserError, match="names no run"):
        distil(model, [], data.train)
    with pytest.raises(UserError, match="form 'mean'"):
        distil(compact(run, "bayes"), run, data.train, how=Distillation(1))
    with pytest.raises(UserError, match="no images"):
        distil(model, run, data.train, data.val.images.take(slice(0)))
    other = Run.__new__(Run)
    vars(other).update(vars(run))
    for change, word in (({"classes": ("a", "b", "d")}, "other classes"), ({"height": 8}, "reads images")):
        fake = dense_network(run, None)
        fake.config = replace(fake.config, **({"image_shape": (1, 8, 4)} if "height" in change else change))
        with pytest.raises(UserError, match=word):
            distil(fake, run, data.train)
    for change in ({"low": (10.0,), "high": (90.0,)}, {"kind": "uint16"}):
        fake = dense_network(run, None)
        fake.config = replace(fake.config, **change)
        with pytest.raises(UserError, match=r"scales pixels otherwise|reads images"):
            distil(fake, run, data.train)
    for images in (torch.zeros(9, 1, 6, 6), torch.zeros(9, 3, 4, 4)):
        with pytest.raises(UserError, match=r"the images of `unlabelled` are \(.*the network reads \(1, 4, 4\)"):
            distil(model, run, data.train, as_images(images.byte()))
    with pytest.raises(UserError, match="float32, the network reads"):
        distil(model, run, data.train, as_images(torch.zeros(9, 1, 4, 4)))


def test_a_student_reads_its_own_scale_and_ends_without_a_temperature(
    trained: tuple[Run, ImageData], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = trained
    model = compact(run, keep=0.5)
    model.config = replace(model.config, mean=(0.3,), std=(0.7,))
    model.temperature.fill_(1.7)
    seen = []
    real = module.mean_prediction

    def watched(run, x, info, *rest):
        seen.append((x, info))
        return real(run, x, info, *rest)

    monkeypatch.setattr(module, "mean_prediction", watched)
    distil(model, run, data.train, how=Distillation(1, batch_size=len(data.train)))
    [(x, info)] = seen
    pixels = data.train.images[:]
    found = (x * 0.7 + 0.3).sort(0).values
    assert run.config.train.augment == "none"
    torch.testing.assert_close(found, (pixels / 255).sort(0).values)
    assert info.scale == model.config.scale and float(model.temperature) == 1.0
    model.temperature.fill_(1.7)
    finetune(model, data.train, 0)
    assert float(model.temperature) == pytest.approx(1.7)  # nothing was trained
    assert float(finetune(model, data.train, 1).temperature) == 1.0


def test_images_count_by_their_weights(trained: tuple[Run, ImageData]) -> None:
    """Two classes, one a tenth of the images at nine times the weight: fine-tuning learns equal shares, not 1 to 9."""
    run, data = trained
    labels = torch.zeros(100, dtype=torch.long)
    labels[:10] = 1
    images = data.train.images[:1].repeat(100, 1, 1, 1)  # they look alike: shares are all there is to learn
    shares = {}
    for name, weights in (("alike", None), ("weighed", torch.where(labels == 1, 5.0, 5.0 / 9))):
        model = finetune(compact(run), Split(images, labels, weights=weights), 60, lr=3e-3, batch_size=100)
        shares[name] = float(model.predict(images[:1])[0, 0, 1])
    assert shares["alike"] == pytest.approx(0.1, abs=0.03) and shares["weighed"] == pytest.approx(0.5, abs=0.05)


def test_shares_are_those_of_the_weights() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    part = Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels, weights=torch.tensor([0.5, 0.5, 0.5, 2.5]))
    torch.testing.assert_close(log_shares(part, 2).exp(), torch.tensor([0.375, 0.625]))
    torch.testing.assert_close(log_shares(Split(part.images, labels), 2).exp(), torch.tensor([0.75, 0.25]))
