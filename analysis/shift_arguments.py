"""Shared arguments of the analyses of shifted images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ShiftArguments:
    """Which runs to judge, on how many images."""

    run: tuple[Path, ...]
    """Folders that inference.train wrote, all of one data set; one figure shows them all."""
    out: Path | None = None
    """Folder to write into; by default the first run's."""
    data_root: str | None = None
    """Folder of the torchvision data sets; by default the run's own."""
    seed: int = 0
    """Seed of the draws, of the choice of images, and of any randomness in the images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
