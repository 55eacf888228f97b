"""Learning rates of the weight matrices: one `lr` serves networks of any width and depth (docs/method.md, Rates).

    lr_k = f_k lr,   f_k = (64 / D) min(1, 4 / L)^(1/2)     matrices of the L blocks
                     f_k = 64 / D                           what else reads channels of a network of width D
                     f_k = 1                                patch embedding, whose inputs do not grow with the width

Adam moves every weight by about its rate, so that what a matrix adds to its outputs grows with the number of its
inputs. 64 / D undoes that: maximal update parametrisation (Yang et al. 2022, table 3, Adam). Every block adds to the
residual stream; the power of the depth is measured (docs/tuning.md).
"""

from typing import Any

from torch import nn

from pyro_isingvit.core.settings import TrainConfig
from pyro_isingvit.nets.readers import Readers

WIDTH, DEPTH = 64, 4  # where the rates of the methods were chosen; shallower networks take the same


def rate_factors(readers: Readers) -> dict[str, float]:
    """f of every kind of matrix, kind -> share of `lr`.

    Examples:
        >>> from pyro_isingvit.nets.readers import vit_readers
        >>> rate_factors(vit_readers(patch=48, width=128, heads=4, depth=16, hidden=256, classes=10))
        {'patch': 1.0, 'qkv': 0.25, 'attn_out': 0.25, 'fc1': 0.25, 'fc2': 0.25, 'head': 0.5}
    """
    width = readers.matrices[0].writes.size
    depths = {kind: len(each.inner) for each in readers.branches for kind in (*each.written, *each.read)}
    return {
        kind: WIDTH / width * min(1.0, DEPTH / depths.get(kind, 1)) ** 0.5
        if readers.writers(readers.matrix(kind).reads)
        else 1.0
        for kind in readers.shapes
    }


def matrix_groups(weights: nn.ParameterDict, readers: Readers, settings: TrainConfig) -> list[dict[str, Any]]:
    """Groups of the weight matrices for AdamW, one for each rate.

    AdamW multiplies a weight by 1 - rate * decay at each step. The decay is divided by the factor of the rate, so that
    `weight_decay` shrinks all matrices alike, whatever their rates.

    Args:
        weights: kind -> (layers, out, in).
        readers: of the network that has them.
        settings: `lr`, `rate_rule` and `weight_decay`.
    """
    factors = rate_factors(readers) if settings.rate_rule == "transfer" else dict.fromkeys(weights, 1.0)
    return [
        {
            "params": [weight for kind, weight in weights.items() if factors[kind] == factor],
            "lr": settings.lr * factor,
            "weight_decay": settings.weight_decay / factor,
        }
        for factor in dict.fromkeys(factors.values())
    ]
