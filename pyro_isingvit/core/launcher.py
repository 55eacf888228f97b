"""Who started this process; without torch, so that scripts know it before they load anything."""

import os

# What torchrun sets; SLURM and others set some of these, but not all.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def by_torchrun() -> bool:
    """Whether torchrun started this process; it may then be one of several."""
    return all(name in os.environ for name in TORCHRUN)
