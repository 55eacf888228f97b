"""inference.predict with --out NAME.parquet or NAME.csv, and the page about it."""

import csv
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from forks import ROOT, start
from helpers import here, refused, script
from PIL import Image

from inference.predict_stream import StreamArguments
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data.load import load_data
from pyro_isingvit.experiment import fit
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.trained import load_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits as files in class folders."""
    folder, test = tmp_path_factory.mktemp("stream") / "digits", load_data("digits").test
    for i, image in enumerate(test.images[:100].numpy()):
        place = folder / str(int(test.labels[i]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Ising run that is right more often than not, with 400 digits for validation."""
    folder = tmp_path_factory.mktemp("stream") / "run"
    data, shape = load_data("digits", train_size=900, val_fraction=0.45, seed=3), ViTConfig(2, 32, 4, 1)
    trained = fit(shape, data, epochs=8, max_keep=0.95, seed=3, samples=6, device="cpu", progress=False)
    trained.evaluate(data)
    return trained.save(folder)


def predict(run: Path, given: object, out: Path, *flags: object) -> tuple[str, list[dict[str, str]]]:
    result = here("inference.predict", "--run", run, "--input", given, "--out", out, "--device", "cpu", *flags)
    assert result.returncode == 0, result.stderr
    if out.suffix == ".parquet":
        rows = [{name: str(value) for name, value in row.items()} for row in pq.read_table(out).to_pylist()]
    else:
        rows = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    return result.stdout, rows


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_table_is_that_of_the_tree(run: Path, digits: Path, tmp_path: Path, suffix: str) -> None:
    flags = ["--coverage", 0.9, "--max-error", 0.2]
    whole, before = predict(run, digits, tmp_path / "n.nc", *flags)
    shown, after = predict(run, digits, tmp_path / f"s{suffix}", *flags, "--part", 30)
    assert [row["file"] for row in after] == [row["file"] for row in before] and len(after) == 100
    assert list(after[0]) == [*list(before[0])[:7], "draws", "mc_error", *list(before[0])[7:]]
    for old, new in zip(before, after, strict=True):
        assert {name: old[name] for name in ("class", "set", "set_size", "decision")} == {
            name: new[name] for name in ("class", "set", "set_size", "decision")
        }
        for name in ("probability", "p05", "p95", "entropy", "mutual_information"):
            assert float(new[name]) == pytest.approx(float(old[name]), abs=2e-5)
        assert new["draws"] == "6" and float(new["mc_error"]) > 0
    for words in ("accuracy", "sets that hold the label", "errors among the accepted", "images a second"):
        assert words in shown, words
    same = [line for line in whole.splitlines() if line.startswith(("│ accuracy ", "│ sets that hold"))]
    assert len(same) == 2
    same += [line for line in whole.splitlines() if line.startswith(("│ balanced acc", "│ ECE", "│ accepted above"))]
    assert len(same) == 5
    for line in same:
        assert " ".join(line.split()) in " ".join(shown.split())


def test_a_given_prevalence(run: Path, digits: Path, tmp_path: Path) -> None:
    whole, before = predict(run, digits, tmp_path / "n.nc", "--prevalence", "8=0.9", "--samples", 7)
    shown, after = predict(run, digits, tmp_path / "s.csv", "--prevalence", "8=0.9", "--samples", 7, "--part", 30)
    shares = [line for line in whole.splitlines() if " -> 0.900 " in line]
    assert len(shares) == 1 and shares[0] in shown
    assert [row["class"] for row in after] == [row["class"] for row in before]
    for old, new in zip(before, after, strict=True):
        assert float(new["probability"]) == pytest.approx(float(old["probability"]), abs=2e-5)
        assert "mc_error" not in new


def test_where_no_image_may_stand_both_say_what_would_help(run: Path, digits: Path, tmp_path: Path) -> None:
    flags = ["--max-error", 0.001]
    whole, _ = predict(run, digits, tmp_path / "n.nc", *flags)
    shown, rows = predict(run, digits, tmp_path / "s.csv", *flags)
    told = [line for line in whole.splitlines() if line.startswith("no threshold keeps the errors below 0.001")]
    assert len(told) == 1 and told[0] in shown.splitlines() and {row["decision"] for row in rows} == {"human"}


