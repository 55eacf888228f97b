"""``analysis.ood`` as a user runs it, on a tiny run; what the images become; what bad input gets."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import here, refused
from PIL import Image

from analysis import shift
from analysis.ood import main
from analysis.shift import choose, fit_images, load_runs, own_test_part
from analysis.strange import file_names, strange_images
from inference.train import main as train
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.load import load_data
from pyro_isingvit.predictive.detection import SCORES

GREY = DataInfo("grey", ("a", "b"), 1, 8, 8, (0.5,), (0.25,))
COLOUR = DataInfo("colour", ("a", "b"), 3, 6, 8, (0.5,) * 3, (0.25,) * 3)
QUICK = ["--samples", "3", "--max-images", "50", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quiet(caplog) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.fixture(scope="module")
def run(digits_run: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "first"))


@pytest.fixture(scope="module")
def other(run: Path) -> Path:
    return Path(shutil.copytree(run, run.parent / "second"))


def tiny_run(folder: Path, *arguments: str) -> Path:
    tiny = "--epochs 3 --depth 1 --width 16 --heads 2 --patch-size 4 --samples 3 --device cpu"
    train(["--out", str(folder), *tiny.split(), *arguments])
    return folder


def test_two_runs_and_several_kinds(run: Path, other: Path, tmp_path: Path, capsys) -> None:
    images = tmp_path / "pictures"
    (images / "deep").mkdir(parents=True)
    for i, size in enumerate([(8, 8), (30, 20), (9, 9)]):
        Image.new("RGB" if i else "L", size, 40 * i).save(images / "deep" / f"{i}.png")
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 20, 20, 3), np.uint8))
    kinds = ["noise", "shuffled", f"imagefolder:{images}", f"npz:{tmp_path / 'x.npz'}"]
    main(["--run", str(run), str(other), "--ood", *kinds, "--out", str(tmp_path / "o"), *QUICK])
    results = json.loads((tmp_path / "o" / "ood" / "results.json").read_text(), parse_constant=pytest.fail)
    assert (
        results["images"] == 50 and results["positive"] == "out-of-distribution" and set(results["ood"]) == set(kinds)
    )
    assert [results["ood"][kind]["images"] for kind in kinds] == [50, 50, 3, 4]
    assert (
        "RGB to grey" in results["ood"][kinds[3]]["adapted"] and "20x20 to 8x8" in results["ood"][kinds[3]]["adapted"]
    )
    for kind in kinds:
        found = results["ood"][kind]["runs"]
        assert set(found) == {"first", "second"} and found["first"] == found["second"]  # a copy of the same run
        assert set(found["first"]) == set(SCORES) and all(0 <= x <= 1 for x in found["first"]["entropy"].values())
        with Image.open(tmp_path / "o" / "ood" / results["ood"][kind]["figure"]) as image:
            assert image.size[0] > 1000
    shown = capsys.readouterr().out
    assert "AUROC" in shown and "FPR95" in shown and "RGB to grey" in shown
    assert not (run / "ood").exists()


def test_it_writes_into_the_first_run_and_repeats_itself(run: Path) -> None:
    written = []
    for _ in range(2):
        main(["--run", str(run), "--ood", "shuffled", *QUICK])
        written.append((run / "ood" / "results.json").read_text())
    assert written[0] == written[1] and (run / "ood" / "ood-shuffled.png").is_file()


def test_a_method_without_masks_serves_as_well(run: Path, tmp_path: Path) -> None:
    plain = tiny_run(tmp_path / "plain", "--dataset", "digits", "--train-size", "100", "--method", "deterministic")
    main(["--run", str(run), str(plain), "--ood", "noise", "--out", str(tmp_path), *QUICK])
    found = json.loads((tmp_path / "ood" / "results.json").read_text())["ood"]["noise"]["runs"]
    assert found["plain"]["mutual_information"]["auroc"] == pytest.approx(0.5, abs=0.1)  # one network: nothing to say


def test_a_data_set_against_itself_says_nothing(run: Path) -> None:
    main(["--run", str(run), "--ood", "digits", *QUICK])
    found = json.loads((run / "ood" / "results.json").read_text())["ood"]["digits"]["runs"]["first"]
    assert {each["auroc"] for each in found.values()} == {0.5}


def test_bad_input_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 8, 8)))
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "other").mkdir()
    good = ["--run", run, "--ood"]
    for arguments, words in [
        (["--run", tmp_path / "gone", "--ood", "noise"], ["no run folder"]),
        (["--run", tmp_path / "empty", "--ood", "noise"], ["holds no run"]),
        (["--run", run, run, "--ood", "noise"], ["twice"]),
        ([*good, "nope"], ["nope", "fashion-mnist", "shuffled"]),
        ([*good, "noise", "noise"], ["twice"]),
        ([*good, "mnist", "--data-root", tmp_path], ["mnist", str(tmp_path)]),
        ([*good, f"imagefolder:{tmp_path / 'empty'}"], ["no image"]),
        ([*good, f"imagefolder:{tmp_path / 'gone'}"], ["no such folder"]),
        ([*good, f"npz:{tmp_path / 'gone.npz'}"], ["no such file"]),
        ([*good, f"npz:{tmp_path / 'float.npz'}"], ["float64", "uint8"]),
        ([*good, f"npz:{tmp_path / 'none.npz'}"], ["test_images"]),
        ([*good, f"npz:{tmp_path / 'damaged.npz'}"], ["cannot read"]),
        ([*good, "noise", "--samples", 0], ["at least 1"]),
        ([*good, "noise", "--max-images", 0], ["max-images"]),
    ]:
        refused(here("analysis.ood", *arguments, "--out", tmp_path / "o", "--device", "cpu"), *words)
    assert not (tmp_path / "o").exists()


def test_runs_of_different_data_are_not_compared(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"train_images": rng.integers(0, 255, (60, 8, 8), np.uint8), "train_labels": np.arange(60) % 10}
    np.savez(tmp_path / "x.npz", **arrays)
    tiny_run(tmp_path / "r", "--dataset", f"npz:{tmp_path / 'x.npz'}", "--epochs", "1")
    with pytest.raises(UserError, match="different data"):
        load_runs([run, tmp_path / "r"], "cpu")


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(run, tmp_path / "twin" / run.name))
    assert list(load_runs([run, twin], "cpu")) == [f"{run.parent.name}/first", "twin/first"]


def test_without_the_data_the_stored_images_serve(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    config = moved / "config.json"
    config.write_text(config.read_text().replace('"dataset": "digits"', '"dataset": "npz:gone.npz"'))
    stored = own_test_part(load_runs([moved], "cpu")["moved"], None, 1000, 0)
    fresh = own_test_part(load_runs([run], "cpu")["first"], None, 1000, 0)
    assert torch.equal(stored.images[:], fresh.images[:]) and torch.equal(stored.labels, fresh.labels)
    (moved / "posterior.nc").unlink()
    with pytest.raises(UserError, match=r"gone\.npz"):
        own_test_part(load_runs([moved], "cpu")["moved"], None, 1000, 0)


def test_a_data_set_that_has_grown_is_not_divided_again(run: Path, monkeypatch) -> None:
    """Its test part would be another one: the images that the run keeps serve."""
    loaded, asked = load_runs([run], "cpu")["first"], []
    stored = shift._stored
    monkeypatch.setattr(shift, "_stored", lambda path: asked.append(path) or stored(path))
    own_test_part(loaded, None, 1000, 0)
    assert not asked
    loaded.method.info = replace(loaded.info, counts=tuple(count + 1 for count in loaded.info.counts))
    own_test_part(loaded, None, 1000, 0)
    assert asked == [run / "posterior.nc"]


def test_images_of_many_channels_are_refused() -> None:
    for channels in (2, 4):
        with pytest.raises(UserError, match="1 or 3 channels"):
            fit_images(torch.zeros(2, channels, 8, 8, dtype=torch.uint8), load_data("digits").info)


def test_images_are_fitted() -> None:
    grey = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    same, done = fit_images(grey, GREY)
    assert torch.equal(same, grey) and done == "as they are"
    colour, done = fit_images(grey, COLOUR)
    assert colour.shape == (1, 3, 6, 8) and colour.dtype == torch.uint8 and torch.equal(colour[:, 0], colour[:, 2])
    assert done == "grey to RGB, resized from 8x8 to 8x6 (bilinear, antialiased)"
    back, done = fit_images(colour, GREY)
    assert back.shape == (1, 1, 8, 8) and done.startswith("RGB to grey")


def test_resizing_is_antialiased() -> None:
    """A fine chequerboard becomes grey; plain bilinear sampling would keep black or white."""
    board = (torch.arange(40)[:, None] + torch.arange(40)).remainder(2).mul(255).to(torch.uint8)[None, None]
    small, _ = fit_images(board, GREY)
    assert int(small.min()) >= 120 and int(small.max()) <= 135


def test_shuffled_keeps_the_pixels_and_noise_does_not() -> None:
    inside = torch.randint(0, 256, (5, 3, 6, 8), dtype=torch.uint8)
    moved, _ = strange_images("shuffled", COLOUR, inside, "data", 5, 0)
    assert not torch.equal(moved, inside)

    def pixels(image: torch.Tensor) -> list[list[int]]:
        return sorted(image.flatten(1).T.tolist())

    assert all(pixels(a) == pixels(b) for a, b in zip(moved, inside, strict=True))
    noise, _ = strange_images("noise", COLOUR, inside, "data", 5, 0)
    assert noise.shape == inside.shape and noise.dtype == torch.uint8 and int(noise.max()) > 200
    assert torch.equal(noise, strange_images("noise", COLOUR, inside, "data", 5, 0)[0])
    assert not torch.equal(noise, strange_images("noise", COLOUR, inside, "data", 5, 1)[0])


def test_file_names_are_safe_and_differ() -> None:
    names = file_names(["mnist", "imagefolder:/a/b c/d.e", "imagefolder:/x/d.f", "npz:/q/$(x).npz"])
    assert names[0] == "ood-mnist.png" and len(set(names)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names)


def test_choose() -> None:
    assert choose(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    some = choose(100, 10, 3)
    assert len(set(some.tolist())) == 10 and some.tolist() == sorted(some.tolist())
