"""Metrics against their definitions, written as loops."""

import math

import pytest
import torch
from sklearn.metrics import f1_score

from pyro_isingvit.errors import UserError
from pyro_isingvit.metrics import calibration_error, classification_metrics, entropy


def made(count: int = 200, classes: int = 4):
    return torch.randn(count, classes).mul(2).softmax(-1), torch.randint(classes, (count,))


def test_against_their_definitions() -> None:
    probs, labels = made()
    m = classification_metrics(probs, labels)
    guess = probs.argmax(-1)
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    assert m["accuracy"] == pytest.approx(float((guess == labels).float().mean()))
    assert m["nll"] == pytest.approx(
        -sum(math.log(float(p[y])) for p, y in zip(probs, labels, strict=True)) / 200, rel=1e-5
    )
    assert m["brier"] == pytest.approx(float(((probs - one_hot) ** 2).sum(-1).mean()), rel=1e-5)
    assert m["f1_macro"] == pytest.approx(f1_score(labels, guess, average="macro"))
    false = [int(((guess == c) & (labels != c)).sum()) / int((labels != c).sum()) for c in range(4)]
    assert m["fpr_macro"] == pytest.approx(sum(false) / 4)


def test_ece_by_hand() -> None:
    probs, labels = made()
    confidence, guess = probs.max(-1)
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap = (guess[inside] == labels[inside]).float().mean() - confidence[inside].mean()
            total += float(inside.float().mean() * gap.abs())
    assert calibration_error(probs, labels) == pytest.approx(total, abs=1e-5)


def test_classes_that_do_not_occur_are_counted_as_known() -> None:
    probs, labels = made(10, 6)
    m = classification_metrics(probs, labels.clamp(max=1))
    assert all(math.isfinite(value) for value in m.values())


def test_certain_and_wrong_is_finite() -> None:
    m = classification_metrics(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    assert math.isfinite(m["nll"]) and m["accuracy"] == 0.5 and m["brier"] == pytest.approx(1.0)


def test_entropy() -> None:
    assert float(entropy(torch.full((4,), 0.25))) == pytest.approx(math.log(4))
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0.0


@pytest.mark.parametrize("labels", [torch.tensor([0, 7]), torch.tensor([-1, 0]), torch.tensor([0])])
def test_labels_that_do_not_fit_are_refused(labels) -> None:
    with pytest.raises(UserError):
        classification_metrics(torch.full((2, 4), 0.25), labels)
