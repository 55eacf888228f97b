"""``analysis.corruptions`` as a user runs it, on a tiny run, and what each corruption does to an image."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import here
from PIL import Image

from analysis.corruptions import main
from inference.spoil import CORRUPTIONS, METRICS, corrupt
from pyro_isingvit.core.errors import UserError

SHAPES = [(1, 8, 8), (3, 32, 32), (1, 28, 20)]


@pytest.fixture(autouse=True)
def quiet(caplog) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.fixture(scope="module")
def run(digits_run: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "first"))


def made(shape: tuple[int, int, int], count: int = 6) -> torch.Tensor:
    """A bright rectangle, off the centre, on a dark ground."""
    images = torch.full((count, *shape), 20, dtype=torch.uint8)
    images[..., shape[1] // 4 : 3 * shape[1] // 4, shape[2] // 4 : shape[2] // 2] = 220
    return images


def test_two_runs(run: Path, tmp_path: Path, capsys) -> None:
    second = shutil.copytree(run, tmp_path / "second")
    out = tmp_path / "o"
    main(["--run", str(run), str(second), "--out", str(out), "--samples", "2", "--max-images", "40", "--device", "cpu"])
    results = json.loads((out / "corruptions" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["images"] == 40 and set(results["runs"]) == {"first", "second"}
    found = results["runs"]["first"]
    assert found == results["runs"]["second"]  # a copy of the same run
    assert set(found["corrupted"]) == set(CORRUPTIONS) == set(results["severities"])
    assert all(len(by[metric]) == 5 for by in found["corrupted"].values() for metric in METRICS)
    every = [x for by in found["corrupted"].values() for x in by["nll"]]
    assert found["mean"]["nll"] == pytest.approx(sum(every) / 25)
    for name in ("corruptions.png", "examples.png"):
        with Image.open(out / "corruptions" / name) as image:
            assert image.size[0] > 800
    shown = capsys.readouterr().out
    assert "occlusion" in shown and "clean" in shown and "second" in shown
    assert not (run / "corruptions").exists()


def test_the_clean_value_is_that_of_the_evaluation_and_runs_repeat(run: Path) -> None:
    written = []
    for _ in range(2):
        main(["--run", str(run), "--samples", "5", "--seed", "3", "--device", "cpu"])
        written.append((run / "corruptions" / "results.json").read_text())
    assert written[0] == written[1]
    metrics, clean = json.loads((run / "metrics.json").read_text()), json.loads(written[0])["runs"]["first"]["clean"]
    assert clean == {name: pytest.approx(metrics[name], abs=1e-6) for name in METRICS}


def test_bad_input_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, word in [
        (["--run", tmp_path / "gone"], "no run folder"),
        (["--run", tmp_path / "empty"], "holds no run"),
        (["--run", run, "--samples", 0], "samples"),
        (["--run", run, "--max-images", 0], "max-images"),
        (["--run", run, "--nope"], "nope"),
        ([], "--run"),
    ]:
        result = here("analysis.corruptions", *arguments, "--out", tmp_path / "o")
        error = result.stdout + result.stderr
        assert result.returncode == 2 and word in error and "Traceback" not in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_grow_and_seeds_repeat(name: str, shape: tuple[int, int, int]) -> None:
    images, before = made(shape), torch.random.get_rng_state()
    spoilt = [corrupt(images, name, severity, seed=1) for severity in range(1, 6)]
    assert torch.equal(torch.random.get_rng_state(), before)
    for image in spoilt:
        assert image.shape == images.shape and image.dtype == torch.uint8
    change = [float((image.float() - images.float()).abs().mean()) for image in spoilt]
    assert 0 < change[0] < change[2] < change[4]
    assert torch.equal(spoilt[2], corrupt(images, name, 3, seed=1))
    assert torch.equal(images, made(shape))  # the original is as it was
    if name in {"noise", "rotation", "occlusion"}:
        assert any(not torch.equal(spoilt[2], corrupt(images, name, 3, seed=seed)) for seed in range(2, 6))


def test_noise_has_the_standard_deviation_it_says() -> None:
    images = torch.full((20, 1, 28, 28), 128, dtype=torch.uint8)
    for severity in (1, 3):
        spoilt = corrupt(images, "noise", severity).float() / 255
        assert float(spoilt.std()) == pytest.approx(CORRUPTIONS["noise"].values[severity - 1], rel=0.03)


def test_blur_keeps_the_mean_of_a_flat_image_and_spreads_a_point() -> None:
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(corrupt(flat, "blur", 5), flat)
    point = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    point[0, 0, 16, 16] = 255
    spread = [corrupt(point, "blur", severity)[0, 0].float() for severity in (1, 2)]
    assert spread[0][16, 16] > spread[1][16, 16] > 0


def test_contrast_scales_the_distances_to_the_mean() -> None:
    images = torch.tensor([0, 100, 100, 200], dtype=torch.uint8).view(1, 1, 2, 2)
    assert corrupt(images, "contrast", 2).flatten().tolist() == [50, 100, 100, 150]


def test_rotation_goes_both_ways_and_fills_with_the_background() -> None:
    images = made((1, 28, 28), 40)
    spoilt = corrupt(images, "rotation", 4)
    kinds = {tuple(image.flatten().tolist()) for image in spoilt}
    assert len(kinds) == 2 and set(spoilt[:, 0, 0, 0].tolist()) == {20}


def test_occlusion_hides_a_square_of_the_stated_side() -> None:
    images = torch.randint(100, 256, (30, 3, 32, 32), dtype=torch.uint8)
    images[..., :20] = 0  # the median
    images[..., 20:] += 1
    side = round(CORRUPTIONS["occlusion"].values[2] * 32)
    for image, spoilt in zip(images, corrupt(images, "occlusion", 3), strict=True):
        hidden = (image != spoilt).any(0)
        rows, columns = hidden.any(1).sum(), hidden.any(0).sum()
        assert int(rows) in (0, side) and int(columns) <= side
        assert int(spoilt[:, hidden].sum()) == 0


@pytest.mark.parametrize(("name", "severity"), [("nope", 1), ("blur", 0), ("blur", 6)])
def test_unknown_corruptions_are_refused(name: str, severity: int) -> None:
    with pytest.raises(UserError):
        corrupt(made((1, 8, 8)), name, severity)
