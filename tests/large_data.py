"""Data that do not fit into memory: what they cost in memory, and what reading from disk costs in time.

python tests/large_data.py --gigabytes 20 --folder FOLDER --out large.json

Makes FOLDER/large (deleted afterwards): an .npy file of random bytes as images of 512x512 pixels. Trains on all of it
for one epoch in a process of its own, and takes the most memory that process ever held. Then trains a small data set
(Fashion-MNIST's shape, 2,000 images) in turn from memory, from an .npy file and from a cache, and compares the seconds
of their epochs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]
SIDE, BLOCK = 512, 256
SMALL, EPOCHS = 2000, 4


def write_large(folder: Path, gigabytes: float) -> int:
    """Images in random bytes, and labels that the first pixels tell; returns N."""
    count = int(gigabytes * 2**30 / SIDE**2) // BLOCK * BLOCK
    images = np.lib.format.open_memmap(folder / "train_images.npy", "w+", np.uint8, (count, SIDE, SIDE))
    labels, made = np.arange(count) % 4, np.random.default_rng(0)
    noise = made.integers(0, 256, (BLOCK + 1, SIDE, SIDE), dtype=np.uint8)
    for start in range(0, count, BLOCK):
        block = np.roll(noise, start // BLOCK, axis=2)[:BLOCK]
        for i in range(BLOCK):
            block[i, :64, :64] = 60 * labels[start + i]
        block[:, -1, -8:] = np.arange(start, start + BLOCK, dtype="<i8").view(np.uint8).reshape(-1, 8)  # no copies
        images[start : start + BLOCK] = block
        images.flush()
    np.save(folder / "train_labels.npy", labels)
    return count


def peak_kib() -> int:
    """The most memory that this process held; ``getrusage`` would count that of the process which started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1])


def train_large(folder: Path) -> dict[str, float]:
    """One epoch on all images; runs in its own process."""
    from pyro_isingvit import ViTConfig, fit, load_data

    start = time.monotonic()
    data = load_data(f"npy:{folder}", val_fraction=0.002)
    loaded = time.monotonic() - start
    vit = ViTConfig(patch_size=64, width=32, heads=2, depth=1)
    start = time.monotonic()
    run = fit(vit, data, epochs=1, max_keep=0.98, progress=True, device="cpu")
    return {
        "training_images": len(data.train), "seconds_to_open": loaded, "seconds_of_training": time.monotonic() - start,
        "validation_accuracy": run.history[-1]["val_accuracy"],
        "peak_gib": peak_kib() / 2**20,
    }  # fmt: skip


def time_small(folder: Path) -> dict[str, float]:
    """Seconds of an epoch from memory, from a file and from a cache, trained in turn."""
    from dataclasses import replace

    import torch

    from pyro_isingvit.core.presets import preset
    from pyro_isingvit.core.settings import RunConfig
    from pyro_isingvit.data.cache import Cache
    from pyro_isingvit.data.decode import Look
    from pyro_isingvit.data.images import InMemory
    from pyro_isingvit.data.npz import Stored
    from pyro_isingvit.data.on_disk import open_npy
    from pyro_isingvit.data.split import ImageData
    from pyro_isingvit.methods.registry import METHODS
    from pyro_isingvit.runs.trainer import Trainer

    array = np.random.default_rng(0).integers(0, 256, (SMALL, 1, 28, 28), dtype=np.uint8)
    np.save(folder / "small.npy", array)
    grey = Look(1, 28, 28, "uint8")
    places = {
        "memory": InMemory(torch.from_numpy(array)),
        "npy": Stored(folder).images("small"),
        "cache": Cache(folder / "cache").images(b"", {}, SMALL, grey, lambda row: iter(array[row:])),
        "rows": open_npy(folder / "small.npy"),  # as if it were large
    }
    settings = replace(METHODS["ising"].train, epochs=EPOCHS, device="cpu")
    ising = replace(METHODS["ising"].ising, max_keep=0.98)
    trainers = {
        name: Trainer(
            RunConfig(vit=replace(preset("small"), depth=1), train=settings, ising=ising),
            ImageData.from_arrays(images, np.arange(SMALL) % 10, val_fraction=0), None, False,
        )
        for name, images in places.items()
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in places}
    for epoch in range(EPOCHS):
        for name, trainer in trainers.items():
            taken[name].append(trainer.train_epoch(epoch)[1])
    usual = {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}
    return {"seconds_from_memory": usual["memory"]} | {
        f"{name}_over_memory": usual[name] / usual["memory"] for name in ("npy", "cache", "rows")
    }


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", choices=("large", "small"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    place = arguments.folder / "large"
    if arguments.step:
        step = train_large if arguments.step == "large" else time_small
        print(json.dumps(step(place)))
        return
    place.mkdir(parents=True)
    result: dict[str, float] = {"gigabytes": arguments.gigabytes}
    try:
        for name in ("small", "large"):
            if name == "large":
                result["images"] = write_large(place, arguments.gigabytes)
            command = [sys.executable, __file__, "--folder", str(arguments.folder), "--step", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ, text=True)
            result |= json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(result), file=sys.stderr)
    finally:
        shutil.rmtree(place)
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
