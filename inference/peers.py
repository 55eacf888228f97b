"""Train methods of other libraries on the same network and split, and print quality and seconds per epoch.

python -m inference.peers --dataset fashion-mnist --data-root data --train-size 6000 --preset small --epochs 30 \
    --seed 0 --samples 50 --peers tyxe bayesian-torch laplace torch-uncertainty --out runs/peers

Each method runs in its own process, so that a peer's patches, warnings and errors stay there. The processes take turns,
one epoch each, so that other load on the machine slows all of them alike.
"""

import importlib.util
import multiprocessing
import signal
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from inference.cli import results_file, run_script
from pyro_isingvit.core.errors import need, why
from pyro_isingvit.core.presets import default_preset, preset, without_stem
from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.methods.registry import METHODS, WITHOUT
from pyro_isingvit.version import __version__

RESULTS = "peers.json"
OURS = ("ising", "deterministic")
REFERENCE = "deterministic"  # the ratios are to its seconds per epoch
LR = 2e-3  # at which every peer and both of ours train well on narrow networks
PATIENCE = 20.0  # seconds that a process gets to end by itself
INSTALL = "pip install 'pyro-isingvit[peers]'"
SHOWN = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE", "nll_calibrated": "NLL, T fitted"}


@dataclass(frozen=True)
class PeersArguments:
    """Which peers, on what."""

    out: Path
    """Folder that receives peers.json."""
    peers: tuple[str, ...] = ("tyxe", "bayesian-torch", "laplace", "torch-uncertainty")
    """tyxe, tyxe-plain, bayesian-torch, laplace, torch-uncertainty; our ising and deterministic always run too."""
    preset: str | None = None
    """Network shape; by default the preset for the data set."""
    depth: int | None = None
    """Number of blocks; by default the preset's."""
    patch_size: int | None = None
    """Side of a patch in pixels; by default the preset's."""
    width: int | None = None
    """D, the width; by default the preset's."""
    epochs: int = 30
    """Epochs of every method."""
    batch_size: int = 64
    """Images per step."""
    lr: float | None = None
    """Peak learning rate of AdamW, the same for all; by default 2e-3, and 2e-3 * 64 / width for wide networks."""
    seed: int = 0
    """Seed of split, initial weights, order of batches and noise."""
    samples: int = 50
    """S, draws at prediction."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    overwrite: bool = False
    """Replace the peers.json that the folder holds."""
    data: DataConfig = field(default_factory=DataConfig)


def make_config(arguments: PeersArguments) -> RunConfig:
    """The settings that all methods share, as a configuration of the deterministic method.

    Raises:
        UserError: no peer, a peer that is unknown, repeated or not installed, or an unknown preset.
    """
    from inference.peer_adapters import METHODS as KNOWN
    from inference.peer_adapters import PEERS
    from pyro_isingvit.methods.rates import WIDTH

    names = ", ".join(PEERS)
    need(arguments.peers, f"--peers needs at least one of {names}.")
    for name in arguments.peers:
        need(name in PEERS, f"unknown peer {name!r}; known: {names}.")
    need(len(set(arguments.peers)) == len(arguments.peers), "--peers needs distinct names.")
    modules = [KNOWN[name].module for name in arguments.peers]
    found = [module for module in modules if module and importlib.util.find_spec(module)]
    need(found, f"none of {', '.join(arguments.peers)} is installed: {INSTALL}.")
    name = arguments.preset or without_stem(default_preset(arguments.data.dataset))
    vit = preset(name, **{key: getattr(arguments, key) for key in ("depth", "patch_size", "width")})
    train = replace(
        METHODS[REFERENCE].train, epochs=arguments.epochs, batch_size=arguments.batch_size,
        lr=LR * min(1.0, WIDTH / vit.width) if arguments.lr is None else arguments.lr, seed=arguments.seed,
        samples=arguments.samples, device=arguments.device, average=0.0, rate_rule="uniform",
        **WITHOUT,  # what no peer's loss has
    )  # fmt: skip
    return RunConfig(name, REFERENCE, arguments.data, vit, train=train, version=__version__)


def check(config: RunConfig) -> None:
    """Raises UserError for data or settings that not every method could use, before any process starts."""
    from pyro_isingvit.data.load import load_data
    from pyro_isingvit.nets.plain import PlainViT
    from pyro_isingvit.nets.vit import ViT
    from pyro_isingvit.runs.checks import check_training

    check_training(config.train)
    data = load_data(**asdict(config.data), seed=config.train.seed)
    need(len(data.test), f"{data.info.dataset} has no test part to evaluate on.")
    need(data.train.weights is None, "the peers know no weights of images, and ours would; give data without them.")
    info = data.info
    PlainViT(ViT(config.vit, info.channels, info.height, info.width, info.num_classes))


def fit_and_score(name: str, config: RunConfig, pause: Any = lambda: None) -> dict[str, Any]:
    """One method from data to its row, without the ratio.

    Args:
        name: of a method of peer_adapters.
        config: what ``make_config`` gives.
        pause: called after each epoch, and once more before what follows the last.
    """
    import torch

    from inference.peer_adapters import METHODS as KNOWN
    from inference.peer_network import Clock, Job
    from pyro_isingvit.data.load import load_data
    from pyro_isingvit.predictive.calibration import fit_temperature, temper
    from pyro_isingvit.predictive.metrics import classification_metrics

    method, clock = KNOWN[name], Clock(pause)
    data = load_data(**asdict(config.data), seed=config.train.seed)
    device = config.train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    predict = method.fit(Job(config, replace(data, train=data.train.to(device)), torch.device(device)), clock)
    after = time.perf_counter() - clock.resumed
    torch.manual_seed(config.train.seed)
    val = predict(data.val.images[:]) if len(data.val) else None
    start = time.perf_counter()
    probs = predict(data.test.images[:])  # the only use of the test part, (S, B, C)
    seconds = time.perf_counter() - start
    temperature = 1.0 if val is None or method.calibrated else fit_temperature(val, data.val.labels)
    fitted = classification_metrics(temper(probs, temperature).mean(0), data.test.labels)
    return {
        "status": "done",
        "reason": "",
        "metrics": {
            **classification_metrics(probs.mean(0), data.test.labels),
            **{f"{key}_calibrated": fitted[key] for key in ("nll", "ece", "brier")},  # T on the validation part
        },
        "samples": len(probs),
        "epoch_seconds": clock.seconds,
        "seconds_per_epoch": statistics.median(clock.seconds),
        "seconds_after_training": after,  # Laplace's fit, our temperature
        "predict_seconds": seconds,
        "train_size": len(data.train),
        "test_size": len(data.test),
    }


def work(name: str, config: RunConfig, pipe: Connection) -> None:
    """The body of a process: waits for each turn, answers it with None, and answers the last one with its row."""
    from inference.peer_adapters import METHODS as KNOWN

    method = KNOWN[name]

    def pause() -> None:
        pipe.send(None)
        pipe.recv()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    row: dict[str, Any]
    try:
        pipe.recv()
        with warnings.catch_warnings():
            if method.module is not None:
                warnings.simplefilter("ignore")  # the peers' own warnings, which their users get too
            row = fit_and_score(name, config, pause)
    except ImportError as error:
        row = {"status": "not installed", "reason": f"{why(error)}; {INSTALL}"}
    except (EOFError, ConnectionError):  # the parent has closed the pipe
        return
    except Exception as error:
        row = {"status": "failed", "reason": f"{type(error).__name__}: {why(error)}"[:300]}
    pipe.send(row)


class Worker:
    """A method in a process of its own."""

    def __init__(self, name: str, config: RunConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(name, config, other), daemon=True)
        self.process.start()
        other.close()

    def turn(self) -> dict[str, Any] | None:
        """Lets it run one more epoch, or from the last one to the end; returns its row if it is done."""
        try:
            self.pipe.send("go on")
            return self.pipe.recv()
        except (EOFError, OSError):
            return {"status": "failed", "reason": "the process died (out of memory, or killed)"}

    def end(self) -> None:
        """Ends the process: a waiting process ends by itself; a process in the middle of an epoch is terminated."""
        self.pipe.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def run_methods(names: list[str], config: RunConfig) -> list[dict[str, Any]]:
    """Trains all methods, one epoch each in turn; returns their rows in the order of ``names``."""
    from tqdm.auto import tqdm

    waiting = [Worker(name, config) for name in names]
    rows: dict[str, dict[str, Any]] = {}
    everyone = list(waiting)
    with tqdm(total=len(names) * (config.train.epochs + 1), desc="peers", unit="turn", dynamic_ncols=True) as bar:
        try:
            while waiting:
                for worker in list(waiting):
                    bar.set_postfix_str(worker.name)
                    row = worker.turn()
                    bar.update()
                    if row is not None:
                        rows[worker.name] = row
                        waiting.remove(worker)
                        if row["status"] != "done":
                            bar.write(f"{worker.name}: {row['status']}: {row['reason']}", file=sys.stderr)
        finally:
            for worker in everyone:
                worker.end()
    reference = rows.get(REFERENCE, {})
    return [{**_labels(name, config), **rows[name], "ratio": ratio(rows[name], reference)} for name in names]


def ratio(row: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """Median over epochs of the seconds over those of the reference in the same round; None where one did not run.

    Within a round both had the same load of the machine. The ratio of two medians would not cancel it.
    """
    if "epoch_seconds" not in row or "epoch_seconds" not in reference:
        return None
    pairs = zip(row["epoch_seconds"], reference["epoch_seconds"], strict=True)
    return statistics.median(own / other for own, other in pairs)


def _labels(name: str, config: RunConfig) -> dict[str, Any]:
    from inference.peer_adapters import METHODS as KNOWN

    method = KNOWN[name]
    try:
        installed = __version__ if method.module is None else version(method.package)
    except PackageNotFoundError:
        installed = None
    return {
        "peer": name, "what": method.what, "package": method.package, "version": installed,
        "dataset": config.data.dataset, "epochs": config.train.epochs, "seed": config.train.seed,
        "vit": asdict(config.vit),
    }  # fmt: skip


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints the table, and below it the reason for each empty row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="test part; seconds of one epoch, and their ratio to the deterministic network's",
                  title_justify="left")  # fmt: skip
    for heading in ("method", "version", *SHOWN.values(), "s / epoch", "ratio"):
        table.add_column(heading, justify="left" if heading in ("method", "version") else "right", no_wrap=True)
    for row in rows:
        head = [row["peer"], row["version"] or ""]
        if row["status"] != "done":
            table.add_row(*head, row["status"])
            continue
        values = [f"{row['metrics'][metric]:.4f}" for metric in SHOWN]
        share = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(*head, *values, f"{row['seconds_per_epoch']:.2f}", share)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    for row in rows:
        if row["status"] != "done":
            print(f"{row['peer']}: {row['status']}: {row['reason']}")


def peers(arguments: PeersArguments) -> None:
    """Compare with other libraries on the same network and split."""
    from pyro_isingvit.core.checkpoint import write_json

    config, path = make_config(arguments), results_file(arguments.out, RESULTS, arguments.overwrite)
    check(config)
    rows = run_methods([*OURS, *arguments.peers], config)
    write_json(path, rows)
    print_rows(rows)
    print(f"rows: {path}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(peers, PeersArguments, argv)


if __name__ == "__main__":
    main()
