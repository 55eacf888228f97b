"""Loss terms that any method can be trained with: a function, and a field of ``TrainConfig`` that weights it.

    loss = NLL + (the method's own terms) + sum_k weight_k penalty_k(seen)        nats per image

A new term is a function of what one training pass showed (``Seen``), a row in ``PENALTIES``, and a field of that name
in ``TrainConfig``. Every method then has it: the Ising posterior on both engines, and every baseline. A term may
remember tensors from step to step (``Penalty.memory``); checkpoints keep them.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.processes import gathered, own_rows
from pyro_isingvit.core.random_state import RandomState
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.nets.attention_terms import negative_entropy, negative_log, spread
from pyro_isingvit.nets.confusion import confusion, first_confusion, settle_confusion
from pyro_isingvit.nets.distillation import distillation
from pyro_isingvit.nets.early_learning import early_learning, first_targets
from pyro_isingvit.nets.feature_terms import negative_von_neumann_entropy
from pyro_isingvit.nets.margins import log_barrier
from pyro_isingvit.nets.rationale import contributions, first_rationales, rationale, settle_rationale
from pyro_isingvit.nets.self_distillation import first_predictions, self_distillation
from pyro_isingvit.nets.smoothness import STEP, half_differences, own_normal, squared_jacobian
from pyro_isingvit.nets.vit import Watch
from pyro_isingvit.nets.weight_terms import (
    Matrices,
    group_lasso,
    group_orthogonality,
    hyperspherical_energy,
    spectral,
)

Network = Callable[[Tensor, Watch | None], Tensor]  # images (B, ...) and what to watch -> logits


@dataclass(frozen=True)
class Seen:
    """What a pass through the network in training showed.

    Attributes:
        logits: (B, C), or (S, B, C) under a vectorised sample plate.
        labels: (B,) class numbers, or (B, C) probabilities times the weight of the image.
        rows: (B,) numbers of the images within the training part; None where the caller did not say.
        watched: what the network recorded at the places that the penalties asked for (``ViT.forward``, ``watch``).
        settings: of training.
        shares: of the classes among the training images, (C,); None where they are not known.
        memory: what the penalty's ``memory`` made, as the steps before left it; the term writes to it in place.
        matrices: the weights without noise, for penalties that ask for them (nets/weight_terms.py).
        images: (B, ...), as the network read them; with gradients for penalties that ask for them.
        again: passes images through the same network once more, with the same random numbers.
        part: which of how many equal parts of the step's batch this is.
        probe: zeros that were added to the features, for penalties that ask for gradients by them; (B, F) or (S B, F).
        told: (B, C) probabilities of a teacher; None: there is none.
        phase: of a posterior with masks; "" without one.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor | None = None
    watched: Watch = field(default_factory=dict)
    settings: TrainConfig = field(default_factory=TrainConfig)
    shares: Sequence[float] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    matrices: Matrices | None = None
    images: Tensor | None = None
    again: Network | None = None
    part: tuple[int, int] = (0, 1)
    probe: Tensor | None = None
    told: Tensor | None = None
    phase: str = ""


@dataclass(frozen=True)
class Settling:
    """What is known when a step is over.

    Attributes:
        rows: (B,) numbers of the images of the whole batch, of all processes.
        shares: of the classes among the training images, (C,); None where they are not known.
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
        by_image: it differentiates by the images.
        again: it passes other images through the same network.
        whole: its mean over the parts of a batch is not its value for the batch.
        by_feature: it differentiates by the features.
        class_memory: (C, F) -> tensors, likewise, where the width F of the features matters.
    """

    term: Callable[[Seen], Tensor]
    watches: tuple[str, ...] = ()
    memory: Callable[[int, int], dict[str, Tensor]] | None = None
    settle: Callable[[Settling], None] | None = None
    weighs: bool = False
    by_image: bool = False
    again: bool = False
    whole: bool = False
    by_feature: bool = False
    class_memory: Callable[[int, int], dict[str, Tensor]] | None = None


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
    if seen.phase == "pilot":
        return seen.logits.new_zeros(seen.logits.shape[:-2])
    return self_distillation(seen.logits, seen.labels, seen.memory, seen.rows, epochs, mean=bool(seen.phase))


