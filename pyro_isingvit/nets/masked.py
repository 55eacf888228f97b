"""Masked-image modelling: what a network learns from images without labels (He et al. 2022, masked autoencoders).

    loss = mean over hidden patches p of |g(f(visible))_p - (x_p - mean x_p) / std x_p|^2 / P

f is the ``ViT``, which computes on the visible patches alone, a quarter of them; g is a small transformer that gets f's
tokens, and one learned token in the place of every hidden patch. g is thrown away afterwards.

Shapes: B batch, T patch tokens, D width, G width of the decoder, P numbers of a patch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import need
from pyro_isingvit.nets.vit import ViT, Watch

EPS = 1e-6  # added to the variance of a patch, which may be all one colour


class MaskedImages(nn.Module):
    """Encoder, decoder and the loss of a batch.

    Args:
        vit: the network that shall learn; its head is not used.
        masked: share of the patches that are hidden.
        width: G of the decoder, a multiple of 16.
        depth: blocks of the decoder.

    Attributes:
        vit: the network.
        weights: its matrices, kind -> (layers, out, in).

    Raises:
        UserError: too few patches to hide some and show some, or patches that overlap.
    """

    def __init__(self, vit: ViT, masked: float, width: int = 64, depth: int = 1) -> None:
        super().__init__()
        need(vit.stem is None, "`stem` conv would let the network see the pixels of hidden patches; leave it out.")
        apart = vit.config.stride >= vit.config.patch_size
        need(apart, "`patch_stride` would let the network see pixels of hidden patches in shown ones; leave it out.")
        need(width % 16 == 0, f"`decoder_width` must be a multiple of 16, not {width}.")
        self.vit, self.tokens = vit, vit.grid[0] * vit.grid[1]
        self.shown = self.tokens - round(masked * self.tokens)
        need(
            0 < self.shown < self.tokens,
            f"`masked` {masked} of {self.tokens} patches shows all or none; choose another, or a smaller `patch_size`.",
        )
        self.weights = nn.ParameterDict({k: nn.Parameter(w) for k, w in vit.initial_weights().items()})
        for kind in ("head", "head_hidden"):
            if kind in self.weights:
                self.weights[kind].requires_grad_(False)
                vit.bias[kind].requires_grad_(False)
        patch = vit.matrix_shapes["patch"][2]
        self.norm, self.enter = nn.LayerNorm(vit.config.width), nn.Linear(vit.config.width, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        block = nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, patch)

    def draw(self, images: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Which patches each image shows and, after them, which it hides: (B, T), both parts in ascending order."""
        order = torch.rand(images, self.tokens, generator=generator).argsort(dim=-1)
        parts = (order[:, : self.shown], order[:, self.shown :])
        return torch.cat([part.sort(dim=-1).values for part in parts], dim=-1).to(device)

    def targets(self, x: Tensor) -> Tensor:
        """Pixels of every patch, each with mean 0 and variance 1: (B, T, P)."""
        patches = self.vit.patchify(x)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
        return (patches - mean) / (variance + EPS).sqrt()

    def guessed(self, x: Tensor, order: Tensor) -> Tensor:
        """The decoder's guess of every patch, (B, T, P).

        Args:
            x: (B, channels, height, width), normalised.
            order: as ``draw`` gives it.
        """
        watch: Watch = {"blocks": []}
        self.vit.visible = order[:, : self.shown]
        try:
            self.vit(dict(self.weights.items()), x, watch)
        finally:
            self.vit.visible = None
        tokens = watch["blocks"][-1][:, self.vit.config.prefix :]  # (B, shown, D)
        known = self.enter(self.norm(tokens))
        every = torch.cat([known, self.hidden.to(known.dtype).expand(len(x), self.tokens - self.shown, -1)], dim=1)
        place = order.argsort(dim=-1).unsqueeze(-1).expand(-1, -1, every.shape[-1])
        return self.leave(self.decoder(every.gather(1, place) + self.position))

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """The loss of a batch, over the hidden patches; ``x`` and ``order`` as in ``guessed``."""
        errors = F.mse_loss(self.guessed(x, order).float(), self.targets(x), reduction="none").mean(-1)  # (B, T)
        return errors.gather(1, order[:, self.shown :]).mean()
