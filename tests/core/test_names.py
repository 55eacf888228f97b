"""Names from strangers: of files, classes, runs and data sets, in paths, tables, pages and terminals."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import EVIL, refuses
from PIL import Image

from analysis import comparison, comparison_figures, report
from analysis.comparison_tables import load_results
from analysis.strange import file_names
from inference import predict
from inference.cli import print_table
from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint
from pyro_isingvit.core.untrusted import csv_text, file_stem, plain, printable
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.load import load_data
from pyro_isingvit.pruning.shapes import CONFIG


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "..", ".", "", "a" * 999, "b\\c", EVIL, "\x1b[2J"])
def test_a_name_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / f"x-{file_stem(name)}.png"
    assert path.resolve().parent == tmp_path / "in" and len(path.name) < 100
    path.parent.mkdir()
    path.touch()
    assert not set(plain(name)) & set("<>&|$`\x1b\0")


def test_strange_images_stay_in_their_folder() -> None:
    names = file_names(["npz:../../x", "imagefolder:/a/../..", "npz:" + "y" * 999, "npz:a\0b"])
    assert all("/" not in name and "\0" not in name and len(name) < 120 and not name.startswith(".") for name in names)


@pytest.mark.parametrize(("text", "wanted"), [
    ("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"), ("-2+3", "'-2+3"),
    ("-1", "-1"), ("+2.5", "+2.5"), ("a=1", "a=1"), ("\tx", "'\tx"), ("cat/001.png", "cat/001.png"), ("", ""),
])  # fmt: skip
def test_formulas_are_written_as_text(text: str, wanted: str) -> None:
    assert csv_text(text) == wanted


NAMES = ('=HYPERLINK("http://x")', "[/b]", ":smile:", EVIL, "\x1b[2Jgone", "$x^{$", "a\u202eb", "名", "@x,y")


def test_predictions_of_files_and_classes_with_hostile_names(
    folder: Path,
    tmp_path: Path,
    capsys,
) -> None:
    """Written, printed and read back: no formula, no markup, no control character, no traceback."""
    state = load_checkpoint(folder / "checkpoint.pt")
    state["info"]["classes"] = ["=1+1", "[/b]", "\x1b[2J"]
    save_checkpoint(folder / "checkpoint.pt", state)
    images = tmp_path / "images"
    images.mkdir()
    for name in NAMES:
        Image.new("L", (4, 4)).save(images / f"{name.replace('/', '_')}.png")
    Image.new("L", (4, 4)).save(bytes(images) + b"/\xff.png")  # no Unicode at all
    predict.main(["--run", str(folder), "--input", str(images), "--samples", "2", "--out", str(tmp_path / "p.nc")])
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "[/b]" in shown
    rows = list(csv.reader(io.StringIO((tmp_path / "p.csv").read_text())))
    assert len(rows) == 2 + len(NAMES)
    for row in rows:
        assert not row[0].startswith(("=", "@", "+")) and not row[1].startswith("=")
        assert printable(row[0]) == row[0]


def test_tables_print_any_name(capsys) -> None:
    print_table("[/x] :smile:", {name: "[/y]\x1b[2J" for name in NAMES})
    shown = capsys.readouterr().out
    assert "[/b]" in shown and ":smile:" in shown and "\x1b[2J" not in shown and "\u202e" not in shown


def cells(**changes: object) -> list[dict]:
    scores = {"accuracy": 0.5, "nll": 1.0, "brier": 0.5, "ece": 0.1, "train_seconds": 3.0, "pruned_fraction": 0.0}
    cell = {"dataset": "digits", "train_size": 60, "seed": 0, "epochs": 2, "run": "r", "status": "done"}
    return [cell | {"method": method, "metrics": scores} | changes for method in ("ising", "deterministic")]


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "名"), "../../../x", "=1+1"])  # no such glyph
def test_comparison_with_hostile_names(name: str, tmp_path: Path, capsys) -> None:
    grid = tmp_path / "grid"
    grid.mkdir()
    (grid / "results.json").write_text(json.dumps(cells(dataset=name, run="../../outside")))
    comparison.main(["--results", str(grid)])
    capsys.readouterr()
    text = (grid / "table.md").read_text() + (grid / "table.csv").read_text()
    assert "<script" not in text and "\x1b" not in text and "\n=" not in text
    assert {path.parent for path in tmp_path.rglob("*.*")} == {grid}


@pytest.mark.parametrize("change", [
    {"train_size": "60"}, {"train_size": -1}, {"epochs": None}, {"metrics": 3}, {"metrics": {"accuracy": "high"}},
    {"dataset": 3},
], ids=str)  # fmt: skip
def test_comparison_of_damaged_results(change: dict, tmp_path: Path, capsys) -> None:
    (tmp_path / "results.json").write_text(json.dumps(cells(**change)))
    refuses(capsys, lambda: comparison.main(["--results", str(tmp_path)]), "results.json", "damaged")


def test_runs_outside_the_grid_are_not_read(tmp_path: Path, monkeypatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(Path, "is_file", lambda path: bool(seen.append(path)))
    (tmp_path / "r.json").write_text(json.dumps(cells(run="../../../outside")))
    monkeypatch.undo()
    frame = load_results(tmp_path / "r.json")
    monkeypatch.setattr(Path, "is_file", lambda path: bool(seen.append(path)))
    comparison_figures.load_predictions(tmp_path, frame)
    assert seen and all(path.parent.parent == tmp_path / "runs" for path in seen)


def test_the_page_of_a_compact_network_escapes_names(tmp_path: Path, capsys) -> None:
    from made import DENSE, FULL, block, point

    place = tmp_path / EVIL.replace("/", "_")
    place.mkdir()
    (place / CONFIG).write_text("{}")
    found = {
        "structure": [block(2, 4, 0.5)],
        "points": [point(0.5)],
        "full": FULL,
        "chosen": point(0.5),
        "dense": DENSE,
    }
    (place / "frontier.json").write_text(json.dumps(found))
    scores = {prefix + key: 0.5 for prefix in ("", "bayes_", "dense_", "full_") for key in (*FULL, "brier")}
    metrics = scores | {
        "dataset": EVIL, "run": EVIL, "granularity": EVIL, "peers": {EVIL: {"accuracy": 0.5}}, "samples": 3,
        "kept_fraction": 0.5, "macs_ratio": 2.0, "throughput_ratio": 2.0, "finetune_epochs": 0, "parameters": 5,
        "dense_parameters": 9, "macs": 5, "dense_macs": 9, "latency_1": 0.1, "dense_latency_1": 0.2,
        "latency_256": 0.1, "dense_latency_256": 0.2,
    }  # fmt: skip
    (place / "metrics.json").write_text(json.dumps(metrics))
    report.main(["--run", str(place)])
    page = (place / "report" / "index.html").read_text()
    assert "<script" not in page and "&lt;script" in page
    (place / "metrics.json").write_text(json.dumps(metrics | {"kept_fraction": None}))
    refuses(capsys, lambda: report.main(["--run", str(place)]), "metrics.json")


def test_class_folders_with_hostile_names(tmp_path: Path, capsys) -> None:
    for i, name in enumerate(("\x1b[2J", "=1+1", "$$", EVIL.replace("/", "_"))):
        (tmp_path / name).mkdir()
        for j in range(6):
            Image.fromarray(np.full((8, 8), 20 * i + j, np.uint8)).save(tmp_path / name / f"{j}.png")
    data = load_data(f"imagefolder:{tmp_path}")
    assert set(data.info.classes) == {"\\x1b[2J", "=1+1", "$$", "<script>alert(1)<_script>"}
    assert all(printable(name) == name for name in (*data.info.classes, *data.train.names))
    assert DataInfo.from_dict(json.loads(json.dumps(data.info.to_dict()))) == data.info
