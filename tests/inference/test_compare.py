"""A small grid from end to end, resumed, with a failing cell; its tables against NumPy; the README's table."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, here, refused, script
from kills import untimed
from scipy import stats

from analysis.comparison_figures import differences, gaps
from analysis.comparison_tables import (
    MARKERS,
    SHOWN,
    against_best,
    against_ensemble,
    load_results,
    markdown,
    page_tables,
    short_table,
    write_between,
)
from analysis.grid_settings import unequal
from inference.compare import (
    Cell,
    CompareArguments,
    _record,
    _set_aside,
    finished,
    main,
    make_cells,
    method_config,
    recorded,
    run_cell,
    run_grid,
    sibling,
)
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.settings import DataConfig, RunConfig, ViTConfig
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT

GRID = ["--dataset", "digits", "--methods", "ising", "deterministic", "temperature", "ensemble:2", "--train-sizes", 60,
        "--seeds", 0, 1, "--epochs", 2, "--samples", 3, "--depth", 1, "--width", 16, "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grids") / "g"
    result = script("inference.compare", *GRID, "--jobs", 2, "--out", folder)
    assert result.returncode == 0, result.stderr
    assert "8 cells done, 0 failed" in result.stdout
    return folder


def test_results_have_every_cell_with_the_metrics_of_its_run(grid: Path) -> None:
    cells = json.loads((grid / "results.json").read_text())
    assert {(c["method"], c["seed"]) for c in cells} == {
        (m, s) for m in ("ising", "deterministic", "temperature", "ensemble:2") for s in (0, 1)
    }
    for cell in cells:
        assert cell["dataset"] == "digits" and cell["train_size"] == 60 and cell["status"] == "done"
        metrics = json.loads((grid / "runs" / cell["run"] / "metrics.json").read_text())
        assert cell["metrics"] == {k: v for k, v in metrics.items() if k not in ("intervals", "by_class")}
    by = {(c["method"], c["seed"]): c["metrics"] for c in cells}
    assert by["deterministic", 0]["accuracy"] == by["temperature", 0]["accuracy"]  # the very same weights
    costs = {method: by[method, 0]["macs"] for method in ("ising", "deterministic", "ensemble:2")}
    assert costs["ensemble:2"] == 2 * costs["deterministic"] and costs["ising"] <= costs["deterministic"]
    assert by["ensemble:2", 0]["samples"] == 2 and by["deterministic", 1]["samples"] == 1


def test_tables_and_figures_are_there(grid: Path) -> None:
    rows = list(csv.DictReader((grid / "table.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(row["accuracy_count"] == "2" for row in rows)
    text = (grid / "table.md").read_text()
    assert "| ising |" in text and "against the best other single network" in text and "against the ensemble" in text
    names = {path.stem for path in grid.glob("*.png")}
    assert names == {"accuracy-nll", "differences", "pruned-accuracy", "reliability-digits-n60", "entropy-digits-n60"}


def test_a_second_call_trains_nothing_and_a_killed_grid_goes_on(grid: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in grid.glob("runs/*/metrics.json")}
    lost = next(path for path in kept if "-ising-s1" in str(path))
    before = json.loads(lost.read_text())
    lost.unlink()  # as if killed before the end
    (grid / "results.json").unlink()
    result = script("inference.compare", *GRID, "--out", grid)
    assert result.returncode == 0 and "8 cells, 7 of them done already" in result.stderr, result.stderr
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path]} == {lost}
    after = json.loads(lost.read_text())
    nested = ("intervals", "by_class")
    assert {name: after.pop(name) for name in nested} == {name: before.pop(name) for name in nested}
    assert untimed(after) == pytest.approx(untimed(before))


def test_a_grid_starts_from_a_trained_network(tmp_path: Path) -> None:
    """Its shape is that of the start, and a finished cell is found again by its folder alone."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(patch_size=4, width=16, heads=2, depth=1, mlp_ratio=2), 1, 8, 8, classes=2)
    scale = Scale(None, (), (), (0.3,), (0.4,))
    Start.of(vit, vit.initial_weights(), scale, "made").save(tmp_path / "start.safetensors")
    arguments = CompareArguments(
        tmp_path / "grid", ("deterministic",), (100,), (0,), (1,), init=str(tmp_path / "start.safetensors"),
        samples=2, device="cpu",
    )  # fmt: skip
    (cell,) = make_cells(arguments)
    assert cell.config.train.layer_decay < 1
    metrics = run_cell(cell, 1)
    assert json.loads((cell.folder / "config.json").read_text())["vit"]["width"] == 16
    assert finished(cell) == json.loads((cell.folder / "metrics.json").read_text()) and metrics["accuracy"] > 0
    (fresh,) = make_cells(replace(arguments, init=None))
    assert finished(fresh) is None


