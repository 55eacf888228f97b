"""Skewed classes: which shares of the classes a run knows of, and what each way of balancing them computes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONFIG, INFO, TINY, make_split, trainer
from kills import same
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.augment import Augmentation
from pyro_isingvit.data.balance import balanced_order, class_weights
from pyro_isingvit.data.batches import batches, count_steps
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.ising.curvature import exact, gnb, lm
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.likelihood import Likelihood
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.predictive.calibration import fit_temperature, temper, with_shares_of
from pyro_isingvit.pruning.choose import compact
from pyro_isingvit.pruning.finetune import finetune
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import draw_predictive

BALANCES = ["sampler", "loss", "logit"]


@pytest.fixture
def skewed() -> ImageData:
    """Classes of 45, 10 and 5 training images."""
    generator = torch.Generator().manual_seed(0)
    pool = make_split(180, generator)
    rows = np.concatenate([np.arange(180)[c::3][:count] for c, count in enumerate((45, 10, 5))])
    return ImageData(pool.take(rows), make_split(30, generator), make_split(30, generator), INFO)


# The shares of the classes ---------------------------------------------------------------------------------------


def test_counts_are_those_of_the_training_part_and_are_kept() -> None:
    images, labels = torch.zeros(100, 4, 4, dtype=torch.uint8), torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    data = ImageData.from_arrays(images, labels)
    assert data.info.counts == tuple(torch.bincount(data.train.labels).tolist())
    assert data.info.shares == pytest.approx([count / len(data.train) for count in data.info.counts])
    assert DataInfo.from_dict(data.info.to_dict()) == data.info
    older = {key: value for key, value in data.info.to_dict().items() if key != "counts"}
    assert DataInfo.from_dict(older).counts == () and DataInfo.from_dict(older).shares is None
    assert data.info.is_that_of(older) and not INFO.is_that_of(older) and not INFO.is_that_of(None)
    for wrong in ([1, 2], [-1, 2, 3], [1.0, 2, 3], "abc"):
        with pytest.raises(UserError, match="damaged"):
            DataInfo.from_dict({**data.info.to_dict(), "counts": wrong})


def test_a_run_says_under_which_shares_its_probabilities_are_meant(data: ImageData, tmp_path: Path) -> None:
    assert data.info.counts == (20, 20, 20)
    data = replace(data, train=data.train.take(np.r_[:30, 30:60:3]))
    data = replace(data, info=replace(data.info, counts=()))  # counted again
    run = trainer(data, tmp_path / "run", epochs=2).fit()
    assert run.class_prior == open_run(tmp_path / "run").class_prior == (20 / 40, 10 / 40, 10 / 40)
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["info"]["counts"]  # as version 0.6 kept it
    save_checkpoint(path, state)
    assert open_run(tmp_path / "run").class_prior is None
    again = trainer(data, tmp_path / "run", epochs=2)
    again.restore()  # the data know what the folder does not
    assert again.run.class_prior == (20 / 40, 10 / 40, 10 / 40)


@pytest.mark.parametrize("balance", BALANCES)
def test_a_balanced_run_means_equal_classes(balance: str, data: ImageData) -> None:
    assert trainer(data, config=CONFIG, balance=balance).run.class_prior == (1 / 3, 1 / 3, 1 / 3)


# What each of them computes --------------------------------------------------------------------------------------


def test_the_sampler_draws_every_class_alike_often_in_as_many_steps(skewed: ImageData) -> None:
    labels = skewed.train.labels
    order = balanced_order(labels, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[order]).tolist() == [20, 20, 20] and len(order) == 60
    shown = torch.bincount(order, minlength=60)
    assert [sorted(set(shown[labels == c].tolist())) for c in range(3)] == [[0, 1], [2], [4]]  # no image much oftener
    first, second = ([rows for *_, rows in batches(skewed.train, 16, 5, epoch, 2, balanced=True)] for epoch in (0, 1))
    assert [len(rows) for rows in first] == [16, 16, 16, 12] and len(first) == count_steps(60, 16, 2)
    assert not torch.equal(torch.cat(first), torch.cat(second))  # another epoch, another order and other images
    again = [rows for *_, rows in batches(skewed.train, 16, 5, 0, 2, balanced=True)]
    assert torch.equal(torch.cat(again), torch.cat(first))
    odd = [
        torch.bincount(labels[:59][balanced_order(labels[:59], torch.Generator().manual_seed(i))]) for i in range(40)
    ]
    assert {count for counts in odd for count in counts.tolist()} == {19, 20}
    assert (torch.stack(odd).double().mean(0) - 59 / 3).abs().max() < 0.3  # the odd image is any class's


def test_weights_sum_to_the_images_and_every_class_weighs_the_same() -> None:
    weights = class_weights((45, 10, 5))
    assert (weights * torch.tensor([45, 10, 5])).tolist() == pytest.approx([20, 20, 20])
    assert class_weights((7, 7)).tolist() == [1, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix", "regmixup"])
def test_weighted_labels_are_the_weighted_loss_of_what_is_mixed(mix: str, smoothing: float) -> None:
    """Loss of l x_a + (1 - l) x_b: l w_a CE(., y_a) + (1 - l) w_b CE(., y_b), with y smoothed."""
    info = replace(INFO, counts=(45, 10, 5))
    labels = torch.tensor([0, 1, 2, 0, 2, 1])
    images = torch.randint(0, 255, (6, 1, 4, 4), dtype=torch.uint8)
    settings = TrainConfig(mix=mix, label_smoothing=smoothing)  # type: ignore[arg-type]
    drawn = []
    for balance in ("none", "loss"):
        torch.manual_seed(1)
        drawn.append(Augmentation(replace(settings, balance=balance), info)(images, labels))  # type: ignore[arg-type]
    (x, plain), (again, y) = drawn
    assert torch.equal(x, again) and y.shape == (6, 3)
    shares = F.one_hot(plain, 3).float() if plain.dim() == 1 else plain
    shares = (shares - smoothing / 3) / (1 - smoothing)  # what was mixed, before it was smoothed
    smoothed = (1 - smoothing) * torch.eye(3) + smoothing / 3
    logits, weights = torch.randn(6, 3), class_weights(info.counts)
    each = -(shares.unsqueeze(2) * weights.view(3, 1) * smoothed * logits.log_softmax(-1).unsqueeze(1)).sum((1, 2))
    assert float(Likelihood().nll(logits, y)) == pytest.approx(float(each.mean()), rel=1e-5)
    torch.testing.assert_close(y.sum(-1), shares @ weights)


def test_logit_adjustment_moves_the_logits_of_training_alone(skewed: ImageData) -> None:
    likelihood, z = Likelihood(TrainConfig(balance="logit"), (0.75, 0.15, 0.1)), torch.randn(8, 3)
    y = torch.arange(8) % 3
    by_hand = (z.exp() * torch.tensor([0.75, 0.15, 0.1])).log()
    assert float(likelihood.nll(z, y)) == pytest.approx(float(F.cross_entropy(by_hand, y)), rel=1e-5)
    mixed = torch.rand(8, 3).softmax(-1)
    assert float(likelihood.nll(z, mixed)) == pytest.approx(float(F.cross_entropy(by_hand, mixed)), rel=1e-5)
    assert not likelihood.state_dict()  # checkpoints have the keys that they had
    for shares in (None, (1.0, 0.0)):
        with pytest.raises(UserError, match="training images of each class"):
            Likelihood(TrainConfig(balance="logit"), shares)
    run = trainer(skewed, config=replace(CONFIG, method="deterministic"), balance="logit", epochs=1).fit()
    x = skewed.info.normalise(skewed.test.images)
    probs = (run.draw_networks(1)(x)[0] / run.temperature).softmax(-1)
    torch.testing.assert_close(draw_predictive(run, skewed.test.images, 1).mean, probs.detach())


@pytest.mark.parametrize("balance", ["loss", "logit"])
def test_the_engines_agree(balance: str, skewed: ImageData) -> None:
    runs = [trainer(skewed, balance=balance, engine=engine, draws=1, epochs=3).fit() for engine in ("pyro", "fused")]
    for ours, theirs in zip(*(run.history for run in runs), strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-4)
        assert ours["retention"] == pytest.approx(theirs["retention"], rel=1e-4)  # the curvature knows of it too


@pytest.mark.parametrize("balance", BALANCES)
def test_micro_batches_leave_the_run_as_it_is(balance: str, skewed: ImageData) -> None:
    whole, cut = (trainer(skewed, balance=balance, draws=1, accumulate=pieces, epochs=3).fit() for pieces in (1, 2))
    for ours, theirs in zip(whole.history, cut.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("balance", BALANCES)
def test_resumed_equals_uninterrupted(balance: str, skewed: ImageData, tmp_path: Path, caplog) -> None:
    settings = {"balance": balance, "mix": "mixup", "label_smoothing": 0.1, "epochs": 4}
    trainer(skewed, tmp_path / "whole", **settings).fit()

    def stop(at: Any) -> None:
        if at.epoch == 2:
            raise KeyboardInterrupt

    begun = trainer(skewed, tmp_path / "cut", **settings)
    begun.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        begun.fit()
    for name, told in (("cut", True), ("whole", False)):
        caplog.clear()
        open_run(tmp_path / name)
        assert ("is not finished" in caplog.text) == told
    again = trainer(skewed, tmp_path / "cut", **settings)
    again.restore()
    again.fit()
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut")]
    assert same(*({k: v for k, v in state.items() if k != "seconds"} for state in states))


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_small_classes_more(method: str, balance: str, skewed: ImageData) -> None:
    """The mean probability of the two small classes among images of all three alike, or a refusal by name."""
    if method == "laplace":
        pytest.importorskip("laplace")
    found = {}
    for chosen in ("none", balance):
        train = replace(METHODS[method].train, epochs=10, finetune_epochs=0, batch_size=20, samples=4, val_samples=2,
                        device="cpu", pilot_fraction=0.3, balance=chosen)  # fmt: skip
        config = replace(CONFIG, method=method, train=train, baseline=METHODS[method].baseline)
        if method == "laplace" and chosen in ("sampler", "loss"):
            with pytest.raises(UserError, match=r"method laplace .* set `balance` to logit"):
                trainer(skewed, config=config)
            return
        run = trainer(skewed, config=config).fit()
        found[chosen] = float(draw_predictive(run, skewed.test.images, 4).mean[:, 1:].sum(-1).mean())
        assert all(math.isfinite(record["loss"]) for record in run.history)
    assert found[balance] > found["none"]


@pytest.mark.parametrize("balance", ["none", *BALANCES])
def test_the_probabilities_are_those_under_the_shares_that_are_told(balance: str) -> None:
    """Two kinds of images that both classes have: the posterior is known for any shares of the classes."""
    made, likely = torch.Generator().manual_seed(0), torch.tensor([0.8, 0.3])  # of the bright kind, by class

    def part(counts: tuple[int, int]) -> Split:
        labels = torch.arange(2).repeat_interleave(torch.tensor(counts))
        bright = torch.rand(len(labels), generator=made) < likely[labels]
        images = torch.where(bright, 200, 50).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        return Split(images.to(torch.uint8), labels)

    data = ImageData(part((1800, 200)), part((180, 20)), part((100, 100)), replace(INFO, classes=("a", "b")))
    settings = TrainConfig(epochs=12, batch_size=100, device="cpu", balance=balance, val_samples=1)  # type: ignore[arg-type]
    run = trainer(data, config=replace(CONFIG, method="temperature", train=settings)).fit()
    assert run.class_prior is not None
    for pixel, chances in ((200, likely), (50, 1 - likely)):
        joint = chances * torch.tensor(run.class_prior)
        image = torch.full((1, 1, 4, 4), pixel, dtype=torch.uint8)
        found = draw_predictive(run, image, 1).mean[0]
        assert found.tolist() == pytest.approx((joint / joint.sum()).tolist(), abs=0.06)
    assert 0.7 < float(run.temperature) < 1.4


@pytest.mark.parametrize("estimator", [gnb, lm, exact])
def test_the_curvature_counts_an_image_as_the_likelihood_does(estimator: Any) -> None:
    """An image of weight 2 and one of weight 0 beside it: twice the curvature of the first, over two images."""
    vit = ViT(TINY, 1, 4, 4, classes=3)
    weights, images = vit.initial_weights(), torch.randn(2, 1, 4, 4)
    labels = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    draws = 300 if estimator is gnb else 1

    def mean(x: Tensor, y: Tensor) -> Tensor:
        found = [torch.cat([h.flatten() for h in estimator(vit, weights, x, y).values()]) for _ in range(draws)]
        return torch.stack(found).mean(0)

    ours, one = mean(images, labels), mean(images[:1], torch.tensor([1]))
    assert float(ours.sum()) == pytest.approx(float(one.sum()), rel=0.15 if estimator is gnb else 1e-4)
    shifted: Any = Likelihood(TrainConfig(balance="logit"), (0.98, 0.01, 0.01)).network(vit)
    p = shifted(weights, images).softmax(-1)
    torch.testing.assert_close(p, (vit(weights, images).exp() * torch.tensor([0.98, 0.01, 0.01])).log().softmax(-1))
    if estimator is not gnb:  # a likelihood that the shares make nearly certain is flat
        sums = [sum(float(h.sum()) for h in estimator(at, weights, images, torch.tensor([0, 0])).values())
                for at in (vit, shifted)]  # fmt: skip
        assert sums[1] < 0.5 * sums[0]


# What the validation part says -----------------------------------------------------------------------------------


def test_the_temperature_is_not_fooled_by_the_shares_of_the_validation_part() -> None:
    """The posterior of two Gaussians under equal classes, on images of which nine in ten are of the first class."""
    made = torch.Generator().manual_seed(0)
    labels = (torch.arange(40_000) % 10 == 0).long()
    kinds = [torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.5, 2.0)]
    x = torch.randn(len(labels), generator=made) * (1 + labels) + 1.5 * labels
    probs = torch.stack([kind.log_prob(x) for kind in kinds], -1).softmax(-1)[None]
    for true in (0.6, 1.0, 1.7):
        shown = temper(probs, 1 / true)  # its logits times true
        assert fit_temperature(shown, labels, prior=(0.5, 0.5)) == pytest.approx(true, rel=0.05)
        assert abs(math.log(fit_temperature(shown, labels) / true)) > 0.15  # as if the classes were equal
    moved = with_shares_of(labels, probs[0])
    assert float(moved[:, 1].mean()) == pytest.approx(float((labels == 1).float().mean()), abs=0.01)
    assert float(probs[0, :, 1].mean()) > 2 * float(moved[:, 1].mean())
    flat = torch.full((2, 5, 3), 1 / 3)
    assert with_shares_of(torch.tensor([0, 0, 2]), flat)[0, 0].tolist() == pytest.approx([2 / 3, 0.0, 1 / 3])
    saturated = with_shares_of(torch.tensor([1, 1]), torch.tensor([[1.0, 0.0, 0.0]]))  # of a class without a label
    assert saturated.tolist() == [[0.0, 1.0, 0.0]]


def test_the_search_for_the_noise_reads_the_shares_too(skewed: ImageData) -> None:
    val = skewed.val.take(np.r_[0:30:3, 1, 2])  # ten of the first class, one of each other
    data = replace(skewed, val=val)
    config = replace(CONFIG, ising=IsingConfig(update_every=2))
    at = trainer(data, config=config, balance="loss", epochs=8)
    run = at.fit()
    assert len(at.noise_search.found) == 3
    run.temperature.fill_(1.0)
    probs = draw_predictive(run, val.images, 50, seed=run.config.train.seed).probs
    mean = temper(probs, fit_temperature(probs, val.labels, prior=(1 / 3,) * 3)).mean(0)
    losses = -with_shares_of(val.labels, mean)[torch.arange(12), val.labels].log()
    torch.testing.assert_close(at.noise_search._losses(), losses.double())
    scores = run.history[-1]
    mean = with_shares_of(val.labels, draw_predictive(run, val.images, 2, seed=7).mean)
    assert scores["val_accuracy"] == pytest.approx(float((mean.argmax(-1) == val.labels).float().mean()), abs=0.2)


def test_a_pruned_network_keeps_meaning_equal_classes(skewed: ImageData) -> None:
    run = trainer(skewed, balance="logit", epochs=8).fit()
    means = {}
    for balanced in (False, True):
        model = finetune(compact(run, val=skewed.val), skewed.train, 20, 1e-2, 20, balanced=balanced)
        means[balanced] = float(model.predict(skewed.test.images)[0][:, 1:].sum(-1).mean())
    assert means[True] > means[False] + 0.02
    assert means[True] == pytest.approx(2 / 3, abs=0.12)  # of the test images, two thirds are of the small classes


def test_a_class_without_images_is_refused(skewed: ImageData) -> None:
    alone = replace(skewed, train=skewed.train.take(np.arange(45)), info=INFO)
    for balance in BALANCES:
        with pytest.raises(UserError, match=f"`balance` {balance} needs a training image of every class"):
            trainer(alone, balance=balance)
    trainer(alone)
