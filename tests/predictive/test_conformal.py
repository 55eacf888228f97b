"""Prediction sets: the coverage that is promised, over many splits of real data, and the order statistic behind it."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from made import real_predictions
from scipy.stats import betabinom

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.conformal import conformal_sets, coverage_band, needed_images

SPLITS = 200


def shares(level: float, size: int, classwise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Share of the sets that hold the label, of all and of each class, over splits of real predictions."""
    probs, labels = real_predictions()
    overall, within = np.empty(SPLITS), np.empty((SPLITS, 10))
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(labels))
        known, new = order[:size], order[size:]
        held = conformal_sets(probs[new], probs[known], labels[known], level, classwise=classwise).numpy()
        right = held[np.arange(len(new)), labels[new]]
        overall[split] = right.mean()
        within[split] = [right[labels[new] == c].mean() for c in range(10)]
    return overall, within


def test_coverage_over_many_splits_of_real_data_is_within_the_finite_sample_bound() -> None:
    """The law of the coverage over splits is beta-binomial; a quantile without (n + 1) / n would fail."""
    size, level = 99, 0.95
    overall, within = shares(level, size, classwise=False)
    new = len(real_predictions()[1]) - size
    law = betabinom(new, math.ceil((size + 1) * level), size + 1 - math.ceil((size + 1) * level))
    error = law.std() / new / math.sqrt(SPLITS)
    assert abs(overall.mean() - law.mean() / new) < 3.5 * error, (overall.mean(), law.mean() / new, error)
    low, high = coverage_band(size, level, new)
    inside = ((overall >= low) & (overall <= high)).mean()
    assert abs(inside - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / SPLITS)
    assert within.mean(0).min() < 0.935  # plain sets: hard classes pay for easy ones


def test_class_wise_sets_cover_every_class() -> None:
    overall, within = shares(0.9, 500, classwise=True)
    error = within.std(0) / math.sqrt(SPLITS)
    assert (within.mean(0) > 0.9 - 3.5 * error).all(), within.mean(0)
    probs, labels = real_predictions()
    accuracy = np.array([(probs.argmax(1) == labels)[labels == c].mean() for c in range(10)])
    # At most 1 / (n_c + 1) above, n_c about 50, or what the most probable class alone covers.
    assert (within.mean(0) < np.maximum(0.9, accuracy) + 0.03).all(), within.mean(0) - accuracy
    assert overall.mean() > 0.9


def test_class_wise_sets_hold_under_another_prevalence_and_plain_ones_do_not() -> None:
    probs, labels = real_predictions()
    hard = int(np.argmin([(probs.argmax(1) == labels)[labels == c].mean() for c in range(10)]))
    found = {True: [], False: []}
    for split in range(60):
        rng = np.random.default_rng(split)
        order = rng.permutation(len(labels))
        known, new = order[:700], order[700:]
        new = np.concatenate([new[labels[new] == hard], rng.choice(new[labels[new] != hard], 10)])
        for classwise, every in found.items():
            held = conformal_sets(probs[new], probs[known], labels[known], 0.9, classwise=classwise).numpy()
            every.append(held[np.arange(len(new)), labels[new]].mean())
    assert np.mean(found[True]) > 0.9 - 3.5 * np.std(found[True]) / math.sqrt(60)
    assert np.mean(found[False]) < 0.88


@pytest.mark.parametrize("level", [0.1, 0.2, 0.3, 0.5, 0.55, 0.56, 0.8, 0.82, 0.9, 0.941, 0.95, 0.99, 0.997])
def test_the_threshold_is_the_order_statistic_of_split_conformal_prediction(level: float) -> None:
    probs, labels = real_predictions()
    for size in (needed_images(level), needed_images(level) + 1, 9, 24, 99, 149, 500):
        if size < needed_images(level):
            continue
        known, new = np.arange(size), np.arange(size, len(labels))
        scores = np.sort(1 - probs[known, labels[known]])
        limit = scores[math.ceil(round((size + 1) * level, 9)) - 1]
        expected = 1 - probs[new] <= limit + 1e-12
        expected[np.arange(len(new)), probs[new].argmax(1)] = True
        assert np.array_equal(conformal_sets(probs[new], probs[known], labels[known], level).numpy(), expected)


def test_sets_grow_with_the_coverage_and_are_never_empty() -> None:
    probs, labels = real_predictions()
    sizes = [conformal_sets(probs[700:], probs[:700], labels[:700], level).sum(1) for level in (0.5, 0.8, 0.95, 0.99)]
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(sizes))
    assert int(sizes[0].min()) == 1


def test_random_states_are_left_alone() -> None:
    probs, labels = real_predictions()
    np.random.seed(0)  # noqa: NPY002  # what a user may have done
    random.seed(0)
    conformal_sets(probs[700:], probs[:700], labels[:700], 0.9)
    drawn = np.random.rand(), random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    assert drawn == (np.random.rand(), random.random())  # noqa: NPY002


def test_two_classes() -> None:
    val, labels = torch.tensor([[0.8, 0.2], [0.3, 0.7]] * 20), torch.tensor([0, 1] * 20)
    sets = conformal_sets(torch.tensor([[0.9, 0.1], [0.5, 0.5]]), val, labels, 0.9, classwise=True)
    assert sets.tolist() == [[True, False], [True, False]]


def test_too_few_images_are_refused_with_the_number_that_is_needed() -> None:
    probs, labels = real_predictions()
    with pytest.raises(UserError, match="needs 20 validation images at least; there are 19"):
        conformal_sets(probs, probs[:19], labels[:19], 0.95)
    with pytest.raises(UserError, match="of each at least; class 0 has"):
        conformal_sets(probs, probs[:100], labels[:100], 0.95, classwise=True)
    for level in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="`coverage` must lie in"):
            conformal_sets(probs, probs, labels, level)
    with pytest.raises(UserError, match="shape"):
        conformal_sets(probs[:, :4], probs, labels, 0.9)
    for wrong in (probs * 2, np.full_like(probs, np.nan), -probs):
        with pytest.raises(UserError, match="sum to 1"):
            conformal_sets(wrong, probs, labels, 0.9)
    with pytest.raises(UserError, match="as many labels"):
        conformal_sets(probs, probs, labels[:-1], 0.9)
    with pytest.raises(UserError, match=r"lie in 0\.\.9"):
        conformal_sets(probs, probs, labels - 1, 0.9)
