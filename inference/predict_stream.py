"""What predict.py does with --out NAME.parquet or NAME.csv: any number of images, part by part."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inference.cli import print_table, scores_shown
from inference.decide import (
    ESTIMATE,
    DecisionArguments,
    columns,
    decide,
    draws_for,
    print_nothing_stands,
    print_prevalence,
    read_prevalences,
)
from pyro_isingvit.core.errors import need

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_isingvit.core.settings import DataConfig
    from pyro_isingvit.predictive.draws import PredictiveDraws
    from pyro_isingvit.predictive.selective import Acceptance
    from pyro_isingvit.predictive.table import Column
    from pyro_isingvit.runs.run import Run
    from pyro_isingvit.runs.stream import Streamed

STREAMED = (".parquet", ".csv")
AUTO: Literal["auto"] = "auto"
Samples = int | Literal["auto"] | None


@dataclass(frozen=True)
class StreamArguments:
    """How a .parquet or .csv file is written."""

    all_classes: bool = False
    """Add a column for the probability of each class."""
    mc_error: float | None = None
    """With --samples auto, draw for an image until the Monte Carlo error of each of its class probabilities is at most
    this much, with 95% certainty for all of them together; 0.02 by default."""
    max_samples: int | None = None
    """With --samples auto, the most draws of an image; 1000 by default."""
    part: int | None = None
    """Images of a part, which is what is kept if the script is killed; 2048 by default, fewer where they are large."""
    max_unreadable: float | None = None
    """Leave with an error if more than this share of the images cannot be read; 0.5 by default."""

    def check(self, out: Path, samples: Samples, decisions: DecisionArguments) -> None:
        """Raises UserError where the flags contradict each other."""
        streams = out.suffix in STREAMED
        need(streams or out.suffix == ".nc", f"--out takes a file name that ends in .nc, .parquet or .csv, not {out}.")
        for name, value in asdict(self).items():
            need(streams or value in (None, False), f"`{name}` is for --out NAME.parquet or NAME.csv, not {out}.")
        auto = samples == AUTO
        need(streams or not auto, f"`samples` auto is for --out NAME.parquet or NAME.csv, not {out}.")
        for name in ("mc_error", "max_samples"):
            need(auto or getattr(self, name) is None, f"`{name}` belongs to `samples` auto; set both.")
        need(
            not auto or not decisions.guaranteed,
            "the guarantees of `coverage` and `max_error` are for the networks that saw the validation part; leave "
            "`samples` auto out.",
        )
        need(
            not auto or decisions.prevalence is None,
            "`samples` auto bounds the error of probabilities before a `prevalence` corrects them; give a number.",
        )
        need(
            not streams or decisions.prevalence != ESTIMATE,
            "`prevalence` estimate needs the predictions of all images at once: use --out NAME.nc, or give the shares.",
        )


class Decider:
    """Decides part by part, and counts.

    Args:
        run: a trained run.
        wanted: what is decided.
        samples: as on the command line.
        seed: as on the command line.
        own_root: folder of the torchvision data sets, if it is not the run's own.
    """

    def __init__(
        self, run: "Run", wanted: DecisionArguments, samples: int | None, seed: int | None, own_root: Path | None
    ) -> None:
        from pyro_isingvit.predictive.selective import acceptance
        from pyro_isingvit.runs.validation import prior_of

        if wanted.prevalence is not None and wanted.training_prevalence is None:  # looked up once
            prior = prior_of(run, own_root)
            wanted = replace(wanted, training_prevalence=",".join(map(repr, prior)))
        self.run, self.wanted, self.own_root = run, wanted, own_root
        self.samples, self.seed, self.val = draws_for(run, wanted, samples, seed, own_root)
        self.prevalences = read_prevalences(run, wanted, own_root)
        self.acceptance: Acceptance | None = None
        if wanted.max_error is not None:
            assert self.val is not None
            self.acceptance = acceptance(self.val.probs, self.val.labels, wanted.max_error, wanted.certainty)

    def rests_on(self) -> dict[str, str]:
        """What the decisions depend on, in words: a table never mixes two of them."""
        asked = {"decisions": str(self.wanted)}
        if self.val is None:
            return asked
        probs, labels = (part.cpu().contiguous().numpy() for part in (self.val.probs, self.val.labels))
        digest = blake2b(probs.tobytes() + labels.tobytes(), digest_size=16).hexdigest()
        return asked | {"validation": f"{digest}, {self.val.samples} draws from seed {self.val.seed}"}

    def __call__(
        self, draws: "PredictiveDraws", labels: "Tensor | None"
    ) -> "tuple[PredictiveDraws, dict[str, Column], Mapping[str, float]]":
        """Draws, columns and sums (``runs.stream.Decide``)."""
        found = decide(self.run, draws, self.val, self.wanted, self.own_root)
        counted: dict[str, float] = {}
        if found.sets is not None:
            sizes = found.sets.sum(-1)
            counted |= {"in_sets": int(sizes.sum()), "sets_of_one": int((sizes == 1).sum())}
            if labels is not None:
                counted["held"] = int(found.sets[range(len(labels)), labels].sum())
        if found.accepted is not None:
            counted["accepted"] = int(found.accepted.sum())
            if labels is not None:
                wrong = found.draws.mean.argmax(-1) != labels
                counted["accepted_wrong"] = int((wrong & found.accepted).sum())
        return found.draws, columns(found, self.run.info.classes), counted


def predict_stream(
    run: "Run",
    given: str,
    out: Path,
    source: "DataConfig",
    *,
    data_root: str,
    own_root: Path | None,
    samples: Samples,
    seed: int | None,
    chunk: int,
    wanted: StreamArguments,
    decisions: DecisionArguments,
    overwrite: bool,
) -> None:
    """Predicts ``given`` into ``out`` and prints what came of it."""
    from pyro_isingvit.data.streamed import open_stream
    from pyro_isingvit.predictive.stopping import Stopping
    from pyro_isingvit.runs.stream import PART, stream_predictions

    until: int | Stopping
    deciding = decisions != DecisionArguments()
    decider = Decider(run, decisions, None if samples == "auto" else samples, seed, own_root)
    until, first = decider.samples, decider.seed
    if samples == AUTO:
        bound, most = wanted.mc_error, wanted.max_samples
        until = Stopping(Stopping.bound if bound is None else bound, Stopping.most if most is None else most)
    done = stream_predictions(
        run, open_stream(given, run.info, data_root=data_root, source=source), out, until, seed=first, chunk=chunk,
        part=PART if wanted.part is None else wanted.part, all_classes=wanted.all_classes,
        decide=decider if deciding else None, settings=decider.rests_on(),
        max_unreadable=0.5 if wanted.max_unreadable is None else wanted.max_unreadable, overwrite=overwrite,
        progress=True,
    )  # fmt: skip
    _report(done, decider, given, out, until if isinstance(until, Stopping) else None)


def _report(done: "Streamed", decider: Decider, given: str, out: Path, stopping: object) -> None:
    totals, count, run = done.totals, done.images, decider.run
    shown: dict[str, object] = {
        "images": count,
        "unreadable images": len(done.unreadable),
        "draws of an image, mean": totals["draws"] / count,
        "Monte Carlo error, largest": done.mc_error,
        "mean confidence": totals["confidence"] / count,
        "mean entropy (nats)": totals["entropy"] / count,
        "mean mutual information (nats)": totals["mutual_information"] / count,
    }
    if done.scores is not None:
        shown |= scores_shown(done.scores)
    if "in_sets" in totals:
        shown |= {
            "mean size of the sets": totals["in_sets"] / count,
            "sets of one class": _share(totals, "sets_of_one", count),
        }
    if "held" in totals:
        shown["sets that hold the label"] = _share(totals, "held", count)
    if "accepted" in totals:
        assert decider.acceptance is not None
        shown["accepted above the confidence"] = decider.acceptance.threshold
        shown["accepted"] = _share(totals, "accepted", count)
    if totals.get("accepted") and "accepted_wrong" in totals:
        shown["errors among the accepted"] = _share(totals, "accepted_wrong", int(totals["accepted"]))
    if done.new < count:
        shown["of these, predicted before"] = count - done.new
    shown |= {
        "images a second": done.new / max(done.seconds, 1e-9),
        "time spent waiting for images": f"{done.waited / max(done.seconds, 1e-9):.0%}",
    }
    print_table(f"{run.folder} on {given}", shown)
    print_table("predicted classes", dict(zip(run.info.classes, done.classes, strict=True)))
    if decider.prevalences is not None:
        prior, shares = decider.prevalences
        print_prevalence(shares, prior, run.info.classes)
    print_nothing_stands(decider.acceptance)
    if stopping is not None and totals["unsettled"]:
        print(f"{int(totals['unsettled'])} images were not settled after all draws; their mc_error says how far.")
    if done.unreadable:
        print(f"{len(done.unreadable)} images could not be read; they are listed in {done.listed}")
    print(f"table: {out}")


def _share(totals: dict[str, float], name: str, count: int) -> str:
    return f"{totals[name] / count:.1%} ({int(totals[name])} of {count})"
