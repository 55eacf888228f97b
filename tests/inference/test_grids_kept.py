"""Grids, searches and tables do not mix what was trained otherwise, and replace nothing unasked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import here, refused
from test_compare import small_cells, table
from test_search import images, trial

from analysis import decisions
from analysis.comparison_tables import against_best, markdown
from analysis.crossfit import cross_fit
from analysis.distillation import _rows
from analysis.rates import curves
from analysis.shift import load_runs
from analysis.trials import table as trials_table
from inference.cli import check_place
from inference.compare import CompareArguments, finished, make_cells, recorded, run_cell, sibling
from inference.prune_peers import check_peers
from inference.rates import RatesArguments, settings
from inference.rates import make_cells as rate_cells
from inference.search import run_trial, title
from inference.search_trials import make_trial
from pyro_isingvit import UserError, ViTConfig
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.experiment import fit as really_fit
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.predictive.validation import Validation
from pyro_isingvit.runs.trainer import Trainer


def start_file(path: Path, mean: float = 0.3) -> str:
    vit = ViT(ViTConfig(patch_size=4, width=16, heads=2, depth=1, mlp_ratio=2), 1, 8, 8, classes=2)
    Start.of(vit, vit.initial_weights(), Scale(None, (), (), (mean,), (0.4,)), "made").save(path)
    return str(path)


def started_cells(out: Path, init: str, *methods: str, epochs: int = 3):
    return make_cells(CompareArguments(out, methods, (60,), (0,), (epochs,), init=init, device="cpu", samples=2,
                                       data=DataConfig("digits")))  # fmt: skip


def test_an_interrupted_cell_that_started_from_a_network_goes_on(tmp_path: Path, monkeypatch) -> None:
    (cell,) = started_cells(tmp_path / "grid", start_file(tmp_path / "s.safetensors"), "deterministic")
    train_epoch, begun = Trainer.train_epoch, list[int]()

    def interrupted(trainer: Trainer, epoch: int):
        begun.append(epoch)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return train_epoch(trainer, epoch)

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, 1)
    assert run_cell(cell, 1)["accuracy"] > 0 and begun == [0, 1, 1, 2]  # the first epoch is kept
    assert json.loads((cell.folder / "config.json").read_text())["vit"]["width"] == 16


def test_a_derived_method_takes_a_network_of_the_same_start_alone(tmp_path: Path) -> None:
    one, two = start_file(tmp_path / "1.safetensors"), start_file(tmp_path / "2.safetensors", mean=0.5)
    plain, derived = started_cells(tmp_path / "grid", one, "deterministic", "temperature", epochs=1)
    run_cell(plain, 1)
    assert sibling(derived) == plain.folder
    (other,) = started_cells(tmp_path / "grid", two, "temperature", epochs=1)
    assert sibling(other) is None and run_cell(other, 1)["accuracy"] > 0


def test_finished_cells_with_other_settings_are_trained_anew_only_when_told(tmp_path: Path) -> None:
    words = ["--dataset", "digits", "--methods", "deterministic", "--train-sizes", 60, "--seeds", 0, "--samples", 1,
             "--depth", 1, "--width", 16, "--device", "cpu", "--out", tmp_path]  # fmt: skip
    assert here("inference.compare", *words, "--epochs", 1).returncode == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    refused(here("inference.compare", *words, "--epochs", 2), "1 finished cells", "n60-deterministic-s0", "--overwrite")
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "results.json").read_text())[0]["status"] == "done"
    again = here("inference.compare", *words, "--epochs", 2, "--overwrite")
    assert again.returncode == 0 and json.loads((tmp_path / "results.json").read_text())[0]["epochs"] == 2
    (tmp_path / "runs" / "digits-n60-deterministic-s0" / "posterior.nc").write_bytes(b"cut short")
    refused(here("inference.compare", *words, "--epochs", 2), "could not be made")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--train-size", "150"], "give the numbers to --train-sizes"),
        (["--init", "x.safetensors", "--preset", "small", "--depth", "9"], "leave out --preset, --depth"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags: list[str], word: str, tmp_path: Path) -> None:
    refused(here("inference.compare", "--dataset", "digits", *flags, "--out", tmp_path / "grid"), word)


def test_a_start_and_a_preset_do_not_go_together(tmp_path: Path) -> None:
    init = ["--dataset", "digits", "--init", start_file(tmp_path / "s.safetensors"), "--out", tmp_path / "run"]
    refused(here("inference.train", *init, "--preset", "digits"), "leave --preset")
    done = here("inference.train", *init, "--epochs", 1, "--train-size", 60, "--samples", 1, "--max-keep", 0.9)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert done.returncode == 0 and config["preset"] == "custom" and config["vit"]["width"] == 16


def test_where_images_are_kept_is_no_setting_of_a_cell(tmp_path: Path) -> None:
    (cell,) = small_cells(tmp_path, "deterministic")
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json").write_text(cell.config.to_json())
    (cell.folder / "metrics.json").write_text("{}")
    moved = replace(cell.config.data, cache="cache", data_root="there", download=True)
    cached = replace(cell, config=replace(cell.config, data=moved))
    assert finished(cached) == {}
    row = {"status": "done", "config": cell.config.to_json()}
    assert recorded(cached, {cell.key: row})


def test_runs_whose_test_parts_differ_are_not_compared(digits_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(digits_run, tmp_path / "other"))
    told = json.loads((other / "config.json").read_text())
    assert len(load_runs([digits_run, other], "cpu")) == 2
    for name, value in (("groups", "(p)_"), ("columns", "path=x"), ("image_size", 8), ("resize", "crop")):
        changed = told | {"data": told["data"] | {name: value}}
        (other / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="read or divided otherwise"):
            load_runs([digits_run, other], "cpu")


def test_rates_of_a_method_with_a_number_are_its_own() -> None:
    one = RatesArguments(
        Path("x"), (1e-3,), methods=("dropout", "dropout:0.1", "dropout:0.9"), widths=(64,), depths=(2,)
    )
    assert [settings(cell)["method"] for cell in rate_cells(one)] == ["dropout", "dropout:0.1", "dropout:0.9"]
    with pytest.raises(UserError, match="distinct"):
        next(iter(rate_cells(replace(one, methods=("dropout", "dropout")))))


def test_rates_are_averaged_over_seeds_and_other_trainings_are_refused() -> None:
    same = {"method": "m", "rule": "r", "width": 1, "depth": 1, "rate": 0.1, "epochs": 8, "data": "digits"}
    records = [{"settings": same | {"seed": seed}, "nll": nll} for seed, nll in ((0, 1.0), (1, 2.0))]
    assert curves(records) == {("m", "r", 1, 1): {0.1: {"nll": 1.5}}}
    with pytest.raises(UserError, match="differ in data, epochs"):
        curves([*records, {"settings": same | {"epochs": 40, "data": "mnist"}, "nll": 1.0}])


def test_a_trial_from_a_start_has_the_head_that_it_asks_for(tmp_path: Path, monkeypatch) -> None:
    given = trial(images(tmp_path), init=start_file(tmp_path / "s.safetensors"), epochs=1, method="deterministic")
    given["vit"], made = {"head": "mlp"}, []

    def watched(*args, **kwargs):
        made.append(really_fit(*args, **kwargs))
        return made[0]

    monkeypatch.setattr("pyro_isingvit.experiment.fit", watched)
    run_trial(make_trial(given, "data", "cpu"))
    assert made[0].config.vit.head == "mlp" and "head_hidden" in made[0].method.vit.matrix_shapes


def test_trials_of_other_networks_have_rows_of_their_own() -> None:
    def record(seed: int, nll: float, **shape: object) -> dict:
        told = {"dataset": "digits", "train_size": 30, "seed": seed, "method": "ising", "settings": {}, **shape}
        return {"trial": told, "nll_calibrated": nll}

    text = trials_table(
        [record(0, 1.0, preset="small"), record(1, 2.0, preset="small"), record(0, 3.0)], "nll_calibrated"
    )
    assert "| as above | 1.5000 (2) |" in text and "preset=None | 3.0000 |" in text
    given = {"dataset": "digits", "method": "ising", "preset": "small"}
    assert title(given) == "ising" and title(given, preset=True) == "ising preset=small"


def test_peers_are_for_runs_from_random_weights(monkeypatch) -> None:
    monkeypatch.setattr("inference.prune_peers.need_peers", lambda: None)
    check_peers(RunConfig())
    with pytest.raises(UserError, match="from a trained network"):
        check_peers(RunConfig(init="runs/a"))


def test_methods_are_compared_on_the_seeds_that_both_have() -> None:
    frame = table()
    single = frame[(frame.method != "ising") | (frame.seed == 0)]
    lucky = frame[frame.method == "deterministic"].assign(method="l0", seed=9, nll=0.01)
    rows = against_best(pd.concat([single, lucky])).set_index("metric")
    assert rows.loc["NLL", "best other"] == "dropout:0.1" and np.isfinite(rows.loc["NLL", "difference"])
    assert against_best(frame[(frame.method != "ising") | (frame.seed == 9)]).empty
    assert "1 to 4 seeds, 3 epochs" in markdown(single) and "\n4 seeds, 3 epochs" in markdown(frame)


def test_a_place_that_cannot_be_written_to_is_told_of_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nope/deep")):
        with pytest.raises(UserError, match=r"--out"):
            check_place(place)
    check_place(tmp_path / "new" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    refused(here("inference.prune", "--run", tmp_path, "--out", tmp_path / "file" / "x"), "cannot write to")


def test_the_error_rate_is_that_of_what_is_accepted() -> None:
    rng = np.random.default_rng(0)
    probs, y = rng.dirichlet([5.0, 1.0], 200), (rng.random(200) < 0.3).astype(int)
    arguments = SimpleNamespace(calibration=40, coverage=0.8, splits=5, seed=0, max_error=0.0001)
    val = Validation(*(torch.from_numpy(x[:40]) for x in (probs, y)), 1, 0)
    limit = decisions.many_splits(probs, y, val, arguments)["limit"]
    assert limit == {"max_error": 0.0001, "accepted": 0.0, "error": None, "broken": 0.0}


def test_what_was_not_distilled_is_not_called_so() -> None:
    scores = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    own = {"dataset": "d", "train_size": 1, "seed": 0, "samples": 2, "macs": 10, "dense_macs": 20, **scores,
           **{f"full_{name}": value for name, value in scores.items()}}  # fmt: skip
    names = [[row["what"] for row in _rows(own | {"distil_epochs": epochs}, None, None)] for epochs in (0, 20)]
    assert names == [["the run that was cut, 2 draws", cut] for cut in ("cut, one pass", "cut and distilled, one pass")]


def test_labels_are_not_checked_by_networks_that_a_teacher_taught() -> None:
    with pytest.raises(UserError, match="check a run without one"):
        cross_fit(RunConfig(teacher=("runs/teacher",)), lambda: pytest.fail("nothing is read"))


def test_columns_of_other_shapes_share_their_rows() -> None:
    """The usual shape of each data set is not told, as patches of other sizes suit them."""

    def record(dataset: str, nll: float, **vit: int) -> dict:
        told = {"dataset": dataset, "train_size": 30, "seed": 0, "method": "ising", "settings": {}, "vit": vit}
        return {"trial": told, "nll_calibrated": nll}

    usual = [record("a", 1.0, depth=2), *2 * [record("b", 2.0, depth=2, patch_size=8)]]
    text = trials_table([*usual, record("b", 3.0, depth=4)], "nll_calibrated")
    assert "| as above | 1.0000 | 2.0000 (2) |" in text and "vit={'depth': 4} |  | 3.0000 |" in text


def test_overwrite_is_for_grids_of_runs(tmp_path: Path) -> None:
    flags = ["--dataset", "digits", "--regularisers", "vne", "--overwrite", "--out", tmp_path / "grid"]
    refused(here("inference.compare", *flags), "is not for --regularisers")


def test_a_folder_of_a_pretraining_is_no_place_for_a_network(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"of inference.pretrain")
    refused(here("inference.prune", "--run", digits_run, "--out", tmp_path), "holds a run; name another --out")
