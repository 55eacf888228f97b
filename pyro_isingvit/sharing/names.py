"""What a shared folder may say of where it was made: nothing."""

import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.core.untrusted import printable

STRINGS = ("method", "preset", "worst_class", "class", "granularity")  # texts of metrics.json that are no paths


def shared_name(name: str) -> str:
    """A data set's name, or the last part of its path: ``imagefolder:/home/me/scans`` becomes ``scans (imagefolder)``.

    What was a path is none any more, and is taken for no data set that a shared run could find again.
    """
    kind, colon, path = name.partition(":")
    if not colon or len(kind) == 1 or "/" in kind:  # no prefix, or a drive's letter
        return last_part(name)
    return f"{last_part(path)} ({kind})"


def last_part(path: str) -> str:
    """A name without the folders before it."""
    return printable(PurePosixPath(path.replace("\\", "/")).name)


def shared_config(config: RunConfig) -> RunConfig:
    """The settings without folders: of data, downloads, caches and trained networks, nor the pattern of file names."""
    plain = DataConfig()
    data = replace(config.data, dataset=shared_name(config.data.dataset), data_root=plain.data_root, cache=plain.cache,
                   groups=plain.groups, download=plain.download)  # fmt: skip
    return replace(
        config,
        data=data,
        init=config.init and _shared_start(config.init),
        teacher=tuple(map(last_part, config.teacher)),
    )


def _shared_start(init: str) -> str:
    library = init.startswith(("timm:", "torchvision:"))  # an architecture, and after an @ a file of it
    return "@".join(map(last_part, init.split("@", 1) if library else [init]))


def shared_metrics(metrics: Any, key: str = "") -> Any:
    """Metrics with numbers and known texts alone; others could be paths."""
    if isinstance(metrics, dict):
        kept = {name: shared_metrics(value, name) for name, value in metrics.items()}
        return {name: value for name, value in kept.items() if value is not None or metrics[name] is None}
    if isinstance(metrics, list):
        return [shared_metrics(each, key) for each in metrics if not isinstance(each, str)]
    if isinstance(metrics, str):
        return shared_name(metrics) if key == "dataset" else metrics if key in STRINGS else None
    return metrics


def is_path_free(name: str) -> bool:
    """Whether a name says nothing of folders."""
    return not re.search(r"[/\\]", name)