def jacobian(seen: Seen) -> Tensor:
    """C |v^T J|^2 / 2 with a random unit vector v for each image (nets/smoothness.py)."""
    assert seen.images is not None
    one = seen.logits if seen.logits.dim() == 2 else seen.logits[0]
    return squared_jacobian(seen.logits, seen.images, own_normal(seen.part, one))


def nuclear_norm(seen: Seen) -> Tensor:
    """A bound on the nuclear norm of the Jacobian, split before the last matrix (nets/smoothness.py)."""
    assert seen.images is not None and seen.again is not None
    (h,) = seen.watched["features"]
    x, one = seen.images, h if h.dim() == 2 else h[0]
    moved_x, moved_h = x + STEP * own_normal(seen.part, x), h + STEP * own_normal(seen.part, one)
    watch: Watch = {"features": [], "swap": [moved_h.view_as]}
    z = seen.again(moved_x, watch)  # h(x + s e'), and g(h + s e) in the same pass
    return half_differences(h, watch["features"][0]) + half_differences(seen.logits, z)


def invariant_reasons(seen: Seen) -> Tensor:
    """Squared distance of an image's reasons from those of its class (nets/rationale.py)."""
    assert seen.probe is not None
    reasons = contributions(seen.logits, seen.watched["features"][0], seen.probe)
    return rationale(reasons, seen.labels, seen.memory)


def taught(seen: Seen) -> Tensor:
    """Divergence from a teacher's predictions (nets/distillation.py)."""
    need(seen.told is not None, "`distillation` needs a teacher's predictions of the batch.")
    assert seen.told is not None
    settings = seen.settings
    return distillation(
        seen.logits, seen.told, seen.labels, settings.distillation_power, settings.distillation_weighted
    )


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
    "distillation": Penalty(taught),
    "attention_entropy": Penalty(lambda seen: negative_entropy(seen.watched["attention"]), ("attention",)),
    "attention_spread": Penalty(lambda seen: spread(seen.watched["attention"]), ("attention",)),
    "attention_log": Penalty(lambda seen: negative_log(seen.watched["attention"]), ("attention",)),
    "feature_entropy": Penalty(
        lambda seen: negative_von_neumann_entropy(seen.watched["features"][0]), ("features",), whole=True
    ),
    "group_lasso": of_weights(lambda matrices, settings: group_lasso(matrices, settings.lasso_groups)),
    "group_orthogonality": of_weights(lambda matrices, _: group_orthogonality(matrices)),
    "spectral": of_weights(lambda matrices, _: spectral(matrices)),
    "hyperspherical_energy": of_weights(lambda matrices, _: hyperspherical_energy(matrices)),
    "jacobian": Penalty(jacobian, by_image=True),
    "nuclear_norm": Penalty(nuclear_norm, ("features",), again=True),
    "rationale": Penalty(
        invariant_reasons,
        ("features",),
        settle=lambda step: settle_rationale(step.memory),
        by_feature=True,
        class_memory=first_rationales,
    ),
}


