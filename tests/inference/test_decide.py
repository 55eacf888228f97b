"""What predict.py decides: prevalences, sets, and what is for a human; and what it refuses."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, here, refused

from inference.decide import read_shares
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data.load import load_data
from pyro_isingvit.experiment import fit
from pyro_isingvit.predictive.datatree import load_datatree

CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is right more often than not, with 400 digits for validation."""
    folder = tmp_path_factory.mktemp("decide") / "run"
    data, shape = load_data("digits", train_size=900, val_fraction=0.45, seed=3), ViTConfig(2, 32, 4, 1)
    trained = fit(shape, data, method="dropout", epochs=8, seed=3, samples=5, device="cpu", progress=False)
    trained.evaluate(data)
    return trained.save(folder)


def predict(run: Path, out: Path, *flags: object) -> tuple[str, list[dict[str, str]], object]:
    result = here("inference.predict", "--run", run, "--input", "digits", "--out", out, "--device", "cpu", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout, list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines())), load_datatree(out)


def test_sets_and_decisions(run: Path, tmp_path: Path) -> None:
    shown, rows, tree = predict(run, tmp_path / "p.nc", "--coverage", 0.9, "--max-error", 0.08, "--certainty", 0.9)
    summary = tree["predictive_summary"]
    held, labels = summary["in_set"].values, summary["y"].values
    assert held[np.arange(len(labels)), labels].mean() > 0.85
    assert summary["in_set"].attrs["coverage"] == 0.9 and summary["in_set"].attrs["classwise"] == 0
    names = load_data("digits").info.classes
    for row, each, stands in zip(rows, held, summary["accepted"].values, strict=True):
        assert row["set"].split("|") == [name for name, inside in zip(names, each, strict=True) if inside]
        assert row["class"] in row["set"].split("|") and int(row["set_size"]) == each.sum() >= 1
        assert row["decision"] == ("accept" if stands else "human")
    assert 0 < summary["accepted"].values.mean() < 1
    top = summary["prob_mean"].values.max(1)
    assert np.array_equal(summary["accepted"].values, top > summary["accepted"].attrs["threshold"])
    for words in ("mean size of the sets", "for a human", "errors among the accepted"):
        assert words in shown
    assert tree.attrs["num_samples"] == 5


def test_another_prevalence(run: Path, tmp_path: Path) -> None:
    _, before, _ = predict(run, tmp_path / "b.nc", "--samples", 5, "--seed", 3)
    shown, rows, tree = predict(run, tmp_path / "p.nc", "--samples", 5, "--seed", 3, "--prevalence", "8=0.9")
    counts = [sum(row["class"] == "8" for row in each) for each in (before, rows)]
    assert counts[1] > 1.5 * counts[0] and "prevalence" in shown
    shares = np.array(json.loads(tree.attrs["prevalence"]))
    prior = np.array(json.loads(tree.attrs["prior"]))
    assert shares[8] == pytest.approx(0.9) and shares.sum() == pytest.approx(1, abs=1e-4)
    assert shares[0] / shares[1] == pytest.approx(prior[0] / prior[1], rel=1e-3)
    drawn = tree["posterior_predictive"]
    mean = (drawn["probs"] * drawn["weight"]).sum("sample").values
    assert np.allclose(mean, tree["predictive_summary"]["prob_mean"].values, atol=1e-6)
    old = load_datatree(tmp_path / "b.nc")["predictive_summary"]["prob_mean"].values
    expected = old * shares / prior
    assert np.allclose(mean, expected / expected.sum(1, keepdims=True), atol=1e-4)


def test_an_estimated_prevalence_with_class_wise_sets(run: Path, tmp_path: Path) -> None:
    labels = load_data("digits").test.labels.numpy()
    rare = np.flatnonzero((labels == 1) | (np.arange(len(labels)) % 5 == 0))
    images = load_data("digits").test.images[:][rare].numpy()[:, 0]
    np.savez(tmp_path / "x.npz", images=images, labels=labels[rare])
    flags = ["--input", tmp_path / "x.npz", "--prevalence", "estimate", "--coverage", 0.9, "--classwise"]
    shown, _, tree = predict(run, tmp_path / "p.nc", *flags)
    found, low, high = (json.loads(tree.attrs[name]) for name in ("prevalence", "prevalence_low", "prevalence_high"))
    assert abs(found[1] - (labels[rare] == 1).mean()) < 0.12 and low[1] <= found[1] <= high[1]
    assert "estimated, 95% intervals" in shown
    assert tree["predictive_summary"]["in_set"].attrs["classwise"] == 1


def test_where_no_limit_can_be_kept_all_images_are_for_a_human(run: Path, tmp_path: Path) -> None:
    shown, rows, _ = predict(run, tmp_path / "p.nc", "--max-error", 0.0001)
    assert {row["decision"] for row in rows} == {"human"}
    assert "every image is for a human" in shown


