"""Limits on the error rate of accepted predictions: how often they are broken, and how much they accept."""

import math

import numpy as np
import pytest
import torch
from made import real_predictions
from scipy.stats import beta

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.metrics import area_under_risk_coverage
from pyro_isingvit.predictive.prevalence import estimate_prevalence
from pyro_isingvit.predictive.selective import acceptance, risk_coverage


def two_classes(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of class 0 with a confidence above a half, and labels that make them right or wrong."""
    return np.stack([confidence, 1 - confidence], 1), 1 - right.astype(int)


@pytest.mark.parametrize(("limit", "size"), [(0.05, 200), (0.05, 600), (0.1, 300), (0.02, 600)])
def test_the_limit_is_broken_no_more_often_than_allowed(limit: float, size: int) -> None:
    """The real predictions are the population here, so the error rate above a threshold is known exactly."""
    probs, labels = real_predictions()
    confidence, wrong, trials, certainty = probs.max(1), probs.argmax(1) != labels, 400, 0.9
    broken, accepted = 0, np.empty(trials)
    for trial in range(trials):
        drawn = np.random.default_rng(trial).integers(0, len(labels), size)
        stands = acceptance(probs[drawn], labels[drawn], limit, certainty).accepts(probs).numpy()
        broken += bool(stands.any() and wrong[stands].mean() > limit)
        accepted[trial] = stands.mean()
    assert broken / trials < 0.1 + 3 * math.sqrt(0.09 / trials), broken / trials
    best = max((confidence >= t).mean() for t in confidence if wrong[confidence >= t].mean() <= limit)
    assert accepted.mean() > 0.4 * best and accepted.max() <= 1.1 * best


def test_confidence_that_says_nothing_is_not_trusted() -> None:
    """The error rate is 6% everywhere: nearly every threshold would break a limit of 5%."""
    broken = 0
    for trial in range(400):
        rng = np.random.default_rng(trial)
        found = acceptance(*two_classes(rng.uniform(0.5, 1, 400), rng.random(400) > 0.06), 0.05, 0.9)
        broken += found.accepted > 0
    assert broken / 400 < 0.1 + 3 * math.sqrt(0.09 / 400)


def test_the_threshold_by_the_bound_of_clopper_and_pearson() -> None:
    """The hypothesis is rejected exactly where the upper confidence bound of the error rate is below the limit."""
    most = max(e for e in range(75) if beta.ppf(0.95, e + 1, 75 - e) <= 0.2)  # errors allowed in a quarter
    first = min(k for k in range(most + 1, 76) if beta.ppf(0.95, most + 1, k - most) <= 0.2)
    for trial in range(30):
        rng = np.random.default_rng(trial)
        confidence = rng.uniform(0.5, 1, 300)
        right = rng.random(300) < confidence
        found = acceptance(*two_classes(confidence, right), 0.2, 0.95)
        order = np.argsort(-confidence)
        errors, best = (~right)[order].cumsum(), 0
        for k in range(first, 301):
            bound = beta.ppf(0.95, errors[k - 1] + 1, k - errors[k - 1]) if errors[k - 1] < k else 1.0
            if bound > 0.2:
                break
            best = k
        assert found.accepted == best == int((confidence > found.threshold).sum())
        assert best == 0 or found.errors == errors[best - 1]


def test_images_of_one_confidence_are_accepted_together() -> None:
    confidence, right = np.full(400, 0.9), np.ones(400, dtype=bool)
    found = acceptance(*two_classes(confidence, right), 0.05)
    assert (found.accepted, found.threshold) == (400, 0.0)
    right[:50] = False
    assert acceptance(*two_classes(confidence, right), 0.05).accepted == 0


def test_where_nothing_stands_it_says_how_many_images_would_be_needed() -> None:
    confidence = np.linspace(0.6, 0.99, 100)
    none = acceptance(*two_classes(confidence, np.ones(100, dtype=bool)), 0.01)
    assert (
        none.accepted == 0
        and none.threshold == 1.0
        and not none.accepts(two_classes(confidence, confidence > 0)[0]).any()
    )
    assert none.needed is not None and 299 <= none.needed <= 325  # 0.99^299 < 0.05
    assert acceptance(*two_classes(np.linspace(0.6, 0.99, 330), np.ones(330, dtype=bool)), 0.01).accepted == 330
    assert acceptance(*two_classes(confidence, np.arange(100) % 2 == 0), 0.01).needed is None


def test_more_images_than_there_are_would_be_needed() -> None:
    """The 51st most confident of 100 is wrong: k = 59 fails, and the search ends, though k = 100 would pass."""
    confidence = np.linspace(0.99, 0.6, 100)
    right = np.ones(100, dtype=bool)
    right[50] = False
    found = acceptance(*two_classes(confidence, right), 0.05)
    assert found.accepted == 0 and found.needed is not None and found.needed > 100
    right = np.tile(right, -(-found.needed // 100))[: found.needed]
    many = np.linspace(0.99, 0.6, found.needed)
    right = np.repeat(np.arange(100) != 50, -(-found.needed // 100))[: found.needed]
    assert acceptance(*two_classes(many, right), 0.05).accepted > 0


def test_the_curve_is_that_of_the_area() -> None:
    probs, labels = real_predictions()
    coverage, risk = risk_coverage(probs, labels)
    wrong = probs.argmax(1) != labels
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(wrong.mean())
    assert risk.mean() == pytest.approx(area_under_risk_coverage(probs.max(1), ~wrong))
    top = np.argsort(-probs.max(1))[:500]
    assert risk[499] == pytest.approx(wrong[top].mean())


@pytest.mark.parametrize(("limit", "certainty"), [(0, 0.9), (1, 0.9), (0.1, 0), (0.1, 1), (float("nan"), 0.9)])
def test_numbers_out_of_range(limit: float, certainty: float) -> None:
    with pytest.raises(UserError, match=r"must lie in \(0, 1\)"):
        acceptance(*real_predictions(), limit, certainty)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y[:, None], r"shape \(n,\), not \(400, 1\)"),
        (lambda y: y + 0.7, "whole numbers"),
        (lambda y: y.astype(str), "whole numbers"),
        (lambda y: y[:5], "as many labels"),
    ],
)
def test_labels_that_are_no_column_of_class_numbers_are_refused(change, words: str) -> None:
    """A column (n, 1) would be compared with every prediction, and every image be accepted."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1.0, 400)
    probs, labels = two_classes(confidence, rng.random(400) < confidence)
    for ask in (lambda y: acceptance(probs, y, 0.2), lambda y: risk_coverage(probs, y),
                lambda y: estimate_prevalence(probs, probs, y)):  # fmt: skip
        with pytest.raises(UserError, match=words):
            ask(change(labels))
    known = acceptance(probs, labels, 0.2)
    for same in (torch.from_numpy(labels), labels.astype(float), labels.astype(object)):
        assert acceptance(probs, same, 0.2) == known


def test_limits_that_no_number_of_images_here_can_keep_are_told_at_once() -> None:
    """Of a limit of 1e-9, arrays over all the images that it needs would have 24 GB."""
    found = acceptance(np.array([[0.9, 0.1]] * 50), np.zeros(50, int), 1e-9)
    assert found.accepted == 0 and found.threshold == 1.0
