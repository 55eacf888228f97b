"""The library names settings, never flags or scripts; a script shows the settings as its flags."""

import ast
import dataclasses
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from inference.cli import in_flags, with_clear_errors
from inference.train import TrainArguments
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.settings import DataConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig

LIBRARY = Path(__file__).parents[2] / "pyro_isingvit"
COMMAND_LINE = re.compile(r"(?<![\w-])--[a-z][a-z-]|python -m|(?<![\w.])(?:inference|analysis)\.[a-z]")


@dataclass(frozen=True)
class Arguments:
    run: Path
    max_images: int = 1
    vit: ViTConfig = field(default_factory=ViTConfig)


def spoken(path: Path) -> list[str]:
    """The texts of a module, docstrings included, that speak command line."""
    constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return [text for text in constants if isinstance(text, str) and COMMAND_LINE.search(text)]


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_the_library_does_not_speak_command_line(path: Path) -> None:
    assert spoken(path) == []


@pytest.mark.parametrize("text", ["use --device cpu", "python -m pip", "what inference.train wrote", "(--lr)"])
def test_what_counts_as_command_line(text: str) -> None:
    assert COMMAND_LINE.search(text)


@pytest.mark.parametrize("text", ["a -- b", "pyro_isingvit.inference.x", "----", "analysis. Then"])
def test_what_does_not(text: str) -> None:
    assert not COMMAND_LINE.search(text)


def test_settings_become_flags_and_other_names_lose_their_backticks() -> None:
    message = "`patch_size` 9 does not fit; set `run` or `max_images`, not `vit`, `seed` or `ImageData.from_arrays`."
    shown = "--patch-size 9 does not fit; set --run or --max-images, not vit, seed or ImageData.from_arrays."
    assert in_flags(message, Arguments) == shown
    assert in_flags("`seed` of `vit`", None) == "seed of vit"
    assert in_flags("a file called `x y` or ``", Arguments) == "a file called `x y` or ``"


def test_every_setting_of_a_run_has_a_flag() -> None:
    for part in (DataConfig, ViTConfig, TrainConfig):
        for each in dataclasses.fields(part):
            assert in_flags(f"`{each.name}`", TrainArguments) == f"--{each.name.replace('_', '-')}"


def test_errors_and_interruptions_are_translated(capsys) -> None:
    def wrong() -> None:
        raise UserError("`width` 7 is odd")

    def stopped() -> None:
        raise KeyboardInterrupt("interrupted; lower `max_images`")

    for call, code, text in ((wrong, 2, "error: --width 7 is odd"), (stopped, 130, "interrupted; lower --max-images")):
        with pytest.raises(SystemExit) as leave:
            with_clear_errors(call, Arguments)
        assert leave.value.code == code and capsys.readouterr().err.strip() == text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("settings", "words"), [
    (TrainConfig(lr=float("nan")), "`lr` cannot be nan; it takes a finite number."),
    (TrainConfig(schedule="linear"), "`schedule` cannot be 'linear'; it takes cosine, halving."),  # type: ignore[arg-type]
    (DataConfig(train_size=1.5), "`train_size` cannot be 1.5; it takes a whole number below 2^31 or None."),  # type: ignore[arg-type]
])  # fmt: skip
def test_a_value_of_another_kind_is_told_what_the_setting_takes(settings: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_fields(settings)
    assert str(caught.value) == words
