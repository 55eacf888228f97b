"""Predict with a trained run: class probabilities, credible intervals and uncertainty of every image.

python -m inference.predict --run runs/demo --input PATH --samples 100 --out predictions.nc
"""

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inference.cli import print_table, run_script
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
    """A folder of images, an npz file, or the name of a data set (its test part)."""
    out: Path = Path("predictions.nc")
    """ArviZ DataTree to write; a CSV with the same name goes to the same folder."""
    samples: int = 100
    """Posterior predictive draws."""
    chunk: int = 2048
    """Images times draws in one pass through the network; limits the memory."""
    seed: int = 0
    """Seed of the draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    data_root: str = "data"
    """Folder of the torchvision data sets, if --input names one."""
    overwrite: bool = False
    """Replace files that are already there."""
    cache: str | None = None
    """Folder where decoded images are kept, for more of them than fit into memory."""


def predict(arguments: PredictArguments) -> None:
    """Draw posterior predictive samples for images with a trained run."""
    import torch

    from pyro_isingvit.core.checkpoint import write_text
    from pyro_isingvit.data.load import load_inputs
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
    cuda = arguments.device != "cpu" and torch.cuda.is_available()
    run = open_run(arguments.run, "cuda" if cuda else "cpu")
    source = replace(run.config.data, cache=arguments.cache)
    inputs = load_inputs(arguments.input, run.info, data_root=arguments.data_root, source=source)
    draws = draw_predictive(run, inputs.images, arguments.samples, arguments.chunk, arguments.seed, progress=True)
    labels = inputs.labels if int(inputs.labels.min()) >= 0 else None
    attrs = {"run": str(arguments.run), "input": arguments.input, "config": run.config.to_json()}
    tree = predictions_to_datatree(draws, run.info.classes, inputs.names or None, labels, attrs)
    save_datatree(tree, arguments.out)
    write_text(table, to_csv(inputs, draws, run.info.classes))

    shown: dict[str, object] = {
        "images": len(inputs),
        "draws": arguments.samples,
        "mean confidence": float(draws.mean.max(-1).values.mean()),
        "mean entropy (nats)": float(draws.entropy.mean()),
        "mean mutual information (nats)": float(draws.mutual_information.mean()),
    }
    if labels is not None:
        scores = classification_metrics(draws.mean, labels)
        shown |= {"accuracy": scores["accuracy"], "NLL (nats)": scores["nll"], "ECE (15 bins)": scores["ece"]}
    print_table(f"{arguments.run} on {arguments.input}", shown)
    counts = torch.bincount(draws.mean.argmax(-1), minlength=run.info.num_classes)
    print_table("predicted classes", {name: int(count) for name, count in zip(run.info.classes, counts, strict=True)})
    print(f"draws: {arguments.out}\ntable: {table}")


def to_csv(inputs: "Split", draws: "PredictiveDraws", classes: tuple[str, ...]) -> str:
    """One line per image: file, class, probability, its 5% and 95% quantiles, entropy, mutual information (nats)."""
    mean, (low, high) = draws.mean, draws.interval(0.9)
    entropy, information = draws.entropy, draws.mutual_information
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", "p05", "p95", "entropy", "mutual_information"])
    for i, top in enumerate(mean.argmax(-1).tolist()):
        numbers = (mean[i, top], low[i, top], high[i, top], entropy[i], information[i])
        name = inputs.names[i] if inputs.names else str(i)
        writer.writerow([csv_text(name), csv_text(classes[top]), *(f"{float(number):.6f}" for number in numbers)])
    return text.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(predict, PredictArguments, argv)


if __name__ == "__main__":
    main()