class Penalties(nn.Module):
    """The loss terms that the settings switch on, with what they remember as buffers.

    Args:
        settings: of training; a field named like a row of ``PENALTIES`` is its weight, and 0 switches it off.
        num_data: N, training images.
        num_classes: C.
        shares: of the classes among the training images, (C,); None where they are not known.
        features: F, inputs of the last matrix.

    Attributes:
        part: which of how many equal parts of a step's batch comes next.
        matrices: gives the weights without noise, to penalties of weights; the method sets it.
        told: a teacher's probabilities (B, C) for the batch that comes next; None: there is none.
        phase: gives the phase of a posterior with masks; None: there is none.
    """

    told: Tensor | None = None
    phase: Callable[[], str] | None = None

    def __init__(
        self,
        settings: TrainConfig | None = None,
        num_data: int = 0,
        num_classes: int = 0,
        shares: Sequence[float] | None = None,
        features: int = 0,
    ) -> None:
        super().__init__()
        self.settings, self.shares, self.part = settings or TrainConfig(), shares, (0, 1)
        self.matrices: Callable[[], Matrices] | None = None
        weights: dict[str, Any] = {name: getattr(settings, name, 0.0) for name in PENALTIES if settings is not None}
        self.weights: dict[str, float] = {name: weight for name, weight in weights.items() if weight}
        for name in self.weights:
            self.add_module(name, memory := nn.Module())
            kind = PENALTIES[name]
            first = {} if kind.memory is None else kind.memory(num_data, num_classes)
            first |= {} if kind.class_memory is None else kind.class_memory(num_classes, features)
            for part, tensor in first.items():
                memory.register_buffer(part, tensor)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.weights)

    def watch(self) -> Watch | None:
        """What to hand to ``ViT.forward``: an empty list for each place to be watched; None where there is none."""
        places = {place for name in self.weights for place in PENALTIES[name].watches}
        return {place: [] for place in sorted(places)} or None

    def look(self, network: Network, x: Tensor, y: Tensor, rows: Tensor | None) -> Seen:
        """Passes a batch through a network, and keeps what the terms look at.

        Args:
            network: images and what to watch -> logits (B, C) or (S, B, C); where it draws, each time anew.
            x: (B, channels, height, width), normalised.
            y: (B,) class numbers, or (B, C) probabilities times the weight of the image.
            rows: (B,) numbers of the images within the training part.
        """
        kinds, watch, state = [PENALTIES[name] for name in self.weights], self.watch(), None
        twice = any(kind.by_image for kind in kinds)
        if twice:
            x = x.detach().requires_grad_()
        if any(kind.again for kind in kinds):
            state = RandomState.now(x.device)
        probes: list[Tensor] = []
        if watch is not None and any(kind.by_feature for kind in kinds):
            watch["swap"] = [partial(_probed, probes)]

        def again(images: Tensor, places: Watch | None) -> Tensor:
            assert state is not None, "a penalty that passes images again says so"
            after = RandomState.now(x.device)
            state.restore(x.device)
            logits = network(images, places).float()
            after.restore(x.device)
            return logits

        with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():  # the others have no second derivative
            logits = network(x, watch).float()
        probe = probes[0] if probes else None
        return Seen(logits, y, rows, watch or {}, images=x, again=again, part=self.part, probe=probe)

    def memory(self, name: str) -> dict[str, Tensor]:
        """The tensors that a penalty remembers, not copies."""
        return dict(self.get_submodule(name).named_buffers())

    def terms(self, seen: Seen, scale: float = 1.0) -> dict[str, Tensor]:
        """scale * weight * penalty of each, a scalar or (S,); nats per image at scale 1, over all images at scale N."""
        terms = {}
        for name, weight in self.weights.items():
            told = replace(
                seen, settings=self.settings, shares=self.shares, memory=self.memory(name), told=self.told,
                phase=self.phase() if self.phase else "",
            )  # fmt: skip
            if PENALTIES[name].weighs and self.matrices is not None:
                told = replace(told, matrices=self.matrices())
            term = PENALTIES[name].term(told)
            lead = tuple(seen.logits.shape[:-2])
            need(
                tuple(term.shape) in ((), lead),
                f"the penalty `{name}` gives a tensor of shape {tuple(term.shape)}, not one number; take its mean.",
            )
            terms[name] = scale * weight * term
        return terms

    def settle(self, rows: Tensor) -> None:
        """Ends a step with the images ``rows`` (B,): what is remembered becomes the same on all processes."""
        for name in self.weights:
            if (settle := PENALTIES[name].settle) is not None:
                settle(Settling(rows, self.shares, self.memory(name)))


def _probed(probes: list[Tensor], features: Tensor) -> Tensor:
    """The features plus zeros by which one can differentiate, which ``probes`` receives."""
    probes.append(features.new_zeros(features.shape[:-1].numel(), features.shape[-1]).requires_grad_())
    return features + probes[0].view_as(features)
