"""The model card of a compact network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_isingvit.core.checkpoint import write_json, write_text
from pyro_isingvit.pruning.shapes import CONFIG, CompactConfig
from pyro_isingvit.sharing.card import Card, write_card
from pyro_isingvit.sharing.folder import README, is_ours
from pyro_isingvit.sharing.names import shared_metrics
from pyro_isingvit.version import __version__

WEIGHTS = "compact.safetensors"
METRICS = "metrics.json"
FILES = (CONFIG, WEIGHTS, METRICS, README)  # what a shared compact network is


def write_compact_card(
    folder: Path,
    config: CompactConfig,
    parameters: int,
    size: int,
    metrics: Mapping[str, Any] | None,
    license: str | None,
    intended_use: str | None,
    repo: str | None,
) -> None:
    """Writes README.md, unless somebody wrote one of their own, and metrics.json where there are metrics.

    Args:
        folder: of the network.
        config: its shapes.
        parameters: how many numbers it has.
        size: bytes of its weights.
        metrics: of the test part, as pruning writes them.
        license: identifier.
        intended_use: in the user's words.
        repo: ``owner/name``.

    Raises:
        UserError: the folder cannot be written to; no such licence or name.
    """
    known = shared_metrics(dict(metrics or {}))
    shown = {name: value for name, value in known.items() if config.form == "bayes" or name != "samples"}
    parts = {"training": "train_size", "validation": "val_size", "test": "test_size"}
    sizes = {part: known[key] for part, key in parts.items() if isinstance(known.get(key), int)}
    form = (
        "one deterministic network" if config.form == "mean"
        else "a network whose remaining weights and masks are drawn anew for each of its draws"
    )  # fmt: skip
    blocks = f"{len(config.layers)} block{'s' * (len(config.layers) > 1)}"
    card = Card(
        config.dataset, config.classes, config.image_shape, config.kind, "CompactViT",
        f"A pruned vision transformer (width {config.width}, {blocks}): {form}.",
        sizes, parameters, WEIGHTS, size, shown, prior=config.class_prior or None, version=__version__, license=license,
        intended_use=intended_use, repo=repo,
    )  # fmt: skip
    if metrics is not None:
        write_json(folder / METRICS, known)
    if is_ours(folder):
        write_text(folder / README, write_card(card))
