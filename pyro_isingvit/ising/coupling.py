"""Ising coupling: how much of what a unit writes is still read (METHOD section 4).

    c_j = sum_R rho_R gamma_j^2 sum_k w_{R,kj}^2 pi_{R,kj} / sum_R rho_R gamma_j^2 sum_k w_{R,kj}^2

over the readers R of channel j. Readers come later, so one sweep from the head to the patch embedding sets all
masks. A graph is a function that visits every (kind, layer) once and calls ``update(kind, layer, c)``, which
returns the new retention (out, in) of that matrix; c has shape (out, 1), or (1, in) for ``forward``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Update = Callable[[str, int, Tensor], Tensor]
EPS = 1e-12


@dataclass(frozen=True)
class Network:
    """What the coupling reads of a network.

    Attributes:
        squared: kind -> (layers, out, in), w^2.
        gain: (2L + 1, D) squared LayerNorm gains; rows: block 0 attention, block 0 MLP, ..., final.
        heads: H.
        decay: weight of a reader per step of distance.
    """

    squared: dict[str, Tensor]
    gain: Tensor
    heads: int
    decay: float

    @property
    def depth(self) -> int:
        """L."""
        return self.squared["qkv"].shape[0]


@dataclass(frozen=True)
class Readers:
    """Sums over the readers of each channel: read = sum w^2 pi, total = sum w^2, both (channels,).

    The ablation ``forward`` takes the same sums over the writers.
    """

    read: Tensor
    total: Tensor

    def share(self) -> Tensor:
        """c in [0, 1]; 0 where nothing reads the channel."""
        return self.read / (self.total + EPS)

    def before(self, nearer: "Readers", decay: float) -> "Readers":
        """Puts a nearer reader in front; these move one step away."""
        return Readers(nearer.read + decay * self.read, nearer.total + decay * self.total)


def _readers(squared: Tensor, retention: Tensor, gain: Tensor | None = None) -> Readers:
    scale = squared if gain is None else squared * gain
    return Readers((scale * retention).sum(0), scale.sum(0))


def _attention_rows(readers: Readers, heads: int) -> Tensor:
    """c of the fused qkv rows (3D,): v row by its own output column, q and k rows by their head's columns pooled."""
    pooled = Readers(readers.read.view(heads, -1).sum(1), readers.total.view(heads, -1).sum(1)).share()
    per_row = pooled.repeat_interleave(len(readers.read) // heads)  # (D,)
    return torch.cat([per_row, per_row, readers.share()])


def _backward(net: Network, update: Update, decay: float) -> None:
    """Residual-aware sweep; ``stream`` holds the readers of the residual channels at the current depth."""
    squared, gain, last = net.squared, net.gain, 2 * net.depth
    head = update("head", 0, gain.new_zeros(1, 1))  # nothing reads the logits: no coupling
    if "head_hidden" in squared:
        top = _readers(squared["head"][0], head)
        hidden = update("head_hidden", 0, top.share()[:, None])
        stream = _readers(squared["head_hidden"][0], hidden, gain[last])
    else:
        stream = _readers(squared["head"][0], head, gain[last])
    for layer in reversed(range(net.depth)):
        fc2 = update("fc2", layer, stream.share()[:, None])
        fc1 = update("fc1", layer, _readers(squared["fc2"][layer], fc2).share()[:, None])
        stream = stream.before(_readers(squared["fc1"][layer], fc1, gain[2 * layer + 1]), decay)
        out = update("attn_out", layer, stream.share()[:, None])
        rows = _attention_rows(_readers(squared["attn_out"][layer], out), net.heads)
        qkv = update("qkv", layer, rows[:, None])
        stream = stream.before(_readers(squared["qkv"][layer], qkv, gain[2 * layer]), decay)
    update("patch", 0, stream.share()[:, None])


def all_readers(net: Network, update: Update) -> None:
    """Every later reader of a residual channel counts, with rho = decay^distance."""
    _backward(net, update, net.decay)


def nearest(net: Network, update: Update) -> None:
    """Only the next reader counts: the paper's "layer l + 1"."""
    _backward(net, update, 0.0)


def no_coupling(net: Network, update: Update) -> None:
    """Ablation: c = 0 everywhere, an independent prior."""
    for kind, squared in net.squared.items():
        for layer in range(squared.shape[0]):
            update(kind, layer, net.gain.new_zeros(1, 1))


def _writers(squared: Tensor, retention: Tensor) -> Readers:
    return Readers((squared * retention).sum(1), squared.sum(1))


def forward(net: Network, update: Update) -> None:
    """Ablation: fed by the layers before instead, c of a weight is the share of its input that is still written."""
    squared = net.squared
    stream = _writers(squared["patch"][0], update("patch", 0, net.gain.new_zeros(1, 1)))
    for layer in range(net.depth):
        qkv = update("qkv", layer, stream.share()[None])
        rows = squared["qkv"].shape[1] // 3
        values = _writers(squared["qkv"][layer, 2 * rows :], qkv[2 * rows :])
        out = update("attn_out", layer, values.share()[None])
        stream = stream.before(_writers(squared["attn_out"][layer], out), net.decay)
        fc1 = update("fc1", layer, stream.share()[None])
        fc2 = update("fc2", layer, _writers(squared["fc1"][layer], fc1).share()[None])
        stream = stream.before(_writers(squared["fc2"][layer], fc2), net.decay)
    if "head_hidden" in squared:
        stream = _writers(squared["head_hidden"][0], update("head_hidden", 0, stream.share()[None]))
    update("head", 0, stream.share()[None])


COUPLINGS: dict[str, Callable[[Network, Update], None]] = {
    "all_readers": all_readers,
    "nearest": nearest,
    "none": no_coupling,
    "forward": forward,
}
