"""Pretrained transformers of timm and torchvision as a ``ViT`` with its weights, and back again.

A converter pairs every parameter of their network with a place in ours; reading and writing go through the same pairs.
A parameter without a place is something that our transformer does not compute, and the network is refused by its name.
LayerScale is folded: diag(gamma) W x + gamma b is a linear layer.

Shapes: B batch, T tokens, D width, R registers; our matrices are stacked by kind, (layers, out, in).
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.shape import ACTIVATIONS
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT, Weights

Pairs = Iterator[tuple[Tensor | None, Tensor]]  # their tensor, None where they have none, and its place in ours

# What a parameter without a place is there for, by a part of its name.
REASONS = {
    "q_norm": "queries and keys are normalised",
    "k_norm": "queries and keys are normalised",
    "attn.norm": "attention is normalised before its output",
    "mlp.norm": "the hidden units of its MLPs are normalised",
    "attn_pool": "it pools by attention",
    "dist_token": "it has a distillation token",
    "head_dist": "it has a distillation token",
    "rel_pos": "its positions are relative",
    "patch_embed.norm": "its patches are normalised",
    "patch_embed.backbone": "a convolutional network comes before its patches",
    "attn.gate": "its attention is gated",
    "conv_proj": "a convolutional stem comes before its patches",
    "pre_logits": "its head has a hidden layer with tanh",
}
HEADS = ("head", "heads", "heads.head")  # what either library calls its last layer
TOLERANCE = 1e-3  # of logits, relative to their size: beyond it, something else is computed


def from_timm(net: nn.Module) -> tuple[ViT, Weights]:
    """A ``VisionTransformer`` of timm in our form.

    Args:
        net: as ``timm.create_model`` makes it. Without a head (``num_classes=0``), the head here is the identity, and
            there are D classes.

    Returns:
        network and matrices, with vit(weights, x) equal to net.eval()(x) up to rounding.

    Raises:
        UserError: it computes what our transformer does not; the message says what.

    Examples:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> shape = dict(img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=2, num_classes=5)
        >>> net = VisionTransformer(**shape, reg_tokens=1).eval()
        >>> vit, weights = from_timm(net)
        >>> x = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(vit(weights, x), net(x), atol=1e-5)
        True
    """
    return _converted(net, _timm_shape(net), timm_pairs)


def from_torchvision(net: nn.Module) -> tuple[ViT, Weights]:
    """A ``VisionTransformer`` of torchvision (``vit_b_16`` and its like) in our form.

    Args:
        net: as ``torchvision.models.vit_b_16()`` makes it. Where ``heads`` is the identity, the head here is too, and
            there are D classes.

    Returns:
        network and matrices, with vit(weights, x) equal to net.eval()(x) up to rounding.

    Raises:
        UserError: it computes what our transformer does not; the message says what.

    Examples:
        >>> from torchvision.models import VisionTransformer
        >>> net = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=64, num_classes=5).eval()
        >>> vit, weights = from_torchvision(net)
        >>> x = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(vit(weights, x), net(x), atol=1e-5)
        True
    """
    return _converted(net, _torchvision_shape(net), torchvision_pairs)


@torch.no_grad()
def into_timm(vit: ViT, weights: Weights, net: nn.Module) -> None:
    """Writes our network into one of timm's of the same shape, in place; its LayerScales become 1.

    Raises:
        UserError: another shape, or a bias where ``net`` has none.
    """
    _written(vit, weights, net, _timm_shape(net), timm_pairs(net, vit, weights))
    first = 0
    for token in (net.cls_token, net.reg_token) if net.no_embed_class else ():
        if isinstance(token, Tensor):  # theirs have no positions: they take ours in
            token.add_(vit.position[first : first + token.shape[1]])
            first += token.shape[1]
    for block in net.blocks if isinstance(net.blocks, nn.Sequential) else ():
        for scale in (getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)):
            if scale is not None:
                scale.fill_(1.0)


@torch.no_grad()
def into_torchvision(vit: ViT, weights: Weights, net: nn.Module) -> None:
    """Writes our network into one of torchvision's of the same shape, in place.

    Raises:
        UserError: another shape.
    """
    _written(vit, weights, net, _torchvision_shape(net), torchvision_pairs(net, vit, weights))


def start_of(net: Any, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Start:
    """A network of timm or torchvision that is in memory, as a start.

    Args:
        net: of either library.
        mean: by channel, of pixels in [0, 1]; None: what timm's ``pretrained_cfg`` says, or ImageNet's.
        std: likewise.

    Raises:
        UserError: it computes what our transformer does not.
    """
    timm = type(net).__module__.startswith("timm.")
    vit, weights = (from_timm if timm else from_torchvision)(net)
    about = getattr(net, "pretrained_cfg", {}) or {}
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    usual = [about.get(name) or default for name, default in zip(("mean", "std"), imagenet, strict=True)]
    mean, std = mean or tuple(usual[0]), std or tuple(usual[1])
    channels = vit.image_shape[0]
    need(
        len(mean) == len(std) == channels,
        f"the network reads {channels} channels; give `mean` and `std` with as many numbers.",
    )
    return Start.of(vit, weights, Scale("uint8", (), (), mean, std), type(net).__name__)


# Shapes: (settings, channels, height, width, classes) --------------------------------------------------------------

Shape = tuple[ViTConfig, int, int, int, int]


def _timm_shape(net: Any) -> Shape:
    from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer

    exact = type(net) is VisionTransformer and all(type(block) is Block for block in net.blocks)
    kinds = {type(net).__name__, *(type(block).__name__ for block in getattr(net, "blocks", ()))}
    _refuse_parameters(net, exact, kinds, _timm_named(net) if exact else ())
    first, patch = net.blocks[0], net.patch_embed
    for part, usual in (("attn", Attention), ("mlp", Mlp)):
        found = {type(getattr(block, part)) for block in net.blocks}
        need(found == {usual}, f"it cannot be converted: {_names(found)} stands for {usual.__name__} in its blocks.")
    (height, width), (size, across) = patch.img_size or (0, 0), patch.patch_size
    need(size == across, f"it cannot be converted: its patches of {size}x{across} pixels are no squares.")
    pools = {"token": "cls", "avg": "mean"}
    need(net.global_pool in pools, f"it cannot be converted: it pools by {net.global_pool or 'nothing'!r}.")
    need(
        not net.pool_include_prefix or net.global_pool == "token" or not net.num_prefix_tokens,
        "it cannot be converted: its mean over tokens has CLS and registers in it.",
    )
    pooled = isinstance(net.fc_norm, nn.LayerNorm)
    final = net.fc_norm if pooled else net.norm
    need(isinstance(final, nn.LayerNorm), "it cannot be converted: it has no final LayerNorm.")
    cls = net.global_pool == "token"
    config = ViTConfig(
        patch_size=size, width=net.embed_dim, heads=first.attn.num_heads, depth=len(net.blocks),
        mlp_ratio=_ratio(first.mlp.fc1, net.embed_dim), pool="cls" if cls else "mean",
        registers=net.num_prefix_tokens - cls, activation=_activation(first.mlp.act), norm_eps=_eps(net),
        norm_pre=isinstance(net.norm_pre, nn.LayerNorm), final_norm="pooled" if pooled and not cls else "tokens",
    )  # fmt: skip
    need(not net.dynamic_img_size, "it cannot be converted: its `dynamic_img_size` is set; make it without.")
    classes = net.head.out_features if isinstance(net.head, nn.Linear) else net.embed_dim
    return config, patch.proj.in_channels, height, width, classes


def _torchvision_shape(net: Any) -> Shape:
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import EncoderBlock

    exact = type(net) is VisionTransformer and all(type(block) is EncoderBlock for block in net.encoder.layers)
    _refuse_parameters(net, exact, {type(net).__name__}, _torchvision_named(net) if exact else ())
    first = net.encoder.layers[0]
    config = ViTConfig(
        patch_size=net.patch_size, width=net.hidden_dim, heads=first.num_heads, depth=len(net.encoder.layers),
        mlp_ratio=_ratio(first.mlp[0], net.hidden_dim), pool="cls", activation=_activation(first.mlp[1]),
        norm_eps=_eps(net),
    )  # fmt: skip
    head = _torchvision_head(net)
    classes = net.hidden_dim if head is None else head.out_features
    return config, net.conv_proj.in_channels, net.image_size, net.image_size, classes


def _torchvision_head(net: Any) -> nn.Linear | None:
    """The last layer, which some replace by one of their own, or by none."""
    if isinstance(net.heads, nn.Linear):
        return net.heads
    need(
        isinstance(net.heads, nn.Identity) or isinstance(getattr(net.heads, "head", None), nn.Linear),
        f"it cannot be converted: its head is a {type(net.heads).__name__} without a linear layer `head`.",
    )
    return getattr(net.heads, "head", None)


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def _ratio(fc1: nn.Linear, width: int) -> int:
    need(
        fc1.out_features % width == 0,
        f"it cannot be converted: the {fc1.out_features} hidden units of its MLPs are no multiple of its width "
        f"{width}.",
    )
    return fc1.out_features // width


def _eps(net: nn.Module) -> float:
    found = {module.eps for module in net.modules() if isinstance(module, nn.LayerNorm)}
    need(len(found) == 1, f"it cannot be converted: its LayerNorms differ in epsilon ({sorted(found)}).")
    return found.pop()


def _activation(module: nn.Module) -> Any:
    x = torch.linspace(-3, 3, 7, device="cpu")  # also where the network is on meta
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(module(x), activation(x), rtol=0, atol=1e-6):
            return name
    raise UserError(f"it cannot be converted: the activation {module} of its MLPs is not among ours.")


def _refuse_parameters(net: nn.Module, exact: bool, kinds: set[str], named: Any) -> None:
    """Raises where the network is of another kind, or has a parameter without a place."""
    known = set(named)
    extra = [name for name, _ in net.named_parameters() if name not in known]
    why = [reason for part, reason in REASONS.items() for name in extra if part in name]
    if not exact:
        other = f"it is built from {', '.join(sorted(kinds))}"
        raise UserError(f"it cannot be converted: {'; '.join([other, *dict.fromkeys(why)])}.")
    if extra:
        reason = "; ".join(dict.fromkeys(why)) or "it computes something else"
        raise UserError(f"it cannot be converted: {reason} (no place for {extra[0]}).")


# Pairs -------------------------------------------------------------------------------------------------------------


def _timm_named(net: Any) -> Iterator[str]:
    """Names of the parameters that have a place."""
    yield from ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "reg_token", "pos_embed")
    for norm in ("norm_pre", "norm", "fc_norm", "head"):
        yield from (f"{norm}.weight", f"{norm}.bias")
    for layer in range(len(net.blocks)):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            yield from (f"blocks.{layer}.{part}.weight", f"blocks.{layer}.{part}.bias")
        yield from (f"blocks.{layer}.ls1.gamma", f"blocks.{layer}.ls2.gamma")


def timm_pairs(net: Any, vit: ViT, weights: Weights) -> Pairs:
    """Every parameter of timm's network with its place in ours."""
    bias, last = vit.bias, 2 * vit.config.depth
    yield net.patch_embed.proj.weight, weights["patch"][0]
    yield net.patch_embed.proj.bias, bias["patch"][0]
    if vit.config.pool == "cls":
        yield net.cls_token, vit.cls
    if vit.config.registers:
        first = [] if vit.config.pool == "cls" or net.cls_token is None else [net.cls_token]  # a register like others
        place: Tensor = vit.register_tokens
        for token in [*first, *([] if net.reg_token is None else [net.reg_token])]:
            yield token, place[: token.shape[1]]
            place = place[token.shape[1] :]
    yield net.pos_embed, vit.position[vit.config.prefix if net.no_embed_class else 0 :]
    if vit.config.norm_pre:
        yield net.norm_pre.weight, vit.pre_gain
        yield net.norm_pre.bias, vit.pre_bias
    for layer, block in enumerate(net.blocks):
        for row, norm in ((2 * layer, block.norm1), (2 * layer + 1, block.norm2)):
            yield norm.weight, vit.norm_gain[row]
            yield norm.bias, vit.norm_bias[row]
        linears = {"qkv": block.attn.qkv, "attn_out": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        for kind, linear in linears.items():
            yield linear.weight, weights[kind][layer]
            yield linear.bias, bias[kind][layer]
    final = net.fc_norm if isinstance(net.fc_norm, nn.LayerNorm) else net.norm
    yield final.weight, vit.norm_gain[last]
    yield final.bias, vit.norm_bias[last]
    if isinstance(net.head, nn.Linear):
        yield net.head.weight, weights["head"][0]
        yield net.head.bias, bias["head"][0]


def _torchvision_named(net: Any) -> Iterator[str]:
    yield from ("class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding")
    for part in ("encoder.ln", "heads" if isinstance(net.heads, nn.Linear) else "heads.head"):
        yield from (f"{part}.weight", f"{part}.bias")
    for layer in range(len(net.encoder.layers)):
        here = f"encoder.layers.encoder_layer_{layer}"
        yield from (f"{here}.self_attention.in_proj_weight", f"{here}.self_attention.in_proj_bias")
        for part in ("ln_1", "ln_2", "self_attention.out_proj", "mlp.0", "mlp.3"):
            yield from (f"{here}.{part}.weight", f"{here}.{part}.bias")


def torchvision_pairs(net: Any, vit: ViT, weights: Weights) -> Pairs:
    """Every parameter of torchvision's network with its place in ours."""
    bias, last = vit.bias, 2 * vit.config.depth
    yield net.conv_proj.weight, weights["patch"][0]
    yield net.conv_proj.bias, bias["patch"][0]
    yield net.class_token, vit.cls
    yield net.encoder.pos_embedding, vit.position
    for layer, block in enumerate(net.encoder.layers):
        for row, norm in ((2 * layer, block.ln_1), (2 * layer + 1, block.ln_2)):
            yield norm.weight, vit.norm_gain[row]
            yield norm.bias, vit.norm_bias[row]
        attention = block.self_attention
        yield attention.in_proj_weight, weights["qkv"][layer]
        yield attention.in_proj_bias, bias["qkv"][layer]
        for kind, linear in {"attn_out": attention.out_proj, "fc1": block.mlp[0], "fc2": block.mlp[3]}.items():
            yield linear.weight, weights[kind][layer]
            yield linear.bias, bias[kind][layer]
    yield net.encoder.ln.weight, vit.norm_gain[last]
    yield net.encoder.ln.bias, vit.norm_bias[last]
    if (head := _torchvision_head(net)) is not None:
        yield head.weight, weights["head"][0]
        yield head.bias, bias["head"][0]


# Reading and writing -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _converted(net: nn.Module, shape: Shape, pairs: Any) -> tuple[ViT, Weights]:
    device = next(net.parameters()).device
    with device:
        vit = ViT(*shape)
        weights = {kind: torch.zeros(size) for kind, size in vit.matrix_shapes.items()}
    vit.position.zero_()
    for theirs, place in pairs(net, vit, weights):
        if theirs is not None:
            place.copy_(theirs.reshape(place.shape))
    if not any(isinstance(part, nn.Linear) for name, part in net.named_modules() if name in HEADS):
        weights["head"][0].copy_(torch.eye(shape[0].width))
    for layer, block in enumerate(getattr(net, "blocks", ())):
        for kind, scale in (("attn_out", block.ls1), ("fc2", block.ls2)):
            if (gamma := getattr(scale, "gamma", None)) is not None:
                weights[kind][layer].mul_(gamma.unsqueeze(-1))
                vit.bias[kind][layer].mul_(gamma)
    if device.type != "meta":
        _check_equal(net, vit, weights)
    return vit.eval(), weights


def _check_equal(net: nn.Module, vit: ViT, weights: Weights) -> None:
    """One image through both networks, with a random head in both: what no rule above foresaw is refused too."""
    x = torch.randn(1, *vit.image_shape, generator=torch.Generator().manual_seed(0)).to(vit.position)
    training = net.training
    single = net if next(net.parameters()).dtype == x.dtype else copy.deepcopy(net).float()
    heads = [part for name, part in single.named_modules() if name in HEADS and isinstance(part, nn.Linear)]
    own = [head.weight.data for head in heads]
    made = torch.randn(weights["head"].shape, generator=torch.Generator().manual_seed(1)).to(x)  # theirs may be 0
    try:
        for head in heads:
            head.weight.data = made[0]
        theirs, ours = single.eval()(x), vit({**weights, "head": made} if heads else weights, x)
    finally:
        for head, weight in zip(heads, own, strict=True):
            head.weight.data = weight
        net.train(training)
    gap, size = float((theirs - ours).abs().max()), float(theirs.abs().max())
    need(gap <= TOLERANCE * max(size, 1.0), f"it cannot be converted: its logits differ by {gap:.2g} from ours.")


def _written(vit: ViT, weights: Weights, net: nn.Module, shape: Shape, pairs: Pairs) -> None:
    own = (vit.config, *vit.image_shape, vit.classes)
    need(shape == own, f"the networks differ in shape: {shape} there, {own} here.")
    for theirs, place in pairs:
        if theirs is not None:
            theirs.copy_(place.reshape(theirs.shape))
        else:
            need(not place.any(), "a bias of ours is not 0 where the other network has none.")
