"""A compact network back in the form that trains: a ``ViT`` with zeros where units were cut.

What was cut stays cut while ordinary weights train: a hidden unit whose rows and columns are all zero has no gradient.
The noise of an Ising posterior gives it one, and a unit may come back.

Shapes: D width, H heads, d channels of a head, F hidden units.
"""

import torch
from torch import Tensor, nn

from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.pruning.network import Attention, Block, CompactViT


@torch.no_grad()
def expanded(network: CompactViT) -> tuple[ViT, Weights]:
    """The network before it was cut, up to the order of its heads and hidden units.

    Args:
        network: of either form; of ``bayes`` the means are taken.

    Returns:
        network and matrices, kind -> (layers, out, in), with vit(weights, x) equal to the logits of ``network`` times
        its temperature, up to rounding.
    """
    config = network.config
    heads = config.width // config.head_dim
    hidden = max((shape.hidden for shape in config.layers), default=1)
    shape = ViTConfig(
        patch_size=config.patch_size, width=config.width, heads=heads, depth=len(config.layers),
        mlp_ratio=max(1, -(-hidden // config.width)), pool=config.pool,  # type: ignore[arg-type]
        head="linear" if config.head_hidden is None else "mlp", patch_stride=config.patch_stride, stem=config.stem,  # type: ignore[arg-type]
        registers=config.registers, activation=config.activation,  # type: ignore[arg-type]
        norm_eps=config.norm_eps, norm_pre=config.norm_pre, final_norm=config.final_norm,  # type: ignore[arg-type]
    )  # fmt: skip
    vit = ViT(shape, *config.image_shape, classes=len(config.classes))
    weights = {kind: torch.zeros(size) for kind, size in vit.matrix_shapes.items()}
    _take(network.patch, weights["patch"][0], vit.bias["patch"][0])
    vit.position.copy_(network.position)
    if config.pool == "cls":
        vit.cls.copy_(network.cls)
    if vit.stem is not None and network.stem is not None:
        vit.stem.load_state_dict(network.stem.state_dict())
    if config.registers:
        vit.register_tokens.copy_(network.register_tokens)
    if config.norm_pre:
        vit.pre_gain.copy_(network.norm_pre.weight)
        vit.pre_bias.copy_(network.norm_pre.bias)
    for layer, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        if block.has_attention:
            _norm(block.attention_norm, vit, 2 * layer)
            _attention(block.attention, vit, weights, layer, config.head_dim)
        if block.has_mlp:
            _norm(block.mlp_norm, vit, 2 * layer + 1)
            _take(block.fc1, weights["fc1"][layer], vit.bias["fc1"][layer])
            _take(block.fc2, weights["fc2"][layer], vit.bias["fc2"][layer])
    _norm(network.norm, vit, 2 * len(network.blocks))
    columns = torch.arange(config.features) if network.features is None else network.features
    if config.head_hidden is not None:
        _take(network.head_hidden, weights["head_hidden"][0], vit.bias["head_hidden"][0], columns=columns)
        columns = torch.arange(config.head_hidden)
    _take(network.head, weights["head"][0], vit.bias["head"][0], columns=columns)
    return vit.eval(), weights


def _take(
    linear: nn.Linear, weight: Tensor, bias: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Places a layer at some rows and columns of a larger one; the first ones where none are given."""
    out, inputs = linear.weight.shape
    rows = torch.arange(out) if rows is None else rows
    columns = torch.arange(inputs) if columns is None else columns
    weight[rows[:, None], columns] = linear.weight.to(weight)
    if linear.bias is not None:
        bias[rows] = bias[rows] + linear.bias.to(bias)


def _norm(norm: nn.Module, vit: ViT, row: int) -> None:
    assert isinstance(norm, nn.LayerNorm)
    vit.norm_gain[row].copy_(norm.weight)
    vit.norm_bias[row].copy_(norm.bias)


def _attention(attention: Attention, vit: ViT, weights: Weights, layer: int, dim: int) -> None:
    """Heads that attend come first; the values of uniform ones fill the heads after them, whose scores are 0."""
    shape, width = attention.shape, vit.config.width
    qkv, out = weights["qkv"][layer], weights["attn_out"][layer]
    bias = vit.bias["qkv"][layer]

    def channels(count: int) -> Tensor:
        """The first ``count`` channels of every head that attends."""
        return (dim * torch.arange(shape.heads)[:, None] + torch.arange(count)).flatten()

    if shape.heads:
        values = channels(shape.value)
        rows = torch.cat([channels(shape.query), width + channels(shape.query), 2 * width + values])
        _take(attention.qkv, qkv, bias, rows)
        _take(attention.out, out, vit.bias["attn_out"][layer], columns=values)
    if shape.uniform:
        values = dim * shape.heads + torch.arange(shape.uniform)
        _take(attention.uniform_value, qkv, bias, 2 * width + values)
        _take(attention.uniform_out, out, vit.bias["attn_out"][layer], columns=values)
