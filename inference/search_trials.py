"""Trials of settings: what a file of them may say, the run that each stands for, and the file of their records."""

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pyro_isingvit.core.checkpoint import write_text
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.presets import PRESETS, default_preset, preset
from pyro_isingvit.core.settings import DataConfig, RunConfig, ViTConfig
from pyro_isingvit.data.load import DEV_SIZE
from pyro_isingvit.methods.plain import check_baseline
from pyro_isingvit.methods.registry import OURS, WITHOUT, row, with_defaults
from pyro_isingvit.runs.checks import check_asked, check_training
from pyro_isingvit.version import __version__

Device = Literal["auto", "cpu", "cuda"]
SAMPLES = 16  # draws of the evaluation, unless a trial says otherwise
SETTINGS = ("train", "ising", "baseline")  # parts of the settings of a run whose fields a trial may set
DATA = ("train_size", "val_fraction", "image_size")
KINDS: dict[str, tuple[type, ...]] = {  # key of a trial -> what it holds
    "dataset": (str,), "label": (str,), "name": (str,), "train_size": (int,), "val_fraction": (int, float),
    "image_size": (int,), "dev_size": (int,), "seed": (int,), "method": (str,), "epochs": (int,), "preset": (str,),
    "vit": (dict,), "settings": (dict,), "init": (str,),
}  # fmt: skip
APART = ("seed", "epochs")  # settings of training that are keys of the trial itself


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes:
        given: what the file of trials says; a folder of this machine is left out where the data set has a label.
        config: the settings that it stands for.
        dev_size: development images to judge it by.
    """

    given: dict[str, Any]
    config: RunConfig
    dev_size: int

    @property
    def key(self) -> str:
        """What distinguishes the trial from others, whatever its name."""
        return key_of(self.given)

    def changes(self) -> dict[str, Any]:
        """Every setting that is not the method's own default, and the shape of the network."""
        chosen = row(self.config.method)
        if chosen.knob is not None and chosen.from_number is not None:  # what comes with the number is no change
            part, knob = chosen.knob
            chosen = replace(chosen, train=chosen.with_number(str(getattr(getattr(self.config, part), knob))).train)
        usual = {"train": chosen.train, "ising": chosen.ising,
                 "baseline": chosen.baseline}  # fmt: skip
        own = {part: asdict(getattr(self.config, part)) for part in SETTINGS}
        changed = {
            name: value
            for part in SETTINGS
            for name, value in own[part].items()
            if value != getattr(usual[part], name) and name != "device"
        }
        return {"method": self.config.method, "vit": asdict(self.config.vit), **changed}

    def resolved(self) -> dict[str, Any]:
        """Every setting, those that are defaults today too, as JSON has them."""
        values = {name: value for part in SETTINGS for name, value in asdict(getattr(self.config, part)).items()}
        found: dict[str, Any] = json.loads(json.dumps({name: values[name] for name in values if name != "device"}))
        return found

    def is_that_of(self, record: dict[str, Any] | None) -> bool:
        """Whether a record is of this trial, and its settings are today's; before version 0.12 they were not recorded.

        Settings that were added since leave a trial as it was.
        """
        return record is not None and key_of(record["trial"]) == self.key and same_settings(self.resolved(), record)


