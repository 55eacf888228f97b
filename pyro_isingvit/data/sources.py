"""Where images come from: ``DATASETS`` by name, ``PREFIXES`` for files of your own.

A new data set is one function ``DataConfig -> Parts`` and one line in ``DATASETS``.
Shapes: N images, C channels (1 or 3), H height, W width; images are (N, C, H, W) uint8.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import check_archive, printable
from pyro_isingvit.data.files import decode_all, list_images, subfolders
from pyro_isingvit.data.split import UNLABELLED, Split

Parts = tuple[Split, Split | None, Split | None, tuple[str, ...]]  # official train, val, test; class names
Loader = Callable[[DataConfig], Parts]


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
        reason = why(error) if folder.is_dir() or source.download else "no such folder"
        fix = "put its published files there, or delete what is there and set `download`"
        raise UserError(f"cannot read {source.dataset} from {folder} ({reason}); {fix}.") from error
    classes = tuple(name.partition(" - ")[0] for name in sets[0].classes)  # MNIST's are "0 - zero"
    return parts[0], None, parts[1], classes


def npz(source: DataConfig) -> Parts:
    """An ``.npz`` file with MedMNIST's keys: train_images, train_labels; the same of val and test, or not.

    Images are (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8; labels (N,) or (N, 1) integers from 0.

    Raises:
        UserError: missing or damaged file, an array that is not as above, a class without training image.
    """
    names, path = ("train", "val", "test"), path_of(source)
    arrays = read_npz(path, [f"{name}_{kind}" for name in names for kind in ("images", "labels")])
    given = [name for name in names if name == "train" or f"{name}_images" in arrays]
    parts = {name: npz_split(arrays, f"{name}_images", f"{name}_labels", path) for name in given}
    shapes = {name: tuple(part.images.shape[1:]) for name, part in parts.items()}
    need(len(set(shapes.values())) == 1, f"{path}: the parts' images differ in (C, H, W): {shapes}.")
    last = max(int(part.labels.max()) for part in parts.values())
    present = np.unique(parts["train"].labels.numpy())
    gap = next(i for i, label in enumerate([*present, -1]) if i != label)
    empty = f"{path}: empty class {gap}: labels go up to {last}, but no training image has label {gap}"
    need(gap > last, f"{empty}; number the classes 0, 1, 2, ... without gaps.")
    return parts["train"], parts.get("val"), parts.get("test"), tuple(map(str, range(gap)))


def imagefolder(source: DataConfig) -> Parts:
    """A folder with train/ and test/ (val/ too, or not) of class folders each, or one of class folders.

    Grey stays one channel if every image is grey, otherwise all are RGB.

    Raises:
        UserError: no such folder, an empty or unmatched class folder, an unreadable image, differing sizes.
    """
    root, size = path_of(source), source.image_size
    need(root.is_dir(), f"no such folder: {root}; imagefolder:PATH needs a folder of class folders.")
    official = (root / "train").is_dir() and ((root / "test").is_dir() or subfolders(root / "train"))
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()] if official else ["."]
    listed: dict[str, dict[str, list[Path]]] = {}  # part -> class -> files
    for name in names:
        folders = subfolders(root / name)
        need(folders, f"{root / name} has no class folders; put the images of each class into their own.")
        listed[name] = {folder.name: list_images(folder, within=root) for folder in folders}
        odd = sorted(set(listed[name]) ^ set(listed[names[0]]))
        need(not odd, f"{root}: class folders of {names[0]}/ and {name}/ must agree; not in both: {odd}.")
    paths = [path for classes in listed.values() for files in classes.values() for path in files]
    images, _ = decode_all(paths, (size, size) if size else None)
    parts, start = {}, 0
    for name, classes in listed.items():
        counts = [len(files) for files in classes.values()]
        rows = slice(start, start := start + sum(counts))
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        file_names = tuple(printable("/".join(path.parts[len(root.parts) :])) for path in paths[rows])
        parts[name] = Split(images[rows].clone(), labels, file_names)
    return parts[names[0]], parts.get("val"), parts.get("test"), tuple(map(printable, listed[names[0]]))


DATASETS: dict[str, Loader] = {
    "digits": digits,
    "mnist": partial(torchvision_set, "MNIST"),
    "fashion-mnist": partial(torchvision_set, "FashionMNIST"),
    "cifar10": partial(torchvision_set, "CIFAR10"),
    "cifar100": partial(torchvision_set, "CIFAR100"),
}


PREFIXES: dict[str, Loader] = {"imagefolder": imagefolder, "npz": npz}  # written name:PATH


def known() -> str:
    """What may be asked for, in words."""
    return ", ".join([*DATASETS, *(f"{name}:PATH" for name in PREFIXES)])


def path_of(source: DataConfig) -> Path:
    """The path after the colon of ``name:PATH``."""
    return Path(source.dataset.partition(":")[2]).expanduser()


def split_of(images: np.ndarray, labels: np.ndarray) -> Split:
    """From images (N, H, W) or (N, H, W, C)."""
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))


def read_npz(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """The arrays called ``keys``, if the file has them."""
    need(path.is_file(), f"no such file: {path}.")
    check_archive(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in keys if key in archive.files}
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise UserError(f"cannot read {path} as .npz without object arrays ({why(error)}).") from error


def npz_split(
    arrays: dict[str, np.ndarray], images_key: str, labels_key: str, path: Path, labelled: bool = True
) -> Split:
    """Checked images and labels of an archive, as a part."""
    for key in (images_key, labels_key)[: 1 + labelled]:
        need(key in arrays, f"{path} has no array {key!r}; found: {', '.join(arrays) or 'no known one'}.")
        bad = int((~np.isfinite(arrays[key])).sum()) if arrays[key].dtype.kind == "f" else 0
        need(not bad, f"{path}: {key} has {bad} NaN or infinite values; repair or remove those images.")
    images = arrays[images_key]
    labels = arrays[labels_key] if labelled else np.full(images.shape[:1], UNLABELLED)
    fix = "convert values in [0, 1] by (images * 255).round().astype('uint8')"
    need(images.dtype == np.uint8, f"{path}: {images_key} is {images.dtype}, uint8 is expected; {fix}.")
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in {1, 3})
    kind = f"{path}: {images_key} is {images.shape}, expected (N, H, W) or (N, H, W, 1 or 3), not empty."
    need(shaped and images.size > 0, kind)
    shaped = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    kind = f"{path}: {labels_key} is {labels.dtype} {labels.shape}, expected integers (N,) or (N, 1)."
    need(shaped and labels.dtype.kind in "iu", kind)
    numbers = f"{len(images)} {images_key}, {len(labels)} {labels_key}"
    need(len(labels) == len(images), f"{path}: label count mismatch: {numbers}.")
    negative = labelled and labels.astype(np.int64).min() < 0
    need(not negative, f"{path}: {labels_key} has negative labels; number the classes 0, 1, 2, ...")
    return split_of(images, labels.reshape(-1))
