"""Tables and figure of what regularisers change, from records that are written by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import here, refused

from analysis.regularisers import MARKERS
from analysis.regularisers_figure import changes_figure
from analysis.regularisers_table import beyond_noise, changes, load, to_overview, to_tables
from pyro_isingvit.core.errors import UserError


def record(name: str, seed: int, nll: float = 0.5, method: str = "ising", machine: str = "a", **changes: Any) -> dict:
    trial = {
        "dataset": changes.pop("dataset", "made"), "train_size": 300, "flipped": changes.pop("flipped", 0.0),
        "method": method, "seed": seed, "regulariser": name, "sets": {},
        "epochs": 40, "settings": changes.pop("settings", {}),
    }  # fmt: skip
    scores = {"accuracy": 0.8, "nll": nll, "ece": 0.02, "corrupted_nll": 1.0, "prunable": 0.3, "seconds_per_step": 0.01}
    return {"trial": trial, "machine": machine, **scores, **changes}


RECORDS = [
    *(record("none", seed, 0.5 + 0.1 * seed) for seed in (0, 1, 2)),
    *(record("car:0.3", seed, 0.4 + 0.1 * seed + 0.001 * seed, seconds_per_step=0.02) for seed in (0, 1, 2)),
    record("vne:1", 0, 0.7, machine="b"), record("vne:1", 1, 0.7, machine="b", accuracy=0.85),
    record("none", 0, 0.6, "dropout"), record("car:0.3", 0, 0.5, "dropout"), record("car:0.3", 1, 0.5, "dropout"),
    {"trial": record("ps-kd:0.8", 0)["trial"], "refused": "no <b>"},
    {"trial": record("mixup:9", 1)["trial"], "error": "the loss became nan"},
    record("none", 0, 0.9, flipped=0.2), record("car:0.3", 0, 0.8, flipped=0.2),
]  # fmt: skip


def write(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    return load(write(tmp_path, *RECORDS) / "records.jsonl")


def test_changes_are_paired_by_seed(frame: pd.DataFrame) -> None:
    pairs = changes(frame)
    assert len(pairs) == 3 + 2 + 1 + 1  # what has no partner, was refused or diverged is left out
    car = pairs[(pairs.regulariser == "car:0.3") & (pairs.method == "ising") & (pairs.flipped == 0)]
    assert np.allclose(car.change_nll, [-0.1, -0.099, -0.098]) and np.allclose(car.change_step, 2.0)
    assert pairs[pairs.regulariser == "vne:1"].change_step.isna().all()  # of another machine: not to be compared


def test_tables_say_changes_seeds_and_what_failed(frame: pd.DataFrame) -> None:
    clean, table, notes, wrong, _ = to_tables(frame)
    assert clean == "### made, 300 images, 40 epochs"
    assert wrong == "### made, 300 images, 20% wrong labels, 40 epochs"
    _, _, bare, car, vne, *dropout = table.splitlines()
    assert bare == "| ising | `none` | 80.00 ± 0.00 | 0.6000 ± 0.1000 | 2.00 ± 0.00 | 1.000 ± 0.000 | 30 ± 0 | 1 | 3 |"
    assert car.startswith("| ising | `car:0.3` | +0.00 ± 0.00 | **-0.0990 ± 0.0010** |") and car.endswith(
        "| 2.00 | 3 |"
    )
    assert "| +2.50 ± 3.54 | +0.1500 ± 0.0707 |" in vne and vne.endswith("| - | 2 |")
    assert dropout[1].startswith("| dropout | `car:0.3` | +0.00 | -0.1000 |") and dropout[1].endswith("| 1 |")
    assert "`ps-kd:0.8` with ising, seed 0: refused: no _b_" in notes
    assert "`mixup:9` with ising, seed 1: diverged: the loss became nan" in notes
    assert "1 cells lack their partner" in notes


def test_the_overview_has_a_column_for_each_place_and_method(frame: pd.DataFrame) -> None:
    head, _, *rows = to_overview(frame).splitlines()
    clean, wrong = "made, 300 images, 40 epochs", "made, 300 images, 20% wrong labels, 40 epochs"
    assert head == f"| regulariser | dropout, {clean} | ising, {clean} | ising, {wrong} | better |"
    car = np.array([100 * (0.4 / 0.5 - 1), 100 * (0.501 / 0.6 - 1), 100 * (0.602 / 0.7 - 1)])
    mean, spread = car.mean(), car.std(ddof=1)
    assert rows[0] == f"| `car:0.3` | -16.7 | **{mean:.1f} ± {spread:.1f}** | -11.1 | 3 of 3 |"
    assert rows[1].startswith("| `vne:1` | - | +28.3 ±") and rows[1].endswith(" | - | 0 of 1 |") and len(rows) == 2


def test_one_place_needs_no_overview(tmp_path: Path) -> None:
    assert to_overview(load(write(tmp_path, *RECORDS[:4]) / "records.jsonl")) == ""


@pytest.mark.parametrize(
    ("values", "clear"), [([0.1], False), ([0.1, 0.2], False), ([0.1, 0.11, 0.12], True), ([0.1, 0.2, -0.1], False)]
)
def test_the_interval_is_students(values: list[float], clear: bool) -> None:
    assert beyond_noise(pd.Series(values)) == clear


def test_a_later_record_of_a_cell_replaces_an_earlier_one(tmp_path: Path) -> None:
    refusal = {"trial": record("car:0.3", 0)["trial"], "refused": "not yet"}
    frame = load(write(tmp_path, record("none", 0), refusal, record("car:0.3", 0, 0.4)) / "records.jsonl")
    assert changes(frame).change_nll.tolist() == pytest.approx([-0.1])


def test_unlike_settings_are_not_mixed(tmp_path: Path) -> None:
    path = write(tmp_path, record("none", 0), record("none", 0, settings={"lr": 1e-3})) / "records.jsonl"
    with pytest.raises(UserError, match=r"different settings for made, 300, .*, ising, none, 0"):
        load(path)


@pytest.mark.parametrize("damage", [{"nll": "low"}, {"trial": {"dataset": "made"}}])
def test_damaged_records(damage: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="damaged"):
        load(write(tmp_path, record("none", 0) | damage) / "records.jsonl")


def test_the_figure_has_every_panel(frame: pd.DataFrame) -> None:
    figure = changes_figure(changes(frame))
    axes = figure.axes
    assert [ax.get_xlabel() for ax in axes] == ["change in NLL"] * 2 + ["change in accuracy, points"] * 2
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["vne:1", "car:0.3"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["ising", "dropout"]
    dots = {float(np.ravel(line.get_xdata())[0]): line.get_markerfacecolor() for line in axes[0].lines[1:]
            if line.get_marker() == "o"}  # fmt: skip
    assert len(dots) == 3 and [face == "white" for x, face in sorted(dots.items())] == [True, False, True]


def test_far_away_is_an_arrow_at_the_edge(tmp_path: Path) -> None:
    names = [f"a{i}:1" for i in range(9)]
    some = [record("none", 0), *(record(name, 0, 0.51) for name in names), record("far:1", 0, 9.5)]
    ax = changes_figure(changes(load(write(tmp_path, *some) / "records.jsonl"))).axes[0]
    assert ax.get_xlim()[1] < 0.1 and [text.get_text().strip() for text in ax.texts] == ["+9"]


def test_the_script_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{MARKERS[0]}\n{MARKERS[1]}\nafter\n")
    shown = here("analysis.regularisers", "--results", write(tmp_path, *RECORDS), "--page", page)
    assert shown.returncode == 0, shown.stderr
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "](../changes.png)" in text
    assert (tmp_path / "changes.png").stat().st_size > 10_000 and "### made" in text
    assert text.index("### NLL on all data, change in %") < text.index("### made")
    again = here("analysis.regularisers", "--results", tmp_path, "--page", page)
    assert again.returncode == 0 and page.read_text() == text


def test_without_regularisers_there_is_no_figure(tmp_path: Path) -> None:
    shown = here("analysis.regularisers", "--results", write(tmp_path, record("none", 0)))
    assert shown.returncode == 0 and "`none`" in shown.stdout and not (tmp_path / "changes.png").exists()
    refused(here("analysis.regularisers", "--results", tmp_path / "nowhere"), "there is no", "--results")
    refused(here("analysis.regularisers", "--results", write(tmp_path)), "no finished cell")
