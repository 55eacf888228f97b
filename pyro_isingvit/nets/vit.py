"""A pre-norm Vision Transformer as a function of its weight matrices.

The matrices are arguments, not parameters, so that one network serves every posterior draw: each may carry a
leading sample axis. Biases, LayerNorms, position and CLS embeddings are ordinary parameters.

Shapes: S samples, B batch, T tokens, D width, H heads, C classes, L depth, P pixels of a patch, F hidden units.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.readers import vit_readers

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]  # kind -> (layers, out, in) or (S, layers, out, in)
Watch = dict[str, list[Any]]  # place -> what passes there, one entry a layer, in order


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, where x and W may both carry a leading sample axis.

    Args:
        x: (B, T, in), or (S, B, T, in) with a sampled weight.
        weight: (out, in) or (S, out, in).
        bias: (out,).
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    samples, batch, tokens, width = x.shape
    flat = x.reshape(samples, batch * tokens, width)  # one large product per sample beats B small ones
    return torch.baddbmm(bias, flat, weight.transpose(1, 2)).view(samples, batch, tokens, -1)


def stack(draws: list[Weights]) -> Weights:
    """Draws (layers, out, in) as one, (S, layers, out, in); a single one stays without a sample axis: it is faster."""
    if len(draws) == 1:
        return draws[0]
    return {kind: torch.stack([draw[kind] for draw in draws]) for kind in draws[0]}


# (kind, layer, x, weight, bias) -> y: what stands for a linear layer; noise on activations goes in here.
Layer = Callable[[str, int, Tensor, Tensor, Tensor], Tensor]


def plain(kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer itself."""
    return linear(x, weight, bias)


