"""Verdicts of the report: known predictions get the grade that the rule says."""

import math

import numpy as np
import pytest

from pyro_isingvit.report.verdicts import verdicts


def made(confidence: float, accuracy: float, count: int = 2000, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of one confidence, right as often as asked."""
    labels = np.arange(count) % classes
    guess = np.where(np.arange(count) < round(count * accuracy), labels, (labels + 1) % classes)
    probs = np.full((count, classes), (1 - confidence) / (classes - 1))
    probs[np.arange(count), guess] = confidence
    return probs, labels


def grades(probs: np.ndarray, labels: np.ndarray) -> dict[str, str]:
    return {verdict.name: verdict.grade for verdict in verdicts(probs, labels)}


@pytest.mark.parametrize(("accuracy", "grade"), [(0.97, "good"), (0.8, "fair"), (0.4, "weak")])
def test_accuracy_is_held_against_the_most_frequent_class(accuracy: float, grade: str) -> None:
    probs, labels = made(0.9, accuracy, 4000)
    assert grades(probs, labels)["Accuracy"] == grade
    skewed = np.zeros(1000, dtype=int)
    skewed[:50] = 1  # always saying 0 is right for 95%: no merit
    assert grades(np.tile([0.9, 0.1], (1000, 1)), skewed)["Accuracy"] == "weak"


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_test_part_of_one_class_says_nothing_of_accuracy(right: float) -> None:
    assert grades(np.tile([right, 1 - right], (60, 1)), np.zeros(60, dtype=int))["Accuracy"] == "unclear"


@pytest.mark.parametrize(("confidence", "grade"), [(0.8, "good"), (0.82, "fair"), (0.99, "weak")])
def test_calibration_is_held_against_the_scatter_of_the_labels(confidence: float, grade: str) -> None:
    assert grades(*made(confidence, 0.8, 4000))["Calibration"] == grade


def test_few_images_excuse_a_gap_that_many_do_not() -> None:
    few, many = (grades(*made(0.84, 0.8, count))["Calibration"] for count in (100, 20_000))
    assert few == "good" and many != "good"


def test_nll_is_held_against_equal_confidence() -> None:
    generator = np.random.default_rng(0)
    easy = generator.random(4000) < 0.5
    labels = generator.integers(0, 4, 4000)
    guess = np.where(easy | (generator.random(4000) < 0.5), labels, (labels + 1) % 4)
    informative = np.where(easy, 0.98, 0.5)
    for confidence, grade in ((informative, "good"), (np.full(4000, 0.76), "fair"), (np.full(4000, 0.9999), "weak")):
        probs = np.repeat(((1 - confidence) / 3)[:, None], 4, 1)
        probs[np.arange(4000), guess] = confidence
        assert grades(probs, labels)["NLL"] == grade


def test_doubt_needs_errors_and_finds_them() -> None:
    probs, labels = made(0.9, 1.0)
    assert grades(probs, labels)["Doubt of errors"] == "unclear"
    generator = np.random.default_rng(0)
    guess, doubtful = labels.copy(), np.arange(2000) % 10 == 0
    guess[doubtful] = (labels[doubtful] + 1) % 4
    for confidence, grade in ((np.where(doubtful, 0.4, 0.99), "good"), (generator.uniform(0.5, 0.99, 2000), "weak")):
        probs = np.repeat(((1 - confidence) / 3)[:, None], 4, 1)
        probs[np.arange(2000), guess] = confidence
        assert grades(probs, labels)["Doubt of errors"] == grade


def test_texts_hold_the_numbers() -> None:
    accuracy, nll, calibration, _ = verdicts(*made(0.9, 0.9, 4000))
    assert "3600 of 4000" in accuracy.why and "25.0%" in accuracy.why and f"{math.log(4):.2f}" in nll.why
    assert "ECE 0.0%" in calibration.why
