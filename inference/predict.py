"""Predict with a trained run: class probabilities, credible intervals and uncertainty of every image.

python -m inference.predict --run runs/demo --input PATH --samples 100 --out predictions.nc
python -m inference.predict --run runs/demo --input PATH --coverage 0.95 --max-error 0.01
python -m inference.predict --run runs/demo --input PATH --prevalence sick=0.02
python -m inference.predict --run runs/demo --input FOLDER --samples auto --out predictions.parquet
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inference.cli import print_table, run_script, scores_shown
from inference.decide import (
    ESTIMATE,
    DecisionArguments,
    add_to_tree,
    columns,
    decide,
    draws_for,
    print_decisions,
    read_prevalences,
)
from inference.predict_stream import STREAMED, StreamArguments, predict_stream
from pyro_isingvit.core.errors import UserError, need

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_isingvit.core.settings import DataConfig
    from pyro_isingvit.data.split import Split
    from pyro_isingvit.predictive.draws import PredictiveDraws
    from pyro_isingvit.predictive.table import Column
    from pyro_isingvit.runs.adapt import Adapted
    from pyro_isingvit.runs.run import Run


@dataclass(frozen=True)
class PredictArguments:
    """Which run predicts what."""

    run: Path
    """Folder of a trained run."""
    input: str
    """A folder of images, a table csv:FILE with or without labels, an npz file, or the name of a data set (its test
    part)."""
    out: Path = Path("predictions.nc")
    """.nc: an ArviZ DataTree with all draws, and a CSV with the same name in the same folder. .parquet or .csv: a line
    for each image alone, written part by part, for any number of images."""
    samples: int | Literal["auto"] | None = None
    """Posterior predictive draws; by default 100, or those that the validation part was shown to, where it is used.
    auto: of each image as many as its probabilities need (--mc-error); for .parquet and .csv."""
    chunk: int = 2048
    """Images times draws in one pass through the network; limits the memory. On a CPU at most 256 images pass,
    fewer where the network is wide."""
    seed: int | None = None
    """Seed of the draws; by default 0, or that of the validation part's, where it is used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    data_root: str | None = None
    """Folder of the torchvision data sets, if --input names one; by default the run's own."""
    overwrite: bool = False
    """Replace files that are already there."""
    cache: str | None = None
    """Folder where decoded images are kept, for more of them than fit into memory."""
    columns: str | None = None
    """csv: names of the table's columns, as 'path=file,label=finding', where they are others than in training."""
    decisions: DecisionArguments = field(default_factory=DecisionArguments)
    streaming: StreamArguments = field(default_factory=StreamArguments)
    adapt: Literal["tent", "eata", "eata-c"] | None = None
    """Adapt the LayerNorms to the images first, without labels, for this prediction alone; it may do harm
    (docs/adaptation.md). For --out NAME.nc."""
    adapt_crowd: bool = False
    """With --adapt, leave out images of whose first answer the adapted network is less sure."""


def predict(arguments: PredictArguments) -> None:
    """Draw posterior predictive samples for images with a trained run."""
    from pyro_isingvit.core.checkpoint import write_text
    from pyro_isingvit.core.device import checked_device
    from pyro_isingvit.data.inputs import load_inputs
    from pyro_isingvit.predictive.datatree import save_datatree
    from pyro_isingvit.predictive.tree import predictions_to_datatree
    from pyro_isingvit.runs.adapt import Adaptation, adapted
    from pyro_isingvit.runs.load import open_run
    from pyro_isingvit.runs.predict import draw_predictive, need_numbers

    wanted, streams = arguments.decisions, arguments.out.suffix in STREAMED
    arguments.streaming.check(arguments.out, arguments.samples, wanted)
    table = arguments.out.with_suffix(".csv")
    for path in () if streams else (arguments.out, table):
        if path.exists() and not arguments.overwrite:
            raise UserError(f"{path} exists; name another --out or add --overwrite.")
    device = checked_device(arguments.device)
    wanted.check()
    _check_adaptation(arguments, streams)
    run = open_run(arguments.run, device)
    source = _source(arguments, run)
    own_root = None if arguments.data_root is None else Path(arguments.data_root)
    data_root = source.data_root if own_root is None else str(own_root)
    read_prevalences(run, wanted, own_root)  # what is wrong with them is said before anything is predicted
    if streams:
        predict_stream(
            run, arguments.input, arguments.out, source, data_root=data_root, own_root=own_root,
            samples=arguments.samples, seed=arguments.seed, chunk=arguments.chunk, wanted=arguments.streaming,
            decisions=wanted, overwrite=arguments.overwrite,
        )  # fmt: skip
        return
    assert arguments.samples != "auto"
    samples, seed, val = draws_for(run, wanted, arguments.samples, arguments.seed, own_root)
    inputs = load_inputs(arguments.input, run.info, data_root=data_root, source=source)
    how = None if arguments.adapt is None else Adaptation(arguments.adapt, crowd=arguments.adapt_crowd, seed=seed)
    with nullcontext() if how is None else adapted(run, inputs.images, how, progress=True) as done:
        drawn = draw_predictive(run, inputs.images, samples, arguments.chunk, seed, progress=True)
    need_numbers(drawn, inputs.images)
    decided = decide(run, drawn, val, wanted, own_root)
    draws = decided.draws
    labels = inputs.labels if int(inputs.labels.min()) >= 0 else None
    attrs = {"run": str(arguments.run), "input": arguments.input, "config": run.config.to_json()}
    attrs |= {} if how is None else {"adaptation": json.dumps(asdict(how))}
    tree = predictions_to_datatree(draws, run.info.classes, inputs.names or None, labels, attrs)
    add_to_tree(tree, decided, wanted, 0 if val is None else len(val))
    save_datatree(tree, arguments.out)
    write_text(table, to_csv(inputs, draws, run.info.classes, columns(decided, run.info.classes)))

    _show(f"{arguments.run} on {arguments.input}", draws, labels, run.info.classes, done)
    print_decisions(decided, run.info.classes, labels)
    print(f"draws: {arguments.out}\ntable: {table}")


