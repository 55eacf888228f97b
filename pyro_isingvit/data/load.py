"""Image data sets by name (``DATASETS``) or from files of your own (``PREFIXES``), split into parts.

Test is the official part; where there is none, a stratified fifth, the same whatever the seed. Training is
the rest, or exactly ``train_size`` images of it, stratified. Validation is the official part; where there is
none, ``val_fraction`` times the number of training images, stratified: from the images that ``train_size``
leaves over if those are enough, otherwise out of the training images themselves. Training and validation have
every class; no image is in two parts; ``val_fraction=0`` leaves validation empty.

A new data set is one function ``DataConfig -> Parts`` and one line in ``DATASETS``.
Shapes: N images, C channels, H height, W width; images are (N, C, H, W).
"""

import logging
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.paths import is_dir, with_home
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.decode import Pages
from pyro_isingvit.data.files import list_images, read_files
from pyro_isingvit.data.images import Images, Resize
from pyro_isingvit.data.intensity import percentiles
from pyro_isingvit.data.named import Parts, UnfitGroupsError, is_own, path_of, reading_of
from pyro_isingvit.data.npz import Stored
from pyro_isingvit.data.sources import DATASETS, FOLDERS, PREFIXES, known
from pyro_isingvit.data.split import (
    ImageData,
    Split,
    check_division,
    divide,
    hold_out_test,
)

log = logging.getLogger(__name__)
TEST_FRACTION = 0.2  # of the images, where there is no official test part
DEV_SIZE = 5000
ARRAYS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "npz", "npy")  # data sets without image files


def load_data(
    dataset: str = "digits",
    *,
    data_root: str | Path = "data",
    train_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
    image_size: int | None = None,
    resize: Resize = "fit",
    intensity: str = "full",
    pages: Pages = "first",
    groups: str | None = None,
    columns: str = "",
    cache: str | None = None,
) -> ImageData:
    """Loads a data set and splits it by the rule that heads ``pyro_isingvit.data.load``.

    Args:
        dataset: a name in ``DATASETS``, ``imagefolder:PATH``, ``csv:FILE``, ``npz:FILE`` or ``npy:FOLDER``.
        data_root: folder of the torchvision data sets.
        train_size: number of training images; None: all that validation leaves.
        val_fraction: validation images per training image, 0 to 0.5.
        seed: of the training subset and the validation part; the test part never depends on it.
        download: fetch a missing torchvision data set into ``data_root``.
        image_size: resize the images to this many pixels square.
        resize: what happens to images that are no squares then: shown whole with dark margins (fit), cut to their
            middle (crop), or stretched.
        intensity: which pixel values become 0 and 1: full, "percentile LOW HIGH" or none (data/intensity.py).
        pages: of a TIFF file: the first, or all as channels.
        groups: regular expression that finds an image's group in its file's name; a group stays in one part.
        columns: names of a table's columns, as "path=file,label=finding".
        cache: folder where decoded images are kept and read from by row; None: they are held in memory.

    Returns:
        training, validation and test part, images (N, C, H, W) uint8, and what a network must know of them.

    Raises:
        UserError: unknown data set, unreadable files, or a split that cannot be made.

    Examples:
        >>> from pyro_isingvit import load_data
        >>> data = load_data("digits", train_size=300)
        >>> len(data.train), len(data.val), len(data.test)
        (300, 30, 360)
        >>> data.train.images[:2].shape, data.info.classes[:3]
        (torch.Size([2, 1, 8, 8]), ('0', '1', '2'))
    """
    check_division(val_fraction, TEST_FRACTION, seed)
    # As in a file of settings: numbers may be NumPy's, and folders a Path.
    numbers: tuple[Any, ...] = (train_size, image_size)
    size, side = (operator.index(n) if hasattr(n, "__index__") else n for n in numbers)
    source = DataConfig(
        dataset, str(data_root), bool(download), size, float(val_fraction), side, resize, intensity, pages, groups,
        columns or "", None if cache is None else str(cache),
    )  # fmt: skip
    check_fields(source)
    for name, reader in idle(source).items():
        log.warning("`%s` changes nothing here: %s", name, reader)
    return replace(load_divided(source, seed), source=(replace(source, download=False), seed))


def load_divided(source: DataConfig, seed: int, numbered: bool = False) -> ImageData:
    """The parts that the settings and a seed lead to.

    Args:
        source: the settings.
        seed: of the training subset and the validation part.
        numbered: images without a file are named by their row in the part that the data set has.

    Raises:
        UserError: as ``load_data``.
    """
    percentiles(source.intensity)  # refuses what it is not before any work
    pool, val, test, classes = load_parts(source, numbered)
    return divide(
        pool, val, test, classes, name=source.dataset, train_size=source.train_size, val_fraction=source.val_fraction,
        seed=seed, intensity=source.intensity,
    )  # fmt: skip


def development_data(source: DataConfig, dev_size: int = DEV_SIZE, seed: int = 0) -> ImageData:
    """Images to choose settings by, all from the training files: training, validation and development part.

    The development part stands where the test part would be, as ``test``. It is stratified and, for one data set and
    size, the same with every seed. The test part itself is left out altogether, and so is the fifth that stands for it
    in a data set without an official one. An official validation part is left out too: validation images are drawn
    from the training files, ``val_fraction`` times ``train_size``.

    Args:
        source: data set, ``train_size`` and ``val_fraction``.
        dev_size: development images; fewer where training and validation part leave fewer, at most half of the files'.
        seed: of the training and validation part.

    Raises:
        UserError: as ``load_data``, or no image is left for development.
    """
    check_division(source.val_fraction, TEST_FRACTION, seed)
    need(dev_size >= 1, f"`dev_size` must be at least 1, not {dev_size}.")
    pool, _, _, classes = load_parts(source)
    size, most = source.train_size, len(pool) // 2
    if size is not None:
        count = max(round(source.val_fraction * size), len(classes)) if source.val_fraction else 0
        most = min(most, len(pool) - size - count)
    need(
        most >= len(classes),
        f"{source.dataset} has {len(pool)} images in its training files; `train_size` {size} and its validation part "
        "leave too few to choose settings by; choose a smaller one.",
    )
    rest, dev = hold_out_test(pool, classes, min(dev_size, most) / len(pool))
    return divide(
        rest, None, dev, classes, name=source.dataset, train_size=size, val_fraction=source.val_fraction, seed=seed,
        intensity=source.intensity,
    )  # fmt: skip


