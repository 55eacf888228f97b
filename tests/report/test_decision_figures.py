"""The page's part about decisions, with and without a validation part."""

import numpy as np
import pytest
import torch
from made import make_tree, real_predictions
from matplotlib.figure import Figure

from pyro_isingvit.predictive.validation import GROUP, Validation
from pyro_isingvit.report.decision_figures import risk_against_coverage, set_sizes
from pyro_isingvit.report.decisions import _limits, decision_sections
from pyro_isingvit.report.section import Section


def sections(count: int) -> dict[str, Section]:
    """Of a run with so many validation images, on real predictions."""
    probs, labels = real_predictions()
    tree = make_tree([str(c) for c in range(10)])
    del tree[GROUP]
    if count:
        val = Validation(torch.from_numpy(probs[:count]), torch.from_numpy(labels[:count]), 5, 0)
        tree[GROUP] = val.to_group(tuple(str(c) for c in range(10)))
    return {each.name: each for each in decision_sections(tree, probs[700:], labels[700:])}


@pytest.mark.parametrize("narrow", [False, True])
def test_with_a_validation_part(narrow: bool) -> None:
    found = sections(700)
    for section in found.values():
        assert section.draw is not None
        assert isinstance(section.draw(narrow=narrow), Figure)
    assert "Red marks: thresholds from the 700 validation images" in found["risk"].caption
    assert "% of the sets for 90% hold the true class" in found["sets"].caption
    axes = found["risk"].draw(narrow=narrow).axes[0]  # type: ignore[misc]
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any(text.startswith("limit 5.0%") for text in told)


def test_without_one_and_with_a_small_one() -> None:
    found = sections(0)
    assert found["sets"].draw is None and "no limit can be promised" in found["risk"].caption
    small = sections(15)
    assert "for 90%" in small["sets"].caption and "for 95%" not in small["sets"].caption
    assert sections(5)["sets"].draw is None


def test_large_sets_share_a_bar() -> None:
    figure = set_sizes({0.9: np.array([1, 2, 9, 30]), 0.95: np.array([1, 1, 7, 30])})
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "5 or more"
    curve = risk_against_coverage(np.array([0.5, 1.0]), np.array([0.0, 0.0]), [])  # nothing is wrong
    assert curve.axes[0].get_ylim()[1] > 0


def test_limits_leave_something_to_a_human_and_four_are_shown() -> None:
    rng, n = np.random.default_rng(0), 20_000
    sure = rng.uniform(0.5, 1, n)
    probs, labels = np.stack([sure, 1 - sure], 1), (rng.random(n) > sure**0.2).astype(int)
    val = Validation(torch.tensor(probs[:10_000]), torch.tensor(labels[:10_000]), 1, 0)
    found = _limits(val, probs[10_000:], labels[10_000:])
    shares = [share for _, share, _ in found]
    assert {0.02, 0.05} <= {limit for limit, _, _ in found} <= {0.01, 0.02, 0.05}  # .1 lets all stand
    assert shares == sorted(shares) and shares[-1] < 1
    harder = (rng.random(n) < 4 * (1 - sure) ** 3).astype(int)
    val = Validation(torch.tensor(probs[:10_000]), torch.tensor(harder[:10_000]), 1, 0)
    assert [limit for limit, _, _ in _limits(val, probs[10_000:], harder[10_000:])] == [0.01, 0.02, 0.05, 0.1]
    certain = np.stack([np.linspace(0.99, 1, 1000), np.linspace(0.01, 0, 1000)], 1)
    val = Validation(torch.tensor(certain), torch.zeros(1000, dtype=torch.long), 1, 0)
    assert _limits(val, certain, np.zeros(1000, int)) == []
