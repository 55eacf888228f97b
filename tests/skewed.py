"""Makes the skewed data of docs/skew.md and its table, by hand: ``python tests/skewed.py make DATA FILE``.

Fashion-MNIST's T-shirts and shirts, two classes that are mistaken for each other: 1 shirt to 9 T-shirts in training, 1
to 1.7 where the runs are judged.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

COMMON, RARE = 0, 6  # T-shirt, shirt
TRAINING, DEVELOPMENT, TEST = (594, 66), (510, 300), (1000, 588)
SHOWN = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auroc_macro", "nll", "ece", "temperature")


def make(data: str, file: Path, seed: int, official: bool) -> None:
    """Writes training images, and images to judge by: others of the training files, or the official test part."""
    made = np.random.default_rng(seed)
    pools = {}
    for part in (True, False):
        source = FashionMNIST(data, train=part)
        images, labels = source.data.numpy(), source.targets.numpy()
        pools[part] = [images[made.permutation(np.flatnonzero(labels == c))] for c in (COMMON, RARE)]
    train = [pool[:count] for pool, count in zip(pools[True], TRAINING, strict=True)]
    if official:
        rest, counts = pools[False], TEST
    else:
        rest = [pool[count:] for pool, count in zip(pools[True], TRAINING, strict=True)]
        counts = DEVELOPMENT
    test = [pool[:count] for pool, count in zip(rest, counts, strict=True)]
    arrays = {}
    for name, classes in (("train", train), ("test", test)):
        arrays[f"{name}_images"] = np.concatenate(classes)
        arrays[f"{name}_labels"] = np.repeat([0, 1], [len(images) for images in classes])
    np.savez(file, **arrays)


def table(folders: list[Path]) -> None:
    """Prints the mean and the standard deviation over the runs whose folders differ in the last word alone."""
    groups: dict[str, list[dict]] = {}
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        groups.setdefault(folder.name.rpartition("-")[0], []).append(metrics)
    print("| | " + " | ".join(SHOWN) + " |\n|" + " --- |" * (1 + len(SHOWN)))
    for name, runs in groups.items():
        numbers = np.array([[run[key] for key in SHOWN] for run in runs])
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(numbers.mean(0), numbers.std(0, ddof=len(runs) > 1), strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("data")
    making.add_argument("file", type=Path)
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--official", action="store_true")
    commands.add_parser("table").add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "make":
        make(given.data, given.file, given.seed, given.official)
    else:
        table(given.folders)
