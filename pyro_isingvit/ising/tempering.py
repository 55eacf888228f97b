"""How much the likelihood counts against the prior (docs/method.md, Tempering)."""

from typing import Literal

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import Tempering


def tempering(kappa: Tempering | Literal["auto"], num_weights: int, num_data: int) -> float:
    """The number behind a tempering setting (docs/method.md, Tempering).

    exact = 1, data_emphasis = max(1, P / N), batch_mean = 1 / N (the likelihood counts as one image), no_kl = 1e30
    (the KL does not count), auto = 1 to start with.

    Args:
        kappa: the setting.
        num_weights: P, masked weights.
        num_data: N, training images.

    Raises:
        UserError: not positive.

    Examples:
        >>> tempering("data_emphasis", 135_000, 6_000)
        22.5
        >>> tempering("exact", 135_000, 6_000)
        1.0
    """
    named = {
        "exact": 1.0, "data_emphasis": max(1.0, num_weights / num_data), "batch_mean": 1.0 / num_data, "no_kl": 1e30,
        "auto": 1.0,
    }  # fmt: skip
    value = named[kappa] if isinstance(kappa, str) else float(kappa)
    if not value > 0:
        raise UserError(f"kappa must be positive, not {value}; set `kappa_mask` and `kappa_weights` above 0.")
    return value