def same_settings(now: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a record was measured with the settings ``now``.

    Those that it does not know are not compared, but for ``WITHOUT``: what was not there was off.
    """
    then = record.get("resolved", {})
    then = WITHOUT | then if then else {}
    return all(now[name] == value for name, value in then.items() if name in now)


def key_of(given: dict[str, Any]) -> str:
    """A trial as text, without its name; one that says no seed is that of seed 0."""
    return json.dumps({"seed": 0} | {name: value for name, value in given.items() if name != "name"}, sort_keys=True)


def source_of(dataset: str) -> str:
    """The kind of a data set and the name of its file or folder, wherever that lies."""
    kind, _, place = dataset.partition(":")
    return f"{kind}:{Path(place).name}" if place else kind


def read_trials(path: Path, data_root: str, device: Device) -> list[Trial]:
    """The trials of a file; those that it names again are left out.

    Args:
        path: a JSON list of objects.
        data_root: folder of the torchvision data sets.
        device: where to train.

    Raises:
        UserError: no such list, or a trial with something that is unknown or cannot be; the message has its number.
    """
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; `trials` takes a JSON file.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file ({why(error)}).") from error
    need(isinstance(raw, list) and raw, f"{path} must hold a list of trials, and one at least.")
    trials: dict[str, Trial] = {}
    for number, given in enumerate(raw, 1):
        try:
            trial = make_trial(given, data_root, device)
        except UserError as error:
            raise UserError(f"{path}, trial {number}: {error}") from error
        trials.setdefault(trial.key, trial)
    return [*trials.values()]


def make_trial(given: Any, data_root: str, device: Device) -> Trial:
    """One trial, checked.

    Raises:
        UserError: an unknown key or setting, or a value out of its range.
    """
    need(isinstance(given, dict), "a trial is an object with `dataset`, `method` and more.")
    _known("key", given, KINDS)
    for name, value in given.items():
        fits = isinstance(value, KINDS[name]) and not isinstance(value, bool)
        need(fits, f"`{name}` cannot be {value!r:.60}.")
    need("dataset" in given, "`dataset` is missing.")
    shaped = given.get("vit", {}).keys() - {"head"} if "init" in given else ()
    told = "`init` brings the shape of its network: leave out `preset` and `vit`, but for its `head`."
    need(not shaped and not ("init" in given and "preset" in given), told)
    source = DataConfig(given["dataset"], data_root, **{name: given[name] for name in DATA if name in given})
    name = given.get("preset", default_preset(source.dataset))
    need(name in PRESETS, f"unknown `preset` {name!r}; known: {', '.join(PRESETS)}.")
    _known("field of `vit`", given.get("vit", {}), [each.name for each in fields(ViTConfig)])
    base = RunConfig(
        name, OURS, source, preset(name, **given.get("vit", {})), version=__version__, init=given.get("init")
    )
    config = with_defaults(given.get("method", OURS), base, given.get("epochs"))
    config = replace(config, train=replace(config.train, seed=given.get("seed", 0), samples=SAMPLES, device=device))
    config = _with_settings(config, given.get("settings", {}), given.get("epochs"))
    check_fields(config)
    check_training(config.train)
    check_asked(config.train)
    check_baseline(config.baseline)
    dev_size = given.get("dev_size", DEV_SIZE)
    need(dev_size >= 1, f"`dev_size` must be at least 1, not {dev_size}.")
    if "label" in given:
        given = given | {"dataset": source_of(source.dataset)}
    return Trial(given, config, dev_size)


def _with_settings(config: RunConfig, settings: dict[str, Any], epochs: int | None) -> RunConfig:
    parts = {part: getattr(config, part) for part in SETTINGS}
    homes = {each.name: part for part, value in parts.items() for each in fields(value)}
    twice = ", ".join(f"`{name}`" for name in APART if name in settings)
    need(not twice, f"{twice}: a key of the trial itself, not one of its `settings`.")
    _known("setting", settings, homes)
    for name, value in settings.items():
        parts[homes[name]] = replace(parts[homes[name]], **{name: value})
    last = settings.get("finetune_epochs")
    if epochs is not None and type(last) is int:  # the epochs of a trial are all of them
        parts["train"] = replace(parts["train"], epochs=epochs - last)
    return replace(config, **parts)


def _known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError that names whatever is unknown, and what may have been meant."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}."
            raise UserError(f"unknown {what} `{name}`; {hint}")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of earlier calls; a last line that was cut short is taken out of the file.

    Raises:
        UserError: the file cannot be read, or another line is no record.
    """
    if not path.exists():
        return []
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; `records` takes a file.") from error
    records = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            raise UserError(f"{path} is damaged in line {number}; take that line out, and its trial runs again.")
        records.append(record)
    if rest:
        last = _record(rest)
        records += [] if last is None else [last]
        write_text(path, "".join(map(to_line, records)))
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("trial"), dict) else None


def to_line(record: dict[str, Any]) -> str:
    """A record as a line; six decimals are enough."""
    short = {name: round(value, 6) if isinstance(value, float) else value for name, value in record.items()}
    return json.dumps(short) + "\n"


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line in one piece; after a crash there is the whole line, or a part of it that the next call takes out."""
    with path.open("ab", buffering=0) as file:
        file.write(to_line(record).encode())
        os.fsync(file.fileno())
