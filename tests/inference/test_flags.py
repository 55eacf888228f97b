"""Every flag of every script with values that cannot be: exit code 2, one message, and no torch for a typing error."""

import dataclasses
import importlib
import os
import subprocess
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from helpers import ROOT, SCRIPTS


def test_every_script_is_here() -> None:
    found = {
        f"{path.parent.name}.{path.stem}"
        for folder in ("inference", "analysis")
        for path in (ROOT / folder).glob("*.py")
        if "\ndef main(" in path.read_text()
    }
    assert found == set(SCRIPTS)


def fields(arguments: Any) -> list[tuple[str, Any]]:
    """Flag and type of every field, nested ones included."""
    found = []
    for field in dataclasses.fields(arguments):
        if dataclasses.is_dataclass(field.type):
            found += fields(field.type)
        else:
            found.append((f"--{field.name.replace('_', '-')}", field.type))
    return found


def choices(kind: Any) -> list[Any]:
    """The types and words that a flag takes."""
    if get_origin(kind) in (Union, types.UnionType):
        return [each for part in get_args(kind) for each in choices(part)]
    return list(get_args(kind)) if get_origin(kind) is Literal else [kind]


def wrong_words(kind: Any) -> list[list[str]]:
    """Words after the flag that its type refuses as they are typed."""
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return [["1", "x y"]] if item in (int, float) else [["nope?"]] if get_origin(item) is Literal else []
    takes = choices(kind)
    if bool in takes:
        return [["nope?"]]
    words = [] if {str, Path} & set(takes) else [["nope?"], [""]]
    return words + [[]] + ([["1.5"]] if int in takes and float not in takes else [])


@cache
def module(name: str) -> Any:
    return importlib.import_module(name)


FLAGS = [
    (script, flag, kind) for script, name in SCRIPTS.items() for flag, kind in fields(getattr(module(script), name))
]


def outcome(script: str, arguments: list[str], capsys: Any) -> str:
    """What is on stderr of a call that must leave with code 2."""
    with pytest.raises(SystemExit) as stop:
        module(script).main(arguments)
    shown = capsys.readouterr()
    assert stop.value.code == 2, arguments
    assert "Traceback" not in shown.err + shown.out
    return str(shown.err)


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_words(script: str, capsys) -> None:
    tried = 0
    for flag, kind in [(flag, kind) for name, flag, kind in FLAGS if name == script]:
        for words in wrong_words(kind):
            assert outcome(script, [flag, *words], capsys).strip(), (flag, words)
            tried += 1
    assert tried >= 1 or script in (
        "analysis.report",
        "analysis.tutorial",
        "analysis.method_figure",
        "analysis.rates",
        "analysis.starts",
        "analysis.paper_table",
        "analysis.distillation",
        "analysis.regularisers",
    )  # paths alone
    for words in ([], ["--nope"], ["stray"], ["--run"]):
        outcome(script, words, capsys)


def required(script: str, folder: Path) -> list[str]:
    """The flags that a script cannot do without, with values that are accepted, and whatever makes it quick."""
    missing = str(folder / "missing")
    return {
        "inference.train": ["--out", str(folder / "out"), "--dataset", "digits", "--device", "cpu"],
        "inference.predict": ["--run", missing, "--input", "digits", "--out", str(folder / "p.nc")],
        "inference.prune": ["--run", missing, "--out", str(folder / "out")],
        "inference.branches": ["--run", missing, "--out", str(folder / "out")],
        "inference.compare": ["--out", str(folder / "out")],
        "inference.peers": ["--out", str(folder / "out")],
        "inference.benchmark": ["--out", str(folder / "out")],
        "inference.variance": ["--out", str(folder / "out")],
        "inference.search": ["--trials", missing, "--records", str(folder / "out")],
        "inference.pretrain": ["--images", "digits", "--out", str(folder / "out"), "--device", "cpu"],
        "inference.start_cost": ["--out", str(folder / "out")],
        "inference.backbones": ["--library", "torchvision"],
        "inference.rates": ["--out", str(folder / "out")],
        "analysis.rates": ["--results", missing],
        "analysis.starts": ["--nothing", missing, "--started", missing],
        "analysis.paper_table": ["--results", missing],
        "analysis.trials": ["--records", missing],
        "analysis.distillation": ["--pruned", missing],
        "analysis.regularisers": ["--results", missing],
        "analysis.decisions": ["--run", missing],
        "analysis.adaptation": ["--run", missing],
        "analysis.shift_table": ["--run", missing],
        "inference.share": ["--run", missing, "--out", str(folder / "out")],
        "analysis.benchmark": ["--results", missing],
        "analysis.report": ["--run", missing],
        "analysis.ood": ["--run", missing, "--ood", "noise"],
        "analysis.corruptions": ["--run", missing],
        "analysis.comparison": ["--results", missing],
        "analysis.tutorial": ["--page", missing],
        "analysis.labels": ["--run", missing],
        "analysis.label_noise": ["--out", str(folder / "out")],
        "analysis.method_figure": ["--out", str(folder / "out")],
    }[script]


