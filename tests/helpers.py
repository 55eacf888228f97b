"""Small networks, data and ways to run scripts that the tests share."""

import importlib
import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from forks import ROOT, new_process, script  # noqa: F401
from kills import same

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.settings import DataConfig, IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import Split
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.trainer import Trainer

TINY = ViTConfig(patch_size=2, width=8, heads=2, depth=2, mlp_ratio=2)
INFO = DataInfo("made", ("a", "b", "c"), 1, 4, 4, (0.5,), (0.25,))
QUICK_TRAIN = TrainConfig(
    epochs=6, batch_size=20, samples=5, val_samples=2, device="cpu", pilot_fraction=0.34, weight_decay=0.0
)
# Masks on single weights with a spike of some width, half of them on: what can go wrong with masks can go wrong here.
WEIGHTS = IsingConfig(granularity="weight", target_retention=0.5, tau_0=1e-3, tau_1=0.3, max_keep=0.9)
CONFIG = RunConfig(vit=TINY, train=QUICK_TRAIN, ising=replace(WEIGHTS, update_every=2))
EVIL = "<script>alert(1)</script>"

# Data ------------------------------------------------------------------------------------------------------------


def make_split(count: int, generator: torch.Generator) -> Split:
    """Images whose brightest quadrant tells the class: learnable within a few epochs."""
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 1, 4, 4), generator=generator)
    for row, label in enumerate(labels.tolist()):
        top, left = divmod(label, 2)
        images[row, 0, 2 * top : 2 * top + 2, 2 * left : 2 * left + 2] += 150
    return Split(images.to(torch.uint8), labels)


