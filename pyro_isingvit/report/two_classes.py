"""What the page of a run with two classes shows: ROC, precision-recall, and a table of thresholds.

Shapes: B images.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from pyro_isingvit.predictive.by_class import class_metrics
from pyro_isingvit.predictive.thresholds import Threshold, choose_thresholds, judge_threshold
from pyro_isingvit.report.style import BLUE, GREY, NARROW, RED, WIDE, label, percent, styled

CAPTION = (
    "Every threshold of the probability of the second class is a point of both curves. Left: the share of its images "
    "that are found against the share of the other images that are called so too; the area is the chance that an image "
    "of the class gets a higher probability than another. Right: how many of the images that are called so are; it "
    "depends on how frequent the class is, and the dashed line is what chance gives. Intervals (95 %) are those of a "
    "bootstrap that keeps the number of images of each class."
)


def has_curves(labels: np.ndarray, classes: list[str]) -> bool:
    """Whether there are two classes, and images of both."""
    return len(classes) == 2 and 0 < int((labels == 1).sum()) < len(labels)


@styled
def ranking_curves(
    probs: np.ndarray, labels: np.ndarray, classes: list[str], thresholds: list[Threshold], narrow: bool = False
) -> Figure:
    """ROC and precision-recall of the second class, with their areas, intervals and what says nothing.

    Args:
        probs: (B, 2) mean class probabilities.
        labels: (B,) class numbers.
        classes: names.
        thresholds: marked on the curves.
        narrow: lay out for a phone.
    """
    figure = Figure((NARROW, 7.4) if narrow else (WIDE, 5.0), layout="constrained")
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    truth, name = labels == 1, label(classes[1], 1)
    found = class_metrics(torch.from_numpy(probs), torch.from_numpy(labels), (classes[0], classes[1]))["by_class"][1]
    false, hits, _ = roc_curve(truth, probs[:, 1])
    left.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="chance, AUROC 0.5")
    left.plot(false, hits, color=BLUE, linewidth=1.8, label=f"AUROC {_with_interval(found, 'auroc')}")
    left.set(xlabel="1 - specificity", ylabel=f"sensitivity ({name} found)", title="ROC")
    precision, recall, _ = precision_recall_curve(truth, probs[:, 1])
    share = float(truth.mean())
    right.axhline(share, color=GREY, linestyle="--", linewidth=1, label=f"chance, prevalence {share:.2f}")
    text = f"average precision {_with_interval(found, 'average_precision')}"
    right.step(recall, precision, color=BLUE, linewidth=1.8, where="post", label=text)
    right.set(xlabel=f"recall, that is sensitivity ({name} found)", ylabel="precision, that is PPV",
              title="precision and recall")  # fmt: skip
    for marker, point in zip("osv^", thresholds, strict=False):
        if point.sensitivity is not None and point.specificity is not None:
            _mark(left, 1 - point.specificity, point.sensitivity, marker, point.rule)
            if point.ppv is not None:
                _mark(right, point.sensitivity, point.ppv, marker, point.rule)
    for ax, corner in ((left, "lower right"), (right, "lower left")):
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
        ax.grid(color="#E3E3E3", linewidth=0.6)
        ax.legend(loc=corner, frameon=True, framealpha=0.9, edgecolor="none")
        percent(ax.xaxis)
        percent(ax.yaxis)
    return figure


def _mark(ax: Axes, x: float, y: float, marker: str, text: str) -> None:
    ax.plot([x], [y], marker, color=RED, markersize=6, fillstyle="none", markeredgewidth=1.4, linestyle="none",
            label=f"threshold: {text}")  # fmt: skip


def _with_interval(found: dict[str, Any], name: str) -> str:
    ends = found[f"{name}_interval"]
    return f"{found[name]:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})")


def threshold_table(
    summary: dict[str, np.ndarray], validation: dict[str, np.ndarray], classes: list[str]
) -> tuple[list[Threshold], str]:
    """Rows of the table and the sentences below it.

    Thresholds are chosen on the validation part where the run has its predictions with images of both classes, else on
    the test part itself; they are judged on the test part.

    Args:
        summary: ``prob_mean`` (B, 2) and ``y`` (B,) of the test part.
        validation: the same of the validation part; empty where the run does not have it.
        classes: names.
    """
    scores, truth = summary["prob_mean"][:, 1], summary["y"] == 1
    held_out = "prob_mean" in validation and has_curves(validation["y"], classes)
    by = validation if held_out else summary
    chosen_by, positive = by["prob_mean"][:, 1], by["y"] == 1
    rows = [
        judge_threshold(rule, value, scores, truth) for rule, value in choose_thresholds(chosen_by, positive).items()
    ]
    if held_out:
        told = (
            f"The thresholds were chosen on the {len(positive)} images of the validation part, {int(positive.sum())} "
            f"of them {classes[1]}, and judged on the test part, which took no part in the choice. With few images of "
            "a class, a wanted sensitivity or specificity is met only roughly on others."
        )
    else:
        told = (
            "The thresholds but 0.5 were chosen on the test part itself, because the run keeps no validation "
            "predictions with both classes: what the table says of them is optimistic. Choose a threshold on other "
            "images than those that judge it."
        )
    told += (
        f" An image is called {classes[1]} if its probability is at least the threshold. PPV and NPV hold where "
        f"{float(truth.mean()):.1%} of the images are {classes[1]}, as in the test part; other shares of the classes "
        "change them, and leave sensitivity and specificity as they are."
    )
    return rows, told


def shown_threshold(row: Threshold) -> list[str]:
    """A row of the table as text: rule, threshold, sensitivity, specificity, PPV, NPV, share called positive."""
    shares = (row.sensitivity, row.specificity, row.ppv, row.npv, row.positive)
    value = "above all" if row.value > 1 else f"{row.value:.3f}"
    return [row.rule, value, *("–" if share is None else f"{100 * share:.1f} %" for share in shares)]
