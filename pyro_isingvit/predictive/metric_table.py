"""The metrics of a run in words: title, value with its interval, and what it says; and those of each class."""

from typing import Any

# metrics.json: name -> title, how to write it, what it says.
EXPLANATIONS: dict[str, tuple[str, str, str]] = {
    "accuracy": ("Accuracy", "%", "Share of the test images whose most probable class is the true one."),
    "balanced_accuracy": (
        "Balanced accuracy",
        "%",
        "Mean over the classes of the share that is found: each class counts the same, however many images it has.",
    ),
    "auroc_macro": (
        "AUROC, macro",
        "4",
        "How well the probability of a class tells its images from all others, averaged over the classes.",
    ),
    "average_precision_macro": (
        "Average precision, macro",
        "4",
        "Area under precision against recall, one class against the rest, averaged over the classes.",
    ),
    "sensitivity": ("Sensitivity", "%", "Of the images of the second class, the share that is found."),
    "specificity": ("Specificity", "%", "Of the images of the first class, the share that is found."),
    "average_precision": ("Average precision", "4", "The same area for the second class alone."),
    "worst_class_sensitivity": (
        "Worst class",
        "%",
        "Share that is found of the class of which the smallest share is.",
    ),
    "f1_macro": ("F1, macro", "%", "Harmonic mean of precision and recall, averaged over the classes."),
    "precision_macro": ("Precision, macro", "%", "Of the images given a class, the share that has it."),
    "recall_macro": ("Recall, macro", "%", "Of the images of a class, the share that is found."),
    "fpr_macro": ("False positive rate, macro", "%", "Of the images without a class, the share given it."),
    "nll": (
        "NLL",
        "4",
        "Negative log-likelihood, nats per image; punishes confident errors. Less is better.",
    ),
    "brier": ("Brier score", "4", "Squared distance of probabilities and truth, 0 to 2. Less is better."),
    "ece": (
        "ECE",
        "%",
        "Expected calibration error, 15 bins: the gap of confidence and accuracy. Less is better.",
    ),
    "ece_adaptive": ("Adaptive ECE", "%", "The same with 15 bins of equally many images."),
    "aurc": (
        "AURC",
        "4",
        "Area under the risk-coverage curve: mean error rate among the most confident. Less is better.",
    ),
    "auroc_right_wrong": (
        "AUROC, right or wrong",
        "4",
        "How well the largest probability tells right from wrong answers.",
    ),
    "auroc_wrong_entropy": ("AUROC of errors, entropy", "4", "The same by the entropy of the mean prediction."),
    "auroc_wrong_mutual_information": (
        "AUROC of errors, mutual information",
        "4",
        "The same by the epistemic part alone.",
    ),
    "auroc_wrong_rel_u": (
        "AUROC of errors, Rel-U",
        "4",
        "The same by a score learned from the validation part's errors.",
    ),
    "credible_set_coverage": (
        "Credible sets, coverage",
        "%",
        "Share of the images whose class lies in the smallest set of classes that holds 90 % of the probability.",
    ),
    "credible_set_size": ("Credible sets, size", "g", "Mean number of classes in such a set."),
    "temperature": (
        "Temperature",
        "g",
        "Divides the logits of every draw; fitted on the validation part, 1: none.",
    ),
    "nll_uncalibrated": ("NLL before", "4", "NLL of the same draws without the temperature."),
    "brier_uncalibrated": (
        "Brier score before",
        "4",
        "Brier score of the same draws without the temperature.",
    ),
    "ece_uncalibrated": ("ECE before", "%", "ECE of the same draws without the temperature."),
    "retention_mean": ("Mean retention", "%", "Mean posterior probability that a masked weight is kept."),
    "pruned_fraction": ("Pruned weights", "%", "Share of the masked weights with a retention below 0.5."),
    "masked_weights": ("Masked weights", "n", "Weights that a selection mask can drop."),
    "dropped_layers": (
        "Dropped matrices",
        "n",
        "Matrices of a layer with next to no mask on; skip connections bypass them.",
    ),
    "samples": ("Posterior draws", "n", "Networks drawn from the posterior; the prediction is their mean."),
    "train_size": ("Training images", "n", "Images the posterior was fitted to."),
    "val_size": ("Validation images", "n", "Images watched during training, not learned from."),
    "test_size": ("Test images", "n", "Images predicted once, after training."),
    "train_seconds": ("Training time", "s", "Wall-clock time of the training."),
    "macs": (
        "Multiply-accumulates",
        "n",
        "Of one image, by the network cut at a retention of 0.5, without sampling; all networks of an ensemble.",
    ),
    "ms_per_image": (
        "Milliseconds per image",
        "g",
        "Measured time of the same, in large batches, where it was evaluated.",
    ),
    "kappa_mask": ("κ, masks", "g", "Weight of the likelihood in the mask field; 1 is no tempering."),
    "kappa_weights": ("κ, weights", "g", "Weight of the likelihood in the objective; 1 is no tempering."),
}


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Title, value with its 95% interval, and explanation of every metric that the run has."""
    intervals, worst = metrics.get("intervals", {}), metrics.get("worst_class")
    rows = []
    for name, (title, form, why) in EXPLANATIONS.items():
        if isinstance(metrics.get(name), int | float):
            value = _with_interval(metrics[name], intervals.get(name), form)
            rows.append((f"{title}: {worst}" if name == "worst_class_sensitivity" else title, value, why))
    return rows


def _write(value: float, form: str) -> str:
    texts = {
        "%": f"{100 * value:.2f} %",
        "4": f"{value:.4f}",
        "n": f"{value:,.0f}".replace(",", "\u202f"),
        "s": f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min",
        "g": f"{value:.3g}" if value < 1000 else f"{value:,.0f}".replace(",", "\u202f"),
    }
    return texts[form]


def class_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Class, images, sensitivity, specificity, AUROC and average precision with intervals; empty where not known."""
    forms = {"sensitivity": "%", "specificity": "%", "auroc": "4", "average_precision": "4"}
    return [
        [
            str(row["class"]), f"{row['images']}",
            *(_with_interval(row[name], row[f"{name}_interval"], form) for name, form in forms.items()),
        ]
        for row in metrics.get("by_class", [])
    ]  # fmt: skip


def _with_interval(value: float | None, ends: list[float] | None, form: str) -> str:
    if value is None:
        return "–"
    return _write(value, form) + (f" ({_write(ends[0], form)} to {_write(ends[1], form)})" if ends else "")
