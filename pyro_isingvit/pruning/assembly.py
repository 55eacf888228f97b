"""How zeros become structure: the compact network of given matrices.

Whatever cannot act any more is removed:

    hidden unit    fc1 row or fc2 column all zero            constant gelu(b) goes to fc2's bias
    value channel  v row or attention-output column zero     constant b_v goes to the output's bias (softmax sums to 1)
    score channel  k row zero: q_i b_k is the same for all keys, which softmax ignores; or q row zero and b_q = 0
                   q row zero, b_q != 0: the head's b_q_i k_i(x) add up to one channel with the constant query 1
    head           no value channel; without score channels it is the mean over the tokens
    branch         nothing left of it: its constant goes to whatever wrote to the residual stream before it

All of it is exact. Zero rows of what writes to the residual stream stay: a scatter into the stream costs as much time
as the product it saves (docs/pruning.md).

Where rows, heads, LayerNorms and constants are is read off the network's ``readers``; kinds of matrices are named where
the compact network has a module for them.

Shapes: D width, H heads, d channels of a head, F hidden units.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.pruning.posterior import Posterior
from pyro_isingvit.pruning.shapes import CompactConfig, LayerShape, PosteriorShape


@dataclass(frozen=True)
class PosteriorParts:
    """What the form ``bayes`` keeps in addition to the means: by kind, over all layers."""

    scale: Weights  # s, (layers, out, in)
    retention: Weights  # pi, 0 where cut, (layers, out, in)
    index: dict[str, Tensor] | None  # number of the mask within its site, (layers, out or 1, in or 1); None: by weight
    site_of: dict[str, str]
    masks: dict[str, Tensor]  # site -> pi of its masks, 0 where cut, and one 0 more
    trunk: Mapping[str, int] = field(default_factory=dict)  # kind -> its first layers, which are not drawn


@dataclass
class HeadPlan:
    """What is left of one attention head; indices within the head."""

    score: list[int]
    value: list[int]
    constant: bool = False  # one more score channel: the sum of those whose query is a constant


@dataclass
class LayerPlan:
    """What is left of one block."""

    heads: dict[int, HeadPlan] = field(default_factory=dict)
    hidden: list[int] = field(default_factory=list)

    @property
    def attending(self) -> dict[int, HeadPlan]:
        """Heads with scores."""
        return {h: plan for h, plan in self.heads.items() if plan.score or plan.constant}

    @property
    def uniform(self) -> dict[int, HeadPlan]:
        """Heads whose attention is the mean over the tokens."""
        return {h: plan for h, plan in self.heads.items() if not (plan.score or plan.constant)}

    def shape(self) -> LayerShape:
        """Sizes, those of the heads padded to the largest."""
        attending = self.attending.values()
        return LayerShape(
            heads=len(attending),
            query=max((len(plan.score) + plan.constant for plan in attending), default=0),
            value=max((len(plan.value) for plan in attending), default=0),
            uniform=sum(len(plan.value) for plan in self.uniform.values()),
            hidden=len(self.hidden),
        )


def plan_layer(vit: ViT, alive: Mapping[str, Tensor], layer: int, merge_queries: bool) -> LayerPlan:
    """Which heads, channels and hidden units of a block can act.

    Args:
        vit: the network, for its biases and shape.
        alive: kind -> (layers, out, in) bool, where a weight may differ from 0.
        layer: of the block.
        merge_queries: add up the score channels of constant queries; otherwise they stay as they are.
    """
    space = vit.readers.matrix("qkv", layer).writes
    heads, dim = space.heads or 1, space.head_size
    q, k, v = alive["qkv"][layer].any(1).view(3, heads, dim)
    bias = (vit.bias["qkv"][layer].view(3, heads, dim)[0] != 0).cpu()
    value = v & alive["attn_out"][layer].any(0).view(heads, dim)
    fixed = k & ~q & bias
    score = k & q if merge_queries else (k & q) | fixed
    plan = LayerPlan(hidden=_where(alive["fc1"][layer].any(1) & alive["fc2"][layer].any(0)))
    for h in range(heads):
        if bool(value[h].any()):
            merged = merge_queries and bool(fixed[h].any())
            plan.heads[h] = HeadPlan(_where(score[h]), _where(value[h]), merged)
    return plan


def structure(alive: Mapping[str, Tensor], heads: int) -> list[dict[str, list[float]]]:
    """What is left of every block, for drawing; exact removal (``plan_layer``) goes a little further.

    Args:
        alive: kind -> (layers, out, in) bool, where a weight may differ from 0.
        heads: H.

    Returns:
        for each block: ``value`` and ``score``, shares of the value and of the query-key channels of each head (H,);
        ``hidden``, 1 for each unit of the MLP that is left (F,).
    """
    layers = []
    for layer in range(len(alive["qkv"])):
        q, k, v = alive["qkv"][layer].any(1).view(3, heads, -1)
        value = v & alive["attn_out"][layer].any(0).view(heads, -1)
        hidden = alive["fc1"][layer].any(1) & alive["fc2"][layer].any(0)
        layers.append(
            {
                "value": value.double().mean(1).tolist(),
                "score": ((q & k) * value.any(1, keepdim=True)).double().mean(1).tolist(),
                "hidden": hidden.double().tolist(),
            }
        )
    return layers


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


@torch.no_grad()
def assemble(vit: ViT, info: DataInfo, weights: Weights, posterior: PosteriorParts | None = None) -> CompactViT:
    """The compact network of given matrices, equal to ``vit(weights, x)`` up to rounding.

    Args:
        vit: the whole network, for its biases, norms, positions and shape.
        info: what the images look like.
        weights: kind -> (layers, out, in), zeros where masks are off.
        posterior: makes the form ``bayes``; None the form ``mean``.

    Returns:
        the network in evaluation mode, on the CPU, at temperature 1.

    Raises:
        UserError: the logits no longer depend on the image.
    """
    return _Assembly(vit, info, weights, posterior).model.eval()


class _Assembly:
    """Builds one compact network: plans every layer, then places rows and columns of the matrices."""

    def __init__(self, vit: ViT, info: DataInfo, weights: Weights, posterior: PosteriorParts | None) -> None:
        self.vit, self.readers, self.posterior = vit, vit.readers, posterior
        self.weights = {kind: weight.detach().cpu() for kind, weight in weights.items()}
        self.bias = {kind: bias.detach().cpu() for kind, bias in vit.bias.items()}
        alive = self.weights if posterior is None else posterior.retention
        self.alive = {kind: field != 0 for kind, field in alive.items()}
        self._check_something_is_left()
        merge = posterior is None  # a sum of channels under masks of their own is no channel under one mask
        self.plans = [plan_layer(vit, self.alive, layer, merge) for layer in range(vit.config.depth)]
        two_layers = "head_hidden" in self.alive
        self.features = _where(self.alive["head_hidden" if two_layers else "head"][0].any(0))
        self.top = _where(self._hidden_of_head()) if two_layers else None
        self.placed: dict[str, tuple[str, int, list[int], list[int]]] = {}
        self.model = CompactViT(self._config(info))
        self._place_all()

    def _check_something_is_left(self) -> None:
        skipped = {kind for branch in self.readers.branches for kind in (*branch.written, *branch.read)}
        for kind in self.readers.shapes:
            if kind not in skipped and not bool(self.alive[kind].any()):
                raise UserError(
                    f"nothing is left of the network: every weight of {kind!r} is dropped, so that the classes no "
                    "longer depend on the image; lower `threshold` or raise `keep`."
                )
        if "head_hidden" in self.alive:
            need(
                self._hidden_of_head().any(),
                "nothing is left of the network: no unit of the two-layer head; lower `threshold` or raise `keep`.",
            )

    def _hidden_of_head(self) -> Tensor:
        """Which units of a two-layer head are written and read."""
        return self.alive["head_hidden"][0].any(1) & self.alive["head"][0].any(0)

    # Rows and columns: -1 stands for zeros ------------------------------------------------------------------------

    def _blocks(self) -> None:
        """Fills ``placed``: module path -> kind, layer, rows, columns."""
        patch = self.readers.matrix("patch")
        everything = list(range(patch.writes.size))
        for layer, plan in enumerate(self.plans):
            shape, path = plan.shape(), f"blocks.{layer}"
            space = self.readers.matrix("qkv", layer).writes
            dim, size = space.head_size, space.size
            queries: list[int] = []
            keys: list[int] = []
            values: list[int] = []
            columns: list[int] = []
            for h, head in plan.attending.items():
                extra = 3 * size + 2 * h  # rows appended by _matrix: constant query and key of head h
                score = [h * dim + i for i in head.score]
                queries += _pad(score + [extra] * head.constant, shape.query)
                keys += _pad([size + i for i in score] + [extra + 1] * head.constant, shape.query)
                values += _pad([2 * size + h * dim + i for i in head.value], shape.value)
                columns += _pad([h * dim + i for i in head.value], shape.value)
            uniform = [h * dim + i for h, head in plan.uniform.items() for i in head.value]
            if shape.heads:
                self.placed[f"{path}.attention.qkv"] = ("qkv", layer, queries + keys + values, everything)
                self.placed[f"{path}.attention.out"] = ("attn_out", layer, everything, columns)
            if shape.uniform:
                rows = [2 * size + i for i in uniform]
                self.placed[f"{path}.attention.uniform_value"] = ("qkv", layer, rows, everything)
                self.placed[f"{path}.attention.uniform_out"] = ("attn_out", layer, everything, uniform)
            if shape.hidden:
                self.placed[f"{path}.fc1"] = ("fc1", layer, plan.hidden, everything)
                self.placed[f"{path}.fc2"] = ("fc2", layer, everything, plan.hidden)
        classes = list(range(self.vit.classes))
        self.placed["patch"] = ("patch", 0, everything, list(range(patch.reads.size)))
        if self.top is not None:
            self.placed["head_hidden"] = ("head_hidden", 0, self.top, self.features)
        self.placed["head"] = ("head", 0, classes, self.features if self.top is None else self.top)

    def _config(self, info: DataInfo) -> CompactConfig:
        self._blocks()
        config = self.vit.config
        sites, posteriors = {}, {}
        if self.posterior is not None:
            sites = {name: tuple(pi.shape) for name, pi in self.posterior.masks.items()}
            for path, (kind, layer, rows, columns) in self.placed.items():
                if layer < self.posterior.trunk.get(kind, 0):
                    continue
                index, site = None, path.replace(".", "_")
                if self.posterior.index is None:
                    sites[site] = (len(rows), len(columns))
                else:
                    full, site = self.posterior.index[kind].shape, self.posterior.site_of[kind]
                    index = (len(rows) if full[1] > 1 else 1, len(columns) if full[2] > 1 else 1)
                scale = self.posterior.scale[kind]
                shared = bool((scale == scale.flatten()[0]).all())
                shape = () if shared else (len(rows), len(columns))
                posteriors[path] = PosteriorShape(site, shape, index, self._masked_by_row(kind))
        return CompactConfig(
            dataset=info.dataset, classes=info.classes, image_shape=self.vit.image_shape, mean=info.mean, std=info.std,
            kind=info.kind, low=info.low, high=info.high,
            patch_size=config.patch_size, width=self.readers.matrix("patch").writes.size,
            head_dim=self.readers.matrix("attn_out").reads.head_size, pool=config.pool,
            features=len(self.features), head_hidden=None if self.top is None else len(self.top),
            layers=tuple(plan.shape() for plan in self.plans), form="mean" if self.posterior is None else "bayes",
            sites=sites, posteriors=posteriors, patch_stride=config.patch_stride, stem=config.stem,
            registers=config.registers, activation=config.activation, norm_eps=config.norm_eps,
            norm_pre=config.norm_pre, final_norm=config.final_norm,
        )  # fmt: skip

    def _matrix(self, kind: str, layer: int) -> tuple[Tensor, Tensor]:
        """Weight and bias, with the constant query and its key of every head appended to qkv."""
        weight, bias = self.weights[kind][layer], self.bias[kind][layer]
        if kind != "qkv":
            return weight, bias
        space = self.readers.matrix(kind, layer).writes
        size, heads = space.size, space.heads or 1
        keys = weight[size : 2 * size]
        fixed = torch.where(self.alive["qkv"][layer, :size].any(1), 0.0, bias[:size])  # b_q where the query is one
        summed = (fixed[:, None] * keys).view(heads, -1, weight.shape[1]).sum(1)  # sum_i b_q_i k_i(x), bias ignored
        extra = torch.stack([torch.zeros_like(summed), summed], 1).flatten(0, 1)
        ones = torch.tensor([1.0, 0.0]).to(bias).repeat(heads)
        return torch.cat([weight, extra]), torch.cat([bias, ones])

    # What is constant ---------------------------------------------------------------------------------------------

    def _constants(self, kind: str, layer: int) -> Tensor | None:
        """The constants that the dropped inputs of a matrix have become, (in,); 0 for all other inputs."""
        matrix = self.readers.matrix(kind, layer)
        space, writers = matrix.reads, self.readers.writers(matrix.reads)
        if matrix.norm is not None or not writers:  # the residual stream, or the image
            return None
        [writer] = writers
        [rows] = writer.own_rows
        bias, alive = (values[writer.kind][writer.layer][rows] for values in (self.bias, self.alive))
        constants = bias if space.activation is None else space.activation(bias)
        return torch.where(alive.any(1), 0.0, constants)

    def _fold(self, kind: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the constants send through a matrix, (out,): through the means m of its weights, as they are placed;
        mean and standard deviation over draws, under row masks of those that are on.
        """  # noqa: D205
        weight, g = self.weights[kind][layer].double(), self._constants(kind, layer)
        nothing = torch.zeros(len(weight))
        if g is None:
            return nothing, nothing, nothing
        g, parts = g.double(), self.posterior
        sent = (weight @ g).float()
        if parts is None or layer < parts.trunk.get(kind, 0):
            return sent, sent, nothing
        scale, pi = parts.scale[kind][layer].double(), parts.retention[kind][layer].double()
        if self._masked_by_row(kind):
            return sent, sent, ((scale**2) @ g**2).sqrt().float()
        variance = pi * (scale**2 + weight**2) - (pi * weight) ** 2
        return sent, ((pi * weight) @ g).float(), (variance @ g**2).sqrt().float()

    def _masked_by_row(self, kind: str) -> bool:
        index = None if self.posterior is None else self.posterior.index
        return index is not None and index[kind].shape[2] == 1

    # Placing ------------------------------------------------------------------------------------------------------

    def _place_all(self) -> None:
        model, vit = self.model, self.vit
        model.position.copy_(vit.position)
        if vit.config.pool == "cls":
            model.cls.copy_(vit.cls)
        if model.stem is not None and vit.stem is not None:
            model.stem.load_state_dict(vit.stem.state_dict())
        if vit.config.registers:
            model.register_tokens.copy_(vit.register_tokens)
        if vit.config.norm_pre:
            model.norm_pre.weight.copy_(vit.pre_gain)
            model.norm_pre.bias.copy_(vit.pre_bias)
        if model.features is not None:
            model.features.copy_(torch.tensor(self.features))
        for name, pi in () if self.posterior is None else self.posterior.masks.items():
            model.get_buffer(f"retention_{name}").copy_(pi)
        for path in self.placed:
            self._place(path)
        norms = {"norm": ("head" if self.top is None else "head_hidden", 0)}  # module path -> what reads through it
        for layer, plan in enumerate(self.plans):
            if plan.heads:
                norms[f"blocks.{layer}.attention_norm"] = ("qkv", layer)
            if plan.hidden:
                norms[f"blocks.{layer}.mlp_norm"] = ("fc1", layer)
        for path, reader in norms.items():
            norm, row = model.get_submodule(path), self.readers.matrix(*reader).norm
            assert isinstance(norm, nn.LayerNorm) and row is not None
            norm.weight.copy_(vit.norm_gain[row])
            norm.bias.copy_(vit.norm_bias[row])
        self._carry_constants()

    def _place(self, path: str) -> None:
        kind, layer, rows, columns = self.placed[path]
        weight, bias = self._matrix(kind, layer)
        linear = self.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(_take(weight, rows, columns))
        sent, mean, deviation = self._fold(kind, layer)
        owns_bias = linear.bias is not None
        folds = owns_bias and self._constants(kind, layer) is not None
        if owns_bias:
            linear.bias.copy_(_take(bias[:, None], rows, [0])[:, 0])
        if folds:
            linear.bias.add_(sent[rows])
        if self.posterior is None or layer < self.posterior.trunk.get(kind, 0):
            return
        kept = self.model.posteriors[path.replace(".", "__")]
        assert isinstance(kept, Posterior)
        scale = self.posterior.scale[kind][layer]
        kept.scale.copy_(scale[0, 0] if kept.scale.dim() == 0 else _take(scale, rows, columns))
        if folds:
            kept.fold_loc.copy_((sent if kept.by_row else mean - sent)[rows])
            kept.fold_scale.copy_(deviation[rows])
        if kept.index is None:
            pi = self.model.get_buffer(f"retention_{kept.site}")
            pi.copy_(_take(self.posterior.retention[kind][layer], rows, columns))
            return
        assert self.posterior.index is not None
        never = len(self.posterior.masks[kept.site]) - 1
        index = self.posterior.index[kind][layer]
        rows, columns = (n if size > 1 else [0] for n, size in zip((rows, columns), index.shape, strict=True))
        taken = _take(index + 1, rows, columns) - 1
        kept.index.copy_(torch.where(taken < 0, never, taken))

    def _carry_constants(self) -> None:
        """An empty branch is a constant; whatever wrote to the stream before it adds that constant."""
        target: Tensor = self.model.norm_pre.bias if self.vit.config.norm_pre else self.model.position
        for layer, plan in enumerate(self.plans):
            here = f"blocks.{layer}"
            writer = f"{here}.attention.{'out' if plan.attending else 'uniform_out'}"
            for kind, there, path in (("attn_out", plan.heads, writer), ("fc2", plan.hidden, f"{here}.fc2")):
                if there:
                    target = self.model.get_parameter(f"{path}.bias")
                    continue
                _, mean, _ = self._fold(kind, layer)  # of its spread, the form bayes keeps the mean alone
                if self.posterior is not None and self._masked_by_row(kind):
                    mean = mean * self.posterior.retention[kind][layer, :, 0]
                target.add_(self.bias[kind][layer] + mean)


def _pad(rows: list[int], length: int) -> list[int]:
    return rows + [-1] * (length - len(rows))


def _take(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Rows and columns of a matrix; -1 takes zeros."""
    return F.pad(matrix, (0, 1, 0, 1))[rows][:, columns]
