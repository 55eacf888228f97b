"""Predict with a trained run: class probabilities, credible intervals and uncertainty of every image.

python -m inference.predict --run runs/demo --input PATH --samples 100 --out predictions.nc
python -m inference.predict --run runs/demo --input PATH --coverage 0.95 --max-error 0.01
python -m inference.predict --run runs/demo --input PATH --prevalence sick=0.02
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inference.cli import print_table, run_script, with_interval
from inference.decide import DecisionArguments, add_to_tree, columns, decide, draws_for, print_decisions
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.untrusted import csv_text

if TYPE_CHECKING:
    from pyro_isingvit.data.split import Split
    from pyro_isingvit.predictive.draws import PredictiveDraws


@dataclass(frozen=True)
class PredictArguments:
    """Which run predicts what."""

    run: Path
    """Folder of a trained run."""
    input: str
    """A folder of images, a table csv:FILE with or without labels, an npz file, or the name of a data set (its test
    part)."""
    out: Path = Path("predictions.nc")
    """ArviZ DataTree to write; a CSV with the same name goes to the same folder."""
    samples: int | None = None
    """Posterior predictive draws; by default 100, or those that the validation part was shown to, where it is used."""
    chunk: int = 2048
    """Images times draws in one pass through the network; limits the memory."""
    seed: int | None = None
    """Seed of the draws; by default 0, or that of the validation part's, where it is used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    data_root: str = "data"
    """Folder of the torchvision data sets, if --input names one."""
    overwrite: bool = False
    """Replace files that are already there."""
    cache: str | None = None
    """Folder where decoded images are kept, for more of them than fit into memory."""
    decisions: DecisionArguments = field(default_factory=DecisionArguments)


def predict(arguments: PredictArguments) -> None:
    """Draw posterior predictive samples for images with a trained run."""
    import torch

    from pyro_isingvit.core.checkpoint import write_text
    from pyro_isingvit.data.load import load_inputs
    from pyro_isingvit.predictive.by_class import class_metrics
    from pyro_isingvit.predictive.datatree import save_datatree
    from pyro_isingvit.predictive.metrics import classification_metrics
    from pyro_isingvit.predictive.tree import predictions_to_datatree
    from pyro_isingvit.runs.load import open_run
    from pyro_isingvit.runs.predict import draw_predictive

    table = arguments.out.with_suffix(".csv")
    if arguments.out.suffix != ".nc":
        raise UserError(f"--out takes a file name that ends in .nc, not {arguments.out}.")
    for path in (arguments.out, table):
        if path.exists() and not arguments.overwrite:
            raise UserError(f"{path} exists; name another --out or add --overwrite.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available here; use --device cpu or auto.")
    wanted = arguments.decisions
    wanted.check()
    cuda = arguments.device != "cpu" and torch.cuda.is_available()
    run = open_run(arguments.run, "cuda" if cuda else "cpu")
    source = replace(run.config.data, cache=arguments.cache)
    inputs = load_inputs(arguments.input, run.info, data_root=arguments.data_root, source=source)
    own_root = None if arguments.data_root == PredictArguments.data_root else Path(arguments.data_root)
    samples, seed, val = draws_for(run, wanted, arguments.samples, arguments.seed, own_root)
    drawn = draw_predictive(run, inputs.images, samples, arguments.chunk, seed, progress=True)
    decided = decide(run, drawn, val, wanted, own_root)
    draws = decided.draws
    labels = inputs.labels if int(inputs.labels.min()) >= 0 else None
    attrs = {"run": str(arguments.run), "input": arguments.input, "config": run.config.to_json()}
    tree = predictions_to_datatree(draws, run.info.classes, inputs.names or None, labels, attrs)
    add_to_tree(tree, decided, wanted, 0 if val is None else len(val))
    save_datatree(tree, arguments.out)
    write_text(table, to_csv(inputs, draws, run.info.classes, columns(decided, run.info.classes)))

    shown: dict[str, object] = {
        "images": len(inputs),
        "draws": len(draws.probs),
        "mean confidence": float(draws.mean.max(-1).values.mean()),
        "mean entropy (nats)": float(draws.entropy.mean()),
        "mean mutual information (nats)": float(draws.mutual_information.mean()),
    }
    if labels is not None:
        scores = classification_metrics(draws.mean, labels)
        shown |= {"accuracy": scores["accuracy"], "NLL (nats)": scores["nll"], "ECE (15 bins)": scores["ece"]}
        by_class = class_metrics(draws.mean, labels, run.info.classes)
        names = {"balanced accuracy": "balanced_accuracy", "AUROC, macro": "auroc_macro", "sensitivity": "sensitivity",
                 "specificity": "specificity"}  # fmt: skip
        shown |= {title: with_interval(by_class, k) for title, k in names.items() if by_class.get(k) is not None}
    print_table(f"{arguments.run} on {arguments.input}", shown)
    counts = torch.bincount(draws.mean.argmax(-1), minlength=run.info.num_classes)
    print_table("predicted classes", {name: int(count) for name, count in zip(run.info.classes, counts, strict=True)})
    print_decisions(decided, run.info.classes, labels)
    print(f"draws: {arguments.out}\ntable: {table}")


def to_csv(
    inputs: "Split", draws: "PredictiveDraws", classes: tuple[str, ...], more: Mapping[str, Sequence[str]]
) -> str:
    """One line per image: file, class, probability, its 5% and 95% quantiles, entropy, mutual information (nats).

    ``more`` are further columns.
    """
    mean, (low, high) = draws.mean, draws.interval(0.9)
    entropy, information = draws.entropy, draws.mutual_information
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", "p05", "p95", "entropy", "mutual_information", *more])
    for i, top in enumerate(mean.argmax(-1).tolist()):
        numbers = (mean[i, top], low[i, top], high[i, top], entropy[i], information[i])
        name = inputs.names[i] if inputs.names else str(i)
        row = [csv_text(name), csv_text(classes[top]), *(f"{float(number):.6f}" for number in numbers)]
        writer.writerow([*row, *(column[i] for column in more.values())])
    return text.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(predict, PredictArguments, argv)


if __name__ == "__main__":
    main()