@pytest.mark.parametrize("name", ["n.nc", "s.csv"])
def test_a_table_with_other_names_of_columns(run: Path, digits: Path, tmp_path: Path, name: str) -> None:
    files = sorted(digits.rglob("*.png"))[:10]
    for i, file in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(file.read_bytes())
    lines = ["picture,finding", *(f"{i}.png,{file.parent.name}" for i, file in enumerate(files))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    given, columns = f"csv:{tmp_path / 'table.csv'}", ["--columns", "path=picture,label=finding"]
    shown, rows = predict(run, given, tmp_path / name, "--samples", 2, *columns)
    assert len(rows) == 10 and "accuracy" in shown
    words = ["--run", run, "--out", tmp_path / f"x{name}", "--input"]
    typo = here("inference.predict", *words, given, "--columns", "path=picture,label=fnding")
    refused(typo, "has no column 'fnding'", "picture, finding")
    refused(here("inference.predict", *words, given), "has no column 'path'", "--columns")
    refused(here("inference.predict", *words, digits, *columns), "--columns", "csv:FILE")


def test_auto_draws_less_where_the_answer_is_settled(run: Path, digits: Path, tmp_path: Path) -> None:
    flags = ["--samples", "auto", "--mc-error", 0.06, "--max-samples", 300, "--all-classes"]
    shown, rows = predict(run, digits, tmp_path / "s.parquet", *flags)
    draws, errors = (np.array([float(row[name]) for row in rows]) for name in ("draws", "mc_error"))
    assert len(set(draws)) > 2 and draws.min() == 16 and draws.max() <= 300
    assert (errors[draws < 300] <= 0.06).all() and "draws of an image, mean" in shown
    probs = np.array([[float(row[f"prob_{c}"]) for c in range(10)] for row in rows])
    assert np.allclose(probs.sum(1), 1, atol=1e-4)
    assert np.allclose(probs.max(1), [float(row["probability"]) for row in rows], atol=1e-6)


def test_auto_says_which_images_are_not_settled(run: Path, digits: Path, tmp_path: Path) -> None:
    flags = ["--samples", "auto", "--mc-error", 0.005, "--max-samples", 16]
    shown, rows = predict(run, digits, tmp_path / "s.csv", *flags)
    over = sum(float(row["mc_error"]) > 0.005 for row in rows)
    assert over > 0 and f"{over} images were not settled after all draws" in shown


def test_unreadable_images_are_told_of(run: Path, digits: Path, tmp_path: Path) -> None:
    bad = digits / "0" / "bad.png"
    bad.write_bytes(b"nothing")
    try:
        shown, rows = predict(run, digits, tmp_path / "s.csv", "--samples", 2)
        refused(
            here("inference.predict", "--run", run, "--input", digits, "--out", tmp_path / "n.nc", "--samples", 2),
            "bad.png",
        )
        alone = tmp_path / "alone"
        alone.mkdir()
        (alone / "bad.png").write_bytes(b"nothing")
        result = here("inference.predict", "--run", run, "--input", alone, "--out", tmp_path / "x.csv")
    finally:
        bad.unlink()
    assert len(rows) == 100 and "1 images could not be read; they are listed in" in shown
    assert (tmp_path / "s.csv.unreadable.csv").read_text().splitlines()[1].startswith("0/bad.png,cannot identify")
    refused(result, "1 of 1 images cannot be read", "--max-unreadable")
    assert not (tmp_path / "x.csv").exists()


def test_parts_that_rest_on_another_validation_part_are_not_mixed_in(run: Path, digits: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    words = ["--run", own, "--input", digits, "--out", tmp_path / "s.csv", "--device", "cpu", "--coverage", 0.9,
             "--part", 30]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_isingvit.runs.parts.Parts.finish", interrupted)
        assert here("inference.predict", *words).returncode == 130
    assert (tmp_path / "s.csv.parts").is_dir()
    trained, test = load_run(own), load_data("digits").test
    trained.evaluate(test, val=(test.images[:50], test.labels[:50]))
    trained.save(own, overwrite=True)
    refused(here("inference.predict", *words), "validation")
    assert here("inference.predict", *words, "--overwrite").returncode == 0


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_terminated_and_called_again(run: Path, digits: Path, tmp_path: Path) -> None:
    words = ["--run", run, "--input", digits, "--out", tmp_path / "s.csv", "--device", "cpu", "--samples", 100,
             "--part", 5]  # fmt: skip
    process, limit = start("inference.predict", *words), time.monotonic() + 60
    while not (tmp_path / "s.csv.parts" / "part-000001.json").exists() and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill(process.child, signal.SIGTERM)
    stopped = process.wait()
    assert stopped.returncode == 143 and "run the same command again to go on" in stopped.stderr
    again = script("inference.predict", *words)
    assert again.returncode == 0 and "of these, predicted before" in again.stdout, again.stderr
    assert script("inference.predict", *words).returncode == 2  # it is there
    predict(run, digits, tmp_path / "w.csv", "--samples", 100, "--part", 5)
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "w.csv").read_bytes()


@pytest.mark.parametrize(
    ("out", "flags", "words"),
    [
        ("p.nc", ["--samples", "auto"], ["--samples auto is for --out NAME.parquet or NAME.csv"]),
        ("p.nc", ["--all-classes"], ["--all-classes is for --out NAME.parquet or NAME.csv"]),
        ("p.nc", ["--part", 7], ["--part is for"]),
        ("p.txt", [], [".nc, .parquet or .csv"]),
        ("p.csv", ["--mc-error", 0.1], ["--mc-error belongs to --samples auto"]),
        ("p.csv", ["--max-samples", 100], ["--max-samples belongs to --samples auto"]),
        ("p.csv", ["--samples", "auto", "--mc-error", 0], ["--mc-error must lie in (0, 1)"]),
        ("p.csv", ["--samples", "auto", "--max-samples", 3], ["--max-samples must be at least 16"]),
        ("p.csv", ["--samples", "auto", "--coverage", 0.9], ["--coverage", "--max-error", "--samples auto out"]),
        ("p.csv", ["--samples", "auto", "--max-error", 0.1], ["--samples auto out"]),
        ("p.csv", ["--samples", "auto", "--prevalence", "8=0.5"], ["--prevalence", "give a number"]),
        ("p.csv", ["--prevalence", "estimate"], ["--prevalence estimate", "--out NAME.nc"]),
        ("p.csv", ["--part", 0], ["--part must be at least 1"]),
        ("p.csv", ["--max-unreadable", 1], ["--max-unreadable must lie in [0, 1)"]),
        ("p.csv", ["--coverage", 0.9, "--samples", 7], ["6 draws from seed 3"]),
        ("none/x/p.csv", ["--samples", 0], ["--samples (0)"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(run: Path, digits: Path, tmp_path: Path, out, flags, words) -> None:
    given = ["--run", run, "--input", digits, "--out", tmp_path / out, "--device", "cpu"]
    refused(here("inference.predict", *given, *flags), *words)
    assert not [*tmp_path.iterdir()]


def test_other_inputs(run: Path, tmp_path: Path) -> None:
    """A data set is read as before, and streamed from memory."""
    _, rows = predict(run, "digits", tmp_path / "s.csv", "--samples", 3, "--part", 100)
    predict(run, "digits", tmp_path / "n.nc", "--samples", 3)
    mean = load_datatree(tmp_path / "n.nc")["predictive_summary"]["prob_mean"].values
    assert np.allclose([float(row["probability"]) for row in rows], mean.max(1), atol=2e-5) and len(rows) == 360


PAGE = (ROOT / "docs" / "predicting.md").read_text()


@pytest.mark.parametrize("line", [line for line in PAGE.splitlines() if line.startswith("python -m inference.predict")])
def test_the_commands_of_the_page_run(run: Path, digits: Path, tmp_path: Path, monkeypatch, line: str) -> None:
    words = [{"runs/mine": str(run), "FOLDER": str(digits)}.get(word, word) for word in line.split()[3:]]
    monkeypatch.chdir(tmp_path)
    result = here("inference.predict", *words, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / words[words.index("--out") + 1]).is_file()


def test_the_example_of_the_page_runs(run: Path, digits: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("runs/mine", str(run)).replace("FOLDER", str(digits)), "predicting.md", "exec"), {})
    images, unreadable, draws = capsys.readouterr().out.split()
    assert (images, unreadable) == ("100", "0") and float(draws) > 16 and (tmp_path / "predictions.csv").is_file()


def test_the_page_names_every_flag() -> None:
    for name in StreamArguments.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in PAGE
