"""The part of a run's page about decisions: risk against coverage, and prediction sets."""

from functools import partial

import numpy as np
import xarray as xr

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.conformal import conformal_sets, coverage_band
from pyro_isingvit.predictive.selective import acceptance, risk_coverage
from pyro_isingvit.predictive.validation import Validation
from pyro_isingvit.report import decision_figures
from pyro_isingvit.report.section import Section

LEVELS = (0.9, 0.95, 0.99)  # of the sets
LIMITS = (0.01, 0.02, 0.05, 0.1)  # on the error rate
CERTAINTY = 0.95


def decision_sections(tree: xr.DataTree, probs: np.ndarray, labels: np.ndarray) -> list[Section]:
    """Risk against coverage on the test part, and sets that the validation part gives for it.

    Args:
        tree: posterior.nc.
        probs: (B, C) mean predictions for the test part.
        labels: (B,) class numbers.
    """
    val = Validation.from_tree(tree)
    coverage, risk = risk_coverage(probs, labels)
    return [
        Section(
            "risk", "Risk against coverage",
            "Test images are answered in the order of confidence; the curve is the error rate among those answered so "
            "far. Pick the error rate you can live with and read off the share of images that needs no human. A curve "
            "that falls steeply to the left means that confidence finds the errors; a flat one, that handing over "
            f"doubtful images gains little. {_limits_text(val)}",
            partial(decision_figures.risk_against_coverage, coverage, risk, _limits(val, probs, labels)), half=True,
        ),
        _sets(val, probs, labels),
    ]  # fmt: skip


def _limits(val: Validation | None, probs: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, float]]:
    """Limits that the validation part can promise and that leave something to a human; how they turn out."""
    found: list[tuple[float, float, float]] = []
    wrong = probs.argmax(-1) != labels
    for limit in LIMITS if val is not None else ():
        assert val is not None
        stands = acceptance(val.probs, val.labels, limit, CERTAINTY).accepts(probs).numpy()
        if stands.all():
            break
        if stands.any():
            found.append((limit, float(stands.mean()), float(wrong[stands].mean())))
    return found


def _limits_text(val: Validation | None) -> str:
    if val is None:
        return "This run keeps no predictions for its validation part, so no limit can be promised."
    return (
        f"Red marks: thresholds from the {len(val)} validation images that keep the error rate below a limit with "
        f"{CERTAINTY:.0%} certainty, and what they do on the test part; limits without a mark cannot be promised from "
        "so few images, or let every prediction stand. Prediction applies one as the setting `max_error`."
    )


def _sets(val: Validation | None, probs: np.ndarray, labels: np.ndarray) -> Section:
    sizes: dict[float, np.ndarray] = {}
    told: list[str] = []
    for level in LEVELS if val is not None else ():
        assert val is not None
        try:
            sets = conformal_sets(probs, val.probs, val.labels, level).numpy()
        except UserError:  # too few validation images
            continue
        held = float(sets[np.arange(len(labels)), labels].mean())
        low, high = coverage_band(len(val), level, len(labels))
        sizes[level] = sets.sum(-1)
        told.append(f"{held:.1%} of the sets for {level:.0%} hold the true class (expected: {low:.1%} to {high:.1%})")
    return Section(
        "sets", "Prediction sets",
        "A set of classes instead of one class: it holds the true class with a probability that is chosen beforehand, "
        "for images like the validation images, however wrong the network's own probabilities are. Sets of one class "
        "can be acted on; larger ones say which classes are still in question. The most probable class is always in, "
        "so easy data are covered more often than asked for. "
        + (f"On the test part {', '.join(told)}. Prediction writes them with the setting `coverage`." if told else ""),
        partial(decision_figures.set_sizes, sizes) if sizes else None, half=True,
    )  # fmt: skip
