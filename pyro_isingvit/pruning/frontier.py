"""Ever smaller networks of one run, measured on the validation part: what each threshold costs and gives."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.data.images import Images
from pyro_isingvit.data.split import Split
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.pruning.choose import Kept, choose_masks, from_masks, guide_of
from pyro_isingvit.pruning.cost import BATCH, latency, macs, parameters
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.runs.run import Run

THRESHOLDS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.85)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of what the threshold 0.5 keeps
REPEATS = 7


@dataclass(frozen=True)
class Point:
    """One network of the frontier; accuracy, NLL and ECE are of the validation part."""

    threshold: float
    """The lowest retention of a mask that is kept."""
    kept: float
    """Share of the masked weights that is kept."""
    parameters: int
    nonzero: int
    macs: int
    """Multiply-accumulates of one image."""
    latency_1: float
    """Median seconds of a batch of 1."""
    latency_256: float
    """Median seconds of a batch of 256."""
    accuracy: float
    nll: float
    ece: float
    unmerged: dict[str, float] | None = None
    """accuracy, nll and ece where the dropped units are only dropped; None where ``accuracy`` is that."""


@dataclass(frozen=True)
class Candidate:
    """A point of the frontier, its masks and its network (the form ``mean``)."""

    point: Point
    kept: Kept
    model: CompactViT


def kept_share(run: Run, kept: Kept) -> float:
    """Share of the masked weights under masks that stay on."""
    guide = guide_of(run)
    expanded = [
        guide.layout.expand(kind, {name: on.double() for name, on in kept.items()}).expand_as(loc)
        for kind, loc in guide.loc.items()
    ]
    return float(sum(e.sum() for e in expanded)) / sum(e.numel() for e in expanded)


@torch.no_grad()
def frontier(
    run: Run, val: Split, repeats: int = REPEATS, chosen: Kept | None = None, merge: Images | None = None
) -> list[Candidate]:
    """Networks from large to small: retention thresholds, then shares of what the threshold 0.5 keeps.

    Shares reach networks that no threshold gives: retention is clipped at max_keep, many masks are equal there, and
    their second-order gains decide.

    Args:
        run: a run with masks.
        val: validation images, for the temperature and the metrics.
        repeats: of each time measurement.
        chosen: masks that are a candidate too.
        merge: training images on which what is left is refitted (``merge_units``); None: it is not.

    Returns:
        candidates of different masks, by falling multiply-accumulates.

    Raises:
        UserError: no masks, or no validation images.
    """
    need(len(val) > 0, "the frontier is measured on the validation part, and this run has none (`val_fraction` 0).")
    guide, masks = guide_of(run), [chosen] if chosen is not None else []
    middle = kept_share(run, choose_masks(run))
    settings = [{"threshold": t} for t in THRESHOLDS] + [{"keep": share * middle} for share in SHARES]
    for setting in settings:
        try:
            kept = choose_masks(run, **setting)
        except UserError:  # above the highest retention, or less than the smallest mask
            continue
        if not any(all(torch.equal(kept[name], other[name]) for name in kept) for other in masks):
            masks.append(kept)
    shape = run.model.vit.image_shape
    networks: list[tuple[Kept, CompactViT]] = []
    seen: set[tuple[int, ...]] = set()
    for kept in masks:
        try:
            model = from_masks(run, kept, "mean", "auto", val, merge)
        except UserError:  # nothing left of the patch embedding or the classifier
            continue
        size = (macs(model, shape), *parameters(model))
        if size not in seen:  # masks of weights that cannot act anyway make no other network
            networks.append((kept, model))
            seen.add(size)
    models = [model for _, model in networks]
    singles, batches = (latency(models, shape, batch, repeats) for batch in (1, BATCH))
    candidates = []
    for (kept, model), single, many in zip(networks, singles, batches, strict=True):
        scores = _scores(model, val)
        unmerged = None if merge is None else _scores(from_masks(run, kept, "mean", "auto", val), val)
        total, nonzero = parameters(model)
        on = torch.cat([guide.retention(name)[mask] for name, mask in kept.items()])
        point = Point(
            threshold=float(on.min()), kept=kept_share(run, kept), parameters=total, nonzero=nonzero,
            macs=macs(model, shape), latency_1=single, latency_256=many, **scores, unmerged=unmerged,
        )  # fmt: skip
        candidates.append(Candidate(point, kept, model))
    return sorted(candidates, key=lambda candidate: (-candidate.point.macs, -candidate.point.nonzero))


def _scores(model: CompactViT, val: Split) -> dict[str, float]:
    scores = classification_metrics(model.predict(val.images)[0], val.labels)
    return {name: scores[name] for name in ("accuracy", "nll", "ece")}


def smallest_within(
    candidates: list[Candidate],
    reference: float,
    max_accuracy_drop: float,
    improve: Callable[[Candidate], float] | None = None,
) -> Candidate:
    """The network of fewest multiply-accumulates whose validation accuracy is within a drop of the reference.

    Args:
        candidates: of ``frontier``.
        reference: validation accuracy of the full posterior, 0 to 1.
        max_accuracy_drop: how far it may lie below the reference, in percentage points.
        improve: fine-tunes a candidate's network and gives its new accuracy; None takes the point's. Candidates that
            are more than 30 points short before fine-tuning are skipped.

    Raises:
        UserError: a drop outside [0, 100], or none is good enough.
    """
    drop = max_accuracy_drop
    need(0 <= drop <= 100, f"`max_accuracy_drop` is in percentage points, 0 to 100, not {drop}.")
    wanted = reference - drop / 100
    best = 0.0
    for candidate in reversed(candidates):
        accuracy = candidate.point.accuracy
        if improve is not None and wanted - 0.3 <= accuracy:
            accuracy = improve(candidate)
        if accuracy >= wanted - 1e-9:
            return candidate
        best = max(best, accuracy)
    advice = "allow a larger `max_accuracy_drop`" + (", or fine-tune the candidates" if improve is None else "")
    raise UserError(
        f"no compact network is within {drop:g} points of the full posterior's validation accuracy {reference:.4f} "
        f"(the best has {best:.4f}); {advice}."
    )
