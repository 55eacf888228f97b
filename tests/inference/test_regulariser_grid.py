"""inference.compare --regularisers: its cells, that it resumes, what it measures, and what can be cut."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import here, refused, script

from inference.compare import CompareArguments, make_cells
from inference.prunable import accuracy, cut, magnitudes, prunable
from inference.regularisers import NONE, RECORDS, Cell, chosen, judge, measure
from inference.regularisers import make_cells as cells_of
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.regularise import REGULARISERS
from pyro_isingvit.core.settings import DataConfig, RunConfig, ViTConfig
from pyro_isingvit.data.load import development_data
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.experiment import fit
from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.methods.registry import with_defaults
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.teacher import Teacher

SMALL = ViTConfig(patch_size=4, width=16, heads=2, depth=1)
FLAGS = ["--preset", "digits", "--depth", 1, "--width", 16, "--train-sizes", 100, "--epochs", 2, "--seeds", 0,
         "--samples", 3, "--device", "cpu", "--methods", "dropout", "--regularisers", "logit-penalty",
         "mixup:0.4"]  # fmt: skip


def plain(**changes: Any) -> list[tuple[str, str, Any]]:
    given = CompareArguments(
        Path("out"), methods=("ising", "dropout:0.2"), train_sizes=(200, 100), seeds=(0, 1), epochs=(2,), samples=3,
        preset="digits", depth=1, width=16, device="cpu", data=DataConfig("digits"),
    )  # fmt: skip
    return [(cell.dataset, cell.method, cell.config) for cell in make_cells(replace(given, **changes))]


def test_none_comes_first_and_all_are_those_of_the_registry() -> None:
    assert [name.partition(":")[0] for name in chosen(["all"])] == [NONE, *REGULARISERS]
    assert chosen(["car", "car:0.3", "vne:2", "none"]) == [NONE, "car:0.3", "vne:2"]
    assert "vne:2" in chosen(["all", "vne:2"]) and "vne:0.01" in chosen(["all", "vne:2"])
    assert chosen(["mhe+vne:2", "vne:2+mhe"]) == [NONE, "mhe:1+vne:2"]
    assert len(cells_of([("d", "ising", RunConfig())], ["mhe:1e6", "mhe:2e+7"], 0.0)) == 3  # with none
    (cell,) = [cell for cell in cells_of([("d", "ising", RunConfig())], ["mhe+vne:2"], 0.0) if cell.trial["sets"]]
    assert cell.trial["sets"] == {"hyperspherical_energy": 1.0, "feature_entropy": 2.0}
    assert (cell.config.train.hyperspherical_energy, cell.config.train.feature_entropy) == (1.0, 2.0)
    with pytest.raises(UserError, match="contradict each other"):
        chosen(["mixup+cutmix"])
    with pytest.raises(UserError, match="nope"):
        chosen(["nope"])


def test_partial_results_are_useful() -> None:
    """Seed by seed, the smallest size first, and all regularisers of a method in a row, none before them."""
    cells = cells_of(plain(), ["car", "vne"], 0.2)
    assert len({cell.key for cell in cells}) == len(cells) == 2 * 2 * 2 * 3
    told = [(c.trial["seed"], c.trial["train_size"], c.trial["method"], c.trial["regulariser"]) for c in cells]
    assert told[:4] == [(0, 100, "ising", name) for name in (NONE, "car:0.3", "vne:0.01")] + [
        (0, 100, "dropout:0.2", NONE)
    ]
    assert [seed for seed, *_ in told] == [0] * 12 + [1] * 12 and told[6][1] == 200
    assert all(cell.trial["flipped"] == 0.2 for cell in cells)


def test_a_cell_is_known_by_everything_that_it_sets() -> None:
    (bare, penalised) = cells_of(plain(methods=("dropout",), train_sizes=(100,), seeds=(0,)), ["logit-penalty"], 0.0)
    assert bare.trial["sets"] == {} and penalised.trial["sets"] == {"logit_penalty": 0.1}
    assert penalised.config.train == replace(bare.config.train, logit_penalty=0.1)
    longer, _ = cells_of(plain(methods=("dropout",), train_sizes=(100,), seeds=(0,), epochs=(3,)), ["car"], 0.0)
    half = cells_of(plain(methods=("dropout",), train_sizes=(100,), seeds=(0,)), ["logit-penalty"], 0.5)
    assert len({bare.key, penalised.key, longer.key, *(cell.key for cell in half)}) == 5
    elsewhere = DataConfig("digits", data_root="elsewhere")
    assert (
        cells_of(plain(methods=("dropout",), train_sizes=(100,), seeds=(0,), data=elsewhere), [], 0.0)[0].key
        == bare.key
    )


def test_what_comes_with_a_number_is_no_change() -> None:
    """A cell of dropout:0.1 of version 0.12, where its decay was that of dropout, is measured again under its name."""
    (cell,) = cells_of([("made", "dropout:0.1", with_defaults("dropout:0.1", RunConfig()))], [], 0.0)
    assert "shrinkage" not in cell.trial["settings"] and cell.trial["settings"]["drop_rate"] == 0.1
    assert cell.resolved()["shrinkage"] == 3.0
    other = with_defaults("dropout:0.1", RunConfig())
    other = replace(other, train=replace(other.train, shrinkage=1.5))
    (cell,) = cells_of([("made", "dropout:0.1", other)], [], 0.0)
    assert cell.trial["settings"]["shrinkage"] == 1.5


def test_what_settings_rule_out_is_left_out_and_told(caplog) -> None:
    cells = cells_of(plain(methods=("cutmix",), train_sizes=(100,), seeds=(0,)), ["early-learning", "car"], 0.0)
    assert [cell.trial["regulariser"] for cell in cells] == [NONE, "car:0.3"]
    assert "left out" in caplog.text and "early-learning:3" in caplog.text


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("regularisers")
    done = script("inference.compare", *FLAGS, "--flipped", 0.2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "3 cells done, 0 failed" in done.stdout and "`mixup:0.4`" in done.stdout
    assert "digits, 100 images, 20% wrong labels, 2 epochs" in done.stdout and (out / "changes.png").is_file()
    return out


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]


def test_every_cell_is_a_line_with_its_scores(measured: Path) -> None:
    found = {record["trial"]["regulariser"]: record for record in records(measured)}
    assert list(found) == [NONE, "logit-penalty:0.1", "mixup:0.4"]
    for record in found.values():
        assert 0 < record["nll"] < 10 and 0 < record["nll_uncalibrated"] < 10 and 0 < record["corrupted_nll"] < 10
        assert 0 <= record["accuracy"] <= 1 and 0 <= record["ece"] <= 1 and 0 <= record["prunable"] < 1
        assert record["seconds_per_step"] > 0 and record["seconds"] > 0 and record["samples"] == 3
        assert record["dev_size"] > 300 and record["train_size"] == 100
    assert found["mixup:0.4"]["trial"]["sets"] == {"mix": "mixup", "mix_alpha": 0.4}
    assert len({record["machine"] for record in found.values()}) == 1
    assert len({record["nll"] for record in found.values()}) == 3


def test_it_resumes(measured: Path, tmp_path: Path) -> None:
    whole = (measured / RECORDS).read_text()
    *kept, last = whole.splitlines(keepends=True)
    (tmp_path / RECORDS).write_text("".join(kept) + last[: len(last) // 2])  # as if killed while it was written
    done = script("inference.compare", *FLAGS, "--flipped", 0.2, "--out", tmp_path)
    assert done.returncode == 0 and "3 cells, 2 of them done already" in done.stderr, done.stderr
    old, new = json.loads(last), records(tmp_path)[-1]
    for record in (old, new):
        for name in ("seconds", "seconds_per_step"):
            del record[name]
    assert (tmp_path / RECORDS).read_text().startswith("".join(kept)) and new == old  # the same numbers too


def one(name: str, flipped: float = 0.0, **changes: Any) -> Cell:
    return cells_of(plain(train_sizes=(100,), seeds=(0,), **changes), [name], flipped)[-1]


def test_refused_by_the_method_or_diverged_is_said() -> None:
    cell = one("logit-penalty", methods=("dropout",))
    train = replace(cell.config.train, compile=True)  # which dropout refuses
    assert "compile" in measure(replace(cell, config=replace(cell.config, train=train)), 1)["refused"]
    bare = replace(cell, trial=cell.trial | {"regulariser": NONE}, config=replace(cell.config, train=train))
    with pytest.raises(UserError, match="compile"):
        measure(bare, 1)
    wild = replace(cell.config.train, lr=1e12, clip_norm=1e12)
    assert "the loss became" in measure(replace(cell, config=replace(cell.config, train=wild)), 1)["error"]


def test_wrong_labels_are_for_training_alone(monkeypatch) -> None:
    seen: list[ImageData] = []
    monkeypatch.setattr("inference.regularisers.judge", lambda run, data: seen.append(data) or {})
    cell = one("car", 0.3, methods=("dropout",))
    measure(cell, 1)
    clean = development_data(cell.config.data, seed=0)
    changed = [
        (getattr(seen[0], part).labels != getattr(clean, part).labels).float().mean() for part in ("train", "val")
    ]
    assert changed[0] == pytest.approx(0.3) and changed[1] > 0 and (seen[0].test.labels == clean.test.labels).all()


@pytest.mark.parametrize("method", ["ising", "dropout"])
def test_distillation_learns_from_the_training_without_it(method: str, monkeypatch) -> None:
    taught: list[list[Run]] = []
    build = Teacher.__init__

    def spy(self: Teacher, runs, run: Run) -> None:
        taught.append(list(runs))
        build(self, runs, run)

    monkeypatch.setattr(Teacher, "__init__", spy)
    scores = measure(one("ttm", methods=(method,)), 1)
    assert 0 < scores["nll"] < 10
    alone, [teacher] = taught
    assert alone == [] and teacher.config.train.distillation == 0 and len(teacher.history) == 2


@pytest.mark.parametrize("name", ["sigma-reparam", "weight-compander"])
def test_reparametrised_weights_are_for_baselines(name: str) -> None:
    assert 0 <= measure(one(name, methods=("dropout",)), 1)["prunable"] < 1
    assert "ordinary weights" in measure(one(name, methods=("ising",)), 1)["refused"]


def test_deterministic_networks_get_a_temperature_too() -> None:
    cell = one("car", methods=("deterministic",))
    assert cell.config.train.calibrate
    scores = measure(cell, 1)
    assert scores["temperature"] != 1 and scores["nll"] != scores["nll_uncalibrated"]


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text("{}\n")
    refused(here("inference.compare", *FLAGS, "--out", tmp_path), "damaged in line 1")
    refused(here("inference.compare", *FLAGS, "--out", tmp_path / RECORDS / "x"), "cannot write")
    words = [word for word in FLAGS if word not in ("--regularisers", "logit-penalty", "mixup:0.4")]
    refused(
        here("inference.compare", *words, "--flipped", 0.2, "--out", tmp_path), "--flipped goes with --regularisers"
    )


# What can be cut ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> ImageData:
    return development_data(DataConfig("digits", train_size=400), 300)


@pytest.mark.parametrize("method", ["ising", "dropout", "mean-field"])
def test_whole_units_go_the_least_first(method: str, data: ImageData) -> None:
    run = fit(SMALL, data, method=method, epochs=4, device="cpu", progress=False)
    whole, half = cut(run, 0.0), cut(run, 0.5)
    assert whole is not None and half is not None
    ((vit, dense), (_, left)) = whole, half
    layout = MaskLayout(vit, run.config.ising.granularity)  # mean-field: of single weights
    total = sum(weight.numel() for weight in dense.values())
    gone = sum(int(((left[kind] == 0) & (dense[kind] != 0)).sum()) for kind in dense)
    assert 0.5 * total <= gone <= 0.5 * total + 100  # the unit that crosses the line goes too
    if method == "ising":
        pi = {name: run.guide.retention(name).flatten() for name in layout.sites}
    else:
        pi = {name: value.flatten() for name, value in magnitudes(layout, dense).items()}
    kept = {name: (layout.reduce(site, {k: w.abs() for k, w in left.items()}) > 0).flatten()
            for name, site in layout.sites.items()}  # fmt: skip
    values, on = torch.cat([*pi.values()]), torch.cat([*kept.values()])
    assert values[on].min() >= 0.98 * values[~on].max()  # masks within 1% of the clip are equals


def test_magnitudes_by_hand(data: ImageData) -> None:
    run = fit(SMALL, data, method="dropout", epochs=1, device="cpu", progress=False)
    [(vit, means)] = run.method.trained_networks()
    found = magnitudes(MaskLayout(vit, "unit"), {kind: w.detach() for kind, w in means.items()})
    torch.testing.assert_close(found["fc1"][0], means["fc1"][0].detach().pow(2).mean(1).sqrt())
    torch.testing.assert_close(found["head"][0], means["head"][0].detach().pow(2).mean(0).sqrt())


def test_prunable_stops_where_accuracy_falls(data: ImageData) -> None:
    run = fit(SMALL, data, method="dropout", epochs=15, device="cpu", progress=False)
    share = prunable(run, data.test)
    whole = cut(run, 0.0)
    assert share is not None and whole is not None and 0 <= share < 0.95
    reference = accuracy(run, whole, data.test)
    mean = run.predict(data.test.images, 1).mean.argmax(-1) == data.test.labels
    assert abs(reference - float(mean.float().mean())) < 0.05  # one draw of dropout is nearly the mean network
    for step in range(1, round(share / 0.05) + 1):
        network = cut(run, 0.05 * step)
        assert network is not None and accuracy(run, network, data.test) >= reference - 0.005
    further = cut(run, share + 0.05)
    assert further is not None and accuracy(run, further, data.test) < reference - 0.005
    assert prunable(run, data.test, drop=1.0) == pytest.approx(0.95)


def test_ensembles_have_no_share(data: ImageData) -> None:
    run = fit(SMALL, data, method="ensemble", members=2, epochs=1, device="cpu", samples=2, progress=False)
    assert prunable(run, data.test) is None and judge(run, data)["prunable"] is None


def test_a_unit_that_does_nothing_can_go(data: ImageData) -> None:
    """Networks with half of their hidden units at zero lose them for free, whatever the share of all weights."""
    run = fit(SMALL, data, method="dropout", epochs=15, device="cpu", progress=False)
    [(_, means)] = run.method.trained_networks()
    with torch.no_grad():
        means["fc1"][:, ::2] = 0.0
        means["fc2"][:, :, ::2] = 0.0
    total = sum(weight.numel() for weight in means.values())
    dead = means["fc1"][:, ::2].numel() / total
    share = prunable(run, data.test)
    assert share is not None and share >= np.floor(dead / 0.05) * 0.05


def test_records_of_another_file_under_the_same_label_are_not_taken(measured: Path, tmp_path: Path) -> None:
    found = records(measured)
    assert {record["source"] for record in found} == {"digits"}
    (tmp_path / RECORDS).write_text("".join(json.dumps(record | {"source": "npz:x.npz"}) + "\n" for record in found))
    refused(here("inference.compare", *FLAGS, "--flipped", 0.2, "--out", tmp_path), "npz:x.npz under the label digits")
