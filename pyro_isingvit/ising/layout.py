"""What one selection mask covers, and how masks and weight-shaped fields map onto each other.

A layout is a list of mask sites, which follow from the network's ``readers``. ``expand`` spreads a site's values over
the weights of a matrix kind; ``reduce`` is its adjoint, the sum of a weight-shaped field over the weights that each
mask covers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal

from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.nets.readers import Matrix, Readers
from pyro_isingvit.nets.vit import ViT


@dataclass(frozen=True)
class Spread:
    """How a mask site lies on one matrix kind."""

    expand: Callable[[Tensor], Tensor]  # (..., *site shape) -> (..., layers, out, in) up to broadcasting
    reduce: Callable[[Tensor], Tensor]  # (layers, out, in) -> site shape
    side: Literal["out", "in", "both"] = "out"  # masks multiply what the matrix writes, what it reads, or its weights

    def channels(self, xi: Tensor) -> Tensor:
        """The factors of the channels that a matrix writes or reads (``side``): (..., layers, out or in, or 1)."""
        return self.expand(xi).squeeze(-1 if self.side == "out" else -2)


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


# Named functions, not lambdas: a model is pickled with its layout.


def _as_they_are(values: Tensor) -> Tensor:
    return values


def _widened(xi: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        xi = xi.unsqueeze(dim)
    return xi


def _summed(field: Tensor, dims: tuple[int, ...]) -> Tensor:
    return field.sum(dims)


def _whole(*dims: int, side: Literal["out", "in"] = "out") -> Spread:
    """One mask over whole axes of a matrix."""
    return Spread(partial(_widened, dims=dims), partial(_summed, dims=dims), side)


WEIGHT = Spread(_as_they_are, _as_they_are, "both")
ROW, COLUMN, BLOCK = _whole(-1), _whole(-2, side="in"), _whole(-1, -2)


def _head_rows(matrix: Matrix) -> Spread:
    """(L, H) over the rows of a matrix that writes heads: row = part * channels + head * d + t."""
    shape = (len(matrix.parts), matrix.writes.heads or 1, matrix.writes.head_size)
    return Spread(partial(_over_rows, shape=shape), partial(_sum_rows, shape=shape))


def _over_rows(xi: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return xi[..., None, :, None].expand(*xi.shape[:-1], *shape).reshape(*xi.shape[:-1], prod(shape), 1)


def _sum_rows(field: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return field.reshape(-1, *shape, field.shape[-1]).sum((1, 3, 4))


def _head_columns(matrix: Matrix) -> Spread:
    """(L, H) over the columns of a matrix that reads heads: column = head * d + t."""
    heads, d = matrix.reads.heads or 1, matrix.reads.head_size
    return Spread(partial(_over_columns, d=d), partial(_sum_columns, heads=heads, d=d), "in")


def _over_columns(xi: Tensor, d: int) -> Tensor:
    return xi.repeat_interleave(d, dim=-1).unsqueeze(-2)


def _sum_columns(field: Tensor, heads: int, d: int) -> Tensor:
    return field.reshape(-1, field.shape[-2], heads, d).sum((1, 3))


def weight_sites(readers: Readers) -> list[MaskSite]:
    """One selection variable per weight (the paper)."""
    return [
        MaskSite(kind, shape, ("layer", "out", "in"), {kind: WEIGHT}, kind) for kind, shape in readers.shapes.items()
    ]


def _unit_site(readers: Readers, kind: str) -> MaskSite:
    layers, out, width = readers.shapes[kind]
    # A class row can never be dropped without losing the class: what writes the logits drops features (columns).
    if not readers.readers(readers.matrix(kind).writes):
        return MaskSite(kind, (layers, width), ("layer", "in"), {kind: COLUMN}, kind)
    return MaskSite(kind, (layers, out), ("layer", "out"), {kind: ROW}, kind)


def _sites(readers: Readers, larger: list[MaskSite]) -> list[MaskSite]:
    """Larger sites, and units of the kinds that they leave out; in the order in which the network computes."""
    covering = {kind: site for site in larger for kind in site.spreads}
    sites = [covering.get(kind) or _unit_site(readers, kind) for kind in readers.shapes]
    return list({site.name: site for site in sites}.values())


def unit_sites(readers: Readers) -> list[MaskSite]:
    """One selection variable per output row; for the head, per input column."""
    return _sites(readers, [])


def head_sites(readers: Readers) -> list[MaskSite]:
    """One selection variable per attention head (q, k, v rows and output columns); units elsewhere."""
    larger = []
    for branch in readers.branches:
        heads = branch.inner[0].heads
        if heads is not None:
            spreads = {kind: _head_rows(readers.matrix(kind)) for kind in branch.written}
            spreads |= {kind: _head_columns(readers.matrix(kind)) for kind in branch.read}
            shape = (len(branch.inner), heads)
            larger.append(MaskSite(branch.name, shape, ("layer", "head"), spreads, branch.read[-1]))
    return _sites(readers, larger)


def block_sites(readers: Readers) -> list[MaskSite]:
    """One selection variable per attention branch and per MLP branch; units elsewhere."""
    larger = [
        MaskSite(b.name, (len(b.inner),), ("layer",), dict.fromkeys((*b.written, *b.read), BLOCK), b.read[-1])
        for b in readers.branches
    ]
    return _sites(readers, larger)


GRANULARITIES: dict[str, Callable[[Readers], list[MaskSite]]] = {
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

    Attributes:
        sites: by name.
        site_of: the site that covers a kind of matrices.

    Raises:
        UserError: unknown granularity.

    Examples:
        >>> import torch
        >>> from pyro_isingvit.core.settings import ViTConfig
        >>> vit = ViT(ViTConfig(patch_size=4, width=8, heads=2, depth=3), channels=1, height=8, width=8, classes=10)
        >>> layout = MaskLayout(vit, "head")
        >>> {name: site.shape for name, site in layout.sites.items()}
        {'patch': (1, 8), 'attention': (3, 2), 'fc1': (3, 32), 'fc2': (3, 8), 'head': (1, 8)}
        >>> ones = {kind: torch.ones(shape) for kind, shape in vit.matrix_shapes.items()}
        >>> layout.reduce(layout.sites["attention"], ones)[0]  # weights of a head: q, k, v rows and output columns
        tensor([128., 128.])
    """

    def __init__(self, vit: ViT, granularity: str) -> None:
        if granularity not in GRANULARITIES:
            raise UserError(f"unknown `granularity` {granularity!r}; known: {', '.join(GRANULARITIES)}.")
        self.granularity = granularity
        self.sites = {site.name: site for site in GRANULARITIES[granularity](vit.readers)}
        self.site_of = {kind: site for site in self.sites.values() for kind in site.spreads}

    def expand(self, kind: str, values: dict[str, Tensor]) -> Tensor:
        """The values of the site that covers ``kind``, broadcastable to (..., layers, out, in)."""
        site = self.site_of[kind]
        return site.spreads[kind].expand(values[site.name])

    def reduce(self, site: MaskSite, fields: dict[str, Tensor]) -> Tensor:
        """Sum of weight-shaped fields, kind -> (layers, out, in), over what each mask of the site covers."""
        parts = [spread.reduce(fields[kind]) for kind, spread in site.spreads.items()]
        return sum(parts[1:], start=parts[0])
