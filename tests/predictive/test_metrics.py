"""Metrics against their definitions, written as loops."""

import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.metrics import (
    adaptive_calibration_error,
    area_under_risk_coverage,
    calibration_error,
    classification_metrics,
    entropy,
    equal_mass_bins,
)


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


# -- adaptive ECE, AURC, right against wrong -------------------------------------------------------------------


def brute_aurc(right) -> float:
    """Images in order of confidence, most confident first."""
    return sum(sum(1 - r for r in right[:k]) / k for k in range(1, len(right) + 1)) / len(right)


def test_aurc_by_hand() -> None:
    rng = np.random.default_rng(0)
    confidence, right = rng.random(60), rng.integers(0, 2, 60)
    ordered = [right[i] for i in np.argsort(-confidence)]
    assert area_under_risk_coverage(confidence, right) == pytest.approx(brute_aurc(ordered))


def test_aurc_of_ties_is_the_mean_over_their_orders() -> None:
    confidence, right = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.2]), np.array([1, 0, 1, 0, 1, 0])
    orders = [brute_aurc([1, *middle, 0]) for middle in permutations(right[1:5])]
    assert area_under_risk_coverage(confidence, right) == pytest.approx(np.mean(orders))
    assert area_under_risk_coverage(np.full(6, 0.5), right) == pytest.approx(0.5)  # no information: the error rate


def test_aurc_is_best_with_errors_last_and_ignores_the_order_of_images() -> None:
    right, shuffle = np.array([1, 1, 1, 1, 0, 0]), np.random.default_rng(1).permutation(6)
    best, worst = np.linspace(1, 0.5, 6), np.linspace(0.5, 1, 6)
    assert area_under_risk_coverage(best, right) < area_under_risk_coverage(worst, right)
    assert area_under_risk_coverage(best[shuffle], right[shuffle]) == area_under_risk_coverage(best, right)
    assert area_under_risk_coverage(best, np.ones(6)) == 0.0


def test_certain_predictions_share_the_last_bin() -> None:
    """50 of confidence 1 of which 40 are right, 50 of .94 that all are: one bin of 100, |.9 - .97|."""
    confidence = torch.cat([torch.ones(50), torch.full((50,), 0.94)])
    probs = torch.stack([confidence, 1 - confidence], 1)
    labels = (torch.arange(100) < 10).long()
    assert calibration_error(probs, labels) == pytest.approx(0.07, abs=1e-5)


def test_adaptive_ece_by_hand() -> None:
    rng = np.random.default_rng(0)
    confidence, right = rng.random(150) ** 0.2, rng.integers(0, 2, 150)
    total = 0.0
    for part in np.split(np.argsort(confidence), 15):  # 15 bins of 10
        total += len(part) / 150 * abs(right[part].mean() - confidence[part].mean())
    assert adaptive_calibration_error(confidence, right) == pytest.approx(total)


def test_equal_mass_bins() -> None:
    assert np.bincount(equal_mass_bins(np.random.default_rng(0).random(300))).tolist() == [20] * 15
    tied = equal_mass_bins(np.array([1.0] * 50 + [0.5] * 10))
    assert len(set(tied[:50])) == 1 and tied[50] < tied[0]
    assert equal_mass_bins(np.array([0.7])).tolist() == [0]


def test_new_keys_against_their_definitions() -> None:
    probs, labels = made()
    m = classification_metrics(probs, labels)
    confidence, guess = probs.double().max(-1)
    right = guess == labels
    pairs = [(a > b) + 0.5 * (a == b) for a in confidence[right].tolist() for b in confidence[~right].tolist()]
    assert m["auroc_right_wrong"] == pytest.approx(np.mean(pairs))
    assert m["aurc"] == pytest.approx(area_under_risk_coverage(confidence.numpy(), right.numpy()), rel=1e-5)
    assert m["ece_adaptive"] == pytest.approx(adaptive_calibration_error(confidence.numpy(), right.numpy()), abs=1e-5)


def test_all_right_leaves_the_auroc_undefined_and_the_json_clean() -> None:
    m = classification_metrics(torch.eye(3), torch.arange(3))
    assert m["auroc_right_wrong"] is None and m["aurc"] == 0.0
    json.dumps(m, allow_nan=False)
