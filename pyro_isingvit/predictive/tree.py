"""Predictions as an ArviZ DataTree.

Draws lie along one dimension, ``sample``: SVI draws are independent, there are no chains to diagnose.
Shapes: S samples, B images, C classes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.datatree import make_group, make_tree
from pyro_isingvit.predictive.draws import PredictiveDraws


def predictions_to_datatree(
    draws: PredictiveDraws,
    classes: Sequence[str],
    names: Sequence[str] | None = None,
    labels: Tensor | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Predictions for any images.

    Groups as in ``run_to_datatree``, all over ``image``: ``posterior_predictive``, ``predictive_summary``,
    and ``observed_data`` where labels are known. Draws that do not all count the same have ``weight`` (sample, image).

    Args:
        draws: predictive draws, (S, B, C).
        classes: C names.
        names: B names of the images, such as file names; None: positions.
        labels: (B,) class numbers.
        attrs: attributes of the root, strings and numbers.

    Raises:
        UserError: classes, names or labels that are not as many as the draws say.
    """
    _, batch, width = draws.probs.shape
    expected = {"classes": (classes, width), "names": (names, batch), "labels": (labels, batch)}
    for what, (given, count) in expected.items():
        if given is not None and len(given) != count:
            raise UserError(f"{len(given)} {what} were given for predictions that need {count}.")
    index = np.arange(batch)
    groups = prediction_groups(draws, classes, labels, index, index if names is None else list(names), "image")
    root = {"num_samples": len(draws.probs), "classes": json.dumps(list(classes)), **(attrs or {})}
    return make_tree(groups, root)


def prediction_groups(
    draws: PredictiveDraws,
    classes: Sequence[str],
    labels: Tensor | None,
    index: np.ndarray,
    names: Any,
    every: str,
) -> dict[str, xr.Dataset]:
    """Draws for the images at ``index``, called ``names``; a summary of all, along ``every``."""
    coords, low_high = {"class": list(classes), "image": names}, draws.interval(0.9).float()
    probs = {"prob_mean": draws.mean, "prob_low": low_high[0], "prob_high": low_high[1]}
    scores = {name: getattr(draws, name) for name in ("entropy", "expected_entropy", "mutual_information")}
    scores, y = (scores, {}) if labels is None else (scores | {"y": labels}, {"y": labels[index]})
    dims = {name: [every, "class"] for name in probs} | {name: [every] for name in scores}
    dims |= {"probs": ["image", "class"], "weight": ["image"]}
    drawn = {"probs": draws.probs[:, index]}
    if draws.weights is not None:
        drawn["weight"] = draws.weights[:, index]
    return {
        "posterior_predictive": make_group(drawn, dims, coords, "sample"),
        "predictive_summary": make_group(probs | scores, dims, coords),
        "observed_data": make_group(y, {"y": ["image"]}, coords),
    }
