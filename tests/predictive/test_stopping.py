"""When to stop drawing: the Monte Carlo error by hand, and how often its bound holds on made posteriors."""

import pytest
import torch
from scipy.stats import chi2, t

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.stopping import Stopping, monte_carlo_error


def test_the_error_by_hand() -> None:
    values = torch.tensor([0.2, 0.4, 0.1, 0.3])
    probs = torch.stack([values, 1 - values], 1).unsqueeze(1)  # (4, 1, 2)
    raised = (3 / chi2.ppf(0.1, 3)) ** 0.5
    odds = values.logit()
    made = (odds.mean() + raised * odds.std() * torch.randn(1_000_000)).sigmoid().std()
    spread = max(raised * float(values.std()), float(made))
    by_hand = t.ppf(1 - 0.1 / 4, 3) * spread / 2
    assert float(monte_carlo_error(probs, 0.9)) == pytest.approx(by_hand, rel=5e-3)
    whole = float(monte_carlo_error(probs, 0.9))
    assert float(monte_carlo_error(probs, 0.9, networks=16)) == pytest.approx(whole * (1 - 4 / 16) ** 0.5, rel=1e-5)
    assert float(monte_carlo_error(probs, networks=4)) == 0  # all that there are
    assert float(monte_carlo_error(probs[:1])) == torch.inf
    assert float(monte_carlo_error(probs[:1], networks=1)) == 0


def test_log_odds_show_what_no_draw_has_met() -> None:
    """16 draws that all say nearly 1, some by far and some hardly: the 17th may say something else."""
    odds = torch.linspace(3.0, 17.0, 16)
    torn, sure = torch.stack([odds.sigmoid(), odds.neg().sigmoid()], 1), torch.full((16,), 10.0)
    certain = torch.stack([sure.sigmoid(), sure.neg().sigmoid()], 1)
    errors = monte_carlo_error(torch.stack([torn, certain], 1))
    assert errors[0] > 0.1 and errors[1] < 1e-6
    assert torn.std(0).max() < 0.02  # the draws themselves hardly differ


def test_probabilities_of_0_and_1_are_no_trouble() -> None:
    probs = torch.zeros(20, 2, 3)
    probs[:, 0, 0] = 1.0  # always the same
    probs[::2, 1, 0], probs[1::2, 1, 1] = 1.0, 1.0
    errors = monte_carlo_error(probs)
    assert errors[0] == 0 and 0.2 < errors[1] < 1


def test_the_worst_class_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(50, 6, 5, generator=generator).mul(torch.tensor([0.1, 1, 2, 3, 4])).softmax(-1)
    pairs = [torch.stack([probs[..., c], 1 - probs[..., c]], -1) for c in range(5)]
    alone = [monte_carlo_error(pair, 1 - 0.05 * 2 / 5) for pair in pairs]  # as much for each class: Bonferroni
    torch.testing.assert_close(monte_carlo_error(probs), torch.stack(alone).amax(0), rtol=1e-3, atol=1e-6)


def test_looks_grow_and_end_at_the_most() -> None:
    looks = Stopping(most=1000).looks(1000)
    assert looks[0] == 16 and looks[-1] == 1000 and looks == sorted(set(looks)) and len(looks) < 25
    assert Stopping().looks(5) == [5] and Stopping().looks(16) == [16] and Stopping().looks(17) == [16, 17]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bound": 0.0}, "mc_error"), ({"bound": 1.0}, "mc_error"), ({"most": 15}, "max_samples"),
        ({"certainty": 1.0}, "certainty"), ({"least": 3}, "least"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(wrong: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Stopping(**wrong)
    with pytest.raises(UserError, match="certainty"):
        monte_carlo_error(torch.rand(3, 2, 2), 1.0)


def posterior(count: int, images: int, classes: int, generator: torch.Generator) -> torch.Tensor:
    """Draws (count, images, classes) of a Bayesian linear classifier: sure and torn images, skewed probabilities."""
    made = torch.Generator().manual_seed(5)
    features = torch.randn(images, 6, generator=made) * torch.logspace(-1.5, 0.7, images)[:, None]
    mean = torch.randn(6, classes, generator=made)
    weights = mean + 0.5 * torch.randn(count, 6, classes, generator=generator)
    return (features @ weights).softmax(-1)


def outcomes(classes: int, stopping: Stopping, rule, seeds: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether all probabilities were within the bound, and the draws taken, each (seeds, images that were settled)."""
    images = 40
    truth = posterior(100_000, images, classes, torch.Generator().manual_seed(99)).mean(0)
    held, taken = [], []
    for seed in range(seeds):
        draws = posterior(stopping.most, images, classes, torch.Generator().manual_seed(seed))
        left, count, mean = torch.ones(images, dtype=torch.bool), torch.zeros(images), torch.zeros(images, classes)
        for look in stopping.looks(stopping.most):
            rows = left.nonzero()[:, 0]
            if not len(rows):
                break
            ends = rows[rule(draws[:look, rows]) <= stopping.bound]
            mean[ends], count[ends], left[ends] = draws[:look, ends].mean(0), look, False
        held.append(((mean - truth).abs().amax(-1) <= stopping.bound)[~left])
        taken.append(count[~left])
    return torch.cat(held).float(), torch.cat(taken)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("bound", [0.02, 0.05])
def test_the_bound_holds_as_often_as_it_says(classes: int, bound: float) -> None:
    stopping = Stopping(bound, most=3000)
    held, taken = outcomes(classes, stopping, monte_carlo_error)
    assert len(held) > 1600 and held.mean() >= 0.95
    early = taken == stopping.least  # who stops at the first look is not wrong more often
    assert early.sum() > 150 and held[early].mean() >= 0.95


def test_one_standard_error_would_not_do() -> None:
    """The test above can fail: a common rule, s / sqrt(n) below the bound, does not keep it."""
    held, _ = outcomes(10, Stopping(0.02, most=3000), lambda draws: draws.std(0).amax(-1) / len(draws) ** 0.5)
    assert held.mean() < 0.9


def test_no_probability_can_be_off_by_more_than_1() -> None:
    probs = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]])
    assert monte_carlo_error(probs).tolist() == [1.0]
