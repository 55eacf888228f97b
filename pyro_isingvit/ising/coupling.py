"""Ising coupling: how much of what a unit writes is still read (docs/method.md, Coupling).

    c_j = sum_R rho_R gamma_j^2 sum_k w_{R,kj}^2 pi_{R,kj} / sum_R rho_R gamma_j^2 sum_k w_{R,kj}^2

over the readers R of channel j, which ``nets.readers`` lists. Readers come later, so one sweep from the last matrix to
the first sets all masks. A coupling is a function that visits every (kind, layer) once and calls
``update(kind, layer, c)``, which returns the new retention (out, in) of that matrix; c has shape (out, 1), or (1, in)
for ``forward``. A new coupling is such a function and a row of ``COUPLINGS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_isingvit.nets.readers import Matrix, Readers, Space

Update = Callable[[str, int, Tensor], Tensor]
EPS = 1e-12


@dataclass(frozen=True)
class Network:
    """What the coupling reads of a network.

    Attributes:
        squared: kind -> (layers, out, in), w^2.
        gain: squared LayerNorm gains, a row for each LayerNorm, (rows, D).
        readers: who writes and reads which channels.
        decay: weight of a reader per step of distance.
    """

    squared: dict[str, Tensor]
    gain: Tensor
    readers: Readers
    decay: float

    def squared_of(self, matrix: Matrix) -> Tensor:
        """w^2 of one matrix, (out, in)."""
        return self.squared[matrix.kind][matrix.layer]

    def nothing(self) -> Tensor:
        """c = 0 for all weights of a matrix, (1, 1)."""
        return self.gain.new_zeros(1, 1)


@dataclass(frozen=True)
class ReaderSums:
    """Sums over the readers of each channel: read = sum w^2 pi, total = sum w^2, both (channels,).

    The ablation ``forward`` takes the same sums over the writers.
    """

    read: Tensor
    total: Tensor

    def share(self) -> Tensor:
        """c in [0, 1]; 0 where nothing reads the channel."""
        return self.read / (self.total + EPS)

    def before(self, nearer: "ReaderSums", decay: float) -> "ReaderSums":
        """Puts a nearer reader in front; these move one step away."""
        return ReaderSums(nearer.read + decay * self.read, nearer.total + decay * self.total)

    def by_head(self, heads: int) -> Tensor:
        """c of every channel, pooled over its head, (channels,)."""
        pooled = ReaderSums(self.read.view(heads, -1).sum(1), self.total.view(heads, -1).sum(1)).share()
        return pooled.repeat_interleave(len(self.read) // heads)


def _columns(squared: Tensor, retention: Tensor, gain: Tensor | None) -> ReaderSums:
    """What a matrix (out, in) reads of every channel."""
    scale = squared if gain is None else squared * gain
    return ReaderSums((scale * retention).sum(0), scale.sum(0))


def _rows(squared: Tensor, retention: Tensor) -> ReaderSums:
    """What rows (channels, in) write to every channel."""
    return ReaderSums((squared * retention).sum(1), squared.sum(1))


def _share_of_rows(matrix: Matrix, sums: ReaderSums) -> Tensor:
    """c of every row of a matrix, (out,), from the readers of what it writes."""
    c = {"own": sums.share()}
    if "head" in matrix.parts:
        c["head"] = sums.by_head(matrix.writes.heads or 1)
    return torch.cat([c[part] for part in matrix.parts])


def _backward(net: Network, update: Update, decay: float) -> None:
    """One sweep from the last matrix to the first; ``sums`` holds the readers met of each space."""
    sums: dict[Space, ReaderSums] = {}
    for matrix in reversed(net.readers.matrices):
        later = sums.get(matrix.writes)
        c = net.nothing() if later is None else _share_of_rows(matrix, later)[:, None]  # nothing reads the logits
        retention = update(matrix.kind, matrix.layer, c)
        gain = None if matrix.norm is None else net.gain[matrix.norm]
        mine, others = _columns(net.squared_of(matrix), retention, gain), sums.get(matrix.reads)
        sums[matrix.reads] = mine if others is None else others.before(mine, decay)


def all_readers(net: Network, update: Update) -> None:
    """Every later reader of a residual channel counts, with rho = decay^distance."""
    _backward(net, update, net.decay)


def nearest(net: Network, update: Update) -> None:
    """Only the next reader counts: the paper's "layer l + 1"."""
    _backward(net, update, 0.0)


def no_coupling(net: Network, update: Update) -> None:
    """Ablation: c = 0 everywhere, an independent prior."""
    for matrix in net.readers.matrices:
        update(matrix.kind, matrix.layer, net.nothing())


def forward(net: Network, update: Update) -> None:
    """Ablation: fed by the layers before instead, c of a weight is the share of its input that is still written."""
    sums: dict[Space, ReaderSums] = {}  # over the writers met of each space
    for matrix in net.readers.matrices:
        earlier = sums.get(matrix.reads)
        retention = update(matrix.kind, matrix.layer, net.nothing() if earlier is None else earlier.share()[None])
        for rows in matrix.own_rows:
            mine, others = _rows(net.squared_of(matrix)[rows], retention[rows]), sums.get(matrix.writes)
            sums[matrix.writes] = mine if others is None else others.before(mine, net.decay)


COUPLINGS: dict[str, Callable[[Network, Update], None]] = {
    "all_readers": all_readers,
    "nearest": nearest,
    "none": no_coupling,
    "forward": forward,
}
