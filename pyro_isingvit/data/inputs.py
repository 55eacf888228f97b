"""Images to predict, brought to the shape of the run that predicts them.

What is done to files, and which of them training has seen, is told in the log. Shapes: N images, C channels, H height,
W width; images are (N, C, H, W).
"""

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.paths import is_dir, is_file, with_home
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.decode import Look, Reading
from pyro_isingvit.data.files import Changes, changes_of, image_names, read_files, real_paths
from pyro_isingvit.data.info import DataInfo, digest
from pyro_isingvit.data.load import TEST_FRACTION, is_named, official_parts
from pyro_isingvit.data.named import is_own, path_of, reading_of
from pyro_isingvit.data.npz import Stored
from pyro_isingvit.data.sources import known, part_folders
from pyro_isingvit.data.split import UNLABELLED, Split, hold_out_test, tell_unknown
from pyro_isingvit.data.table import table_inputs, training_files

log = logging.getLogger(__name__)


def load_inputs(
    spec: str, info: DataInfo, *, data_root: str | Path = "data", source: DataConfig | None = None
) -> Split:
    """Images to predict, in the shape of the run that ``info`` describes.

    ``spec`` is a data set as for ``load_data`` (its test part), another table ``csv:FILE`` than the run's (its test
    part, or all of its images where it has no column of splits; with labels or without), an ``.npz`` file (``images``
    or ``test_images``, with ``labels`` or ``test_labels`` or without) or a folder of images, nested or not. A folder is
    labelled if every image lies in a subfolder that is called like a class.

    Args:
        spec: what to read.
        info: of the run.
        data_root: folder of the torchvision data sets.
        source: how the run read its images: size, shape, pages, columns and cache; None: as they are.

    Raises:
        UserError: nothing readable there, or images of another shape than the run's.
    """
    path, source = with_home(spec), source or DataConfig()
    own = is_named(spec) and is_own(spec, source)
    seen = list[Path]()  # files that training may have seen
    if spec.startswith("csv:") and not own:  # not the table that the run learned from
        paths, lines, numbers = table_inputs(replace(source, dataset=spec), info.classes)
        split, seen = replace(load_image_files(paths, info, source), names=tuple(lines), labels=numbers), paths
    elif is_named(spec):
        square = spec.startswith(("imagefolder:", "csv:")) and info.height == info.width
        size = info.height if square else source.image_size
        asked = replace(source, dataset=spec, data_root=str(data_root), image_size=size, download=False)
        train, _, official, classes = official_parts(asked, like=source)
        train, split = hold_out_test(train, classes, TEST_FRACTION) if official is None else (train, official)
        if official is None and own and has_changed(train, info, source):
            log.warning(
                "%s has other images than when the run was trained, or they are called otherwise: what is now its test "
                "part may hold images that it was trained on", spec,
            )  # fmt: skip
        try:
            split = replace(split, classes=classes).numbered_as(info.classes)
        except UserError:
            log.warning("%s has other classes than %s: its labels are not used", spec, info.dataset)
            split = replace(split, labels=torch.full_like(split.labels, UNLABELLED))
        if not own and spec.startswith("imagefolder:"):
            named = [path_of(asked) / name for name in split.names]
            seen = [file for file in named if is_file(file)]  # names with control characters are written otherwise
            wanted = replace(look_of(info), channels=split.images.shape[1])
            tell_changes(changes_of(seen, reading_of(asked), wanted), len(split), wanted)
    elif is_dir(path):
        inner = image_names(path)
        seen = [path / name for name in inner]
        split, labelled = load_image_files(seen, info, source), folder_labels(inner, info.classes)
        split = replace(
            split, names=tuple(map(printable, inner)), labels=split.labels if labelled is None else labelled
        )
    else:
        need(path.suffix == ".npz", f"{spec!r} is no folder, no .npz file and no known data set ({known()}).")
        stored = Stored(path, source.cache)
        start = "" if "images" in stored.names else "test_"
        labels = f"{start}labels"
        split = stored.part(f"{start}images", labels if labels in stored.names else None)
        last, classes = int(split.labels.max()), info.classes
        need(last < len(classes), f"{path} has label {last}, but the run has {len(classes)} classes.")
        split = split.resized(source.image_size, source.resize)
    tell_seen(seen, source)
    try:
        info.normalise(split.images[:1])
    except UserError as error:
        raise UserError(f"{spec} does not fit this run: {error}") from error
    kind = split.images.kind
    need(kind == info.kind, f"{spec} does not fit this run: its images are {kind}, those of the training {info.kind}.")
    return split


