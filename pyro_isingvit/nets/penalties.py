"""Loss terms that any method can be trained with: a function, and a field of ``TrainConfig`` that weights it.

    loss = NLL + (the method's own terms) + sum_k weight_k penalty_k(seen)        nats per image

A new term is a function of what one training pass showed (``Seen``), a row in ``PENALTIES``, and a field of that name
in ``TrainConfig``. Every method then has it: the Ising posterior on both engines, and every baseline. A term may
remember tensors from step to step (``Penalty.memory``); checkpoints keep them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.processes import gathered, own_rows
from pyro_isingvit.core.settings import TrainConfig
from pyro_isingvit.nets.attention_terms import negative_entropy, negative_log, spread
from pyro_isingvit.nets.confusion import confusion, first_confusion, settle_confusion
from pyro_isingvit.nets.early_learning import early_learning, first_targets
from pyro_isingvit.nets.feature_terms import negative_von_neumann_entropy
from pyro_isingvit.nets.margins import log_barrier
from pyro_isingvit.nets.self_distillation import first_predictions, self_distillation
from pyro_isingvit.nets.vit import Watch
from pyro_isingvit.nets.weight_terms import (
    Matrices,
    group_lasso,
    group_orthogonality,
    hyperspherical_energy,
    spectral,
)


@dataclass(frozen=True)
class Seen:
    """What a pass through the network in training showed.

    Attributes:
        logits: (B, C), or (S, B, C) under a vectorised sample plate.
        labels: (B,) class numbers, or (B, C) probabilities times the weight of the image.
        rows: (B,) numbers of the images within the training part; None where the caller did not say.
        watched: what the network recorded at the places that the penalties asked for (``ViT.forward``, ``watch``).
        settings: of training.
        shares: of the classes in the training part, (C,); None where they are not known.
        memory: what the penalty's ``memory`` made, as the steps before left it; the term writes to it in place.
        matrices: the weights without noise, for penalties that ask for them (nets/weight_terms.py).
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor | None = None
    watched: Watch = field(default_factory=dict)
    settings: TrainConfig = field(default_factory=TrainConfig)
    shares: Sequence[float] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    matrices: Matrices | None = None


@dataclass(frozen=True)
class Settling:
    """What is known when a step is over.

    Attributes:
        rows: (B,) numbers of the images of the whole batch, of all processes.
        shares: of the classes in the training part, (C,); None where they are not known.
        memory: of the penalty.
    """

    rows: Tensor
    shares: Sequence[float] | None
    memory: dict[str, Tensor]


@dataclass(frozen=True)
class Penalty:
    """One kind of loss term.

    Attributes:
        term: nats per image, a scalar; (S,) where the logits have a sample axis.
        watches: places of the network that it looks at.
        memory: (N, C) -> tensors that last from step to step, by name, as they are before the first; None: nothing.
        settle: (what was seen of the step) -> None: called after each step with the whole batch's ``rows``; it must
            leave the memory the same on all processes, though each saw its ``own_rows`` of the batch alone, perhaps in
            several parts.
        weighs: it looks at the weight matrices, ``seen.matrices``.
    """

    term: Callable[[Seen], Tensor]
    watches: tuple[str, ...] = ()
    memory: Callable[[int, int], dict[str, Tensor]] | None = None
    settle: Callable[[Settling], None] | None = None
    weighs: bool = False


def attention_log_barrier(seen: Seen) -> Tensor:
    """-mean log|det(I - Sigma_i A)| over images, layers, heads and tokens (nets/margins.py)."""
    return log_barrier(seen.watched["attention"])


def remembered_predictions(seen: Seen) -> Tensor:
    """Early-learning regularisation by the images' own row numbers (nets/early_learning.py)."""
    need(seen.rows is not None, "`early_learning` needs the row numbers of the images in the training part.")
    assert seen.rows is not None
    return early_learning(seen.logits, seen.memory["targets"], seen.rows, seen.settings.early_learning_momentum)


def class_confusion(seen: Seen) -> Tensor:
    """Spectral norm of the averaged soft confusion matrix (nets/confusion.py)."""
    need(seen.shares is not None, "`confusion` needs the number of training images of each class.")
    assert seen.shares is not None
    return confusion(seen.logits, seen.labels, seen.shares, seen.settings.balance == "sampler", seen.memory)


def settle_class_confusion(step: Settling) -> None:
    """The matrix takes what the parts of the step have seen."""
    assert step.shares is not None
    settle_confusion(step.memory, step.shares)


def logit_penalty(seen: Seen) -> Tensor:
    """Half the squared length of the logits, mean over images of |z|^2 / 2 (spectral decoupling).

    Pezeshki et al. 2021, arXiv 2011.09468: with the cross entropy, the gradient by z is p - y + weight z.
    """
    return 0.5 * seen.logits.square().sum(-1).mean(-1)


