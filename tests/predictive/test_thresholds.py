"""Thresholds of two classes: each rule does what its name says, on every ranking."""

import numpy as np
import pytest

from pyro_isingvit.predictive.thresholds import WANTED, choose_thresholds, judge_threshold


@pytest.mark.parametrize("seed", range(6))
def test_every_rule_against_all_thresholds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(80) < 0.3
    scores = np.round(np.clip(0.3 * truth + rng.random(80) * 0.7, 0, 1), 2 if seed % 2 else 9)  # with and without ties
    rules = choose_thresholds(scores, truth)
    rows = {rule: judge_threshold(rule, value, scores, truth) for rule, value in rules.items()}
    every = [judge_threshold("", value, scores, truth) for value in [*np.unique(scores), 2.0]]
    assert rules["0.5"] == 0.5
    youden = rows["Youden"]
    assert youden.sensitivity + youden.specificity == pytest.approx(max(r.sensitivity + r.specificity for r in every))
    enough = rows[f"sensitivity ≥ {WANTED:g}"]
    assert enough.sensitivity >= WANTED
    assert enough.value == max(row.value for row in every if row.sensitivity >= WANTED)
    enough = rows[f"specificity ≥ {WANTED:g}"]
    assert enough.specificity >= WANTED
    found = [row for row in every if row.specificity >= WANTED]
    assert enough.sensitivity == max(row.sensitivity for row in found)  # the lowest threshold finds the most


def test_a_row_by_hand() -> None:
    scores, truth = np.array([0.9, 0.8, 0.7, 0.2, 0.1]), np.array([True, False, True, True, False])
    row = judge_threshold("rule", 0.7, scores, truth)
    assert (row.sensitivity, row.specificity, row.ppv, row.npv, row.positive) == (2 / 3, 1 / 2, 2 / 3, 1 / 2, 3 / 5)
    nobody = judge_threshold("rule", 2.0, scores, truth)
    assert nobody.ppv is None and nobody.npv == 2 / 5 and nobody.positive == 0.0
    assert judge_threshold("rule", 0.5, scores, truth | True).specificity is None