def has_changed(pool: Split, info: DataInfo, source: DataConfig) -> bool:
    """Whether a data set's training files are others than those of a run.

    Args:
        pool: the training files.
        info: of the run. Before version 0.18 it says nothing of the files, and their number is compared.
        source: of the run.
    """
    if info.pool:
        return info.pool != digest(pool.labels, pool.names, pool.groups)
    known = sum(info.counts)
    parts = known, known + round(source.val_fraction * len(pool))  # with an official validation part, and without
    told = bool(known) and source.train_size is None and not pool.groups  # validation parts are rounded to groups
    return told and min(abs(len(pool) - part) for part in parts) > info.num_classes


def folder_labels(names: Sequence[str], classes: Sequence[str]) -> torch.Tensor | None:
    """Labels of files that each lie in a folder which is called like a class; None where one does not.

    Args:
        names: of the files, relative to the folder of the class folders.
        classes: of the run.
    """
    known = {name: number for number, name in enumerate(classes)}
    tops = (name.partition(os.sep) for name in names)
    labels = [known.get(printable(top), UNLABELLED) if rest else UNLABELLED for top, _, rest in tops]
    tell_unknown(labels, names, "its folder is not called like a class")
    return None if UNLABELLED in labels else torch.tensor(labels)


def load_image_files(paths: Sequence[Path], info: DataInfo, source: DataConfig | None = None) -> Split:
    """Reads image files, unlabelled, converted to the run's channels and type and resized to its size.

    Args:
        paths: the files.
        info: of the run.
        source: how the run read its images: shape, pages and cache.

    Raises:
        UserError: no path given, or an image cannot be read.
    """
    need(paths, "no images to read.")
    source = source or DataConfig()
    reading = Reading((info.height, info.width), source.resize, source.pages)
    images, changes = read_files(paths, reading, look_of(info), source.cache)
    tell_changes(changes, len(paths), look_of(info))
    return Split(images, torch.full((len(paths),), UNLABELLED), tuple(printable(str(path)) for path in paths))


def look_of(info: DataInfo) -> Look:
    """What every file becomes for a run."""
    return Look(info.channels, info.height, info.width, info.kind)


def tell_changes(changes: Changes, count: int, wanted: Look) -> None:
    """Warns where files are not as the run's own were.

    Args:
        changes: what was done to them.
        count: how many they are.
        wanted: what they became.
    """
    if changes.resized:
        log.warning("%d of %d images resized to %dx%d", changes.resized, count, wanted.width, wanted.height)
    if changes.greyed:
        log.warning("%d of %d images have colours and were made grey, as the run's are", changes.greyed, count)
    if changes.cut:
        log.warning(
            "%d of %d images have 16 bits, of which 8 were kept, as the run's have: what was below 256 is black now",
            changes.cut, count,
        )  # fmt: skip


def tell_seen(files: Sequence[Path], source: DataConfig) -> None:
    """Warns where files to predict are training files of the run.

    Args:
        files: any.
        source: of the run.
    """
    if number := len(learned_from(files, source)):
        log.warning(
            "%d of %d images are of the files that the run was trained with (%s): what it says of them is no test. "
            "%s itself stands for the images that were held out", number, len(files), source.dataset, source.dataset,
        )  # fmt: skip


def learned_from(files: Sequence[Path], source: DataConfig) -> list[Path]:
    """Those of some files that are training or validation files of a data set, which may take only some of them.

    Where the data set has no test part of its own, its test images, which lie among the others, count too.

    Args:
        files: any.
        source: the data set. Of one without files, or that is no longer there, none is found.
    """
    try:
        return _learned_from(files, source)
    except (OSError, UserError, ValueError):  # the run's own data may be damaged since; its predictions are not
        return []


def _learned_from(files: Sequence[Path], source: DataConfig) -> list[Path]:
    kind, root = source.dataset.partition(":")[0], path_of(source)
    if kind == "imagefolder" and is_dir(root):
        parts = [os.path.realpath(root / name) for part, name in part_folders(root).items() if part != "test"]
        below = tuple(f"{part}{os.sep}" for part in parts)
        known = [os.path.dirname(path).startswith(below) for path in real_paths(files)]  # loose files are not read
    elif kind == "csv" and is_file(root):
        learned = set(training_files(source))
        known = [path in learned for path in real_paths(files)]
    else:
        return []
    return list(itertools.compress(files, known))
