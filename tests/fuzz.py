"""Bytes that nobody meant, given to every reader of a user's files; coverage tells which ones to change further.

python tests/fuzz.py --seconds 60 --reader table

Needs `pip install atheris`. A reader may give images or raise ``UserError`` in one line, and nothing else: any other
error ends the run with the bytes that caused it in the current folder. ``make fuzz`` tries all readers.
"""

import argparse
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]
import atheris  # noqa: E402 - the line above finds the library

with atheris.instrument_imports(include=["pyro_isingvit.data", "tifffile"]):
    import numpy as np
    import tifffile
    from PIL import Image

    from pyro_isingvit.core.errors import UserError
    from pyro_isingvit.core.settings import DataConfig
    from pyro_isingvit.data.decode import Reading
    from pyro_isingvit.data.files import read_files
    from pyro_isingvit.data.load import load_data
    from pyro_isingvit.data.npz import Stored
    from pyro_isingvit.data.table import csv_table

HERE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def image(suffix: str) -> Callable[[bytes], object]:
    """A reader of image files of one type."""
    path = HERE / f"x{suffix}"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return [read_files([path], Reading((8, 8), pages=pages))[0][:] for pages in ("first", "channels")]

    return read


def arrays(data: bytes) -> object:
    """An .npz file."""
    (HERE / "x.npz").write_bytes(data)
    return load_data(f"npz:{HERE / 'x.npz'}")


def folder(data: bytes) -> object:
    """An .npy file in a folder."""
    (HERE / "arrays").mkdir(exist_ok=True)
    (HERE / "arrays" / "train_images.npy").write_bytes(data)
    return Stored(HERE / "arrays").images("train_images")[:]


def table(data: bytes) -> object:
    """A table of images, of which there is one."""
    (HERE / "x.csv").write_bytes(data)
    return csv_table(DataConfig(dataset=f"csv:{HERE / 'x.csv'}", groups="(.)" if len(data) % 2 else None))


def cache(data: bytes) -> object:
    """What a cache keeps: every file in it is these bytes, cut at a place that the first byte says."""
    kept = HERE / "cache"
    read_files([HERE / "one.png"], Reading(), cache=kept)
    cut = data[0] if data else 0
    for path in kept.rglob("*"):
        if path.is_file() and path.name != "lock":
            path.write_bytes(path.read_bytes()[:cut] + data[1:])
    try:
        return read_files([HERE / "one.png"], Reading(), cache=kept)[0][:]
    finally:
        for path in sorted(kept.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


READERS: dict[str, Callable[[bytes], object]] = {
    "png": image(".png"), "tiff": image(".tif"), "npy": image(".npy"), "jpeg": image(".jpg"), "npz": arrays,
    "array": folder, "table": table, "cache": cache,
}  # fmt: skip


def seeds(reader: str) -> list[bytes]:
    """Files that are whole, to begin with."""
    deep = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    made = HERE / "seed"
    writers: dict[str, list[Callable[[], object]]] = {
        "png": [lambda: Image.fromarray(deep).save(made, "PNG"), lambda: Image.new("RGB", (4, 4)).save(made, "PNG")],
        "jpeg": [lambda: Image.new("RGB", (9, 9)).save(made, "JPEG")],
        "tiff": [
            lambda: tifffile.imwrite(made, deep),
            lambda: tifffile.imwrite(made, np.stack([deep] * 3), photometric="minisblack"),
            lambda: tifffile.imwrite(made, np.stack([deep] * 5, 2), photometric="minisblack", planarconfig="contig"),
            lambda: tifffile.imwrite(made, deep.astype(np.float32), compression="zlib"),
        ],
        "npz": [lambda: _savez(made, deep[None].repeat(6, 0)), lambda: _savez(made, np.zeros((6, 4, 4, 3), np.uint8))],
    }
    found = []
    for write in writers.get(reader, []):
        write()
        found.append(made.read_bytes())
    if reader in ("npy", "array"):
        for array in (deep[None] if reader == "array" else deep, np.zeros((4, 5, 3), np.float64)):
            with made.open("wb") as file:
                np.save(file, array)
            found.append(made.read_bytes())
    if reader == "table":
        found = [
            b"path,label,split,group,weight\none.png,a,train,p,1\none.png,b,test,q,2\n",
            b"\xef\xbb\xbfpath;label\n",
        ]
    if reader == "cache":
        found = [bytes([40]) + b"x" * 20, struct.pack("<BI", 4, zlib.crc32(b""))]
    return found


def _savez(path: Path, images: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, train_images=images, train_labels=np.arange(len(images)) % 2)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--reader", choices=READERS, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    Image.new("L", (4, 4), 7).save(HERE / "one.png")
    corpus = HERE / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(arguments.reader)):
        (corpus / str(number)).write_bytes(data)
    reader = READERS[arguments.reader]

    def once(data: bytes) -> None:
        try:
            reader(data)
        except UserError as error:
            if len(str(error).splitlines()) != 1:
                raise AssertionError(f"more than one line: {error}") from error

    options = ["-max_len=4096", f"-max_total_time={arguments.seconds}", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], once)

    atheris.Fuzz()


if __name__ == "__main__":
    main()