NUMBERS = [(script, flag, kind) for script, flag, kind in FLAGS if {int, float} & set(choices(kind))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_that_no_setting_has(script: str, tmp_path: Path, capsys) -> None:
    """nan and inf are numbers to the parser, and so is 10^30."""
    for flag, kind in [(flag, kind) for name, flag, kind in NUMBERS if name == script]:
        words = ["nan", "inf", "-inf"] if float in choices(kind) else [str(10**30), str(-(10**30))]
        for word in words:
            shown = outcome(script, [*required(script, tmp_path), f"{flag}={word}"], capsys)
            assert f"{flag} cannot be" in shown, (flag, word, shown)
    assert not (tmp_path / "out").exists()


SIGNED = ("--J", "--omega")  # of any sign
BASELINE = ("--drop-rate", "--members", "--sparsity", "--l0-penalty", "--kl-weight", "--length-scale",
            "--hypersparse-weight", "--hypersparse-growth", "--lobster-weight")  # fmt: skip


@pytest.mark.parametrize(
    "flag", [flag for script, flag, kind in NUMBERS if script == "inference.train" and flag not in SIGNED]
)
def test_training_refuses_what_is_out_of_range(flag: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """-1 is out of the range of every number but the Ising coupling's; the run's folder is not made."""
    from pyro_isingvit.runs.trainer import Trainer

    def accepted(*_: object) -> None:
        raise AssertionError(f"{flag}=-1 was accepted")

    monkeypatch.setattr(Trainer, "fit", accepted)
    method = {"--members": "ensemble", "--length-scale": "concrete-dropout", "--sparsity": "magnitude"}
    size = ["--dataset", "digits", "--width", "8", "--depth", "1", "--train-size", "50"]
    small = [word for pair in zip(size[::2], size[1::2], strict=True) if pair[0] != flag for word in pair]
    kind = ["--method", method.get(flag, "dropout")] if flag in BASELINE else []
    outcome("inference.train", ["--out", str(tmp_path / "r"), "--device", "cpu", *small, *kind, f"{flag}=-1"], capsys)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("script", "arguments"), [
    ("inference.predict", ["--samples", "0"]), ("inference.predict", ["--chunk", "0"]),
    ("inference.predict", ["--samples", "auto"]), ("inference.predict", ["--all-classes"]),
    ("inference.predict", ["--mc-error", "0.1"]), ("inference.predict", ["--part", "100"]),
    ("inference.prune", ["--threshold", "2"]), ("inference.prune", ["--keep", "0"]),
    ("inference.prune", ["--threshold", "0.5", "--keep", "0.5"]), ("inference.prune", ["--finetune=-1"]),
    ("inference.prune", ["--repeats", "0"]), ("inference.compare", ["--methods", "nope"]),
    ("inference.compare", ["--methods", "dropout:x"]), ("inference.compare", ["--methods", "ising:nan"]),
    ("inference.compare", ["--methods", "ising", "ising"]), ("inference.compare", ["--jobs", "0"]),
    ("inference.compare", ["--flipped", "0.2"]), ("inference.compare", ["--regularisers", "nope"]),
    ("inference.compare", ["--regularisers", "car:x"]), ("inference.compare", ["--flipped", "1"]),
    ("inference.compare", ["--epochs", "1", "2", "3"]), ("inference.compare", ["--preset", "nope"]),
    ("inference.compare", ["--train-sizes", "0"]), ("inference.peers", ["--peers", "nope"]),
    ("inference.peers", ["--preset", "nope"]), ("inference.peers", ["--epochs", "0"]),
    ("inference.search", []), ("inference.search", ["--jobs", "0"]),
    ("inference.pretrain", ["--masked", "1"]), ("inference.pretrain", ["--masked", "0.01"]),
    ("inference.pretrain", ["--images", "nope"]), ("inference.pretrain", ["--images", "nope.npz"]),
    ("inference.pretrain", ["--patch-size", "99"]), ("inference.pretrain", ["--preset", "nope"]),
    ("inference.pretrain", ["--epochs", "0"]), ("inference.pretrain", ["--decoder-width", "20"]),
    ("inference.pretrain", ["--image-size=-4"]), ("inference.pretrain", ["--resume", "nowhere"]),
    ("inference.train", ["--init", "nope"]), ("inference.train", ["--init", "timm:nope"]),
    ("inference.train", ["--init", "timm:vit_tiny_patch16_224"]),
    ("inference.train", ["--init", "torchvision:vit_b_16"]),
    ("inference.train", ["--init", "torchvision:vit_b_16@nowhere.pth"]),
    ("inference.train", ["--init", "nope.safetensors"]),
    ("inference.train", ["--init", "timm:vit_tiny_patch16_224", "--depth", "3"]),
    ("analysis.ood", ["--samples", "0"]), ("analysis.ood", ["--ood", "noise", "noise"]),
    ("analysis.corruptions", ["--samples", "0"]), ("inference.train", ["--dataset", "nope"]),
    ("inference.train", ["--method", "nope"]), ("inference.train", ["--preset", "nope"]),
    ("inference.train", ["--accumulate", "0"]), ("inference.train", ["--accumulate", "3"]),
])  # fmt: skip
def test_values_out_of_range(script: str, arguments: list[str], tmp_path: Path, capsys) -> None:
    assert outcome(script, [*required(script, tmp_path), *arguments], capsys).strip()
    assert not (tmp_path / "out").exists()


CODE = """
import importlib, sys
for name in sys.argv[1].split(","):
    for words in (["--nope"], [], ["--help"]):
        try:
            importlib.import_module(name).main(words)
        except SystemExit as stop:
            assert stop.code == (0 if words == ["--help"] else 2), (name, words, stop.code)
    heavy = {"torch", "pyro", "numpy", "pandas", "matplotlib", "scipy", "sklearn", "xarray"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""


def test_a_typing_error_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, ",".join(SCRIPTS)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
