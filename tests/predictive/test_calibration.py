"""The predictive temperature: found again where it is known, and harmless where there is nothing to learn."""

import math

import pytest
import torch

from pyro_isingvit.predictive.calibration import PRIOR_MEAN, fit_temperature, temper
from pyro_isingvit.predictive.metrics import classification_metrics


def test_temper_is_softmax_of_scaled_logits() -> None:
    logits = torch.randn(3, 5, 4)
    torch.testing.assert_close(temper(logits.softmax(-1), 2.5), (logits / 2.5).softmax(-1))
    torch.testing.assert_close(temper(temper(logits.softmax(-1), 2.5), 1 / 2.5), logits.softmax(-1))


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0])
def test_it_finds_the_temperature_that_made_the_labels(true: float) -> None:
    logits = 3 * torch.randn(1, 4000, 5)
    labels = torch.distributions.Categorical(logits=logits[0] / true).sample()
    assert fit_temperature(logits.softmax(-1), labels) == pytest.approx(true, rel=0.06)


def test_it_mends_the_underconfidence_of_pooled_draws() -> None:
    clean = 6 * torch.randn(6000, 4)
    labels = torch.distributions.Categorical(logits=clean).sample()
    draws = (clean + 3 * torch.randn(30, 6000, 4)).softmax(-1)
    half = 3000
    temperature = fit_temperature(draws[:, :half], labels[:half])
    before = classification_metrics(draws[:, half:].mean(0), labels[half:])
    after = classification_metrics(temper(draws[:, half:], temperature).mean(0), labels[half:])
    assert temperature < 0.9
    assert (
        after["nll"] < before["nll"] and after["ece"] < before["ece"] and after["accuracy"] >= before["accuracy"] - 0.01
    )


def test_few_images_do_not_move_it_far() -> None:
    probs, usual = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]]), math.exp(PRIOR_MEAN)
    assert 0.7 * usual < fit_temperature(probs, torch.tensor([0, 0])) < usual
    assert usual < fit_temperature(probs, torch.tensor([0, 1])) < 1.5 * usual
    assert fit_temperature(probs[:, :0], torch.tensor([], dtype=torch.long)) == 1.0
