"""Network shapes by name."""

from dataclasses import dataclass, replace
from typing import Any

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig


@dataclass(frozen=True)
class Preset:
    """The shape of a network, and the highest learning rate for its width.

    Attributes:
        vit: the shape; each field can be overridden.
        lr: the highest rate for networks of this width; methods with a higher rate take this one. None: no limit.
    """

    vit: ViTConfig
    lr: float | None = None


PRESETS: dict[str, Preset] = {
    "digits": Preset(ViTConfig(patch_size=2, width=64, heads=4, depth=2, mlp_ratio=2)),
    "small": Preset(ViTConfig(patch_size=7, width=64, heads=4, depth=4, mlp_ratio=2)),
    "cifar": Preset(ViTConfig(patch_size=4, width=192, heads=6, depth=6, mlp_ratio=2), lr=1e-3),
    "paper-28": Preset(ViTConfig(patch_size=7, width=64, heads=8, depth=2, mlp_ratio=16, head="mlp")),
    "paper-32": Preset(ViTConfig(patch_size=4, width=128, heads=16, depth=2, mlp_ratio=16, head="mlp"), lr=1e-3),
}


def default_preset(dataset: str) -> str:
    """The preset for a data set, by its name; ``small`` for folders and npz files."""
    return {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar"}.get(dataset, "small")


def preset(name: str, **changes: int | None) -> ViTConfig:
    """The network shape called ``name``, with every field replaced that is not None in ``changes``.

    Raises:
        UserError: unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown `preset` {name!r}; known: {', '.join(PRESETS)}.")
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return replace(PRESETS[name].vit, **given)


def fitting_rate(lr: float, vit: ViTConfig) -> float:
    """A learning rate for the width of a network: at most the rate of the widest preset that is no wider.

    Args:
        lr: the method's rate for a narrow network.
        vit: the network.
    """
    narrower = [row for row in PRESETS.values() if row.vit.width <= vit.width]
    widest = max(narrower, key=lambda row: row.vit.width, default=Preset(vit))
    return lr if widest.lr is None else min(lr, widest.lr)
