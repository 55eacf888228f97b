"""What the form ``bayes`` of a compact network keeps of one matrix, and a draw of it."""

import torch
from torch import Tensor, nn

from pyro_isingvit.pruning.shapes import PosteriorShape


class Posterior(nn.Module):
    """Scales and mask numbers of one matrix (buffers), and the random part of its bias.

    What dropped inputs, constants, send through the means of the matrix is in its bias. In a draw it has the standard
    deviation ``fold_scale`` (out,); ``fold_loc`` is the difference of its mean to the bias's part or, where one mask
    covers a row, that part, which goes with the row.
    """

    def __init__(self, shape: PosteriorShape, out: int) -> None:
        super().__init__()
        self.site, self.by_row = shape.site, shape.by_row
        self.register_buffer("scale", torch.zeros(shape.scale))
        index = None if shape.index is None else torch.zeros(shape.index, dtype=torch.int32)
        self.register_buffer("index", index)
        self.register_buffer("fold_loc", torch.zeros(out))
        self.register_buffer("fold_scale", torch.zeros(out))
        self.scale: Tensor
        self.index: Tensor | None
        self.fold_loc: Tensor
        self.fold_scale: Tensor

    def draw(self, loc: Tensor, masks: dict[str, Tensor], noise: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """One weight matrix and what is added to its bias."""

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=noise, device=like.device, dtype=like.dtype)

        mask = masks[self.site] if self.index is None else masks[self.site][self.index]
        more = self.fold_loc + self.fold_scale * normal(self.fold_loc)
        more = mask[:, 0] * more - self.fold_loc if self.by_row else more
        return mask * (loc + self.scale * normal(loc)), more
