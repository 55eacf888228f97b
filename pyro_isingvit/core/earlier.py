"""What runs of earlier versions meant by their config.json."""

from typing import Any

# What runs did before a setting was there: the value of a config.json that lacks it, where the default is another.
EARLIER: dict[str, dict[str, Any]] = {
    "data": {"resize": "stretch"}, "vit": {}, "ising": {},
    "train": {"average": 0.0, "rate_rule": "uniform", "shrinkage_epochs": None},
}  # fmt: skip


def brought_up_to_date(raw: dict[str, Any]) -> None:
    """Changes the settings of an earlier version, as they were read, to what means the same now.

    Raises:
        KeyError, TypeError, AttributeError: settings that no version wrote.
    """
    if written_before(raw.get("version", ""), (0, 4)) and raw["train"].get("draws") == 4:
        raw["train"]["draws"] = None  # the default was 4, and 1 where 4 could not be
    if "average" not in raw["train"] and shared_draws(raw):  # before version 0.5
        raw["train"]["draws"] = 4
    if raw["train"].get("shrinkage", 0.0) is None:  # what it was before it had a default
        del raw["train"]["shrinkage"]
    for part, values in EARLIER.items():
        raw[part] = values | raw[part]


def shared_draws(raw: dict[str, Any]) -> bool:
    """Whether version 0.4 shared a batch of masked units, heads or blocks out among 4 draws where none were asked."""
    ising, train = raw["ising"], raw["train"]
    fused = ising.get("mask_posterior") == "likelihood_guided" and train.get("engine") != "pyro"
    return fused and train.get("draws") is None and ising.get("granularity") != "weight"


def written_before(version: str, release: tuple[int, int]) -> bool:
    """Whether a version, such as "0.3.0", is older than a release; an unreadable version counts as older."""
    numbers = version.split(".")[:2]
    return not all(map(str.isdecimal, numbers)) or len(numbers) < 2 or (int(numbers[0]), int(numbers[1])) < release