class ViT(nn.Module):
    """Maps images and weight matrices to logits.

    Args:
        config: patch size, width, heads, depth, MLP ratio, pooling, head.
        channels: of the images.
        height: of the images, in pixels.
        width: of the images, in pixels.
        classes: number of classes C.

    Attributes:
        readers: who writes and reads which channels.
        checkpoint_activations: where gradients are wanted, keep each block's input alone and compute the block again in
            the backward pass: the same numbers from less memory, for about a third more time.
        visible: (images, tokens) numbers of the patch tokens that each image of a batch shows, as many for all; the
            others are dropped once the position is added. None: all of them (nets/tokens.py sets it in training).

    Raises:
        UserError: a width that the heads do not divide, a patch larger than the image, non-positive sizes.
    """

    def __init__(self, config: ViTConfig, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        check_shape(config, height, width, classes)
        self.config, self.image_shape, self.classes = config, (channels, height, width), classes
        self.checkpoint_activations = False
        self.visible: Tensor | None = None
        patch, dim, depth = config.patch_size, config.width, config.depth
        self.grid = (-(-height // patch), -(-width // patch))
        self.padding = (0, self.grid[1] * patch - width, 0, self.grid[0] * patch - height)
        if any(self.padding):
            log.info(
                "images of %dx%d are zero-padded to %dx%d, a multiple of the patch size %d",
                height, width, height + self.padding[3], width + self.padding[1], patch,
            )  # fmt: skip
        self.readers = vit_readers(
            patch=channels * patch * patch, width=dim, heads=config.heads, depth=depth, classes=classes,
            hidden=config.mlp_ratio * dim, top=dim // 2 if config.head == "mlp" else None,
        )  # fmt: skip
        self.matrix_shapes = self.readers.shapes  # kind -> (layers, out, in), input to output
        tokens = self.grid[0] * self.grid[1] + (config.pool == "cls")
        self.bias = nn.ParameterDict(
            {kind: nn.Parameter(torch.zeros(shape[:2])) for kind, shape in self.matrix_shapes.items()}
        )
        self.norm_gain = nn.Parameter(torch.ones(2 * depth + 1, dim))  # rows: block 0 attention, MLP, ..., final
        self.norm_bias = nn.Parameter(torch.zeros(2 * depth + 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        if config.pool == "cls":
            self.cls = nn.Parameter(0.02 * torch.randn(dim))

    def patchify(self, images: Tensor) -> Tensor:
        """Cuts (B, channels, height, width) into patches (B, T, P)."""
        images = F.pad(images, self.padding) if any(self.padding) else images
        size = self.config.patch_size
        patches = images.unfold(2, size, size).unfold(3, size, size)  # (B, ch, rows, cols, size, size)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def _shown(self, x: Tensor, visible: Tensor) -> Tensor:
        """The tokens of (..., B, T, D) that each image shows, (..., B, shown, D); a CLS token always is."""
        if self.config.pool == "cls":
            visible = torch.cat([visible.new_zeros(len(visible), 1), visible + 1], dim=-1)
        (*lead, tokens, width), shown = x.shape, visible.shape[-1]
        passes = x.shape[:-2].numel()  # images, or draws times images
        rows = visible.repeat(passes // len(visible), 1) + tokens * torch.arange(passes, device=x.device).unsqueeze(-1)
        # Whole rows of a matrix: two thirds of the time of a gather.
        return x.flatten(0, -2).index_select(0, rows.flatten()).view(*lead, shown, width)

    def _attention(self, x: Tensor, apply: Callable[..., Tensor], layer: int, watch: Watch) -> Tensor:
        heads = self.config.heads
        qkv = apply("qkv", layer, x)  # (..., B, T, 3D)
        lead = qkv.shape[:-1]
        qkv = qkv.view(-1, lead[-1], 3, heads, self.config.width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (S*B, H, T, D/H)
        if "attention" in watch:
            watch["attention"].append((q.unflatten(0, lead[:-1]), k.unflatten(0, lead[:-1])))  # (..., B, H, T, D/H)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(*lead, self.config.width)
        return apply("attn_out", layer, mixed)

    def forward(
        self, weights: Weights, images: Tensor, watch: Watch | None = None, layer_rule: Layer = plain
    ) -> Tensor:
        """Logits of a batch.

        Args:
            weights: kind -> (layers, out, in), or (S, layers, out, in) for all kinds alike.
            images: (B, channels, height, width), normalised; with S sampled weights also (S, B, ...), a batch for each.
            watch: receives what passes at the places that it has as keys, appended to their lists:
                ``tokens``, what the first block reads, (..., B, T, D); ``attention``, queries and keys of each layer,
                (..., B, H, T, D/H) each; ``blocks``, the output of each block, (..., B, T, D); ``features``, what the
                last matrix reads, (..., B, its inputs). T counts the tokens that are visible.
            layer_rule: what is computed in place of each linear layer; baselines put their noise there.

        Returns:
            (B, C), or (S, B, C) with sampled weights.

        Raises:
            UserError: the images are not of the shape that the network was built for.
        """
        if tuple(images.shape[-3:]) != self.image_shape:
            raise UserError(
                f"images of shape {tuple(images.shape[-3:])} given, the network reads {self.image_shape} "
                "(channels, height, width); resize them or build the network for them."
            )

        watch = {} if watch is None else watch
        # Cut once: the gradient of a single index would be a tensor of all layers, zero but for one.
        matrices = {kind: weight.unbind(-3) for kind, weight in weights.items()}
        biases = {kind: bias.unbind(0) for kind, bias in self.bias.items()}
        gains, offsets = self.norm_gain.unbind(0), self.norm_bias.unbind(0)

        def norm(x: Tensor, row: int) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], gains[row], offsets[row])

        def apply(kind: str, layer: int, x: Tensor) -> Tensor:
            return layer_rule(kind, layer, x, matrices[kind][layer], biases[kind][layer])

        def block(x: Tensor, layer: int) -> Tensor:
            x = x + self._attention(norm(x, 2 * layer), apply, layer, watch)
            x = x + apply("fc2", layer, F.gelu(apply("fc1", layer, norm(x, 2 * layer + 1))))
            if "blocks" in watch:
                watch["blocks"].append(x)
            return x

        x = self.patchify(images.flatten(0, -4))  # (B, T, P)
        if images.dim() == 5:
            x = x.unflatten(0, images.shape[:2])  # (S, B, T, P)
        elif weights["patch"].dim() == 4:
            x = x.expand(weights["patch"].shape[0], *x.shape)  # (S, B, T, P)
        x = apply("patch", 0, x)  # (..., B, T, D)
        if self.config.pool == "cls":
            x = torch.cat([self.cls.expand(*x.shape[:-2], 1, -1), x], dim=-2)
        x = x + self.position
        if self.visible is not None:
            assert len(self.visible) == images.shape[:-3].numel(), "visible tokens of another batch"
            x = self._shown(x, self.visible)
        if "tokens" in watch:
            watch["tokens"].append(x)
        again = self.checkpoint_activations and not watch and torch.is_grad_enabled()
        for layer in range(self.config.depth):
            x = checkpoint(block, x, layer, use_reentrant=False) if again else block(x, layer)
        x = norm(x, 2 * self.config.depth)
        x = x[..., :1, :] if self.config.pool == "cls" else x.mean(dim=-2, keepdim=True)
        if self.config.head == "mlp":
            x = F.relu(apply("head_hidden", 0, x))
        if "features" in watch:
            watch["features"].append(x.squeeze(-2))
        return apply("head", 0, x).squeeze(-2)

    def initial_weights(self) -> Weights:
        """Xavier-uniform matrices (q, k, v each on its own), kind -> (layers, out, in)."""
        weights = {}
        for kind, shape in self.matrix_shapes.items():
            weights[kind] = torch.empty(shape)
            fan_out = shape[1] // len(self.readers.matrix(kind).parts)
            limit = (6.0 / (fan_out + shape[2])) ** 0.5
            nn.init.uniform_(weights[kind], -limit, limit)
        return weights


def check_shape(config: ViTConfig, height: int, width: int, classes: int) -> None:
    """Raises UserError where the network cannot be built for such images."""
    sizes = ("patch_size", "width", "heads", "depth", "mlp_ratio")
    for name in sizes:
        if getattr(config, name) < 1:
            raise UserError(f"`{name}` must be at least 1, not {getattr(config, name)}.")
    if config.width % config.heads:
        raise UserError(f"`width` {config.width} is not divisible by `heads` {config.heads}; change one of them.")
    if config.head == "mlp" and config.width % 2:
        raise UserError(f"`head` mlp halves the width, and `width` {config.width} is odd; make it even.")
    if config.patch_size > min(height, width):
        raise UserError(
            f"`patch_size` {config.patch_size} does not fit images of {height}x{width} pixels; "
            f"choose at most {min(height, width)}."
        )
    if classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, the data have {classes}.")
