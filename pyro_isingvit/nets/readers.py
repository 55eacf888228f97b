"""Who writes and who reads which channels: what coupling, mask layout and pruning know of a network's structure.

A network is a list of matrices in the order of computation. The columns of each read one space of channels, its rows
write another:

    image -patch-> stream -qkv-> attention -attn_out-> stream -fc1-> mlp -fc2-> stream -qkv-> ...
    ... stream -head-> logits, or stream -head_hidden-> top -head-> logits

Shapes: D width, H heads, L blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Part = Literal["own", "head"]


@dataclass(frozen=True)
class Space:
    """Channels that some matrices write and others read.

    Attributes:
        name: spaces of one name are alike, one in every block.
        size: number of channels.
        block: of the block that it lies in; None outside.
        heads: the channels are as many equal, contiguous groups: attention heads.
        activation: stands between writers and readers, so that a channel that is written by no weight is the constant
            activation(bias); None: the identity.
    """

    name: str
    size: int
    block: int | None = None
    heads: int | None = None
    activation: Callable[[Tensor], Tensor] | None = None

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.size // (self.heads or 1)


@dataclass(frozen=True)
class Matrix:
    """One matrix, (out, in).

    Attributes:
        kind: matrices of one kind have the same shape and are stacked, (layers, out, in).
        layer: its number within the kind.
        reads: column j reads channel j of this space.
        writes: its rows write this space, as ``parts`` says.
        norm: row of the LayerNorm gains between the channels and the columns; None: no LayerNorm.
        parts: its rows from top to bottom, a row for each channel in each part. "own": row j writes channel j. "head":
            row j acts through all channels of the head that channel j belongs to, as queries and keys do.
    """

    kind: str
    layer: int
    reads: Space
    writes: Space
    norm: int | None = None
    parts: tuple[Part, ...] = ("own",)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.parts) * self.writes.size, self.reads.size

    @property
    def own_rows(self) -> tuple[slice, ...]:
        """Rows that write a channel each, in the order of the channels."""
        size = self.writes.size
        return tuple(slice(i * size, (i + 1) * size) for i, part in enumerate(self.parts) if part == "own")


@dataclass(frozen=True)
class Branch:
    """What leaves a space, and returns to it through another one that nothing else reads: attention or an MLP.

    Attributes:
        name: of the inner spaces.
        inner: the inner spaces, one in every block.
        written: kinds of the matrices that write them.
        read: kinds of the matrices that read them.
    """

    name: str
    inner: tuple[Space, ...]
    written: tuple[str, ...]
    read: tuple[str, ...]


@dataclass(frozen=True)
class Readers:
    """The matrices of a network in the order of computation: whatever reads a channel comes after what writes it.

    Raises:
        ValueError: matrices of one kind differ in shape, or are not numbered from 0.
    """

    matrices: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        """Checks that matrices of a kind can be stacked."""
        for kind in self.shapes:
            alike = [matrix for matrix in self.matrices if matrix.kind == kind]
            if {m.shape for m in alike} != {alike[0].shape} or [m.layer for m in alike] != [*range(len(alike))]:
                raise ValueError(f"matrices of kind {kind} must have one shape and be numbered from 0 in their order.")

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """kind -> (layers, out, in), from input to output."""
        found: dict[str, tuple[int, int, int]] = {}
        for matrix in self.matrices:
            found[matrix.kind] = (found.get(matrix.kind, (0,))[0] + 1, *matrix.shape)
        return found

    def matrix(self, kind: str, layer: int = 0) -> Matrix:
        """The matrix of a kind and layer; raises KeyError where there is none."""
        for matrix in self.matrices:
            if (matrix.kind, matrix.layer) == (kind, layer):
                return matrix
        raise KeyError(f"{kind}, layer {layer}")

    def readers(self, space: Space) -> tuple[Matrix, ...]:
        """The matrices that read a space, in order."""
        return tuple(matrix for matrix in self.matrices if matrix.reads == space)

    def writers(self, space: Space) -> tuple[Matrix, ...]:
        """The matrices that write a space, in order."""
        return tuple(matrix for matrix in self.matrices if matrix.writes == space)

    @cached_property  # every training step asks for them
    def branches(self) -> tuple[Branch, ...]:
        """The branches of the residual blocks; those of one name are one ``Branch`` for all blocks."""
        inner: dict[str, list[Space]] = {}
        for matrix in self.matrices:
            space = matrix.writes
            source = {writer.reads for writer in self.writers(space)}
            if source == {reader.writes for reader in self.readers(space)} and space not in inner.get(space.name, []):
                inner.setdefault(space.name, []).append(space)
        return tuple(
            Branch(name, tuple(spaces), _kinds(self.writers, spaces), _kinds(self.readers, spaces))
            for name, spaces in inner.items()
        )


def _kinds(of: Callable[[Space], tuple[Matrix, ...]], spaces: list[Space]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(matrix.kind for space in spaces for matrix in of(space)))


def vit_readers(
    *,
    patch: int,
    width: int,
    heads: int,
    depth: int,
    hidden: int,
    classes: int,
    top: int | None = None,
    activation: Callable[[Tensor], Tensor] = F.gelu,
    first: int = 0,
) -> Readers:
    """Readers and writers of a pre-norm vision transformer with fused queries, keys and values.

    Args:
        patch: numbers per patch, channels * side * side.
        width: D, channels of the residual stream.
        heads: H.
        depth: L; block b reads the stream through rows 2b (attention) and 2b + 1 (MLP) of the gains, the head through
            row 2L.
        hidden: hidden units of an MLP.
        classes: C.
        top: hidden units of a two-layer head; None: a linear head.
        activation: of the MLPs.
        first: leave out the blocks before this one, and with them the patch embedding: the stream has no writer there.

    Examples:
        >>> tiny = vit_readers(patch=16, width=8, heads=2, depth=3, hidden=32, classes=10)
        >>> tiny.shapes["qkv"]
        (3, 24, 8)
        >>> [f"{m.kind} {m.layer}" for m in tiny.readers(tiny.matrix("patch").writes)]
        ['qkv 0', 'fc1 0', 'qkv 1', 'fc1 1', 'qkv 2', 'fc1 2', 'head 0']
    """
    stream, logits = Space("stream", width), Space("logits", classes)
    matrices = [] if first else [Matrix("patch", 0, Space("image", patch), stream)]
    for b in range(first, depth):
        attention = Space("attention", width, b, heads)
        mlp = Space("mlp", hidden, b, activation=activation)
        matrices += [
            Matrix("qkv", b - first, stream, attention, 2 * b, ("head", "head", "own")),
            Matrix("attn_out", b - first, attention, stream),
            Matrix("fc1", b - first, stream, mlp, 2 * b + 1),
            Matrix("fc2", b - first, mlp, stream),
        ]
    last = stream
    if top is not None:
        last = Space("top", top, activation=F.relu)
        matrices.append(Matrix("head_hidden", 0, stream, last, 2 * depth))
    matrices.append(Matrix("head", 0, last, logits, 2 * depth if top is None else None))
    return Readers(tuple(matrices))