def idle(source: DataConfig) -> dict[str, str]:
    """Settings that were given and that nothing reads, each with what would read it.

    Examples:
        >>> from pyro_isingvit.core.settings import DataConfig
        >>> idle(DataConfig("digits", groups="p[0-9]+"))
        {'groups': 'it is for imagefolder:PATH and csv:FILE'}
    """
    kind, usual = source.dataset.partition(":")[0], DataConfig()
    readers = {"groups": "it is for imagefolder:PATH and csv:FILE", "pages": "it is for image files",
               "columns": "it is for csv:FILE"}  # fmt: skip
    unread = {"columns"} if kind == "imagefolder" else {*readers} if kind in ARRAYS else set()
    unread -= {"groups"} if kind in ("npz", "npy") else set()  # refused there
    return {name: readers[name] for name in unread if getattr(source, name) != getattr(usual, name)}


def is_named(spec: str) -> bool:
    """Whether a text names a data set, not a path."""
    return spec in DATASETS or spec.partition(":")[0] in PREFIXES


def load_parts(
    source: DataConfig, numbered: bool = False, like: DataConfig | None = None
) -> tuple[Split, Split | None, Split, tuple[str, ...]]:
    """The parts, test being the official one or a fifth that is taken away from training.

    Args:
        source: the settings.
        numbered: images without a file are named by their row in the part that the data set has.
        like: settings that those are taken from, of another data set perhaps, whose names need not have their groups.
    """
    train, val, test, classes = official_parts(source, numbered, like)
    if test is None:
        train, test = hold_out_test(train, classes, TEST_FRACTION)
    return train, val, test, classes


def official_parts(source: DataConfig, numbered: bool = False, like: DataConfig | None = None) -> Parts:
    """The parts that a data set has, of the wanted size.

    Args:
        source: the settings.
        numbered: as for ``load_parts``.
        like: the same.
    """
    if like is not None and source.groups is not None and not is_own(source.dataset, like):
        try:
            return official_parts(source, numbered)
        except UnfitGroupsError:
            return official_parts(replace(source, groups=None), numbered)
    spec, size = source.dataset, source.image_size
    name, _, path = spec.partition(":")
    loader = PREFIXES.get(name) if path else DATASETS.get(spec)
    if loader is None:
        raise UserError(f"unknown data set {spec!r}; known: {known()}.")
    need(size is None or size > 0, f"`image_size` must be a positive number of pixels, not {size}.")
    train, val, test, classes = loader(source)
    if numbered:
        train, val = _numbered(train), None if val is None else _numbered(val)
    train = train.resized(size, source.resize)
    val, test = (None if part is None else part.resized(size, source.resize) for part in (val, test))
    need(len(classes) > 1, f"{spec} has only the class {classes[0]!r}; at least two are needed.")
    return train, val, test, classes


def _numbered(part: Split) -> Split:
    return part if part.names else replace(part, names=tuple(map(str, range(len(part)))))


def load_unlabelled(
    spec: str,
    *,
    data_root: str | Path = "data",
    image_size: int | None = None,
    source: DataConfig | None = None,
    test: bool = False,
) -> Images:
    """Images to learn from without labels; those of an official test part are left out.

    Args:
        spec: a data set as for ``load_data`` (its training files), an ``.npz`` file with ``images`` or
            ``train_images``, or a folder of images, nested or not: all of them, but for a folder ``test`` in it.
        data_root: folder of the torchvision data sets.
        image_size: resize the images to this many pixels square.
        source: how files are read: shape, pages, columns and cache. Where ``spec`` is the path of its ``dataset``, the
            images held out of that are left out here too.
        test: read the folder ``test`` of a folder too.

    Raises:
        UserError: nothing readable there.
    """
    path, source = with_home(spec), replace(source or DataConfig(), image_size=image_size)
    need(image_size is None or image_size > 0, f"`image_size` must be a positive number of pixels, not {image_size}.")
    folder = source.dataset.partition(":")[2] and is_named(source.dataset)
    if folder and not is_named(spec) and path.resolve() == path_of(source).resolve():
        spec = source.dataset  # whose held-out test images are no images to learn from
    if is_named(spec):
        asked = replace(source, dataset=spec, data_root=str(data_root))
        train, *_ = load_parts(asked, like=source)
        return train.images
    if is_dir(path):
        apart, found = path / FOLDERS["test"][0], list_images(path)
        kept = [file for file in found if test or apart not in file.parents]
        if len(kept) < len(found):
            log.warning(
                "%d images in %s are left out; name that folder to learn from them", len(found) - len(kept), apart
            )
        need(kept, f"{path} has no images but those of {apart}; name that folder to learn from them.")
        return read_files(kept, reading_of(source), cache=source.cache)[0]
    need(path.suffix == ".npz", f"{spec!r} is no folder, no .npz file and no known data set ({known()}).")
    stored = Stored(path, source.cache)
    key = "images" if "images" in stored.names else "train_images"
    return stored.part(key, None).resized(image_size, source.resize).images
