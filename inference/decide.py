"""What predict.py does besides predicting: another prevalence of the classes, prediction sets, what is for a human."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from inference.cli import print_table
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr
    from torch import Tensor

    from pyro_isingvit.predictive.draws import PredictiveDraws
    from pyro_isingvit.predictive.prevalence import PrevalenceEstimate
    from pyro_isingvit.predictive.selective import Acceptance
    from pyro_isingvit.predictive.table import Column
    from pyro_isingvit.predictive.validation import Validation
    from pyro_isingvit.runs.run import Run

ESTIMATE = "estimate"
DRAWS = 100
MASS = 0.95  # of the intervals of an estimated prevalence


@dataclass(frozen=True)
class DecisionArguments:
    """What is decided about every image."""

    prevalence: str | None = None
    """Shares of the classes among these images, where they differ from training: 0.9,0.1 in the order of the classes,
    or NAME=0.1,... (classes that are not named share the rest as in training, equally where it made classes equal), or
    estimate."""
    training_prevalence: str | None = None
    """Shares of the classes in training, for runs that do not know them; as --prevalence, without estimate."""
    coverage: float | None = None
    """Write for every image a set of classes that holds the true one with this probability."""
    classwise: bool = False
    """Hold --coverage within every class, whatever its prevalence."""
    max_error: float | None = None
    """Say which predictions to accept so that at most this share of them is wrong; the others are for a human."""
    certainty: float = 0.95
    """Probability, over the draw of the validation part, that --max-error holds."""

    def check(self) -> None:
        """Raises UserError where they contradict each other, or a number is out of its range."""
        for name, value in (("coverage", self.coverage), ("max_error", self.max_error), ("certainty", self.certainty)):
            need(value is None or 0 < value < 1, f"`{name}` must lie in (0, 1), not {value}.")
        unused = self.certainty != DecisionArguments.certainty and self.max_error is None
        need(not unused, "`certainty` belongs to `max_error`; set both.")
        need(not self.classwise or self.coverage is not None, "`classwise` belongs to `coverage`; set both.")
        other = self.prevalence is not None
        need(
            not other or self.coverage is None or self.classwise,
            "`coverage` counts on the validation part's shares of the classes, which `prevalence` changes; add "
            "`classwise`, whose sets hold under any shares.",
        )
        need(
            not other or self.max_error is None,
            "`max_error` counts on the validation part's shares of the classes, which `prevalence` changes; leave one "
            "out.",
        )
        need(other or self.training_prevalence is None, "`training_prevalence` belongs to `prevalence`; set both.")

    @property
    def guaranteed(self) -> bool:
        """Whether something with a guarantee is asked for."""
        return self.coverage is not None or self.max_error is not None


@dataclass(frozen=True)
class Decisions:
    """What was decided about B images of C classes.

    Attributes:
        draws: predictions, for the prevalence that was asked for.
        prevalence: (C,) that they are meant for; None: training's.
        prior: (C,) training's; None where it was not needed.
        estimate: where the prevalence was estimated.
        sets: (B, C) bool.
        acceptance: the threshold.
        accepted: (B,) bool.
    """

    draws: "PredictiveDraws"
    prevalence: "np.ndarray | None" = None
    prior: "np.ndarray | None" = None
    estimate: "PrevalenceEstimate | None" = None
    sets: "Tensor | None" = None
    acceptance: "Acceptance | None" = None
    accepted: "Tensor | None" = None


def read_prevalences(
    run: "Run", wanted: DecisionArguments, data_root: Path | None
) -> "tuple[np.ndarray, np.ndarray | None] | None":
    """The shares of the classes in training and where the images are from, (C,) each.

    Args:
        run: which was trained.
        wanted: what is asked for.
        data_root: folder of the run's data, for runs that do not know their shares; None: where the run says.

    Returns:
        None where no other prevalence is asked for; the second is None where it is to be estimated.

    Raises:
        UserError: texts that are no shares of the run's classes.
    """
    import numpy as np

    from pyro_isingvit.runs.validation import prior_of

    if wanted.prevalence is None:
        return None
    classes, given = run.info.classes, wanted.training_prevalence
    prior = np.array(prior_of(run, data_root)) if given is None else read_shares(given, classes, "training_prevalence")
    whose = "the run's training part; give `training_prevalence`" if given is None else "`training_prevalence`"
    none = ", ".join(name for name, share in zip(classes, prior, strict=True) if share <= 0)
    need(not none, f"the class {none:.60} has no share in {whose}: no correction can bring it back.")
    shares = None if wanted.prevalence == ESTIMATE else read_shares(wanted.prevalence, classes, "prevalence", prior)
    return prior, shares


def read_shares(text: str, classes: Sequence[str], name: str, rest: "np.ndarray | None" = None) -> "np.ndarray":
    """Shares of the classes from a command line's word.

    Args:
        text: numbers in the order of the classes, or NAME=number of some.
        classes: C names.
        name: of the setting, in messages.
        rest: (C,) shares by which classes that are not named divide what is left; None: all must be named.

    Returns:
        (C,), sum 1.

    Raises:
        UserError: something else.
    """
    import numpy as np

    from pyro_isingvit.predictive.prevalence import check_shares

    words = [word.strip() for word in text.split(",")]
    named = ["=" in word for word in words]
    need(all(named) or not any(named), f"`{name}` takes shares of all classes in order, or NAME=share; not a mixture.")
    numbers: list[float] = []
    for word in words:
        try:
            numbers.append(float(word.rpartition("=")[2]))
        except ValueError:
            need(False, f"`{name}` takes numbers such as 0.1, not {word!r:.40}.")
    if not all(named):
        return check_shares(numbers, len(classes), name)
    names = [word.rpartition("=")[0].strip() for word in words]
    for each in names:
        known = ", ".join(classes[:8])
        need(each in classes, f"`{name}` names the class {each!r:.40}, which the run does not have; it has {known}.")
        need(names.count(each) == 1, f"`{name}` names the class {each!r:.40} twice.")
    shares, given = np.zeros(len(classes)), np.zeros(len(classes), dtype=bool)
    for each, number in zip(names, numbers, strict=True):
        shares[classes.index(each)], given[classes.index(each)] = number, True
    if not given.all():
        need(rest is not None, f"`{name}` must name every class.")
        left = 1 - shares.sum()
        need(-1e-9 <= left <= 1, f"the shares in `{name}` sum to {shares.sum():.4g}, more than 1.")
        assert rest is not None
        shares[~given] = max(left, 0.0) * rest[~given] / rest[~given].sum()
    return check_shares(shares, len(classes), name)


def draws_for(
    run: "Run", wanted: DecisionArguments, samples: int | None, seed: int | None, data_root: Path | None
) -> tuple[int, int, "Validation | None"]:
    """How many draws from which seed to predict with, and the validation part's predictions where they are needed.

    Raises:
        UserError: as ``validation_of``, too few validation images for the coverage, or draws that are not those of the
            validation part, on which guarantees rest.
    """
    from pyro_isingvit.predictive.conformal import check_images
    from pyro_isingvit.runs.validation import validation_of

    if not wanted.guaranteed and wanted.prevalence != ESTIMATE:
        return DRAWS if samples is None else samples, seed or 0, None
    val = validation_of(run, data_root=data_root)
    s, first = val.samples if samples is None else samples, val.seed if seed is None else seed
    same = (min(s, run.max_draws or s), first) == (val.samples, val.seed)
    need(
        same or not wanted.guaranteed,
        f"the guarantee is for the networks that saw the validation part: {val.samples} draws from seed {val.seed}. "
        "Leave `samples` and `seed` out.",
    )
    if wanted.coverage is not None:  # what is wrong with it is said before anything is predicted
        check_images(val.labels, run.info.classes, wanted.coverage, classwise=wanted.classwise)
    return s, first, val


def decide(
    run: "Run", draws: "PredictiveDraws", val: "Validation | None", wanted: DecisionArguments, data_root: Path | None
) -> Decisions:
    """Everything that is asked for.

    Class-wise sets come from the probabilities before they are corrected for a prevalence: that is how the validation
    part was predicted, and the coverage within a class does not depend on how frequent it is.

    Raises:
        UserError: shares that cannot be, or too few validation images.
    """
    from pyro_isingvit.predictive.conformal import conformal_sets
    from pyro_isingvit.predictive.prevalence import estimate_prevalence, with_prevalence
    from pyro_isingvit.predictive.selective import acceptance

    found = Decisions(draws)
    prevalences = read_prevalences(run, wanted, data_root)
    if prevalences is not None:
        prior, shares = prevalences
        estimate = None
        if shares is None:
            assert val is not None
            estimate = estimate_prevalence(draws, val.probs, val.labels, mass=MASS)
            shares = estimate.shares
        corrected = with_prevalence(draws, shares, prior)
        found = Decisions(corrected, shares, prior, estimate)
    if wanted.coverage is not None:
        assert val is not None
        sets = conformal_sets(draws, val.probs, val.labels, wanted.coverage, classwise=wanted.classwise)
        sets[range(len(sets)), found.draws.mean.argmax(-1)] = True  # the class that is shown is in the set
        found = replace(found, sets=sets)
    if wanted.max_error is not None:
        assert val is not None
        limit = acceptance(val.probs, val.labels, wanted.max_error, wanted.certainty)
        found = replace(found, acceptance=limit, accepted=limit.accepts(draws))
    return found


def columns(found: Decisions, classes: Sequence[str]) -> "dict[str, Column]":
    """Columns of the table: ``set`` with its classes, ``set_size``, ``decision``."""
    more: dict[str, Column] = {}
    if found.sets is not None:
        rows = found.sets.tolist()
        more["set"] = ["|".join(name for name, held in zip(classes, row, strict=True) if held) for row in rows]
        more["set_size"] = found.sets.sum(-1).numpy()
    if found.accepted is not None:
        more["decision"] = ["accept" if stands else "human" for stands in found.accepted.tolist()]
    return more


def add_to_tree(tree: "xr.DataTree", found: Decisions, wanted: DecisionArguments, images: int) -> None:
    """Adds ``in_set`` (image, class) and ``accepted`` (image) to ``predictive_summary``, prevalences to the root.

    Args:
        tree: predictions.
        found: what was decided.
        wanted: what was asked for.
        images: of the validation part.
    """
    import xarray as xr

    summary = tree["predictive_summary"]
    if found.sets is not None:
        rule = {"coverage": wanted.coverage, "classwise": int(wanted.classwise), "score": "1 - probability"}
        summary["in_set"] = xr.DataArray(
            found.sets.numpy(), dims=("image", "class"), attrs={**rule, "validation_images": images}
        )
    if found.acceptance is not None and found.accepted is not None:
        limit = {
            "max_error": found.acceptance.max_error, "certainty": found.acceptance.certainty,
            "threshold": found.acceptance.threshold, "validation_images": images,
        }  # fmt: skip
        summary["accepted"] = xr.DataArray(found.accepted.numpy(), dims=("image",), attrs=limit)
    for name, shares in (
        ("prevalence", found.prevalence),
        ("prior", found.prior),
        ("prevalence_low", None if found.estimate is None else found.estimate.low),
        ("prevalence_high", None if found.estimate is None else found.estimate.high),
    ):
        if shares is not None:
            tree.attrs[name] = json.dumps([round(float(share), 6) for share in shares])


def print_decisions(found: Decisions, classes: Sequence[str], labels: "Tensor | None") -> None:
    """Tables of what was decided, and of how it went where labels are known."""
    print_prevalence(found.prevalence, found.prior, classes, found.estimate)
    shown: dict[str, object] = {}
    if found.sets is not None:
        sizes = found.sets.sum(-1)
        shown |= {"mean size of the sets": float(sizes.float().mean()), "sets of one class": f"{_share(sizes == 1)}"}
        if labels is not None:
            shown["sets that hold the label"] = _share(found.sets[range(len(labels)), labels])
    if found.accepted is not None and found.acceptance is not None:
        limit = found.acceptance
        shown |= {"accepted above the confidence": limit.threshold, "for a human": _share(~found.accepted)}
        if labels is not None and bool(found.accepted.any()):
            wrong = found.draws.mean.argmax(-1) != labels
            shown["errors among the accepted"] = _share(wrong[found.accepted])
    if shown:
        print_table("decisions", shown)
    print_nothing_stands(found.acceptance)


def print_prevalence(
    shares: "np.ndarray | None", prior: "np.ndarray | None", classes: Sequence[str],
    estimate: "PrevalenceEstimate | None" = None,
) -> None:  # fmt: skip
    """A table of another prevalence than training's, (C,) both; nothing where there is none."""
    if shares is None or prior is None:
        return
    rows: dict[str, object] = {}
    for c, name in enumerate(classes):
        spread = "" if estimate is None else f" [{estimate.low[c]:.3f}, {estimate.high[c]:.3f}]"
        rows[name] = f"{prior[c]:.3f} -> {shares[c]:.3f}{spread}"
    how = "" if estimate is None else f", estimated, {MASS:.0%} intervals"
    print_table(f"prevalence: what the network counts on -> here{how}", rows)


def print_nothing_stands(limit: "Acceptance | None") -> None:
    """Says how many validation images would help where a limit on the errors lets no image stand."""
    if limit is None or limit.accepted:
        return
    help_ = (
        f"about {limit.needed:,} validation images at the present error rates would let some stand (there are "
        f"{limit.images:,})" if limit.needed
        else "no number of validation images would help at the present error rates"
    )  # fmt: skip
    print(f"no threshold keeps the errors below {limit.max_error:g} for certain: every image is for a human; {help_}.")


def _share(mask: "Tensor") -> str:
    return f"{float(mask.float().mean()):.1%} ({int(mask.sum())} of {len(mask)})"
