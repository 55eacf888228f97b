"""What runs of version 0.3.0 computed, and the same asked of today's code.

``python tests/golden.py`` writes ``golden.json`` anew: only for a change that means to change what is computed.
The bytes of a run depend on the processor's kernels and on torch's version, so that hashes are compared where a fixed
computation (``probe``) gives the bytes that it gave there; elsewhere the losses are compared, to 1e-3.
"""

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.experiment import train_run

FILE = Path(__file__).with_name("golden.json")
SIZES = {"train": 40, "val": 12, "test": 12}
# Whole settings of 0.4.0, for every method as it then was and for variants: fields added later are at what they were.
SETTINGS = json.loads(Path(__file__).with_name("golden_settings.json").read_text())
NAMES = [*SETTINGS]


def probe() -> str:
    """Hash of a product, an attention, a LayerNorm and their gradients at fixed inputs."""
    made = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=made, requires_grad=True) for shape in ((6, 4, 8), (24, 8)))
    q, k, v = F.linear(F.layer_norm(x, (8,)), w).chunk(3, -1)
    loss = F.gelu(F.scaled_dot_product_attention(q, k, v)).softmax(-1).log().sum()
    return digest({"loss": loss, **dict(zip("xw", torch.autograd.grad(loss, (x, w)), strict=True))})


def digest(state: dict[str, Any]) -> str:
    """SHA-256 of keys, shapes and bytes."""
    total = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        else:
            total.update(f"{key} {value}".encode())
    return total.hexdigest()


def write_images(folder: Path) -> str:
    """A small data set, the same every time; returns its name for ``DataConfig``."""
    made, path = np.random.default_rng(0), folder / "x.npz"
    arrays = {f"{part}_images": made.integers(0, 255, (n, 8, 8), dtype=np.uint8) for part, n in SIZES.items()}
    np.savez(path, **arrays, **{f"{part}_labels": np.arange(n) % 3 for part, n in SIZES.items()})
    return f"npz:{path}"


def settings(name: str, images: str) -> RunConfig:
    """The settings of a run in ``NAMES``."""
    config = RunConfig.from_json(json.dumps(SETTINGS[name]))
    return replace(config, data=replace(config.data, dataset=images), version="")


def outcome(name: str, images: str, folder: Path) -> dict[str, Any]:
    """What a run computed: hashes of everything that is kept, and numbers to compare elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over more threads have other roundings
    try:
        metrics = train_run(settings(name, images), folder, progress=False)
    finally:
        torch.set_num_threads(threads)
    state = load_checkpoint(folder / "checkpoint.pt")
    return {
        "model": digest(state["model"]),
        "guide": digest(state["guide"]),
        "rng": digest({"rng": state["rng"]}),
        "val_nll": [record["val_nll"] for record in state["history"]],
        "nll": metrics["nll"],
        "accuracy": metrics["accuracy"],
    }


def kept_keys(folder: Path) -> dict[str, list[str]]:
    """Names of everything in config.json and, first level, in checkpoint.pt."""
    return {
        "config": sorted(_keys(json.loads((folder / "config.json").read_text()))),
        "checkpoint": sorted(load_checkpoint(folder / "checkpoint.pt")),
    }


def _keys(raw: dict[str, Any], start: str = "") -> list[str]:
    return [name for key, value in raw.items() for name in
            (_keys(value, f"{start}{key}.") if isinstance(value, dict) else [start + key])]  # fmt: skip


def main() -> None:
    """Writes the file."""
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder))
        runs = {name: outcome(name, images, Path(folder) / name) for name in NAMES}
        keys = kept_keys(Path(folder) / NAMES[0])
    made = {"version": sys.argv[1], "torch": torch.__version__, "probe": probe(), **keys, "runs": runs}
    FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
