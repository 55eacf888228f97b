"""Where images come from: ``DATASETS`` by name, ``PREFIXES`` for files of your own.

A new data set is one function ``DataConfig -> Parts`` and one line in ``DATASETS``.
Shapes: N images, C channels, H height, W width; images are (N, C, H, W).
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.paths import is_dir
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.decode import SUFFIXES
from pyro_isingvit.data.files import list_images, read_files, subfolders
from pyro_isingvit.data.named import Parts, groups_of, path_of, reading_of
from pyro_isingvit.data.npz import npy, npz
from pyro_isingvit.data.split import Split
from pyro_isingvit.data.table import csv_table

log = logging.getLogger(__name__)
Loader = Callable[[DataConfig], Parts]
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # what parts are called


def digits(source: DataConfig) -> Parts:
    """scikit-learn's 1,797 embedded handwritten digits, 8x8; no file is needed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0..16 -> 0..255
    return split_of(images, raw.target), None, None, tuple("0123456789")


def torchvision_set(kind: str, source: DataConfig) -> Parts:
    """MNIST, FashionMNIST, CIFAR10 or CIFAR100, training and test part.

    Raises:
        UserError: files are missing (and not to be downloaded) or damaged.
    """
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, kind)
    folder = Path(source.data_root) / getattr(dataset, "base_folder", f"{kind}/raw")
    try:
        sets = [dataset(source.data_root, train, download=source.download) for train in (True, False)]
        parts = [split_of(np.asarray(part.data), np.asarray(part.targets)) for part in sets]
        for part in parts:
            need(int(part.labels.max()) < len(sets[0].classes), "labels without a class")
    except Exception as error:  # a damaged file makes the readers raise almost anything
        reason = why(error) if is_dir(folder) or source.download else "no such folder"
        fix = "`data_root` names the folder that holds its published files; a training can `download` them"
        fix += ", once what is damaged is deleted" if is_dir(folder) else ""
        raise UserError(f"cannot read {source.dataset} from {folder} ({reason}); {fix}.") from error
    classes = tuple(name.partition(" - ")[0] for name in sets[0].classes)  # MNIST's are "0 - zero"
    return parts[0], None, parts[1], classes


def imagefolder(source: DataConfig) -> Parts:
    """A folder with train/ and test/ (val/ or valid/ too, or not) of class folders each, or one of class folders.

    Grey stays one channel if every image is grey, otherwise all are RGB.

    Raises:
        UserError: no such folder, an empty or unmatched class folder, an unreadable image, differing sizes.
    """
    root = path_of(source)
    need(is_dir(root), f"no such folder: {root}; imagefolder:PATH needs a folder of class folders.")
    names = part_folders(root)
    listed: dict[str, dict[str, list[Path]]] = {}  # part -> class -> files
    for part, name in names.items():
        folders = subfolders(root / name)
        there = [path for path in sorted((root / name).iterdir()) if not path.name.startswith(".")]
        links = [path.name for path in there if path.is_symlink() and is_dir(path)]
        loose = sum(path.suffix.lower() in SUFFIXES for path in there)
        if links or loose:
            told = f" ({', '.join(map(printable, links[:3]))})" if links else ""
            log.warning(
                "%s: skipped %d links to folders%s and %d images outside of the class folders", root / name, len(links),
                told, loose,
            )  # fmt: skip
        need(folders, f"{root / name} has no class folders; put the images of each class into their own.")
        listed[part] = {folder.name: list_images(folder, within=root) for folder in folders}
        odd = sorted(set(listed[part]) ^ set(listed["train"]))
        need(not odd, f"{root}: class folders of train/ and {name}/ must agree; not in both: {odd}.")
    files = {part: [path for found in classes.values() for path in found] for part, classes in listed.items()}
    groups = {
        part: groups_of([path.relative_to(root / names[part]).as_posix() for path in paths], source.groups)
        for part, paths in files.items()
    }  # fmt: skip
    images, _ = read_files([path for paths in files.values() for path in paths], reading_of(source), cache=source.cache)
    parts, start = {}, 0
    for part, classes in listed.items():
        counts = [len(found) for found in classes.values()]
        rows = slice(start, start := start + sum(counts))
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        file_names = tuple(printable("/".join(path.parts[len(root.parts) :])) for path in files[part])
        parts[part] = Split(images.take(rows), labels, file_names, groups[part])
    return parts["train"], parts.get("val"), parts.get("test"), tuple(map(printable, listed["train"]))


def part_folders(root: Path) -> dict[str, str]:
    """Where the parts lie below a folder of images: part -> name of its folder; train alone, ".", where it has none.

    Raises:
        UserError: two folders that mean the same part.
    """
    if not is_dir(root / "train") or not (is_dir(root / "test") or subfolders(root / "train")):
        return {"train": "."}
    found = {part: [name for name in names if is_dir(root / name)] for part, names in FOLDERS.items()}
    twice = next((names for names in found.values() if len(names) > 1), [])
    need(not twice, f"{root} has {' and '.join(twice)}, which mean the same part; keep one of them.")
    return {part: names[0] for part, names in found.items() if names}


DATASETS: dict[str, Loader] = {
    "digits": digits,
    "mnist": partial(torchvision_set, "MNIST"),
    "fashion-mnist": partial(torchvision_set, "FashionMNIST"),
    "cifar10": partial(torchvision_set, "CIFAR10"),
    "cifar100": partial(torchvision_set, "CIFAR100"),
}


PREFIXES: dict[str, Loader] = {  # written name:PATH
    "imagefolder": imagefolder, "csv": csv_table, "npz": npz, "npy": npy,
}  # fmt: skip


def known() -> str:
    """What may be asked for, in words."""
    return ", ".join([*DATASETS, *(f"{name}:PATH" for name in PREFIXES)])


def split_of(images: np.ndarray, labels: np.ndarray) -> Split:
    """From images (N, H, W) or (N, H, W, C)."""
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
