"""Token masking: in training, each image shows the network a random part of its patch tokens.

    T' = T - round(share T) of the T patch tokens, drawn for every image, uniformly and without replacement

A token is dropped after its position is added, so that the others keep theirs. A CLS token stays. Blocks compute on T'
tokens, so that a step gets cheaper. The likelihood is that of what is shown: training sees masked images, while
predictions and curvature estimates see whole ones.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.nets.vit import ViT

log = logging.getLogger(__name__)


class TokenMasking:
    """Draws which patch tokens the images of a batch show.

    Args:
        share: of the patch tokens, to be dropped; 0 draws nothing.
        method: what is trained; all networks in it read the same tokens.

    Raises:
        UserError: no token would stay, or there is no ``ViT`` in ``method``.
    """

    def __init__(self, share: float, method: nn.Module) -> None:
        self.tokens = self.shown = 0
        if not share:
            return
        counts = {math.prod(module.grid) for module in method.modules() if isinstance(module, ViT)}
        need(len(counts) == 1, "`token_masking` needs a method whose networks are ViTs with the same patches.")
        (self.tokens,) = counts
        self.shown = self.tokens - round(share * self.tokens)
        if self.shown < 1:
            most = math.floor(100 * (1 - 1 / self.tokens)) / 100
            raise UserError(
                f"`token_masking` {share} means masking all tokens, of which there are {self.tokens}; choose at most "
                f"{most} or a smaller `patch_size`."
            )
        if self.shown == self.tokens:
            log.warning("`token_masking` %s of %d tokens is less than half a token: none is dropped", share, self.shown)

    def draw(self, images: int, device: torch.device) -> Tensor | None:
        """Token numbers (images, shown) in ascending order; None, and no random number, where all are shown."""
        if self.shown == self.tokens:
            return None
        order = torch.rand(images, self.tokens, device=device).argsort(dim=-1)
        return order[:, : self.shown].sort(dim=-1).values


@contextmanager
def showing(method: nn.Module, visible: Tensor | None) -> Iterator[None]:
    """Within it, every ``ViT`` in a module reads batches whose images show these tokens alone.

    Args:
        method: the module.
        visible: (B, shown) numbers of patch tokens; None: all are shown.
    """
    networks = [] if visible is None else [module for module in method.modules() if isinstance(module, ViT)]
    for network in networks:
        network.visible = visible
    try:
        yield
    finally:
        for network in networks:
            network.visible = None
