"""What one step of training does to a network and its loss, apart from the images: drawn once for a whole batch.

Shapes: B batch, L depth, T tokens, C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pyro_isingvit.nets.manifold_mixup import HiddenMix
from pyro_isingvit.nets.nested_dropout import first_units
from pyro_isingvit.nets.penalties import Penalties
from pyro_isingvit.nets.tokens import showing
from pyro_isingvit.nets.vit import ViT


@dataclass(frozen=True)
class View:
    """What was drawn for a batch, or for a part of it.

    Attributes:
        visible: (B, shown) numbers of the patch tokens that each image shows; None: all.
        mix: how hidden states are mixed; None: not.
        told: (B, C) probabilities of a teacher; None: there is none.
        kept: (B, L) share of the hidden units that each image keeps in each block; None: all.
    """

    visible: Tensor | None = None
    mix: HiddenMix | None = None
    told: Tensor | None = None
    kept: Tensor | None = None

    def __getitem__(self, rows: slice) -> "View":
        """The part for some of the images."""
        visible, told, kept = (None if each is None else each[rows] for each in self._by_image())
        return replace(self, visible=visible, told=told, kept=kept)

    def chunk(self, pieces: int) -> "list[View]":
        """Equal, contiguous parts; ``pieces`` divides B."""
        parts = [[None] * pieces if each is None else each.chunk(pieces) for each in self._by_image()]
        return [View(visible, self.mix, told, kept) for visible, told, kept in zip(*parts, strict=True)]

    def _by_image(self) -> tuple[Tensor | None, ...]:
        return self.visible, self.told, self.kept

    @property
    def touches(self) -> bool:
        """Whether the network computes otherwise."""
        return self.mix is not None or self.kept is not None

    def touch(self, place: str, layer: int, x: Tensor) -> Tensor:
        """What the network reads on from a place (``ViT.touch``)."""
        if place == "hidden":
            return x if self.kept is None else first_units(x, self.kept[:, layer].view(x.shape[:-2]))
        after = 0 if place == "tokens" else layer + 1
        return self.mix.states(x) if self.mix is not None and self.mix.after == after else x


@contextmanager
def viewing(method: nn.Module, view: View | None) -> Iterator[None]:
    """Within it, every ``ViT`` and every loss term in a module computes as a view has it; None: as usual."""
    view = view or View()
    networks = [each for each in method.modules() if isinstance(each, ViT)] if view.touches else []
    taught = [each for each in method.modules() if isinstance(each, Penalties)] if view.told is not None else []
    with showing(method, view.visible):
        for network in networks:
            network.touch = view.touch
        for penalties in taught:
            penalties.told = view.told
        try:
            yield
        finally:
            for network in networks:
                network.touch = None
            for penalties in taught:
                penalties.told = None
