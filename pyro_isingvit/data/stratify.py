"""Which images go into which part: class proportions kept, no class left out.

Shapes: N images.
"""

import numpy as np

from pyro_isingvit.core.errors import need


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