def remembered_answers(seen: Seen) -> Tensor:
    """Progressive self-distillation by the images' own row numbers (nets/self_distillation.py)."""
    need(seen.rows is not None, "`self_distillation` needs the row numbers of the images in the training part.")
    assert seen.rows is not None
    epochs = seen.settings.epochs + seen.settings.finetune_epochs
    return self_distillation(seen.logits, seen.labels, seen.memory, seen.rows, epochs)


def exchange_rows(step: Settling) -> None:
    """Every process takes what the others remember of their images of the batch."""
    rows = step.rows
    for table in step.memory.values():
        table[rows] = gathered(table[rows[own_rows(len(rows))]], len(rows), 0, table.device)


def of_weights(term: Callable[[Matrices, TrainConfig], Tensor]) -> Penalty:
    """The row of a term of the weight matrices and the settings."""

    def seen_by(seen: Seen) -> Tensor:
        assert seen.matrices is not None, "the method does not say what its matrices are"
        with torch.autocast(seen.logits.device.type, enabled=False):
            return term(seen.matrices, seen.settings)

    return Penalty(seen_by, weighs=True)


PENALTIES: dict[str, Penalty] = {
    "log_barrier": Penalty(attention_log_barrier, ("attention",)),
    "early_learning": Penalty(remembered_predictions, memory=first_targets, settle=exchange_rows),
    "confusion": Penalty(class_confusion, memory=first_confusion, settle=settle_class_confusion),
    "logit_penalty": Penalty(logit_penalty),
    "self_distillation": Penalty(remembered_answers, memory=first_predictions, settle=exchange_rows),
    "attention_entropy": Penalty(lambda seen: negative_entropy(seen.watched["attention"]), ("attention",)),
    "attention_spread": Penalty(lambda seen: spread(seen.watched["attention"]), ("attention",)),
    "attention_log": Penalty(lambda seen: negative_log(seen.watched["attention"]), ("attention",)),
    "feature_entropy": Penalty(lambda seen: negative_von_neumann_entropy(seen.watched["features"][0]), ("features",)),
    "group_lasso": of_weights(lambda matrices, settings: group_lasso(matrices, settings.lasso_groups)),
    "group_orthogonality": of_weights(lambda matrices, _: group_orthogonality(matrices)),
    "spectral": of_weights(lambda matrices, _: spectral(matrices)),
    "hyperspherical_energy": of_weights(lambda matrices, _: hyperspherical_energy(matrices)),
}


class Penalties(nn.Module):
    """The loss terms that the settings switch on, with what they remember as buffers.

    Args:
        settings: of training; a field named like a row of ``PENALTIES`` is its weight, and 0 switches it off.
        num_data: N, training images.
        num_classes: C.
        shares: of the classes in the training part, (C,); None where they are not known.

    Attributes:
        matrices: gives the weights without noise, to penalties of weights; the method sets it.
    """

    def __init__(
        self,
        settings: TrainConfig | None = None,
        num_data: int = 0,
        num_classes: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.shares = settings or TrainConfig(), shares
        self.matrices: Callable[[], Matrices] | None = None
        weights: dict[str, Any] = {name: getattr(settings, name, 0.0) for name in PENALTIES if settings is not None}
        self.weights: dict[str, float] = {name: weight for name, weight in weights.items() if weight}
        for name in self.weights:
            self.add_module(name, memory := nn.Module())
            start = PENALTIES[name].memory
            for part, tensor in ({} if start is None else start(num_data, num_classes)).items():
                memory.register_buffer(part, tensor)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.weights)

    def watch(self) -> Watch | None:
        """What to hand to ``ViT.forward``: an empty list for each place to be watched; None where there is none."""
        places = {place for name in self.weights for place in PENALTIES[name].watches}
        return {place: [] for place in sorted(places)} or None

    def memory(self, name: str) -> dict[str, Tensor]:
        """The tensors that a penalty remembers, not copies."""
        return dict(self.get_submodule(name).named_buffers())

    def terms(self, seen: Seen, scale: float = 1.0) -> dict[str, Tensor]:
        """scale * weight * penalty of each, a scalar or (S,); nats per image at scale 1, over all images at scale N."""
        terms = {}
        for name, weight in self.weights.items():
            told = replace(seen, settings=self.settings, shares=self.shares, memory=self.memory(name))
            if PENALTIES[name].weighs and self.matrices is not None:
                told = replace(told, matrices=self.matrices())
            terms[name] = scale * weight * PENALTIES[name].term(told)
        return terms

    def settle(self, rows: Tensor) -> None:
        """Ends a step with the images ``rows`` (B,): what is remembered becomes the same on all processes."""
        for name in self.weights:
            if (settle := PENALTIES[name].settle) is not None:
                settle(Settling(rows, self.shares, self.memory(name)))