def pixels(*shape, seed=0):
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_npz(path, **changes):
    """Writes a data set of small grey images in three classes; None leaves an array out."""
    arrays = {
        "train_images": pixels(30, 6, 6),
        "train_labels": np.arange(30, dtype=np.uint8)[:, None] % 3,
        "val_images": pixels(6, 6, 6, seed=1),
        "val_labels": np.arange(6)[:, None] % 3,
        "test_images": pixels(9, 6, 6, seed=2),
        "test_labels": np.arange(9)[:, None] % 3,
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return f"npz:{path}"


# Networks and training -------------------------------------------------------------------------------------------


def make_pair(num_data: int = 50, vit: ViTConfig = TINY, **ising: object) -> tuple[IsingViT, IsingGuide]:
    """Model and guide in the Ising phase, with retention spread between 0.1 and 0.9."""
    config = RunConfig(
        data=DataConfig(), vit=vit, ising=replace(WEIGHTS, **ising), train=TrainConfig(), preset="custom"
    )
    model, guide = IsingMethod(config, INFO, num_data).posterior
    guide.phase = "ising"
    for name in guide.layout.sites:
        guide.field(name).uniform_(-2.1, 2.1)
        model.prior_logits(name).uniform_(-2.0, 2.0)
    return model, guide


def around(model: IsingViT, guide: IsingGuide, config: RunConfig | None = None) -> Run:
    """A run in memory around a model and its posterior."""
    config = config or RunConfig()
    return Run(config, IsingMethod(config, model.info, guide.num_data, model, guide))


def network(config: ViTConfig, info: DataInfo, seed: int) -> tuple[ViT, Weights]:
    """A network whose every parameter is random: constants that are folded must not happen to be 0."""
    torch.manual_seed(seed)
    vit = ViT(config, info.channels, info.height, info.width, info.num_classes)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vit, vit.initial_weights()


def cut(vit: ViT, weights: Weights, granularity: str, share: float, seed: int) -> Weights:
    """The matrices with random masks of a granularity; patch embedding and classifier keep something."""
    layout, generator = MaskLayout(vit, granularity), torch.Generator().manual_seed(seed)
    masks = {name: (torch.rand(site.shape, generator=generator) < share).float() for name, site in layout.sites.items()}
    for name in ("patch", "head_hidden", "head"):
        if name in masks:
            masks[name].fill_(1.0)
    return {kind: weight * layout.expand(kind, masks) for kind, weight in weights.items()}


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a module would save."""
    return {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


QUICK_FIT = {
    "epochs": 4,
    "batch_size": 20,
    "lr": 1e-2,
    "samples": 4,
    "val_samples": 2,
    "device": "cpu",
    "progress": False,
}


def trainer(data, folder=None, config=CONFIG, **train) -> Trainer:
    """A trainer of ``CONFIG``, with changes to its settings of training."""
    return Trainer(replace(config, train=replace(config.train, **train)), data, folder, progress=False)


def resumed_like_whole(data, folder, make=trainer, stop=3, **train) -> dict[str, object]:
    """Trains once, and once more with an interruption after ``stop`` epochs; the checkpoints must be the same bits.

    Returns:
        the checkpoint.
    """
    whole = make(data, folder / "whole", **train).fit()

    def interrupt(at: Trainer) -> None:
        if at.epoch == stop:
            raise KeyboardInterrupt

    cut = make(data, folder / "cut", **train)
    cut.on_epoch = interrupt
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    torch.manual_seed(99)
    again = make(data, folder / "cut", **train)
    again.restore()
    again.fit()
    ours, theirs = (load_checkpoint(folder / name / "checkpoint.pt") for name in ("cut", "whole"))
    assert same({**ours, "seconds": 0}, {**theirs, "seconds": 0}) and whole.history == again.run.history
    return theirs


# Scripts ---------------------------------------------------------------------------------------------------------

# Every script, and the dataclass of its command line.
SCRIPTS = {
    "inference.train": "TrainArguments", "inference.predict": "PredictArguments", "inference.prune": "PruneArguments",
    "inference.compare": "CompareArguments", "inference.peers": "PeersArguments", "analysis.report": "Arguments",
    "inference.benchmark": "BenchmarkArguments", "inference.variance": "VarianceArguments",
    "inference.search": "SearchArguments", "inference.pretrain": "PretrainArguments",
    "inference.backbones": "BackbonesArguments", "inference.start_cost": "CostArguments",
    "inference.rates": "RatesArguments", "analysis.rates": "Arguments", "analysis.benchmark": "BenchmarkFigures",
    "analysis.ood": "Arguments", "analysis.corruptions": "Arguments", "analysis.comparison": "Arguments",
    "analysis.starts": "Arguments", "analysis.paper_table": "Arguments",
    "analysis.labels": "Arguments", "analysis.label_noise": "Arguments",
    "analysis.decisions": "Arguments", "analysis.adaptation": "Arguments", "analysis.shift_table": "Arguments",
    "inference.share": "ShareArguments", "analysis.distillation": "Arguments",
    "analysis.regularisers": "Arguments", "inference.branches": "BranchesArguments",
    "analysis.trials": "Arguments", "analysis.tutorial": "Arguments", "analysis.method_figure": "Arguments",
}  # fmt: skip
QUICK_FLAGS = ["--dataset", "digits", "--epochs", "3", "--depth", "1", "--width", "16", "--samples", "5",
               "--train-size", "100", "--device", "cpu"]  # fmt: skip


def here(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script in this process, for input that is refused before anything happens."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, COLUMNS="200"):
        try:
            importlib.import_module(module).main([*map(str, arguments)])
        except SystemExit as leave:
            code = int(leave.code or 0)
    return subprocess.CompletedProcess(module, code, out.getvalue(), err.getvalue())


def prints_what_it_shows(page: str, folder: Path) -> None:
    """The Python example of a page of docs/ prints the text that the page shows below it."""
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.S)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == shown


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The script left with exit code 2, without a traceback, and its message has the words."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr + result.stdout, result.stderr + result.stdout


def refuses(capsys, call, *words: str) -> None:
    """A call leaves with exit code 2 and one message of at most three lines, which has the words."""
    with pytest.raises(SystemExit) as stop:
        call()
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in shown and len(shown.splitlines()) <= 3, shown
    for word in words:
        assert word in shown, shown


# Parameters of tests ---------------------------------------------------------------------------------------------


def every_pair(*columns: Sequence[object]) -> list[tuple[object, ...]]:
    """Few rows in which every two values of different columns meet."""
    left = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(columns), 2)
        for a, b in itertools.product(first, second)
    }
    rows = []
    while left:

        def pairs(row: tuple[object, ...]) -> set[tuple]:
            return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

        best = max(itertools.product(*columns), key=lambda row: len(pairs(row) & left))  # the first of equals
        left -= pairs(best)
        rows.append(best)
    return rows


def product(*columns: Sequence[object]) -> list:
    """Every combination as parameters of a test; what ``every_pair`` leaves out is slow."""
    kept = every_pair(*columns)
    slow = [row for row in itertools.product(*columns) if row not in kept]
    return [*kept, *(pytest.param(*row, marks=pytest.mark.slow) for row in slow)]
