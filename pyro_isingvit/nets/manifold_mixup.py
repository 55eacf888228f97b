"""Manifold mixup: hidden states of two images mixed after a block, with their labels (Verma et al. 2019).

    h'_i = l h_k(x_i) + (1 - l) h_k(x_j),   y'_i = l y_i + (1 - l) y_j

k is 0 (the tokens, their positions added) or the number of a block; i and j are neighbours in the batch, each mixed
into the other. The source pairs images by a permutation of a shuffled batch; neighbours of a shuffled batch are such
pairs. No posterior draw, micro-batch or process parts a pair. The patch embedding is linear (without
``stem``), so that k = 0 is the mixup of images.

Shapes: S samples, B batch, T tokens, D width, C classes.
"""

from dataclasses import dataclass

from torch import Tensor

ALPHA = 2.0  # of the share, where the settings leave it open: the authors' code
LAST = 2  # the last block after which states are mixed: likewise, of the groups of layers of a residual network


@dataclass(frozen=True)
class HiddenMix:
    """One draw, for a whole batch.

    Attributes:
        after: k.
        share: l.
    """

    after: int
    share: float

    def states(self, x: Tensor) -> Tensor:
        """(..., B, T, D) -> the same shape; B is even."""
        return self._mixed(x, -3)

    def labels(self, y: Tensor) -> Tensor:
        """Probabilities (B, C), perhaps times the weight of the image -> the same shape."""
        return self._mixed(y, -2)

    def _mixed(self, values: Tensor, axis: int) -> Tensor:
        pairs = values.unflatten(axis, (-1, 2))
        return pairs.flip(axis).lerp(pairs, self.share).flatten(axis - 1, axis)
