"""A pre-norm Vision Transformer as a function of its weight matrices.

The matrices are arguments, not parameters, so that one network serves every posterior draw: each may carry a
leading sample axis. Biases, LayerNorms, position and CLS embeddings are ordinary parameters.

Shapes: S samples, B batch, T tokens, D width, H heads, C classes, L depth, P pixels of a patch, F hidden units.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.readers import vit_readers
from pyro_isingvit.nets.shape import ACTIVATIONS, check_shape, patch_grid
from pyro_isingvit.nets.stem import ConvStem

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]  # kind -> (layers, out, in) or (S, layers, out, in)
Apart = dict[str, tuple[Tensor, ...]]  # kind -> the layers one by one, (out, in) each
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


Touch = Callable[[str, int, Tensor], Tensor]  # (place, layer, x) -> x, changed

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
        centred: keep the matrices that training started from, but for those of frozen blocks; they are 0 until they are
            filled.
        trunk: how many of the first blocks, and with any the patch embedding, have ordinary weights of their own, which
            are not among the matrices that are given. What is drawn many times then computes them once.
        frozen: how many of the first blocks, and with any everything before them, compute without gradients.

    Attributes:
        readers: who writes and reads which channels, of the matrices that are given; layers are counted from the first
            block that has some. ``all_readers`` are those of the whole network.
        matrix_shapes: of the matrices that are given, kind -> (layers, out, in), from input to output.
        trunk: the ordinary weights, kind -> (layers, out, in); empty without a trunk.
        checkpoint_activations: where gradients are wanted, keep each block's input alone and compute the block again in
            the backward pass: the same numbers from less memory, for about a third more time.
        centred: there is a ``centre`` of the matrices, from which training started.
        shared: where it is an empty list, the next pass puts what the trunk gives there, (B, T, D), or without a trunk
            the patches, and the passes after it take that for their own images (nets/trunk.py). None: every pass
            computes it.
        visible: (images, tokens) numbers of the patch tokens that each image of a batch shows, as many for all; the
            others are dropped once the position is added. None: all of them (nets/tokens.py sets it in training).
        touch: (place, layer, x) -> what is read on from there: ``tokens`` (layer 0, before ``norm_pre``), ``hidden``,
            the units of an MLP, and ``blocks``, the output of each. None: x itself (nets/view.py sets it in training).

    Raises:
        UserError: a width that the heads do not divide, a patch larger than the image, non-positive sizes.
    """

    def __init__(
        self,
        config: ViTConfig,
        channels: int,
        height: int,
        width: int,
        classes: int,
        centred: bool = False,
        trunk: int = 0,
        frozen: int = 0,
    ) -> None:
        super().__init__()
        check_shape(config, height, width, classes)
        need(0 <= frozen <= config.depth, f"`frozen_blocks` {frozen} of {config.depth} blocks cannot be.")
        self.trunk_depth, self.frozen = trunk, frozen
        self.config, self.image_shape, self.classes = config, (channels, height, width), classes
        self.checkpoint_activations, self.centred = False, centred
        self.shared: list[Tensor] | None = None
        self.visible: Tensor | None = None
        self.touch: Touch | None = None
        patch, dim, depth = config.patch_size, config.width, config.depth
        self.grid, self.padding = patch_grid(height, width, patch, config.stride)
        if any(self.padding):
            log.info(
                "images of %dx%d are zero-padded to %dx%d, which patches of %d pixels fill",
                height, width, height + self.padding[3], width + self.padding[1], patch,
            )  # fmt: skip
        self.stem = ConvStem(channels, patch, dim) if config.stem == "conv" else None
        numbers = channels * patch * patch if self.stem is None else self.stem.out
        self.all_readers, self.readers = (
            vit_readers(
                patch=numbers, width=dim, heads=config.heads, depth=depth, classes=classes,
                hidden=config.mlp_ratio * dim, top=dim // 2 if config.head == "mlp" else None,
                activation=ACTIVATIONS[config.activation], first=first,
            )
            for first in (0, trunk)
        )  # fmt: skip
        self.matrix_shapes = self.readers.shapes
        tokens = self.grid[0] * self.grid[1] + config.prefix
        self.bias = nn.ParameterDict(
            {kind: nn.Parameter(torch.zeros(shape[:2])) for kind, shape in self.all_readers.shapes.items()}
        )
        self.norm_gain = nn.Parameter(torch.ones(2 * depth + 1, dim))  # rows: block 0 attention, MLP, ..., final
        self.norm_bias = nn.Parameter(torch.zeros(2 * depth + 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        if config.pool == "cls":
            self.cls = nn.Parameter(0.02 * torch.randn(dim))
        if config.registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(config.registers, dim))
        if config.norm_pre:
            self.pre_gain, self.pre_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

        for kind, shape in self.matrix_shapes.items() if centred else ():
            self.register_buffer(f"centre_{kind}", torch.zeros(shape))
        shapes: dict[str, tuple[int, int, int]] = {}  # of what is not among the matrices that are given
        for kind, (layers, out, inputs) in self.all_readers.shapes.items():
            if below := layers - self.matrix_shapes.get(kind, (0,))[0]:
                shapes[kind] = (below, out, inputs)
        self.trunk = nn.ParameterDict({kind: nn.Parameter(w) for kind, w in self._xavier(shapes).items()})
        for kind, (below, out, inputs) in shapes.items() if centred else ():
            moving = max(0, below - self.frozen_layers(kind))
            self.register_buffer(f"centre_trunk_{kind}", torch.zeros(moving, out, inputs))

    def centre(self, kind: str) -> Tensor:
        """The matrices of a kind that training started from, (layers, out, in); 0 for a fresh head."""
        return self.get_buffer(f"centre_{kind}")

    def trunk_centre(self, kind: str) -> Tensor:
        """The same of the trunk, for its layers that are not frozen."""
        return self.get_buffer(f"centre_trunk_{kind}")

    def frozen_layers(self, kind: str) -> int:
        """How many of the first layers of a kind are frozen."""
        every = self.all_readers
        if any(kind in (*branch.written, *branch.read) for branch in every.branches):
            return self.frozen
        return int(self.frozen > 0 and not every.writers(every.matrix(kind).reads))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Before version 0.12 a trunk decayed towards 0."""
        for kind in self.trunk if self.centred else ():
            name = f"centre_trunk_{kind}"
            state_dict.setdefault(prefix + name, torch.zeros_like(self.get_buffer(name)))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def patchify(self, images: Tensor) -> Tensor:
        """Cuts (B, channels, height, width) into patches (B, T, P), or into the vectors of the stem."""
        images = F.pad(images, self.padding) if any(self.padding) else images
        if self.stem is not None:
            return self.stem(images).flatten(2).transpose(1, 2)
        size, stride = self.config.patch_size, self.config.stride
        patches = images.unfold(2, size, stride).unfold(3, size, stride)  # (B, ch, rows, cols, size, size)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def _prefix(self, x: Tensor) -> Tensor:
        """CLS token and registers, in this order, before the patch tokens of (..., B, T, D)."""
        tokens = [self.cls.unsqueeze(0)] if self.config.pool == "cls" else []
        tokens += [self.register_tokens] if self.config.registers else []
        return torch.cat([*(each.expand(*x.shape[:-2], -1, -1) for each in tokens), x], dim=-2) if tokens else x

    def _shown(self, x: Tensor, visible: Tensor) -> Tensor:
        """The tokens of (..., B, T, D) that each image shows, (..., B, shown, D); CLS and registers always are."""
        if prefix := self.config.prefix:
            always = torch.arange(prefix, device=visible.device).expand(len(visible), -1)
            visible = torch.cat([always, visible + prefix], dim=-1)
        (*lead, tokens, width), shown = x.shape, visible.shape[-1]
        passes = x.shape[:-2].numel()  # images, or draws times images
        rows = visible.repeat(passes // len(visible), 1) + tokens * torch.arange(passes, device=x.device).unsqueeze(-1)
        # Whole rows of a matrix: two thirds of the time of a gather.
        return x.flatten(0, -2).index_select(0, rows.flatten()).view(*lead, shown, width)

    def _patch_tokens(self, x: Tensor) -> Tensor:
        """(..., T, D) without CLS and registers."""
        return x[..., self.config.prefix :, :] if self.config.prefix else x

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

    def _patches(self, images: Tensor) -> Tensor:
        """``patchify``, once for all passes that share it."""
        if self.shared is None or self.trunk_depth:
            return self.patchify(images)
        if not self.shared:
            self.shared.append(self.patchify(images))
        return self.shared[0]

    def _embedded(self, images: Tensor, drawn: int | None, apply: Callable[..., Tensor], watch: Watch) -> Tensor:
        """What the first block reads, (..., B, T, D); ``drawn`` is S where the same images pass S draws."""
        x = self._patches(images.flatten(0, -4))  # (B, T, P)
        if images.dim() == 5:
            x = x.unflatten(0, images.shape[:2])  # (S, B, T, P)
        elif drawn is not None and not self.trunk_depth:
            x = x.expand(drawn, *x.shape)  # (S, B, T, P)
        x = self._prefix(apply("patch", 0, x)) + self.position  # (..., B, T, D)
        if self.visible is not None:
            assert len(self.visible) == images.shape[:-3].numel(), "visible tokens of another batch"
            x = self._shown(x, self.visible)
        x = x if self.touch is None else self.touch("tokens", 0, x)
        if self.config.norm_pre:
            x = F.layer_norm(x, x.shape[-1:], self.pre_gain, self.pre_bias, self.config.norm_eps)
        if "tokens" in watch:
            watch["tokens"].append(x)
        return x

    def _pooled(self, x: Tensor, norm: Callable[[Tensor, int], Tensor]) -> Tensor:
        """(..., T, D) to what the head reads, (..., 1, D)."""
        last, late = 2 * self.config.depth, self.config.final_norm == "pooled"
        x = x if late else norm(x, last)
        x = x[..., :1, :] if self.config.pool == "cls" else self._patch_tokens(x).mean(dim=-2, keepdim=True)
        return norm(x, last) if late else x

    def forward(
        self, weights: Weights | Apart, images: Tensor, watch: Watch | None = None, layer_rule: Layer = plain
    ) -> Tensor:
        """Logits of a batch.

        Args:
            weights: kind -> (layers, out, in), or its layers one by one, or (S, layers, out, in) for all kinds alike.
            images: (B, channels, height, width), normalised; with S sampled weights also (S, B, ...), a batch for each.
            watch: receives what passes at the places that it has as keys, appended to their lists:
                ``tokens``, what the first block reads, (..., B, T, D); ``attention``, queries and keys of each layer,
                (..., B, H, T, D/H) each; ``blocks``, the output of each block, (..., B, T, D); ``features``, what the
                last matrix reads, (..., B, its inputs). T counts the tokens that are visible. ``swap`` holds a function
                of these features, which is taken out: the last matrix reads its result in their place.
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
        matrices = {k: weight if isinstance(weight, tuple) else weight.unbind(-3) for k, weight in weights.items()}
        biases = {kind: bias.unbind(0) for kind, bias in self.bias.items()}
        gains, offsets = self.norm_gain.unbind(0), self.norm_bias.unbind(0)
        eps, activate = self.config.norm_eps, ACTIVATIONS[self.config.activation]

        def norm(x: Tensor, row: int) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], gains[row], offsets[row], eps)

        touch = self.touch  # a block that is computed again in the backward pass has that of the forward pass
        trunk = {kind: weight.unbind(0) for kind, weight in self.trunk.items()}

        def apply(kind: str, layer: int, x: Tensor) -> Tensor:
            below = trunk.get(kind, ())
            if layer < len(below):
                return linear(x, below[layer], biases[kind][layer])
            here = layer - len(below)
            return layer_rule(kind, here, x, matrices[kind][here], biases[kind][layer])

        def block(x: Tensor, layer: int) -> Tensor:
            x = x + self._attention(norm(x, 2 * layer), apply, layer, watch)
            units = activate(apply("fc1", layer, norm(x, 2 * layer + 1)))
            x = x + apply("fc2", layer, units if touch is None else touch("hidden", layer, units))
            x = x if touch is None else touch("blocks", layer, x)
            if "blocks" in watch:
                watch["blocks"].append(x)
            return x

        head = matrices["head"][0]
        drawn = len(head) if head.dim() == 3 and images.dim() == 4 else None  # S, of the same images

        inside = watch.keys() & {"attention", "blocks"}  # what a block that is computed again would record twice
        again = self.checkpoint_activations and not inside and torch.is_grad_enabled()
        ready = self.shared if self.trunk_depth else None
        if ready:
            x = ready[0]
        else:
            with torch.no_grad() if self.frozen else nullcontext():
                x = self._embedded(images, drawn, apply, watch)
        for layer in range(self.trunk_depth if ready else 0, self.config.depth):
            if layer == self.trunk_depth > 0 and drawn is not None:
                x = x.expand(drawn, *x.shape)  # (S, B, T, D): so far all draws agree
            with torch.no_grad() if layer < self.frozen else nullcontext():
                x = checkpoint(block, x, layer, use_reentrant=False) if again else block(x, layer)
            if ready is not None and layer + 1 == self.trunk_depth and not ready:
                ready.append(x)
        if self.trunk_depth == self.config.depth and drawn is not None:
            x = x.expand(drawn, *x.shape)
        x = self._pooled(x, norm)
        if self.config.head == "mlp":
            x = F.relu(apply("head_hidden", 0, x))
        features = x.squeeze(-2)
        if "features" in watch:
            watch["features"].append(features)
        if "swap" in watch:
            features = watch["swap"].pop()(features)
        return apply("head", 0, features.unsqueeze(-2)).squeeze(-2)

    def initial_weights(self) -> Weights:
        """Xavier-uniform matrices (q, k, v each on its own), or the centre's; kind -> (layers, out, in)."""
        weights = self._xavier(self.matrix_shapes)
        for kind in weights:
            if self.centred and self.centre(kind).any():
                weights[kind] = self.centre(kind).float()
        return weights

    def _xavier(self, shapes: dict[str, tuple[int, int, int]]) -> Weights:
        weights = {}
        for kind, shape in shapes.items():
            weights[kind] = torch.empty(shape)
            fan_out = shape[1] // len(self.all_readers.matrix(kind).parts)
            limit = (6.0 / (fan_out + shape[2])) ** 0.5
            nn.init.uniform_(weights[kind], -limit, limit)
        return weights

    @torch.no_grad()
    def whole(self, weights: Weights) -> "tuple[ViT, Weights]":
        """The same network with the trunk's weights among the matrices; itself where there is no trunk.

        Args:
            weights: kind -> (layers, out, in).

        Returns:
            network and matrices of all its layers, on the CPU where something had to be copied.
        """
        if not self.trunk:
            return self, weights
        vit = ViT(self.config, *self.image_shape, classes=self.classes)
        own = {n: v for n, v in self.state_dict().items() if not n.startswith(("trunk.", "centre_"))}
        vit.load_state_dict(own)
        parts = {kind: [part[kind].cpu() for part in (self.trunk, weights) if kind in part] for kind in self.bias}
        return vit.eval(), {kind: torch.cat(part).detach() for kind, part in parts.items()}