def test_a_failed_cell_is_reported_and_the_rest_runs(tmp_path: Path) -> None:
    small = ["--dataset", "digits", "--methods", "deterministic", "--seeds", 0, "--epochs", 1, "--depth", 1,
             "--width", 16, "--samples", 1, "--device", "cpu", "--out", tmp_path]  # fmt: skip
    result = script("inference.compare", *small, "--train-sizes", 100_000, 60)
    refused(result, "1 cells failed", "train_size must be between")
    cells = {c["train_size"]: c for c in json.loads((tmp_path / "results.json").read_text())}
    assert cells[60]["status"] == "done" and cells[100_000]["status"] == "failed"
    assert "train_size" in cells[100_000]["error"] and "metrics" not in cells[100_000]


def test_data_that_are_missing_end_the_grid_before_any_cell(tmp_path: Path) -> None:
    gone = ["--dataset", f"npz:{tmp_path / 'gone.npz'}", "--device", "cpu", "--out", tmp_path / "grid"]
    for more in ([], ["--regularisers", "all"]):
        result = here("inference.compare", *gone, *more)
        refused(result, "gone.npz")
        assert "failed" not in result.stderr and not (tmp_path / "grid" / "results.json").exists()


def small_cells(out: Path, *methods: str, seeds: tuple[int, ...] = (0,), **changes: object):
    data = DataConfig("digits")
    return make_cells(CompareArguments(out, methods, (60,), seeds, (1,), depth=1, width=16, device="cpu", samples=2,
                                       data=data, **changes))  # type: ignore[arg-type]  # fmt: skip


def as_if_finished(folder: Path, config: RunConfig) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.derived_from])
def test_a_sibling_is_found_by_its_settings(method: str, tmp_path: Path) -> None:
    plain, derived = small_cells(tmp_path, "deterministic", method)
    assert sibling(derived) is None  # nothing is trained yet
    for name, changes in {
        "another-seed": {"train": replace(plain.config.train, seed=1)},
        "another-size": {"data": replace(plain.config.data, train_size=61)},
        "another-shape": {"vit": replace(plain.config.vit, depth=2)},
        "another-rate": {"train": replace(plain.config.train, lr=1e-4)},
        "another-method": {"method": "dropconnect"},
    }.items():
        as_if_finished(derived.folder.parent / name, replace(plain.config, **changes))
    (as_if_finished(derived.folder.parent / "damaged", plain.config) / "config.json").write_text("{")
    (as_if_finished(derived.folder.parent / "unfinished", plain.config) / "metrics.json").unlink()
    assert sibling(derived) is None
    found = as_if_finished(derived.folder.parent / "copied from elsewhere", plain.config)
    assert sibling(derived) == found and sibling(plain) is None


def test_a_cell_of_the_results_counts_with_the_same_settings_wherever_its_run_is(tmp_path: Path) -> None:
    (cell,) = small_cells(tmp_path, "ising")
    results: dict = {}
    assert not recorded(cell, results)
    _record(results, cell, {"accuracy": 0.5})
    kept = json.loads(json.dumps([*results.values()]))
    assert str(tmp_path) not in json.dumps(kept)
    results = {cell.key: kept[0]}
    assert recorded(cell, results)
    moved = replace(cell.config, data=replace(cell.config.data, data_root="elsewhere"), version="9.9.9")
    assert recorded(replace(cell, config=moved, folder=tmp_path / "other"), results)
    for part, change in (("train", {"lr": 1e-4}), ("ising", {"tau_1": 0.7}), ("data", {"val_fraction": 0.2})):
        config = replace(cell.config, **{part: replace(getattr(cell.config, part), **change)})
        assert not recorded(replace(cell, config=config), results), part
    for broken in ({"status": "failed"}, {"config": "{}"}, {"config": "no JSON"}):
        assert not recorded(cell, {cell.key: kept[0] | broken})
    del kept[0]["config"]  # of an earlier version
    assert not recorded(cell, {cell.key: kept[0]})


