"""Metrics of each class and their intervals: against scikit-learn, loops and what is known of a bootstrap."""

import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    recall_score,
    roc_auc_score,
)

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.by_class import _by_choice, class_metrics, weighted_ranking
from pyro_isingvit.predictive.intervals import overall_intervals
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.predictive.sums import metrics_of, score_sums, together

NAMES = ("a", "b", "c", "d")


def made(count: int = 400, classes: int = 4, skill: float = 1.5, seed: int = 0):
    """Predictions of some skill for classes of different sizes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) * (classes * (classes + 1) // 2) // count  # 0, 1, 1, 2, 2, 2, ... in equal parts
    labels = np.repeat(np.arange(classes), np.arange(1, classes + 1))[labels]
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += skill
    return torch.from_numpy(logits).softmax(-1), torch.from_numpy(labels)


def test_values_are_those_of_scikit_learn() -> None:
    probs, labels = made()
    found = class_metrics(probs, labels, NAMES)
    y, guess = labels.numpy(), probs.argmax(-1).numpy()
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, guess))
    assert found["auroc_macro"] == pytest.approx(roc_auc_score(y, probs.numpy(), multi_class="ovr"))
    assert found["average_precision_macro"] == pytest.approx(average_precision_score(np.eye(4)[y], probs.numpy()))
    recalls = recall_score(y, guess, average=None)
    assert [row["sensitivity"] for row in found["by_class"]] == pytest.approx(recalls.tolist())
    for c, row in enumerate(found["by_class"]):
        assert row["specificity"] == pytest.approx(recall_score(y != c, guess != c))
        assert row["class"] == NAMES[c] and row["images"] == int((y == c).sum())
    assert found["worst_class"] == NAMES[int(recalls.argmin())]
    assert found["worst_class_sensitivity"] == pytest.approx(recalls.min())
    assert "sensitivity" not in found  # for two classes alone
    json.dumps(found, allow_nan=False)


def test_two_classes_have_the_numbers_of_the_second() -> None:
    probs, labels = made(classes=2)
    found = class_metrics(probs, labels, ("no", "yes"))
    second = found["by_class"][1]
    for name in ("sensitivity", "specificity", "average_precision"):
        assert found[name] == second[name] and found["intervals"][name] == second[f"{name}_interval"]
    assert found["specificity"] == found["by_class"][0]["sensitivity"]
    assert found["auroc_macro"] == pytest.approx(second["auroc"])
    ends = [row["auroc_interval"] for row in found["by_class"]]
    assert ends[0] == pytest.approx(ends[1], abs=1e-9)  # one ranking, read from both of its ends


@pytest.mark.parametrize(("classes", "size"), [(4, 7), (2, 400), (4, 1)])
def test_sums_over_parts_give_what_all_images_give(classes: int, size: int) -> None:
    probs, labels = made(400 if size > 1 else 60, classes)
    names, sums = NAMES[:classes], None
    for start in range(0, len(labels), size):
        part = score_sums(probs[start : start + size], labels[start : start + size])
        sums = together(sums, json.loads(json.dumps(part)))
    assert sums is not None
    found, whole = metrics_of(sums, names), class_metrics(probs, labels, names)
    overall = classification_metrics(probs, labels)
    for name in ("accuracy", "nll", "ece"):
        assert found[name] == pytest.approx(overall[name], abs=1e-6), name
    for name in ("balanced_accuracy", "worst_class", "worst_class_sensitivity"):
        assert found[name] == whole[name]
        assert found["intervals"].get(name) == whole["intervals"].get(name)
    for row, other in zip(found["by_class"], whole["by_class"], strict=True):
        assert row == {name: other[name] for name in row} and "auroc" not in row
    if classes == 2:
        assert found["specificity"] == whole["specificity"]


def test_sums_of_perfect_and_certain_predictions() -> None:
    labels = torch.tensor([0, 1, 1])
    found = metrics_of(score_sums(torch.eye(3)[labels], labels), NAMES[:3])  # the third class has no image
    assert (found["accuracy"], found["nll"], found["ece"], found["balanced_accuracy"]) == (1.0, 0.0, 0.0, 1.0)
    assert [row["images"] for row in found["by_class"]] == [1, 2, 0] and found["by_class"][2]["sensitivity"] is None


@pytest.mark.parametrize("digits", [1, 2, 9])
def test_weighted_rankings_are_those_of_scikit_learn(digits: int) -> None:
    """With many ties, with some, and without."""
    rng = np.random.default_rng(digits)
    scores = np.round(rng.random(120), digits)
    truth, weights = rng.random(120) < scores, rng.integers(0, 4, (120, 30)).astype(np.float32)
    auroc, precision = weighted_ranking(scores, truth, weights)
    for r in range(30):
        assert auroc[r] == pytest.approx(roc_auc_score(truth, scores, sample_weight=weights[:, r]), abs=1e-6)
        expected = average_precision_score(truth, scores, sample_weight=weights[:, r])
        assert precision[r] == pytest.approx(expected, abs=1e-6)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """AUROC, balanced accuracy and sensitivity of samples from a known distribution with fixed classes."""
    whole = class_metrics(*made(20_000, 2, seed=99), ("no", "yes"))
    names = ("auroc_macro", "balanced_accuracy", "sensitivity", "average_precision")
    inside = dict.fromkeys(names, 0)
    for seed in range(150):
        ends = class_metrics(*made(150, 2, seed=seed), ("no", "yes"))["intervals"]
        for name in names:
            inside[name] += ends[name][0] <= whole[name] <= ends[name][1]
    for name, count in inside.items():
        least = 0.84 if name == "average_precision" else 0.88  # in 400 samples: 91% and 93 to 95%, of 95%
        assert count / 150 > least, (name, count)
    widths = [np.diff(class_metrics(*made(n, 2), ("no", "yes"))["intervals"]["auroc_macro"])[0] for n in (200, 3200)]
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=0.35)  # a sixteenth of the images


def test_no_error_seen_is_not_no_error() -> None:
    probs = torch.eye(2)[[0] * 30 + [1] * 10] * 0.8 + 0.1
    found = class_metrics(probs, torch.tensor([0] * 30 + [1] * 10), ("no", "yes"))
    assert found["sensitivity"] == 1.0
    low, high = found["intervals"]["sensitivity"]
    exact = binomtest(10, 10).proportion_ci(0.95, "exact")
    assert (low, high) == (pytest.approx(exact.low), 1.0) and 0.6 < low < 0.7
    assert found["intervals"]["specificity"][0] == pytest.approx(binomtest(30, 30).proportion_ci(0.95, "exact").low)
    assert found["intervals"]["worst_class_sensitivity"][0] < 0.9


def test_classes_that_do_not_occur_are_left_out() -> None:
    probs, labels = made(60, 4)
    labels = labels.clamp(max=1)
    found = class_metrics(probs, labels, NAMES)
    assert found["by_class"][3]["sensitivity"] is None and found["by_class"][3]["auroc"] is None
    assert found["by_class"][3]["sensitivity_interval"] is None and found["by_class"][3]["images"] == 0
    assert found["balanced_accuracy"] == pytest.approx(np.mean([r["sensitivity"] for r in found["by_class"][:2]]))
    assert found["worst_class"] in ("a", "b")
    alone = class_metrics(probs, torch.zeros(60, dtype=torch.long), NAMES)
    assert alone["auroc_macro"] is None and alone["intervals"]["auroc_macro"] is None
    assert alone["balanced_accuracy"] is not None and alone["by_class"][0]["specificity"] is None
    json.dumps([found, alone], allow_nan=False)


def test_it_is_fast_and_the_same_twice(caplog) -> None:
    probs, labels = made(10_000, 10)
    first = class_metrics(probs, labels, tuple("abcdefghij"))
    start = time.process_time()
    assert class_metrics(probs, labels, tuple("abcdefghij")) == first
    assert time.process_time() - start < 4.0  # 0.9 s where this was written
    many, of = made(40_000, 60)
    with caplog.at_level("INFO"):
        found = class_metrics(many, of, tuple(map(str, range(60))))
    assert found["intervals"]["auroc_macro"] is None and found["intervals"]["balanced_accuracy"]
    assert "takes long" in caplog.text


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(UserError, match="labels for all images"):
        class_metrics(torch.full((2, 2), 0.5), torch.tensor([0]), ("a", "b"))


def test_what_no_resample_changes_has_no_interval() -> None:
    """All images right: how far balanced accuracy lies from 1 cannot be told; a single image tells nothing."""
    labels = torch.arange(3).repeat(10)
    found = class_metrics(torch.eye(3)[labels], labels, ("a", "b", "c"))
    assert found["balanced_accuracy"] == found["auroc_macro"] == 1.0
    for name in ("balanced_accuracy", "auroc_macro", "average_precision_macro"):
        assert found["intervals"][name] is None
    assert found["intervals"]["worst_class_sensitivity"][0] < 0.75
    assert set(overall_intervals(torch.tensor([[0.7, 0.3]]), torch.tensor([0]))) == {"accuracy"}


def test_memory_is_that_of_a_few_tables(monkeypatch) -> None:
    """All resampled tables of 200 classes have 320 MB; the numbers are those of the whole tables."""
    rng, classes = np.random.default_rng(0), 200
    table = rng.multinomial(5, np.full(classes, 1 / classes), size=classes).astype(float)
    table[7] = 0  # a class without images
    tracemalloc.start()
    found = _by_choice(table)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 30e6
    made, count = np.random.default_rng(0), len(found["sensitivity"][1])
    drawn = [made.multinomial(5, row / 5, count) if row.any() else np.zeros((count, classes)) for row in table]
    tables = np.stack(drawn, 1)
    hits = tables.diagonal(axis1=1, axis2=2)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found["sensitivity"][1], hits / table.sum(1))
    rest = table.sum() - table.sum(1)
    np.testing.assert_allclose(found["specificity"][1], 1 - (tables.sum(1) - hits) / rest, rtol=1e-12)
