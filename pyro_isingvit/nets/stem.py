"""A convolutional stem: what may stand between the pixels and the patch embedding where data are few.

    x <- maxpool_2x2 (gelu(conv_3x3(x)))     log2(patch size) times

One vector is left where a patch would be, and the patch embedding, a matrix like all others, reads it (compact
convolutional transformers, Hassani et al. 2021). The convolutions are ordinary parameters: no mask covers them, and no
noise is on them.

Shapes: B batch, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import need


class ConvStem(nn.Module):
    """The stages of a stem.

    Args:
        channels: of the images.
        patch: side of a patch in pixels, a power of two of at least 2.
        width: D; the stages have D / 2^(stages - 1), ..., D / 2, D channels, none fewer than 16.

    Attributes:
        out: channels of the last stage.

    Raises:
        UserError: another patch size.

    Examples:
        >>> import torch
        >>> stem = ConvStem(channels=3, patch=4, width=64)
        >>> stem(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        stages = patch.bit_length() - 1
        need(
            stages >= 1 and patch == 2**stages,
            f"`stem` conv halves the image to one vector a patch; `patch_size` {patch} is no power of two.",
        )
        widths = [max(16, width >> (stages - 1 - stage)) for stage in range(stages)]
        self.out = widths[-1]
        self.stages = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1)
            for inputs, outputs in zip([channels, *widths[:-1]], widths, strict=True)
        )
        for stage in self.stages:
            assert isinstance(stage, nn.Conv2d) and stage.bias is not None
            nn.init.kaiming_normal_(stage.weight, nonlinearity="relu")
            nn.init.zeros_(stage.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) to (B, out, height / patch, width / patch)."""
        x = x.contiguous(memory_format=torch.channels_last)  # a third less time on a CPU
        for stage in self.stages:
            x = F.max_pool2d(F.gelu(stage(x)), 2)
        return x
