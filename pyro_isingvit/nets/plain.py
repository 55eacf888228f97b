"""The ViT as an ordinary module of nn.Linear layers: what other libraries turn Bayesian, prune, or are timed against.

Shapes: B batch, T tokens, D width, H heads, C classes, P pixels of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.vit import ViT, Weights


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: ViTConfig, dropout: float) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads, self.scale = config.heads, (width // config.heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attn_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        # One module per place: libraries switch dropout on by module, and one used twice would count once.
        self.drop_attention, self.drop_hidden, self.drop_mlp = (nn.Dropout(dropout) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        batch, tokens, _ = x.shape
        # The head size is whatever pruning has left of the fused projection.
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (B, H, T, D/H)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.drop_attention(self.attn_out(mixed))
        return x + self.drop_mlp(self.fc2(self.drop_hidden(F.gelu(self.fc1(self.norm2(x))))))


class PlainViT(nn.Module):
    """The network of ``ViT`` with ordinary layers: mean pooling, linear head.

    Args:
        vit: the network whose shape is taken.
        dropout: rate, at the places where the library's own method ``dropout`` has it.

    Raises:
        UserError: another pooling or head.
    """

    def __init__(self, vit: ViT, dropout: float = 0.0) -> None:
        super().__init__()
        config = vit.config
        need(
            config.plain,
            "the comparison with peers needs `pool` mean and `head` linear, and plain networks: no stem, registers or "
            "overlapping patches.",
        )
        self.patch_size, self.padding = config.patch_size, vit.padding
        self.patch = nn.Linear(vit.matrix_shapes["patch"][2], config.width)
        self.position = nn.Parameter(torch.zeros_like(vit.position))
        self.drop_patch = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PlainBlock(config, dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vit.classes)

    @classmethod
    def fresh(cls, config: ViTConfig, channels: int, height: int, width: int, classes: int) -> "PlainViT":
        """A network with initial weights; the arguments are those of ``ViT``."""
        start = ViT(config, channels, height, width, classes)
        return cls(start).copy_from(start, start.initial_weights())

    def linears(self) -> dict[str, list[nn.Linear]]:
        """Every linear layer, by the names that ``ViT`` has for them."""
        blocks: list[Any] = list(self.blocks)
        inner = {kind: [getattr(block, kind) for block in blocks] for kind in ("qkv", "attn_out", "fc1", "fc2")}
        return {"patch": [self.patch], **inner, "head": [self.head]}

    def norms(self) -> list[nn.LayerNorm]:
        """In the order of ``ViT``'s rows: block 0 attention, block 0 MLP, ..., final."""
        blocks: list[Any] = list(self.blocks)
        return [norm for block in blocks for norm in (block.norm1, block.norm2)] + [self.norm]

    @torch.no_grad()
    def copy_from(self, vit: ViT, weights: Weights) -> "PlainViT":
        """Takes all parameters of a ``ViT`` with these weights; returns itself."""
        for kind, linears in self.linears().items():
            for layer, linear in enumerate(linears):
                linear.weight.copy_(weights[kind][layer])
                linear.bias.copy_(vit.bias[kind][layer])
        for row, norm in enumerate(self.norms()):
            norm.weight.copy_(vit.norm_gain[row])
            norm.bias.copy_(vit.norm_bias[row])
        self.position.copy_(vit.position)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, channels, height, width) to logits (B, C)."""
        patches = F.unfold(F.pad(x, self.padding), self.patch_size, stride=self.patch_size)  # (B, P, T)
        x = self.drop_patch(self.patch(patches.transpose(1, 2))) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))
