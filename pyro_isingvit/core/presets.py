"""Network shapes by name."""

from dataclasses import replace
from typing import Any

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig

PRESETS: dict[str, ViTConfig] = {
    "digits": ViTConfig(patch_size=2, width=64, heads=4, depth=2, mlp_ratio=2),
    "small": ViTConfig(patch_size=7, width=64, heads=4, depth=4, mlp_ratio=2),
    # Few images in colour: a convolutional stem is worth more than depth (docs/starting.md, From nothing).
    "cifar": ViTConfig(patch_size=4, width=96, heads=4, depth=2, mlp_ratio=2, stem="conv"),
    "cifar-linear": ViTConfig(patch_size=4, width=192, heads=6, depth=6, mlp_ratio=2),
    "paper-28": ViTConfig(patch_size=7, width=64, heads=8, depth=2, mlp_ratio=16, head="mlp"),
    "paper-32": ViTConfig(patch_size=4, width=128, heads=16, depth=2, mlp_ratio=16, head="mlp"),
}


def default_preset(dataset: str) -> str:
    """The preset for a data set, by its name; ``small`` for folders and npz files."""
    return {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar"}.get(dataset, "small")


def without_stem(name: str) -> str:
    """The preset for the same images whose patches go straight to the embedding."""
    return {"cifar": "cifar-linear"}.get(name, name)


def preset(name: str, **changes: int | None) -> ViTConfig:
    """The network shape called ``name``, with every field replaced that is not None in ``changes``.

    Raises:
        UserError: unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown `preset` {name!r}; known: {', '.join(PRESETS)}.")
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return replace(PRESETS[name], **given)
