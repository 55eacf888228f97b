"""Cross-fitting: each training image predicted by a network that was trained without it.

The training images are cut into K folds. For each, a network is trained on the others with a run's own settings and
validation part, and predicts the fold. The validation images took no part in learning the weights of any network, so
that all K predict them; one that has a copy among the training images is predicted by the network that saw neither.
Each finished fold is kept in a file; the same call then resumes.

Shapes: S samples, N training images, V validation images, C classes.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from inference.workers import outcomes, threads_of
from pyro_isingvit.core.checkpoint import write_atomically
from pyro_isingvit.core.errors import need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.folds import copy_groups, fold_numbers, joined
from pyro_isingvit.data.images import Images
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.experiment import begun
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.trainer import Trainer
from pyro_isingvit.starts import load_start

log = logging.getLogger(f"pyro_isingvit.{__name__}")
CHUNK = 2048  # images that are read, or predicted with all draws, at a time
ARRAYS = ("probs", "given", "val_probs", "val_given")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fitted:
    """Predictions of N training and V validation images, training images first.

    Attributes:
        data: the images.
        probs: (N + V, C), the mean over the draws.
        given: (S, N + V), p of the given label in every draw; of validation images S of the K S draws.
        labels: (N + V,) given class numbers.
    """

    data: ImageData
    probs: np.ndarray
    given: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """How the folds are trained, the same for all."""

    config: RunConfig
    source: Callable[[], ImageData]
    numbers: np.ndarray  # (N,) fold of each training image
    samples: int
    key: str
    folder: Path | None
    progress: bool
    threads: int | None

    def file(self, number: int) -> Path | None:
        """Where a finished fold is kept."""
        return None if self.folder is None else self.folder / f"fold-{number + 1}.npz"


def cross_fit(
    config: RunConfig,
    source: Callable[[], ImageData],
    folder: Path | None = None,
    *,
    folds: int = 5,
    samples: int = 50,
    jobs: int = 1,
    groups: np.ndarray | None = None,
    progress: bool = True,
) -> Fitted:
    """Trains a network for each fold and predicts the images that it has not seen.

    Copies of one image are in one fold, and so are groups that share one.

    Args:
        config: settings of every training; its seed cuts the folds too.
        source: gives training and validation part, the same at each call; processes call it for themselves.
        folder: for finished folds; those of other settings or images are trained again. None: nothing is kept.
        folds: K.
        samples: S.
        jobs: folds that are trained at the same time, in processes of their own.
        groups: (N,) numbers; images of one group are in one fold. None: the groups of the data, if there are.
        progress: show progress bars.

    Raises:
        UserError: settings or images that cannot be used, or a training that diverged.
        KeyboardInterrupt: Ctrl-C; its message says what is kept.
    """
    for name, value in (("samples", samples), ("jobs", jobs)):
        need(value >= 1, f"`{name}` must be at least 1, not {value}.")
    told = "the run learned from a `teacher`, which has seen the labels that are to be checked"
    need(not config.teacher, f"{told}; check a run without one.")
    data = source()
    if jobs == 1:  # no other process needs to read them again
        source = partial(replace, data)
    labels, val_labels = (part.labels.cpu().numpy() for part in (data.train, data.val))
    prints = digests(data.train.images)
    named, copies = data.train.groups, copy_groups(prints)
    if groups is None and named:
        groups = np.unique(np.array(named), return_inverse=True)[1]
    groups = copies if groups is None else joined(groups, copies)
    numbers = fold_numbers(labels, folds, data.info.classes, config.train.seed, groups)
    own = config.portable()
    own = replace(own, data=replace(own.data, data_root=""))  # as in the keys of finished folds
    info = {name: value for name, value in data.info.to_dict().items() if name != "pool"}  # prints and labels say more
    said = json.dumps([asdict(own), samples, info], sort_keys=True).encode()
    val_prints = digests(data.val.images)
    parts = [said, *prints, *val_prints, labels.tobytes(), val_labels.tobytes(), numbers.tobytes()]
    key = hashlib.sha256(b"".join(parts)).hexdigest()
    threads = None if jobs == 1 else threads_of(jobs)
    task = Task(config, source, numbers, samples, key, folder, progress and jobs == 1, threads)
    found = {number: kept for number in range(folds) if (kept := read_fold(task.file(number), key)) is not None}
    if found:
        log.info("%d of %d folds are there already", len(found), folds)
    left = [number for number in range(folds) if number not in found]
    try:
        _train(task, left, jobs, found, progress)
    except KeyboardInterrupt as stop:
        told = f"{len(found)} of {folds} folds are kept in {folder}; re-run the same command to resume"
        stop.args = (f"interrupted; {told if folder else 'nothing was saved'}",)
        raise
    draws = found[0]["given"].shape[0]
    probs, given = (
        np.empty((len(labels), data.info.num_classes), np.float32),
        np.empty((draws, len(labels)), np.float32),
    )
    for number, arrays in found.items():
        probs[numbers == number], given[:, numbers == number] = arrays["probs"], arrays["given"]
    val_probs = np.mean([found[number]["val_probs"] for number in range(folds)], axis=0)
    # As many draws as the training images have, from all networks in turn; of a single one, the mean over the networks.
    each_given = [found[number]["val_given"] for number in range(folds)]
    turns = [given_there[number::folds] for number, given_there in enumerate(each_given)]
    val_given = np.mean(each_given, 0) if draws == 1 else np.concatenate(turns)
    fold_of = dict(zip(prints, numbers, strict=True))
    for image, digest in enumerate(val_prints):
        if digest in fold_of:  # the other networks have seen a copy
            arrays = found[int(fold_of[digest])]
            val_probs[image], val_given[:, image] = arrays["val_probs"][image], arrays["val_given"][:, image]
    return Fitted(
        data, np.concatenate([probs, val_probs]).astype(np.float32), np.concatenate([given, val_given], 1),
        np.concatenate([labels, val_labels]),
    )  # fmt: skip


def _train(task: Task, left: list[int], jobs: int, found: dict[int, Arrays], progress: bool) -> None:
    """Trains the folds that are left and adds them to ``found``; the first error ends it."""
    if jobs == 1 or not left:
        for number in left:
            if task.progress:
                log.info("fold %d of %d", number + 1, task.numbers.max() + 1)
            found[number] = fit_fold(number, task)
        return
    with tqdm(total=len(left), desc="folds", unit="fold", dynamic_ncols=True, disable=not progress) as bar:
        for number, outcome in outcomes(partial(fit_fold, task=task), left, jobs):
            if isinstance(outcome, Exception):
                raise outcome
            found[number] = outcome
            bar.update()


def fit_fold(number: int, task: Task) -> Arrays:
    """Trains without the images of a fold, predicts them and the validation images, and keeps that.

    Returns:
        ``probs`` (n, C), ``given`` (S, n), ``val_probs`` (V, C), ``val_given`` (S, V).
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    data, config, start = task.source(), task.config, None
    if config.init is not None:
        config, data, start = begun(config, data, load_start(config.init))
    held_out = data.train.take(np.flatnonzero(task.numbers == number))
    data = replace(data, train=data.train.take(np.flatnonzero(task.numbers != number)))
    run = Trainer(config, data, None, task.progress, start=start).fit()
    arrays: Arrays = {}
    for prefix, part in (("", held_out), ("val_", data.val)):
        means, given = [np.empty((0, data.info.num_classes), np.float32)], list[np.ndarray]()
        chunk = min(CHUNK, part.images.chunk)
        for first in range(0, len(part), chunk):
            rows, labels = slice(first, first + chunk), part.labels[first : first + chunk].cpu()
            drawn = draw_predictive(run, part.images[rows], task.samples, seed=config.train.seed).probs
            means.append(drawn.mean(0).numpy())
            given.append(drawn[:, torch.arange(len(labels)), labels].numpy())
        arrays[f"{prefix}probs"] = np.concatenate(means)
        draws = min(task.samples, run.max_draws or task.samples)
        arrays[f"{prefix}given"] = np.concatenate(given, 1) if given else np.empty((draws, 0), np.float32)
    if (file := task.file(number)) is not None:
        write_atomically(file, lambda temporary: _save(temporary, arrays, task.key))
    return arrays


def _save(path: Path, arrays: Arrays, key: str) -> None:
    with path.open("wb") as file:
        np.savez(file, key=np.array(key), **arrays)  # type: ignore[arg-type]


def read_fold(path: Path | None, key: str) -> Arrays | None:
    """A finished fold; None where there is none, or one of other settings or images."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in ARRAYS} if str(file["key"]) == key else None
    except Exception as error:  # NumPy and zipfile raise several kinds, by what is damaged
        log.warning("%s is damaged (%s); its fold is trained again", path, error)
        return None


def digests(images: Images) -> list[bytes]:
    """A digest of each image's pixels."""
    found: list[bytes] = []
    for first in range(0, len(images), images.chunk):
        pixels: Any = images[first : first + images.chunk].cpu().numpy()
        found += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
    return found
