"""Loss terms that any method can be trained with: a function, and a field of ``TrainConfig`` that weights it.

    loss = NLL + (the method's own terms) + sum_k weight_k penalty_k(seen)        nats per image

A new term is a function of what one training pass showed (``Seen``), a row in ``PENALTIES``, and a field of that name
in ``TrainConfig``. Every method then has it: the Ising posterior on both engines, and every baseline.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_isingvit.core.settings import TrainConfig
from pyro_isingvit.nets.margins import log_barrier
from pyro_isingvit.nets.vit import Watch


@dataclass(frozen=True)
class Seen:
    """What a pass through the network in training showed.

    Attributes:
        logits: (B, C), or (S, B, C) under a vectorised sample plate.
        labels: (B,) class numbers, or (B, C) probabilities.
        rows: (B,) numbers of the images within the training part; None where the caller did not say.
        watched: what the network recorded at the places that the penalties asked for (``ViT.forward``, ``watch``).
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor | None = None
    watched: Watch = field(default_factory=dict)


@dataclass(frozen=True)
class Penalty:
    """One kind of loss term.

    Attributes:
        term: nats per image, a scalar; (S,) where the logits have a sample axis.
        watches: places of the network that it looks at.
    """

    term: Callable[[Seen], Tensor]
    watches: tuple[str, ...] = ()


def attention_log_barrier(seen: Seen) -> Tensor:
    """-mean log|det(I - Sigma_i A)| over images, layers, heads and tokens (nets/margins.py)."""
    return log_barrier(seen.watched["attention"])


PENALTIES: dict[str, Penalty] = {"log_barrier": Penalty(attention_log_barrier, ("attention",))}


class Penalties:
    """The loss terms that the settings switch on.

    Args:
        settings: of training; a field named like a row of ``PENALTIES`` is its weight, and 0 switches it off.
    """

    def __init__(self, settings: TrainConfig | None = None) -> None:
        weights: dict[str, Any] = {} if settings is None else {name: getattr(settings, name, 0.0) for name in PENALTIES}
        self.weights: dict[str, float] = {name: weight for name, weight in weights.items() if weight}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.weights)

    def watch(self) -> Watch | None:
        """What to hand to ``ViT.forward``: an empty list for each place to be watched; None where there is none."""
        places = {place for name in self.weights for place in PENALTIES[name].watches}
        return {place: [] for place in sorted(places)} or None

    def terms(self, seen: Seen, scale: float = 1.0) -> dict[str, Tensor]:
        """scale * weight * penalty of each, a scalar or (S,); nats per image at scale 1, over all images at scale N."""
        return {name: scale * weight * PENALTIES[name].term(seen) for name, weight in self.weights.items()}
