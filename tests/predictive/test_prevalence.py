"""Another prevalence than in training: Bayes' rule for a mixture of draws, and the estimate from unlabelled images."""

import logging

import numpy as np
import pytest
import torch
from made import real_predictions

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.predictive.prevalence import _solve, estimate_prevalence, with_prevalence

RNG = np.random.default_rng(0)


def shifted(shares: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Real predictions and labels, drawn so that the classes have these shares."""
    probs, labels = real_predictions()
    drawn = rng.choice(len(shares), count, p=shares)
    return probs[[rng.choice(np.flatnonzero(labels == c)) for c in drawn]], drawn


def test_the_corrected_mean_is_bayes_rule_exactly() -> None:
    """Images are one of 50 kinds, p(x | y) is known, and the draws scatter around the true p(y | x)."""
    likelihood = RNG.dirichlet(np.ones(50), 3)  # p(x | y), (C, kinds)
    old, new = np.array([0.7, 0.2, 0.1]), np.array([0.05, 0.25, 0.7])

    def posterior(prior: np.ndarray) -> np.ndarray:
        joint = prior[:, None] * likelihood
        return (joint / joint.sum(0)).T

    scatter = RNG.dirichlet(np.ones(3), (8, 50))
    scatter -= scatter.mean(0)
    probs = posterior(old) + scatter * np.minimum(posterior(old).min(1), 1)[:, None]
    draws = PredictiveDraws(torch.from_numpy(probs))
    assert float(draws.probs.min()) > 0 and np.allclose(draws.mean, posterior(old))
    found = with_prevalence(draws, new, old)
    assert np.allclose(found.mean, posterior(new), atol=1e-6)
    assert torch.allclose(found.probs.sum(-1), torch.ones(8, 50)) and torch.allclose(
        found.weights.sum(0), torch.ones(50)
    )
    assert (
        float((found.probs.mean(0) - torch.from_numpy(posterior(new))).abs().max()) > 0.01
    )  # the mean of draws is not


def test_draws_with_weights_are_draws_that_come_several_times() -> None:
    probs = torch.from_numpy(RNG.dirichlet(np.ones(4), (3, 5)))
    times = torch.tensor([1, 2, 5])
    weighted = PredictiveDraws(probs, (times / 8)[:, None].expand(3, 5).double())
    again = PredictiveDraws(probs.repeat_interleave(times, 0))
    for name in ("mean", "entropy", "expected_entropy", "mutual_information"):
        assert torch.allclose(getattr(weighted, name), getattr(again, name)), name
    assert torch.allclose(
        weighted.interval(0.5), torch.from_numpy(np.quantile(again.probs, [0.25, 0.75], axis=0, method="inverted_cdf"))
    )


def test_the_same_prevalence_changes_nothing_and_a_missing_class_is_never_predicted() -> None:
    draws = PredictiveDraws(torch.from_numpy(RNG.dirichlet(np.ones(3), (4, 6))).float())
    prior = [0.5, 0.3, 0.2]
    same = with_prevalence(draws, prior, prior)
    assert torch.allclose(same.mean, draws.mean) and torch.allclose(same.probs, draws.probs)
    without = with_prevalence(draws, [0.6, 0.4, 0.0], prior)
    assert float(without.mean[:, 2].abs().max()) == 0 and bool(torch.isfinite(without.mutual_information).all())
    sure = PredictiveDraws(torch.tensor([[[0.0, 0.0, 1.0]]]))  # a class that is ruled out, and certain
    assert with_prevalence(sure, [0.5, 0.5, 0.0], prior).mean.isfinite().all()


@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_real_data_under_made_shifts(strength: float) -> None:
    """Accuracy and calibration before, with the prevalence given, and with the prevalence estimated."""
    probs, labels = real_predictions()
    prior, found = np.bincount(labels) / len(labels), []
    for shift in range(12):
        rng = np.random.default_rng(shift)
        shares = rng.dirichlet(np.full(10, strength))
        new, truth = shifted(shares, 600, rng)
        known = rng.permutation(len(labels))[:400]
        estimate = estimate_prevalence(new, probs[known], labels[known], replicates=50)
        draws, y = PredictiveDraws(torch.from_numpy(new)[None]), torch.from_numpy(truth)
        ways = draws, with_prevalence(draws, shares, prior), with_prevalence(draws, estimate.shares, prior)
        found.append([[classification_metrics(way.mean, y)[name] for name in ("accuracy", "nll")] for way in ways])
    before, given, estimated = np.mean(found, axis=0)
    assert given[0] > before[0] + 0.02 and given[1] < before[1] - 0.05, found
    assert estimated[0] > before[0] + 0.01 and estimated[1] < before[1], found


def test_the_estimate_is_exact_where_the_shares_are() -> None:
    """Validation and new images in exact proportions: A pi' = m has one solution."""
    confusion, shares = np.array([[0.8, 0.1, 0.0], [0.1, 0.7, 0.2], [0.1, 0.2, 0.8]]), np.array([0.1, 0.3, 0.6])
    labels = np.repeat([0, 1, 2], 100)
    guesses = np.concatenate([np.repeat([0, 1, 2], (100 * column).round().astype(int)) for column in confusion.T])
    new = np.repeat([0, 1, 2], (1000 * confusion @ shares).round().astype(int))
    sure = 0.7 * np.eye(3) + 0.1
    found = estimate_prevalence(sure[new], sure[guesses], labels)
    assert np.allclose(found.shares, shares, atol=0.02)
    assert np.allclose(_solve(confusion, confusion @ shares), shares, atol=1e-9)
    assert np.allclose(_solve(confusion, confusion @ [1.2, -0.2, 0.0]), [1, 0, 0], atol=0.1)  # on the simplex
    assert ((found.low < shares) & (shares < found.high)).all()
    assert found.singular == pytest.approx(np.linalg.svd(confusion, compute_uv=False)[-1])
    again = estimate_prevalence(sure[new], sure[guesses], labels)
    assert np.array_equal(found.low, again.low)  # the same seed
    few = estimate_prevalence(sure[new[::20]], sure[guesses[::10]], labels[::10])
    assert (few.high - few.low).mean() > 2 * (found.high - found.low).mean()


@pytest.mark.parametrize("size", [100, 400])
def test_the_intervals_hold_as_often_as_they_say(size: int) -> None:
    probs, labels = real_predictions()
    held = []
    for trial in range(60):
        rng = np.random.default_rng(trial)
        shares = rng.dirichlet(np.ones(10))
        known = rng.permutation(len(labels))[:size]
        if len(set(labels[known])) == 10:
            new, _ = shifted(shares, 300, rng)
            found = estimate_prevalence(new, probs[known], labels[known], replicates=200)
            held.append((found.low <= shares) & (shares <= found.high))
    assert 0.91 < np.mean(held) < 0.995, np.mean(held)


def test_classes_that_do_not_occur_are_in_their_intervals_and_keep_a_little() -> None:
    probs, labels = real_predictions()
    held = []
    for trial in range(30):
        rng = np.random.default_rng(trial)
        shares = np.eye(10)[trial % 10]
        known = rng.permutation(len(labels))[:300]
        found = estimate_prevalence(shifted(shares, 300, rng)[0], probs[known], labels[known], replicates=200)
        held.append((found.low <= shares) & (shares <= found.high))
        assert (found.shares > 0).all() and found.shares.sum() == pytest.approx(1)
        assert found.shares[trial % 10] > 0.8
    assert np.mean(held) > 0.91, np.mean(held)


def test_warnings(caplog: pytest.LogCaptureFixture) -> None:
    probs, labels = real_predictions()
    with caplog.at_level(logging.WARNING):
        estimate_prevalence(probs[:50], probs[:60], labels[:60], replicates=5)
    assert "fewer than 10 validation images" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        estimate_prevalence(probs[:50], probs[:60], labels[:60], replicates=5, quiet=True)
    assert not caplog.text
    rough, y = np.full((100, 2), 0.5), np.array([0, 1] * 50)
    rough[::3] += [0.1, -0.1]
    rough[1::3] -= [0.1, -0.1]
    with caplog.at_level(logging.WARNING):
        estimate_prevalence(rough, rough, y, replicates=5)
    assert "nearly singular" in caplog.text


def test_what_cannot_be_is_refused() -> None:
    probs, labels = real_predictions()
    draws, even = PredictiveDraws(torch.from_numpy(probs)[None]), np.full(10, 0.1)
    for shares, words in (([0.5, 0.5], "each of 10"), (even * 2, "sum to 1, not 2"), (even - 0.2, "at least 0"),
                          (even * np.nan, "at least 0")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            with_prevalence(draws, shares, even)
    with pytest.raises(UserError, match="above 0"):
        with_prevalence(draws, even, np.eye(10)[0])
    with pytest.raises(UserError, match="corrected for a prevalence already"):
        with_prevalence(with_prevalence(draws, even, even), even, even)
    with pytest.raises(UserError, match="no image of class"):
        estimate_prevalence(probs, probs[labels > 0], labels[labels > 0])
    with pytest.raises(UserError, match="no images"):
        estimate_prevalence(probs[:0], probs, labels)
    with pytest.raises(UserError, match="mass"):
        estimate_prevalence(probs, probs, labels, mass=1.0)
    with pytest.raises(UserError, match="replicates"):
        estimate_prevalence(probs, probs, labels, replicates=0)
