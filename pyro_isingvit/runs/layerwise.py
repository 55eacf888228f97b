"""AdamW for networks that were trained before: rates that fall from block to block, and decay towards the start.

    lr_l = layer_decay^l lr,   l = 0 head and last LayerNorm, 1 the last block, ..., L the first, L + 1 the embedding
    m <- m - lr_l decay (m - m0) - lr_l step

The first line is that of BEiT (Bao et al. 2022), the second AdamW with L2-SP (Li et al. 2018) in the place of L2.
Matrices of a kind are one parameter, stacked over the blocks: the optimiser has a view of each block.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.nets.vit import ViT

Networks = Iterable[tuple[ViT, nn.ParameterDict]]


def levels(vit: ViT, weights: nn.ParameterDict) -> dict[nn.Parameter, list[int]]:
    """How far below the head the rows of a network's parameters act: parameter -> l of each row.

    A parameter with one level for all rows has a list of one.

    Args:
        vit: the network.
        weights: its matrices, kind -> (layers, out, in).
    """
    depth, every = vit.config.depth, vit.all_readers
    inner = {kind for branch in every.branches for kind in (*branch.written, *branch.read)}
    blocks = [depth - layer for layer in range(depth)]
    found: dict[nn.Parameter, list[int]] = {}
    for kind in vit.bias:
        outside = [0] if every.writers(every.matrix(kind).reads) else [depth + 1]
        rows = blocks if kind in inner else outside
        found[vit.bias[kind]] = rows
        below = len(vit.trunk[kind]) if kind in vit.trunk else 0
        if below:
            found[vit.trunk[kind]] = rows[:below]
        if kind in weights:
            found[weights[kind]] = rows[below:]
    norms = [level for level in blocks for _ in range(2)] + [0]
    found[vit.norm_gain] = found[vit.norm_bias] = norms
    return found | {p: [depth + 1] for p in vit.parameters() if p not in found}


def _centres(networks: Networks) -> dict[nn.Parameter, list[Tensor | None]]:
    """Where each row of the matrices started, None for frozen ones; of one row alone, as it is stacked."""
    found: dict[nn.Parameter, list[Tensor | None]] = {}
    for vit, weights in networks:
        for matrices, centre in ((weights, vit.centre), (vit.trunk, vit.trunk_centre)) if vit.centred else ():
            for kind, whole in matrices.items():
                moving = centre(kind)
                rows: list[Tensor | None] = [None] * (len(whole) - len(moving))
                found[whole] = [*rows, *([moving] if len(whole) == len(moving) == 1 else moving)]
    return found


class LayerwiseAdamW(torch.optim.AdamW):
    """AdamW over rows of stacked parameters.

    Args:
        groups: of parameters, as ``Method.parameter_groups`` gives them, each with its rate.
        networks: every network that is trained, with its matrices.
        lr: of groups that name none.
        layer_decay: the factor from one level to the next.
    """

    def __init__(self, groups: list[dict[str, Any]], networks: Networks, lr: float, layer_decay: float) -> None:
        networks = list(networks)
        known = {p: rows for vit, weights in networks for p, rows in levels(vit, weights).items()}
        frozen = {
            p: vit.config.depth - vit.frozen for vit, weights in networks if vit.frozen for p in levels(vit, weights)
        }
        centres = _centres(networks)
        self._views: list[tuple[nn.Parameter, int, nn.Parameter]] = []  # whole, row, view
        self._centres: dict[nn.Parameter, Tensor] = {}
        made: list[dict[str, Any]] = []
        for group in groups:
            by_level: dict[int, list[nn.Parameter]] = {}
            for whole in group["params"]:
                rows = known.get(whole, [0])
                starts = centres.get(whole, [None] * len(rows))
                if len(rows) == 1:
                    views = [(rows[0], whole, starts[0])]
                else:
                    views = [(level, self._view(whole, row), start)
                             for row, (level, start) in enumerate(zip(rows, starts, strict=True))]  # fmt: skip
                for level, view, start in views:
                    if level > frozen.get(whole, level):
                        continue
                    by_level.setdefault(level, []).append(view)
                    if start is not None:
                        self._centres[view] = start
            for level, params in sorted(by_level.items()):
                made.append({**group, "params": params, "lr": group.get("lr", lr) * layer_decay**level})
        super().__init__(made, lr=lr, fused=True)

    def _view(self, whole: nn.Parameter, row: int) -> nn.Parameter:
        view = nn.Parameter(whole.detach()[row])  # the same memory
        self._views.append((whole, row, view))
        return view

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the whole parameters too."""
        for whole, _, view in self._views:
            view.grad = None
            if whole.grad is not None:
                whole.grad = None if set_to_none else whole.grad.zero_()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of AdamW on every view, and what the decay to 0 took back towards the start."""
        for whole, row, view in self._views:
            view.grad = None if whole.grad is None else whole.grad[row]
        found = super().step(closure)
        for group in self.param_groups:
            pull = group["lr"] * group["weight_decay"]
            pairs = [(p, self._centres[p]) for p in group["params"] if p in self._centres and p.grad is not None]
            if pull and pairs:
                torch._foreach_add_([p for p, _ in pairs], [centre for _, centre in pairs], alpha=float(pull))
        return found