def test_without_decisions_nothing_is_added(run: Path, tmp_path: Path) -> None:
    _, rows, tree = predict(run, tmp_path / "p.nc", "--samples", 3)
    assert list(rows[0]) == ["file", "class", "probability", "p05", "p95", "entropy", "mutual_information"]
    assert "in_set" not in tree["predictive_summary"] and "weight" not in tree["posterior_predictive"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coverage", 1.2], ["--coverage must lie in (0, 1)"]),
        (["--max-error", 0], ["--max-error must lie in (0, 1)"]),
        (["--max-error", 0.1, "--certainty", 1], ["--certainty must lie in (0, 1)"]),
        (["--classwise"], ["--classwise belongs to --coverage"]),
        (["--certainty", 0.9], ["--certainty belongs to --max-error"]),
        (["--prevalence", "estimate", "--coverage", 0.9], ["--classwise"]),
        (["--prevalence", "estimate", "--max-error", 0.1], ["--max-error", "--prevalence"]),
        (["--training-prevalence", "0.5,0.5"], ["--training-prevalence belongs to --prevalence"]),
        (["--coverage", 0.9, "--samples", 7], ["5 draws from seed 3", "--samples", "--seed"]),
        (["--coverage", 0.9, "--seed", 4], ["5 draws from seed 3"]),
        (["--coverage", 0.999], ["needs 1000 validation images"]),
        (["--coverage", 0.995, "--classwise"], ["needs 200 validation images of each", "class 0 has"]),
        (["--prevalence", "0.5,0.5"], ["--prevalence needs a share for each of 10 classes"]),
        (["--prevalence", "8=0.9", "--training-prevalence", "8=0.1"], ["--training-prevalence must name every class"]),
        (
            ["--prevalence", "8=0.9", "--training-prevalence", "0,0.2" + ",0.1" * 8],
            ["the class 0 has no share in --training-prevalence"],
        ),
    ],
)
def test_what_cannot_be_is_refused(run: Path, tmp_path: Path, flags: list[object], words: list[str]) -> None:
    for name in ("p.nc",) if "estimate" in flags else ("p.nc", "p.csv"):
        out = ["--run", run, "--input", "digits", "--out", tmp_path / name, "--device", "cpu"]
        refused(here("inference.predict", *out, *flags), *words)
        assert not [*tmp_path.iterdir()]


PAGE = (ROOT / "docs" / "decisions.md").read_text()


@pytest.mark.parametrize(
    "line", [line for line in PAGE.splitlines() if "inference.predict" in line and "python" in line]
)
def test_the_commands_of_the_page_run(run: Path, tmp_path: Path, line: str) -> None:
    words = line.split()[3:]
    changed = {"runs/mine": str(run), "FOLDER": "digits", "sick=0.02": "8=0.02"}
    shown, _, _ = predict(run, tmp_path / "p.nc", *(changed.get(word, word) for word in words))
    assert "decisions" in shown or "prevalence" in shown


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(code, "decisions.md", "exec"), {})
    assert "torch.Size([360, 10]) torch.Size([360]) torch.Size([360, 10])" in capsys.readouterr().out


def test_shares_in_words() -> None:
    prior = np.array([0.5, 0.3, 0.2])
    assert read_shares("0.2, 0.3,0.5", CLASSES, "prevalence").tolist() == [0.2, 0.3, 0.5]
    assert read_shares("c=0.6", CLASSES, "prevalence", prior) == pytest.approx([0.25, 0.15, 0.6])
    assert read_shares("c=0,a=1", CLASSES, "prevalence", prior).tolist() == [1, 0, 0]
    assert read_shares("0.333,0.333,0.333", CLASSES, "prevalence") == pytest.approx([1 / 3] * 3)
    for text, words in {
        "20,30,50": "sum to 1, not 100", "a=0.5,0.5": "not a mixture", "x=0.5": "does not have; it has a, b, c",
        "a=0.5,a=0.5": "twice", "a=many": "numbers such as", "": "numbers such as", "a=1.5": "more than 1",
        "a=-0.5": "sum", "0.5,nan,0.5": "at least 0", "1e999,0,0": "at least 0", "0.1,0.9": "each of 3",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_shares(text, CLASSES, "prevalence", prior)
    with pytest.raises(UserError, match="must name every class"):
        read_shares("a=0.5", CLASSES, "prevalence")


@pytest.mark.parametrize("shares", ["0.5,0.5", "0=nan", "nobody=0.5"])
def test_wrong_shares_are_said_before_anything_is_drawn(run: Path, tmp_path: Path, shares: str, monkeypatch) -> None:
    monkeypatch.setattr("pyro_isingvit.runs.predict.draw_predictive", lambda *_, **__: pytest.fail("too late"))
    out = ["--run", run, "--input", "digits", "--out", tmp_path / "p.nc", "--device", "cpu"]
    refused(here("inference.predict", *out, "--prevalence", shares), "--prevalence")
