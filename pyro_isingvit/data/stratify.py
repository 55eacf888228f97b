"""Which images go into which part: class proportions kept, no class left out.

Shapes: N images.
"""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from pyro_isingvit.core.errors import UserError, need


def hold_out(
    labels: np.ndarray, count: int, rng: np.random.Generator, classes: tuple[str, ...], part: str
) -> tuple[np.ndarray, np.ndarray]:
    """Indices that remain and those held out, each with every class.

    Args:
        labels: (N,) class numbers.
        count: to hold out; at least one per class is.
        rng: of the choice.
        classes: their names.
        part: what is held out for, in the message.

    Raises:
        UserError: a class with a single image.
    """
    counts = np.bincount(labels)
    rare = f"class {classes[counts.argmin()]!r} has a single image left"
    need(counts.min() > 1, f"{rare}, which cannot be both for training and for {part}; add images.")
    held_out = stratified(labels, max(count, len(counts)), rng)  # up to half: a class is never taken whole
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly ``count`` indices, class proportions kept, at least one per class.

    scikit-learn's stratified splits can leave a rare class out altogether.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quota = counts * (count / len(labels))
    take = np.maximum(np.floor(quota), 1).astype(np.int64)
    while take.sum() != count:  # largest remainder: at most a few steps per class
        step = 1 if take.sum() < count else -1
        allowed = take + step >= 1
        take[np.where(allowed, (quota - take) * step, -np.inf).argmax()] += step
    order = rng.permutation(len(labels))
    groups = [order[labels[order] == name][:n] for name, n in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(groups))


def hold_out_groups(
    labels: np.ndarray,
    groups: Sequence[str],
    count: int,
    rng: np.random.Generator,
    classes: tuple[str, ...],
    part: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices that remain and those held out: whole groups, about ``count`` images, class proportions nearly kept.

    Of the folds of scikit-learn's ``StratifiedGroupKFold``, the one nearest to ``count`` with all classes in both.

    Args:
        labels: (N,) class numbers.
        groups: (N,) of the images.
        count: images to hold out.
        rng: of the choice.
        classes: their names.
        part: what is held out for, in the message.

    Raises:
        UserError: no division into whole groups leaves every class in both.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    per_class = [len(np.unique(numbers[labels == c])) for c in range(len(classes))]
    fewest = int(np.argmin(per_class))
    need(
        per_class[fewest] > 1,
        f"class {classes[fewest]!r} has images of one group, which cannot be both for training and for {part}; add "
        "groups.",
    )
    seed = int(rng.integers(2**31))
    for folds in range(min(max(2, round(len(labels) / count)), int(numbers.max()) + 1), 1, -1):
        with warnings.catch_warnings():  # of classes with fewer groups than folds, which are looked at below
            warnings.simplefilter("ignore", UserWarning)
            try:
                found = list(
                    StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, numbers)
                )
            except ValueError:  # more folds than any class has images
                continue
        whole = [pair for pair in found if all(len(np.unique(labels[side])) == len(classes) for side in pair)]
        if whole:
            rest, held_out = min(whole, key=lambda pair: abs(len(pair[1]) - count))
            return rest, held_out
    raise UserError(
        f"no division into whole groups leaves every class for training and for {part}; class {classes[fewest]!r} has "
        f"images of {per_class[fewest]} groups only: add groups."
    )


def shared_group(parts: Iterable[Sequence[str]]) -> str | None:
    """A group with images in two of the parts; None: there is none."""
    seen: set[str] = set()
    for groups in parts:
        here = set(groups)
        if seen & here:
            return min(seen & here)
        seen |= here
    return None
