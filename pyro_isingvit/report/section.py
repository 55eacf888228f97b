"""What a page is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One figure of the page.

    Attributes:
        name: of the PNG and of the anchor.
        title: heading.
        caption: how to read it.
        draw: called with ``narrow=``; None where the run lacks what it shows.
        half: takes half of a wide page.
    """

    name: str
    title: str
    caption: str
    draw: Callable[..., Figure] | None
    half: bool = False