def _source(arguments: PredictArguments, run: "Run") -> "DataConfig":
    """How the images are read: as the run read its own, but for what was asked for."""
    from pyro_isingvit.data.named import path_of
    from pyro_isingvit.data.table import read_table

    source = replace(run.config.data, cache=arguments.cache)
    if arguments.columns is None:
        return source
    need(arguments.input.startswith("csv:"), f"`columns` are those of a table csv:FILE, not of {arguments.input}.")
    source = replace(source, columns=arguments.columns)
    named = [pair.partition("=")[0].strip() for pair in arguments.columns.split(",")]
    read_table(path_of(replace(source, dataset=arguments.input)), arguments.columns, named)  # has them all
    return source


def _show(
    title: str, draws: "PredictiveDraws", labels: "Tensor | None", classes: tuple[str, ...], done: "Adapted | None"
) -> None:
    import torch

    from pyro_isingvit.predictive.by_class import class_metrics
    from pyro_isingvit.predictive.metrics import classification_metrics

    shown: dict[str, object] = {
        "images": draws.probs.shape[1],
        "draws": len(draws.probs),
        **({} if done is None else {"images adapted to": f"{done.used} of {done.images}"}),
        "mean confidence": float(draws.mean.max(-1).values.mean()),
        "mean entropy (nats)": float(draws.entropy.mean()),
        "mean mutual information (nats)": float(draws.mutual_information.mean()),
    }
    if labels is not None:
        metrics = classification_metrics(draws.mean, labels) | class_metrics(draws.mean, labels, classes)
        shown |= scores_shown(metrics)
    print_table(title, shown)
    counts = torch.bincount(draws.mean.argmax(-1), minlength=len(classes))
    print_table("predicted classes", {name: int(count) for name, count in zip(classes, counts, strict=True)})


def _check_adaptation(arguments: PredictArguments, streams: bool) -> None:
    need(arguments.adapt or not arguments.adapt_crowd, "`adapt_crowd` belongs to `adapt`; name a kind.")
    if arguments.adapt is None:
        return
    need(
        not streams, f"`adapt` is for --out NAME.nc, not {arguments.out}: it follows all images before it predicts any."
    )
    wanted = arguments.decisions
    need(
        not wanted.guaranteed and wanted.prevalence != ESTIMATE,
        "`coverage`, `max_error` and an estimated `prevalence` rest on what the network said of the validation part "
        "before it was adapted; leave `adapt` out.",
    )


def to_csv(inputs: "Split", draws: "PredictiveDraws", classes: tuple[str, ...], more: "Mapping[str, Column]") -> str:
    """One line per image: the columns of ``summary_columns``, and ``more``."""
    from pyro_isingvit.predictive.table import csv_of, summary_columns

    names = inputs.names or [str(i) for i in range(len(inputs))]
    return csv_of({**summary_columns(draws, names, classes), **more})


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(predict, PredictArguments, argv)


if __name__ == "__main__":
    main()
