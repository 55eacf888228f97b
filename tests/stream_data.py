"""Predictions of many files: images a second and memory, against a plain network's in the same run.

python tests/stream_data.py --data-root DATA --folder FOLDER --images 100000 --out stream.json

Makes FOLDER/images (deleted afterwards): PNG files of Fashion-MNIST's test part, again and again, shifted by some
pixels. Trains a posterior and a plain network of the same shape on 3,000 images for some epochs. Then each predicts all
files in a process of its own, one after another, and says how long it took and the most memory that it ever held.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from large_data import peak_kib  # noqa: E402

MANY = 5000  # files of a folder
SHIFTS = (0, 1, -1, 2, -2)  # pixels
SHAPE = ["--dataset", "fashion-mnist", "--train-size", "3000", "--preset", "small", "--depth", "2", "--epochs", "6",
         "--samples", "16", "--seed", "0", "--device", "cpu"]  # fmt: skip


def write_images(folder: Path, data_root: str, count: int) -> None:
    """PNG files of 28x28 grey pixels."""
    from PIL import Image
    from torchvision.datasets import FashionMNIST

    pixels = FashionMNIST(data_root, train=False).data.numpy()
    for i in range(count):
        place = folder / f"{i // MANY:04d}"
        place.mkdir(parents=True, exist_ok=True)
        round_, row = divmod(i, len(pixels))
        shifted = np.roll(pixels[row], (SHIFTS[round_ % 5], SHIFTS[round_ // 5 % 5]), (0, 1))
        Image.fromarray(shifted).save(place / f"{i:07d}.png", compress_level=1)


def predict(run: Path, images: Path, out: Path, samples: str) -> dict[str, float]:
    """Predicts all files; runs in its own process.

    Args:
        run: folder of a run.
        images: folder of the files.
        out: the table.
        samples: draws, or the bound of the Monte Carlo error below which they end.
    """
    from pyro_isingvit import load_run
    from pyro_isingvit.data.streamed import open_stream
    from pyro_isingvit.predictive.stopping import Stopping
    from pyro_isingvit.runs.stream import stream_predictions

    until = Stopping(float(samples)) if "." in samples else int(samples)
    loaded, before = load_run(run), peak_kib()
    start = time.monotonic()
    stream = open_stream(str(images), loaded.info)
    listed = time.monotonic() - start
    done = stream_predictions(loaded, stream, out, until, progress=True)
    return {
        "images": done.images, "seconds_to_list": listed, "seconds": done.seconds,
        "images_per_second": done.images / done.seconds, "waited_for_images": done.waited / done.seconds,
        "draws_of_an_image": done.totals["draws"] / done.images, "unsettled": done.totals["unsettled"],
        "largest_mc_error": done.mc_error, "peak_mib": peak_kib() / 2**10, "mib_before": before / 2**10,
        "table_mib": out.stat().st_size / 2**20,
    }  # fmt: skip


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", nargs="+", default=["100", "0.02", "0.05"], help="draws, or bounds of their error")
    parser.add_argument("--suffix", default=".parquet", choices=(".parquet", ".csv"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    images, out = arguments.folder / "images", arguments.folder / f"table{arguments.suffix}"
    if arguments.step:
        print(json.dumps(predict(arguments.folder / arguments.step[0], images, out, arguments.step[1])))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for method in ("deterministic", "ising"):
        where = ["--data-root", arguments.data_root, "--out", str(arguments.folder / method)]
        command = [sys.executable, "-m", "inference.train", *SHAPE, "--method", method, *where]
        if not (arguments.folder / method / "metrics.json").exists():
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=Path(__file__).parents[1])
    result: dict[str, dict[str, float]] = {}
    try:
        write_images(images, arguments.data_root, arguments.images)
        for method, samples in (("deterministic", "1"), *(("ising", each) for each in arguments.samples)):
            command = [sys.executable, __file__, "--folder", str(arguments.folder), "--suffix", arguments.suffix,
                       "--step", method, samples]  # fmt: skip
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            first = next(iter(result.values()), found)
            found["times_of_plain"] = found["seconds"] / first["seconds"]
            result[f"{method}, {samples}"] = found
            print(json.dumps({f"{method}, {samples}": found}), file=sys.stderr)
            out.unlink()
    finally:
        shutil.rmtree(images)
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