def test_seeds_of_an_earlier_call_with_other_settings_are_set_aside(tmp_path: Path) -> None:
    """They would be averaged with those of this call."""
    first, results = small_cells(tmp_path, "ising", "dropout", seeds=(0, 1, 2)), {}
    for cell in first:
        _record(results, cell, {"accuracy": 0.5}, "0.9.0")
    assert json.loads(results["digits", 60, "ising", 0]["config"])["version"] == "0.9.0"
    _set_aside(results, small_cells(tmp_path, "ising", seeds=(0, 1)))
    assert {row["status"] for row in results.values()} == {"done"}  # the same settings
    other = small_cells(tmp_path, "ising", seeds=(0, 1), augment="crop", margin=1)
    _set_aside(results, other)
    told = {(key[2], key[3]): row["status"] for key, row in results.items()}
    assert told.pop(("ising", 2)) == "set aside" and set(told.values()) == {"done"}
    assert recorded(first[2], results) and not recorded(other[0], results)  # it counts again for whoever asks for it


def test_what_is_to_be_trained_again_is_set_aside_at_once(tmp_path: Path, monkeypatch) -> None:
    results: dict = {}
    for cell in small_cells(tmp_path, "ising", seeds=(0, 1)):
        _record(results, cell, dict.fromkeys(SHOWN, 0.5))
    (tmp_path / "results.json").write_text(json.dumps([*results.values()]))

    def interrupted(*rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inference.compare._run_and_record", interrupted)
    words = [
        "--dataset",
        "digits",
        "--methods",
        "ising",
        "--train-sizes",
        "60",
        "--epochs",
        "3",
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit):
        main([*words, "--seeds", "0", "1", "--out", str(tmp_path)])
    assert {row["status"] for row in json.loads((tmp_path / "results.json").read_text())} == {"set aside"}


def test_two_calls_at_a_time_keep_the_cells_of_both(tmp_path: Path, monkeypatch) -> None:
    """Another call finishes a cell of its own and one of ours, whose run it holds, while ours is at work."""
    own, held, foreign = small_cells(tmp_path, "ising", "dropout", "deterministic")
    metrics = dict.fromkeys(SHOWN, 0.5)

    def beside(cells: list[Cell], jobs: int):
        theirs: dict = {}
        for cell in (held, foreign):
            _record(theirs, cell, metrics)
        (tmp_path / "results.json").write_text(json.dumps([*theirs.values()]))
        yield held, UserError("another process trains into its folder.")
        yield own, metrics

    monkeypatch.setattr("inference.compare.run_grid", beside)
    words = "--dataset digits --methods ising dropout --train-sizes 60 --epochs 1 --seeds 0 --depth 1 --width 16"
    main([*words.split(), "--samples", "2", "--device", "cpu", "--out", str(tmp_path)])
    rows = {row["method"]: row["status"] for row in json.loads((tmp_path / "results.json").read_text())}
    assert rows == {"ising": "done", "dropout": "done", "deterministic": "done"}


def test_settings_that_differ_within_a_column_are_told(tmp_path: Path) -> None:
    results: dict = {}
    metrics = dict.fromkeys(SHOWN, 0.5)
    for cell in small_cells(tmp_path, "ising", "dropout", "deterministic", seeds=(0, 1)):
        _record(results, cell, metrics)
    assert unequal([*results.values()]) == []
    (odd,) = small_cells(tmp_path, "dropout", seeds=(1,), augment="crop", batch_size=20)
    odd = replace(odd, config=replace(odd.config, train=replace(odd.config.train, lr=0.5)))
    _record(results, odd, metrics, "0.9.0")
    (tmp_path / "results.json").write_text(json.dumps([*results.values()]))
    frame = load_results(tmp_path / "results.json")
    text = page_tables(frame)
    assert "digits, 60 images: `batch_size` is 64, but 20 for `dropout` (1 of 2 seeds)." in text
    assert "digits, 60 images: `augment` is none, but crop for `dropout` (1 of 2 seeds)." in text
    assert re.search(r"`version` is \S+, but 0\.9 for `dropout`", text)
    assert re.search(r"digits, 60 images, dropout: `lr` is [\d.]+, but 0\.5 for `seed 1`", text)


def test_a_derived_method_takes_the_weights_of_a_renamed_sibling(tmp_path: Path) -> None:
    plain, derived = small_cells(tmp_path, "deterministic", "temperature")
    ours = run_cell(plain, 1)
    plain.folder.rename(plain.folder.with_name("moved"))
    theirs = run_cell(derived, 1)
    assert theirs["accuracy"] == ours["accuracy"] and theirs["train_seconds"] == ours["train_seconds"]


def test_a_process_that_dies_fails_its_cell_alone(tmp_path: Path, monkeypatch) -> None:
    """The first cell's process is killed from within by a poisoned module on its path."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "import inference.compare as c\n"
        "keep = c.run_cell\n"
        "def run_cell(cell, threads):\n"
        "    os._exit(9) if cell.seed == 0 else None\n"
        "    return {'seed': cell.seed}\n"
        "c.run_cell = run_cell\n"
    )
    code = (
        "import inference.compare as c; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    cells = c.make_cells(c.CompareArguments(Path('x'), ('deterministic',), (60,), (0, 1, 2), (1,)))\n"
        "    print([(cell.seed, type(out).__name__) for cell, out in c.run_grid(cells, 1)])\n"
    )
    main = tmp_path / "main.py"
    main.write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(main)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.stdout.strip() == "[(0, 'RuntimeError'), (1, 'dict'), (2, 'dict')]", result.stderr
    assert run_grid is not None


def test_costs_are_shown_and_older_cells_have_a_dash(tmp_path: Path) -> None:
    metrics = dict.fromkeys(SHOWN, 0.5) | {"macs": 1_312_768, "ms_per_image": 0.0425}
    older = {name: value for name, value in metrics.items() if name not in ("macs", "ms_per_image")}
    cell = {"dataset": "d", "train_size": 10, "seed": 0, "status": "done", "epochs": 3, "run": "r"}
    results = tmp_path / "results.json"
    for cells, shown in (
        ({"ising": metrics, "dropout:0.1": older}, {"ising": "1.313 | 0.0425", "dropout:0.1": "- | -"}),
        ({"ising": older}, {"ising": "- | -"}),
        ({"ising": metrics | {"macs": None, "ms_per_image": None}}, {"ising": "- | -"}),
    ):
        results.write_text(json.dumps([{**cell, "method": name, "metrics": value} for name, value in cells.items()]))
        frame = load_results(results)
        for table, after in ((markdown(frame), "0.50"), (page_tables(frame), "50%")):
            heading = next(line for line in table.splitlines() if line.startswith("| method"))
            assert "pruned | MMACs | ms |" in heading
            for name, text in shown.items():
                assert any(
                    line.startswith(f"| {name} ") and f"| {after} | {text} |" in line for line in table.splitlines()
                )
    assert here("analysis.comparison", "--results", tmp_path).returncode == 0
    (row,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert row["macs_mean"] == "" and row["accuracy_mean"] == "0.5"


def test_a_metric_that_cells_lack_is_no_verdict() -> None:
    frame = table()
    frame["brier"] = np.nan
    rows = {line.split(" |")[0]: line for line in page_tables(frame).splitlines()}
    assert rows["| d 10"].split(" | ")[3].strip(" |") == "-"


def test_each_ensemble_has_a_column_of_its_own() -> None:
    first, second = table(), table()
    second["train_size"] = 20
    second.loc[second.method == "ensemble:5", "method"] = "ising-ensemble:5"
    text = page_tables(pd.concat([first, second], ignore_index=True))
    ratio = f"{against_ensemble(first)['NLL ratio'].item():.2f}"
    assert "| NLL / that of ensemble:5 | NLL / that of ising-ensemble:5 |" in text
    rows = {line.split(" |")[0]: line for line in text.splitlines()}
    assert rows["| d 10"].endswith(f"| {ratio} | - |") and rows["| d 20"].endswith(f"| - | {ratio} |")


def test_method_numbers_set_the_knobs() -> None:
    base = RunConfig()
    assert method_config("dropout:0.3", 10, base).baseline.drop_rate == 0.3
    assert method_config("ising:0.7", 10, base).ising.target_retention == 0.7
    assert method_config("ensemble:7", 10, base).baseline.members == 7
    smooth = method_config("label-smoothing:0.2", 10, base).train
    assert (smooth.label_smoothing, smooth.epochs, smooth.calibrate) == (0.2, 10, True)
    mixed = method_config("cutmix:0.5", 10, base).train
    assert (mixed.mix, mixed.mix_alpha) == ("cutmix", 0.5)
    assert method_config("label-smoothing", 10, base).train.label_smoothing == 0.02
    assert method_config("gradual-magnitude:0.9", 10, base).baseline.sparsity == 0.9
    shifted = replace(base, train=replace(base.train, augment="crop", margin=1))
    for spec in ("ising", "dropout:0.3", "ising-paper"):
        assert (method_config(spec, 10, shifted).train.augment, method_config(spec, 10, shifted).train.margin) == (
            "crop",
            1,
        )
    magnitude = method_config("magnitude", 10, base)
    assert (magnitude.train.epochs, magnitude.train.finetune_epochs) == (8, 2)
    assert method_config("mean-field", 10, base).ising == METHODS["mean-field"].ising


@pytest.mark.parametrize("spec", ["nope", "deterministic:3", "dropout:many", "ensemble:2.5"])
def test_bad_methods_are_named(spec: str) -> None:
    with pytest.raises(UserError, match=spec.split(":", maxsplit=1)[0]):
        method_config(spec, 10, RunConfig())


@pytest.mark.parametrize(
    "bad",
    [{"epochs": (1, 2, 3)}, {"seeds": ()}, {"methods": ("ising", "ising")}, {"train_sizes": (0,)}, {"jobs": 0},
     {"methods": ("dropout:2",)}, {"methods": ("label-smoothing:1",)}, {"methods": ("cutmix:0",)}, {"preset": "huge"},
     {"margin": 1}],
)  # fmt: skip
def test_bad_grids_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError):
        make_cells(CompareArguments(Path("x"), data=DataConfig(), **bad))  # type: ignore[arg-type]


def test_every_method_but_deterministic_and_the_papers_has_a_temperature() -> None:
    without = {name for name, row in METHODS.items() if not row.train.calibrate}
    assert without == {"deterministic", "ising-paper"}


def test_tables_of_methods_without_a_number() -> None:
    """Names with a dash, with and without a number, stand in every table."""
    frame = table()
    extra = frame[frame.method == "deterministic"]
    frame = pd.concat([frame, extra.assign(method="label-smoothing"), extra.assign(method="gradual-magnitude:0.9")])
    for text in (markdown(frame), page_tables(frame)):
        for method in ("label-smoothing", "gradual-magnitude:0.9", "ensemble:5"):
            assert f"| {method} |" in text
    assert set(against_best(frame)["best other"]) == {"dropout:0.1"}
    assert "label-smoothing" not in short_table(frame)


def test_the_short_table_of_a_grid_that_is_not_finished() -> None:
    frame = table()
    more = frame[frame.method != "ensemble:5"].assign(dataset="e")
    lines = short_table(pd.concat([frame, more])).splitlines()
    assert next(line for line in lines if "`ensemble:5`" in line).count("-") >= 4  # two metrics of e, and both means


def test_bad_arguments_of_the_scripts(tmp_path: Path) -> None:
    refused(here("inference.compare", "--methods", "nope", "--out", tmp_path), "unknown method 'nope'", "ising")
    refused(here("analysis.comparison", "--results", tmp_path), "results.json", "inference.compare")
    (tmp_path / "results.json").write_text("[{")
    refused(here("analysis.comparison", "--results", tmp_path), "damaged")
    cell = {"dataset": "d", "train_size": 10, "method": "dropout:0.1", "seed": 0, "status": "done", "epochs": 3}
    (tmp_path / "results.json").write_text(json.dumps([{**cell, "run": "r", "metrics": dict.fromkeys(SHOWN, 0.5)}]))
    refused(here("analysis.comparison", "--results", tmp_path, "--ours", "nope"), "nope", "dropout:0.1")


def table() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = []
    for method, nll in (("ising", 0.50), ("dropout:0.1", 0.52), ("deterministic", 0.9), ("ensemble:5", 0.45)):
        for seed in range(4):
            rows.append({
                "dataset": "d", "train_size": 10, "method": method, "seed": seed, "epochs": 3, "run": "r",
                "accuracy": 1 - nll / 3, "nll": nll + 0.01 * generator.normal(), "brier": nll / 2, "ece": 0.1,
                "nll_calibrated": nll, "aurc": 0.1, "pruned_fraction": 0.5, "train_seconds": 3.0,
                "macs": 1.25e6 if method == "ising" else np.nan, "ms_per_image": 0.5 if method == "ising" else np.nan,
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_against_the_best_is_a_paired_t_test_without_ensembles() -> None:
    frame = table()
    row = against_best(frame).set_index("metric").loc["NLL"]
    ours, best = (frame[frame.method == m].nll.to_numpy() for m in ("ising", "dropout:0.1"))
    assert row["best other"] == "dropout:0.1"
    assert row["difference"] == pytest.approx((ours - best).mean())
    assert row["standard error"] == pytest.approx((ours - best).std(ddof=1) / 2)
    assert row["p (paired t)"] == pytest.approx(stats.ttest_rel(ours, best).pvalue)
    assert row["first or within one standard error"]
    worse = against_best(frame, "deterministic").set_index("metric").loc["NLL"]
    assert not worse["first or within one standard error"] and worse["best other"] == "ising"
    ratio = against_ensemble(frame)["NLL ratio"].item()
    ensemble = frame[frame.method == "ensemble:5"].nll.mean()
    assert ratio == pytest.approx(ours.mean() / ensemble)


def test_tables_put_the_best_in_bold_and_fill_the_readme(tmp_path: Path) -> None:
    text = markdown(table())
    line = next(line for line in text.splitlines() if line.startswith("| ensemble:5"))
    assert "**0.8500" in line and text.index("| ising |") < text.index("| deterministic") < text.index("| ensemble")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{MARKERS[0]}\nstale\n{MARKERS[1]}\nafter\n")
    write_between(path, page_tables(table()))
    written = path.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "stale" not in written
    assert "| method | d 10 | pruned | MMACs | ms |" in written
    assert "| ising | 0.833 ± 0.000 | 50% | 1.250 | 0.5000 |" in written
    assert "| ensemble:5 | **0.850 ± 0.000** | 50% | - | - |" in written
    row = against_best(table()).set_index("metric").loc["NLL"]
    assert f"| {row['difference']:+.3f} ± {row['standard error']:.3f} (dropout:0.1) |" in written
    assert f"| {against_ensemble(table())['NLL ratio'].item():.2f} |" in written
    path.write_text("no markers")
    with pytest.raises(UserError, match="lacks the lines"):
        write_between(path, "x")


def test_readme_and_page_show_the_published_grid() -> None:
    folder = ROOT / "analysis" / "results" / "grid"
    frame = load_results(folder / "results.json")
    assert (frame.groupby(["dataset", "train_size", "method"]).seed.nunique() >= 3).all()
    assert frame.groupby(["dataset", "train_size"]).method.nunique().eq(frame.method.nunique()).all()  # none left out
    assert frame.groupby(["dataset", "train_size"]).epochs.nunique().eq(1).all()
    assert all(cell["status"] == "done" for cell in json.loads((folder / "results.json").read_text()))
    assert markdown(frame) in (folder / "table.md").read_text()
    for page, tables in (("docs/comparison.md", page_tables), ("README.md", short_table)):
        assert f"{MARKERS[0]}\n\n{tables(frame)}\n\n{MARKERS[1]}" in (ROOT / page).read_text()


def test_the_page_of_more_methods_shows_its_grid() -> None:
    """One seed of the published grid beside the rows that it leaves out; the cells they share are the same."""
    results = ROOT / "analysis" / "results"
    frame, published = (load_results(results / name / "results.json") for name in ("grid-more", "grid"))
    assert f"{MARKERS[0]}\n\n{page_tables(frame)}\n\n{MARKERS[1]}" in (ROOT / "docs" / "more-methods.md").read_text()
    keys = ["dataset", "train_size", "method", "seed"]
    assert not frame.duplicated(keys).any() and set(frame.seed) == {0}
    both = frame.merge(published, on=keys, suffixes=("", "_published"))
    assert len(both) == 5 * 11 and (both.nll == both.nll_published).all()
    assert frame.groupby(["dataset", "train_size"]).epochs.nunique().eq(1).all()


def test_differences_are_paired_and_far_ones_are_arrows() -> None:
    frame = table()
    found = gaps(frame, "nll", "ising", relative=True)
    ours, theirs = (frame[frame.method == m].nll.to_numpy() for m in ("ising", "dropout:0.1"))
    assert found["dropout:0.1"] == pytest.approx(((theirs / ours - 1).mean(), (theirs / ours - 1).std(ddof=1) / 2))
    points = gaps(frame, "accuracy", "ising", relative=False)
    assert points["deterministic"][0] == pytest.approx((0.5 - 0.9) / 3) and "ising" not in points
    assert gaps(frame[frame.method != "ising"], "nll", "ising", relative=True) == {}
    left, right = differences(frame, "ising").axes
    assert [text.get_text() for text in right.texts] == ["ising is worse", "ising is better"]
    shown = {bars.get_label(): bars.lines[0] for bars in right.containers}
    assert shown["dropout:0.1"].get_xdata()[0] == pytest.approx(found["dropout:0.1"][0])
    assert "deterministic" not in shown  # 80% above: an arrow without a label
    (arrow,) = [line for line in right.lines if line.get_marker() == ">"]
    assert arrow.get_xdata()[0] == 0.15 and len(left.containers) == 3


def test_the_best_other_is_chosen_by_the_seeds_that_both_have() -> None:
    """An opponent with one easy seed is not the best; one that is ahead on every seed is."""
    frame = table()
    scores = {"ising": (0.15, 0.40, 0.45), "deterministic": (0.13, 0.35, 0.38), "dropout:0.1": (0.20,)}
    rows = []
    for method, values in scores.items():
        one = frame[frame.method == method].iloc[0]
        rows += [
            {**one, "seed": seed, "nll": nll, "accuracy": 1 - nll, "brier": nll**2} for seed, nll in enumerate(values)
        ]
    partly = pd.DataFrame(rows)
    row = against_best(partly).set_index("metric").loc["NLL"]
    assert row["best other"] == "deterministic" and not row["first or within one standard error"]
    text = page_tables(partly)
    assert "0.200 (1 of 3 seeds)" in text and "**0.287 ± 0.137**" in text and "**0.200" not in text


def test_an_ensemble_predicts_with_all_its_members() -> None:
    arguments = CompareArguments(Path("out"), methods=("ensemble:5",), train_sizes=(60,), samples=4, preset="digits")
    assert {cell.config.train.samples for cell in make_cells(arguments)} == {5}
    assert {cell.config.train.samples for cell in make_cells(replace(arguments, samples=9))} == {9}
    assert {cell.config.train.samples for cell in make_cells(replace(arguments, methods=("dropout",)))} == {4}


def test_a_label_does_not_make_two_files_one(tmp_path: Path) -> None:
    """Rows know the label alone; the cell's folder says which file it was."""
    digits = np.random.default_rng(0).integers(0, 255, (80, 8, 8), dtype=np.uint8)
    for name in ("one", "two"):
        np.savez(tmp_path / f"{name}.npz", train_images=digits, train_labels=np.arange(80) % 2)
    flags = ["--label", "mine", "--methods", "deterministic", "--train-sizes", 40, "--seeds", 0, "--epochs", 1,
             "--preset", "digits", "--depth", 1, "--width", 16, "--device", "cpu", "--out", tmp_path / "g"]  # fmt: skip
    first = script("inference.compare", "--dataset", f"npz:{tmp_path / 'one.npz'}", *flags)
    assert first.returncode == 0, first.stderr
    refused(here("inference.compare", "--dataset", f"npz:{tmp_path / 'two.npz'}", *flags), "other settings", "--out")
    (tmp_path / "moved").mkdir()
    (tmp_path / "one.npz").rename(tmp_path / "moved" / "one.npz")
    again = script("inference.compare", "--dataset", f"npz:{tmp_path / 'moved' / 'one.npz'}", *flags)
    assert again.returncode == 0 and "1 cells, 1 of them done already" in again.stderr
