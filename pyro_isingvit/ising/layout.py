"""What one selection mask covers, and how masks and weight-shaped fields map onto each other.

A layout is a list of mask sites. ``expand`` spreads a site's values over the weights of a matrix kind;
``reduce`` is its adjoint, the sum of a weight-shaped field over the weights that each mask covers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.nets.vit import ViT


@dataclass(frozen=True)
class Spread:
    """How a mask site lies on one matrix kind."""

    expand: Callable[[Tensor], Tensor]  # (..., *site shape) -> (..., layers, out, in) up to broadcasting
    reduce: Callable[[Tensor], Tensor]  # (layers, out, in) -> site shape


@dataclass(frozen=True)
class MaskSite:
    """One ``pyro.sample`` site of selection masks.

    Attributes:
        name: the site is sampled as ``xi_<name>``.
        shape: (layers, ...), one selection variable per entry.
        dims: names of the axes of ``shape``: layer, then out, in or head.
        spreads: the matrix kinds that the site covers.
        coupled_kind: the kind whose readers couple to this site.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    spreads: dict[str, Spread]
    coupled_kind: str


WEIGHT = Spread(lambda xi: xi, lambda field: field)
ROW = Spread(lambda xi: xi.unsqueeze(-1), lambda field: field.sum(-1))
COLUMN = Spread(lambda xi: xi.unsqueeze(-2), lambda field: field.sum(-2))


def _head_rows(heads: int, width: int) -> Spread:
    """(L, H) over the q, k and v rows of the fused qkv matrix: row = part * D + head * d + t."""

    def expand(xi: Tensor) -> Tensor:
        rows = xi[..., None, :, None].expand(*xi.shape[:-1], 3, heads, width // heads)
        return rows.reshape(*xi.shape[:-1], 3 * width, 1)

    return Spread(expand, lambda field: field.reshape(-1, 3, heads, width // heads, width).sum((1, 3, 4)))


def _head_columns(heads: int, width: int) -> Spread:
    """(L, H) over the columns of the attention output: column = head * d + t."""

    def expand(xi: Tensor) -> Tensor:
        return xi.repeat_interleave(width // heads, dim=-1).unsqueeze(-2)

    return Spread(expand, lambda field: field.reshape(-1, width, heads, width // heads).sum((1, 3)))


def weight_sites(vit: ViT) -> list[MaskSite]:
    """One selection variable per weight (the paper)."""
    return [
        MaskSite(kind, shape, ("layer", "out", "in"), {kind: WEIGHT}, kind) for kind, shape in vit.matrix_shapes.items()
    ]


def _unit_site(kind: str, shape: tuple[int, int, int]) -> MaskSite:
    # A class row can never be dropped without losing the class: the head drops features (columns) instead.
    if kind == "head":
        return MaskSite(kind, (shape[0], shape[2]), ("layer", "in"), {kind: COLUMN}, kind)
    return MaskSite(kind, shape[:2], ("layer", "out"), {kind: ROW}, kind)


def unit_sites(vit: ViT) -> list[MaskSite]:
    """One selection variable per output row; for the head, per input column."""
    return [_unit_site(kind, shape) for kind, shape in vit.matrix_shapes.items()]


def head_sites(vit: ViT) -> list[MaskSite]:
    """One selection variable per attention head (q, k, v rows and output columns); units elsewhere."""
    heads, width, depth = vit.config.heads, vit.config.width, vit.config.depth
    spreads = {"qkv": _head_rows(heads, width), "attn_out": _head_columns(heads, width)}
    attention = MaskSite("attention", (depth, heads), ("layer", "head"), spreads, "attn_out")
    others = [_unit_site(kind, shape) for kind, shape in vit.matrix_shapes.items() if kind not in spreads]
    return [others[0], attention, *others[1:]]


BLOCK = Spread(lambda xi: xi[..., None, None], lambda field: field.sum((-1, -2)))


def block_sites(vit: ViT) -> list[MaskSite]:
    """One selection variable per attention branch and per MLP branch; units elsewhere."""
    shape = (vit.config.depth,)
    attention = MaskSite("attention", shape, ("layer",), {"qkv": BLOCK, "attn_out": BLOCK}, "attn_out")
    mlp = MaskSite("mlp", shape, ("layer",), {"fc1": BLOCK, "fc2": BLOCK}, "fc2")
    covered = {*attention.spreads, *mlp.spreads}
    others = [_unit_site(kind, shape3) for kind, shape3 in vit.matrix_shapes.items() if kind not in covered]
    return [others[0], attention, mlp, *others[1:]]


GRANULARITIES: dict[str, Callable[[ViT], list[MaskSite]]] = {
    "weight": weight_sites,
    "unit": unit_sites,
    "head": head_sites,
    "block": block_sites,
}


class MaskLayout:
    """The mask sites of a network at one granularity.

    Args:
        vit: the network.
        granularity: a name in ``GRANULARITIES``.

    Raises:
        UserError: unknown granularity.
    """

    def __init__(self, vit: ViT, granularity: str) -> None:
        if granularity not in GRANULARITIES:
            raise UserError(f"unknown granularity {granularity!r}; known: {', '.join(GRANULARITIES)}.")
        self.granularity = granularity
        self.sites = {site.name: site for site in GRANULARITIES[granularity](vit)}
        self.site_of = {kind: site for site in self.sites.values() for kind in site.spreads}

    def expand(self, kind: str, values: dict[str, Tensor]) -> Tensor:
        """The values of the site that covers ``kind``, broadcastable to (..., layers, out, in)."""
        site = self.site_of[kind]
        return site.spreads[kind].expand(values[site.name])

    def reduce(self, site: MaskSite, fields: dict[str, Tensor]) -> Tensor:
        """Sum of weight-shaped fields, kind -> (layers, out, in), over what each mask of the site covers."""
        parts = [spread.reduce(fields[kind]) for kind, spread in site.spreads.items()]
        return sum(parts[1:], start=parts[0])
