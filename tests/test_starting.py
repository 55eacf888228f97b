"""docs/starting.md keeps its word: its example prints what it shows, and its commands run, with random weights."""

from pathlib import Path

import numpy as np
import pytest
from forks import ROOT
from helpers import here, prints_what_it_shows
from PIL import Image
from torchvision import models

PAGE = (ROOT / "docs" / "starting.md").read_text()
COMMANDS = [line.split() for line in PAGE.splitlines() if ".venv/bin/python -m" in line]
QUICK = ["--epochs", "2", "--samples", "3", "--device", "cpu", "--val-samples", "1"]


def test_the_example_prints_what_is_shown(tmp_path: Path) -> None:
    prints_what_it_shows(PAGE, tmp_path)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Images in two classes and without labels, and torchvision's network at a size that a test affords."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(("round", "square")):
        for folder, count in (("labelled/" + name, 12), ("unlabelled", 10)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (20, 24, 3), dtype=np.uint8) + np.uint8(120 * number)
                Image.fromarray(pixels).save(tmp_path / folder / f"{name}{i}.png")
    for name, classes in (("vehicles", 2), ("animals", 3)):
        images = generator.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
        arrays = {"train_images": images, "train_labels": np.arange(30) % classes}
        np.savez(tmp_path / f"{name}.npz", **arrays, test_images=images[:9], test_labels=arrays["train_labels"][:9])

    def get_model(name, weights=None, **_):
        assert (name, weights is None) == ("vit_b_16", False)  # asked for with --download, and fetched by torchvision
        return models.VisionTransformer(32, 8, num_layers=12, num_heads=2, hidden_dim=16, mlp_dim=32)

    monkeypatch.setattr(models, "get_model", get_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> list[str]:
    """The command of the page that has these words, without what starts Python."""
    (found,) = [line for line in COMMANDS if all(word in line for word in words)]
    return found[2:]


def run(found: list[str], extra: list[str]) -> str:
    result = here(found[0], *found[1:], *extra)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_pretrained_network_on_a_folder_of_images(folders) -> None:
    words = command("torchvision:vit_b_16")
    words = [{"imagefolder:PATH": "imagefolder:labelled", "224": "32"}.get(word, word) for word in words]
    shown = run(words, QUICK)
    assert "accuracy" in shown and (folders / "runs" / "mine" / "metrics.json").is_file()
    again = here("inference.predict", "--run", "runs/mine", "--input", "unlabelled", "--out", "p.nc", "--samples", "2")
    assert again.returncode == 0, again.stderr
    pruned = here("inference.prune", "--run", "runs/mine", "--out", "small", "--repeats", "1")
    assert pruned.returncode == 0, pruned.stderr
    report = here("analysis.report", "--run", "runs/mine")
    assert report.returncode == 0, report.stderr


def test_images_without_labels_and_then_with(folders) -> None:
    words = [{"PATH": "unlabelled"}.get(word, word) for word in command("inference.pretrain")]
    shown = run(words, ["--epochs", "1", "--depth", "1", "--width", "24", "--batch-size", "8", "--device", "cpu"])
    assert "start.safetensors" in shown and (folders / "runs" / "pretrained" / "guesses.png").is_file()
    words = [
        {"imagefolder:LABELLED": "imagefolder:labelled"}.get(word, word)
        for word in command("runs/pretrained/start.safetensors")
    ]
    assert "accuracy" in run(words, QUICK)


def test_another_run_and_what_pruning_left_of_it(folders) -> None:
    shape = ["--preset", "cifar", "--depth", "1", "--width", "24"]
    first = here("inference.train", "--dataset", "npz:vehicles.npz", *shape, "--out", "runs/vehicles", *QUICK)
    assert first.returncode == 0, first.stderr
    pruned = here("inference.prune", "--run", "runs/vehicles", "--keep", "0.5", "--repeats", "1",
                  "--out", "runs/vehicles-small")  # fmt: skip
    assert pruned.returncode == 0, pruned.stderr
    assert "accuracy" in run(command("runs/vehicles"), QUICK)
    assert "accuracy" in run(command("runs/vehicles-small"), QUICK)


def test_what_works_is_listed() -> None:
    shown = run(command("inference.backbones"), [])
    assert "torchvision: 5 of 5 architectures work" in shown and "torchvision:vit_b_16" in shown


def test_every_command_of_the_page_is_tried_here() -> None:
    assert len(COMMANDS) == 6
