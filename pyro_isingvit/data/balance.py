"""Classes of different sizes made equal: by what is drawn, or by what each image counts (docs/skew.md).

Shapes: N training images, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_weights(counts: Sequence[float]) -> Tensor:
    """w_c = N / (C n_c), the weight of an image of class c: every class weighs N / C, the mean image 1; (C,).

    Examples:
        >>> class_weights((9, 1))
        tensor([0.5556, 5.0000])
    """
    sizes = torch.tensor(counts, dtype=torch.float)
    return sizes.sum() / (len(sizes) * sizes)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Row numbers of an epoch that shows every class alike often, shuffled.

    N rows are shared out among the classes that occur, at random where C does not divide N. A class whose share is
    larger than itself is gone through as often as it fits, and the rest, like the share of a larger class, is drawn
    from it without replacement: images of a class differ by at most one in how often they are shown.

    Args:
        labels: (N,) class numbers.
        generator: of the random numbers, on the CPU.

    Returns:
        (N,), on the CPU.

    Examples:
        >>> order = balanced_order(torch.tensor([0, 0, 0, 0, 0, 1]), torch.Generator().manual_seed(0))
        >>> sorted(order.tolist())[3:]
        [5, 5, 5]
    """
    labels = labels.cpu()
    present = labels.unique()
    share, left = divmod(len(labels), len(present))
    shares = torch.full((len(present),), share)
    shares[torch.randperm(len(present), generator=generator)[:left]] += 1
    chosen = []
    for number, count in zip(present, shares.tolist(), strict=True):
        rows = (labels == number).nonzero().squeeze(1)
        times, rest = divmod(count, len(rows))
        chosen += [rows.repeat(times), rows[torch.randperm(len(rows), generator=generator)[:rest]]]
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=generator)]
