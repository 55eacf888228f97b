"""What a run predicts for its validation images: what decisions with a guarantee are made from.

Shapes: n validation images, C classes.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import xarray as xr

GROUP = "validation"  # of posterior.nc


@dataclass(frozen=True)
class Validation:
    """Predictions for the validation part, with its labels.

    Other images are compared with it. Their predictions must come from the same networks: as many draws with the same
    seed.

    Attributes:
        probs: (n, C) mean predictions.
        labels: (n,) class numbers.
        samples: S, draws.
        seed: of the draws.
    """

    probs: Tensor
    labels: Tensor
    samples: int
    seed: int

    def __len__(self) -> int:
        """The number of images, n."""
        return len(self.labels)

    def to_group(self, classes: tuple[str, ...]) -> "xr.Dataset":
        """The group ``validation`` of posterior.nc: ``prob_mean`` (image_val, class) and ``y`` (image_val)."""
        from pyro_isingvit.predictive.datatree import make_group

        dims = {"prob_mean": ["image_val", "class"], "y": ["image_val"]}
        group = make_group({"prob_mean": self.probs, "y": self.labels}, dims, {"class": list(classes)})
        return group.assign_attrs(num_samples=self.samples, draw_seed=self.seed)

    @classmethod
    def from_tree(cls, tree: "xr.DataTree") -> "Validation | None":
        """Reads what ``to_group`` wrote; None where a tree has none, or one that does not fit its classes."""
        try:
            group, classes = tree.children[GROUP].dataset, len(json.loads(tree.attrs["classes"]))
            probs, labels = group["prob_mean"].values, group["y"].values.astype(np.int64)
            fits = probs.shape == (len(labels), classes) and labels.min() >= 0 and labels.max() < classes
            samples, seed = int(group.attrs["num_samples"]), int(group.attrs["draw_seed"])
            return cls(torch.from_numpy(probs), torch.from_numpy(labels), samples, seed) if fits else None
        except (KeyError, ValueError, TypeError, AttributeError):
            return None
