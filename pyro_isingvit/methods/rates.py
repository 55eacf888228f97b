"""Learning rates of the weight matrices: one `lr` serves networks of any width and depth (docs/method.md, Rates).

    lr_k = f_k lr,   f_k = (64 / D) min(1, 2 D / inputs) min(1, 4 / L)     the last factor inside the L blocks alone
                     f_k = 1                                               patch embedding

Adam moves every weight by about its rate, so that what a step adds to the outputs of a matrix grows with the number of
its inputs, and what it adds to the residual stream with the number of blocks. The factors undo that: maximal update
parametrisation (Yang et al. 2022, table 3, Adam), relative to the networks on which the rates of the methods were
chosen: width 64, twice as many hidden units, up to 4 blocks. The inputs of the patch embedding do not grow.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.nets.readers import Readers

WIDTH, HIDDEN, DEPTH = 64, 2, 4  # where rates were chosen: D, hidden units of an MLP as a multiple of D, most blocks


def rate_factors(readers: Readers) -> dict[str, float]:
    """f of every kind of matrix, kind -> share of `lr`.

    Examples:
        >>> from pyro_isingvit.nets.readers import vit_readers
        >>> rate_factors(vit_readers(patch=48, width=128, heads=4, depth=8, hidden=512, classes=10))
        {'patch': 1.0, 'qkv': 0.25, 'attn_out': 0.25, 'fc1': 0.25, 'fc2': 0.125, 'head': 0.5}
    """
    width = readers.matrices[0].writes.size
    depths = {kind: len(each.inner) for each in readers.branches for kind in (*each.written, *each.read)}
    factors = {}
    for kind, (_, _, inputs) in readers.shapes.items():
        if readers.writers(readers.matrix(kind).reads):
            deep = min(1.0, DEPTH / depths.get(kind, 1))
            factors[kind] = WIDTH / width * min(1.0, HIDDEN * width / inputs) * deep
        else:
            factors[kind] = 1.0
    return factors


def matrix_groups(
    weights: nn.ParameterDict | Mapping[str, nn.Parameter], readers: Readers, settings: TrainConfig
) -> list[dict[str, Any]]:
    """Groups of the weight matrices for AdamW, one for each rate.

    AdamW multiplies a weight by 1 - rate * decay at each step. The decay is divided by the factor of the rate, so that
    `weight_decay` shrinks all matrices alike, whatever their rates.

    Args:
        weights: kind -> (layers, out, in).
        readers: of the whole network that has them.
        settings: `lr`, `rate_rule` and `weight_decay`, a number once `shrinkage` has set it (runs/optimiser.py); None
            is no decay.
    """
    factors = rate_factors(readers) if settings.rate_rule == "transfer" else dict.fromkeys(weights, 1.0)
    return [
        {
            "params": [weight for kind, weight in weights.items() if factors[kind] == factor],
            "lr": settings.lr * factor,
            "weight_decay": (settings.weight_decay or 0.0) / factor,
        }
        for factor in dict.fromkeys(factors.values())
    ]
