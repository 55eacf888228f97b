"""Folds for cross-fitting: every image is held out once.

Shapes: N images.
"""

import warnings

import numpy as np

from pyro_isingvit.core.errors import need


def fold_numbers(
    labels: np.ndarray, count: int, classes: tuple[str, ...], seed: int = 0, groups: np.ndarray | None = None
) -> np.ndarray:
    """The fold that each image is held out in, class proportions kept.

    Args:
        labels: (N,) class numbers.
        count: K, folds.
        classes: their names.
        seed: of the shuffling.
        groups: (N,) numbers; images of one group are in one fold. None: each image by itself.

    Returns:
        (N,) numbers 0 to K - 1; what is left without any one fold has every class.

    Raises:
        UserError: fewer than two folds, more than there are groups or images of the largest class, or a class that is
            in one fold alone.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    counts = np.bincount(labels, minlength=len(classes))
    need(2 <= count <= counts.max(), f"`folds` must lie between 2 and {counts.max()}, not {count}.")
    some = count if groups is None else len(np.unique(groups))
    need(count <= some, f"`folds` must lie between 2 and {some}, the number of groups, not {count}.")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    numbers = np.empty(len(labels), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # it is looked at below
        parts = kind(count, shuffle=True, random_state=seed).split(labels, labels, groups)
        for number, (_, held_out) in enumerate(parts):
            numbers[held_out] = number
    for number in range(count):
        left = np.bincount(labels[numbers != number], minlength=len(classes))
        alone = "has images in one group alone" if counts[left.argmin()] > 1 else "has a single image"
        need(
            left.min() > 0,
            f"class {classes[left.argmin()]!r} {alone}: no network could learn it without them; add images, or leave "
            "the class out.",
        )
    return numbers


def copy_groups(prints: list[bytes]) -> np.ndarray | None:
    """Groups of images that are the same.

    Args:
        prints: N digests of the images' content.

    Returns:
        (N,) group numbers; None where all images differ.
    """
    numbers = np.unique(np.array(prints), return_inverse=True)[1]
    return numbers if numbers.max() + 1 < len(prints) else None


def joined(groups: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """Groups of images that either numbering puts together, directly or through further images.

    Args:
        groups: (N,) group numbers.
        others: likewise; None: no groups.

    Returns:
        (N,) group numbers.

    Examples:
        >>> import numpy as np
        >>> joined(np.array([0, 0, 1, 2]), np.array([5, 6, 6, 7]))
        array([0, 0, 0, 1])
    """
    if others is None:
        return groups
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = (np.unique(numbers, return_inverse=True)[1] for numbers in (groups, others))
    size = left.max() + 1
    edges = coo_array((np.ones(len(left)), (left, size + right)), shape=(size + right.max() + 1,) * 2)
    return np.asarray(np.unique(connected_components(edges, directed=False)[1][left], return_inverse=True)[1])
