"""A small search from end to end, resumed, with a training that diverges; and what it must not look at."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import here, pixels, refused, script, write_npz

from inference.search import print_tables, run_trial
from inference.search_trials import make_trial, read_records
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.load import development_data
from pyro_isingvit.methods.registry import METHODS

LABELS = {"train_labels": np.arange(90) % 3}


def images(folder: Path, **changes: Any) -> str:
    """A data set with 90 training images."""
    return write_npz(folder / "images.npz", **{"train_images": pixels(90, 6, 6), **LABELS, **changes})


def trial(dataset: str, seed: int = 0, method: str = "dropout:0.2", epochs: int = 2, **changes: Any) -> dict[str, Any]:
    settings = {"samples": 3, "batch_size": 10, **changes.pop("settings", {})}
    return {
        "dataset": dataset, "label": "made", "train_size": 30, "seed": seed, "method": method, "epochs": epochs,
        "vit": {"width": 8, "heads": 2, "depth": 1, "patch_size": 3}, "settings": settings, **changes,
    }  # fmt: skip


def write_trials(path: Path, *trials: dict[str, Any]) -> Path:
    path.write_text(json.dumps(trials))
    return path


def flags(folder: Path) -> list[object]:
    return ["--trials", folder / "t.json", "--records", folder / "kept" / "r.jsonl", "--device", "cpu"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    dataset = images(folder)
    write_trials(
        folder / "t.json", trial(dataset), trial(dataset, seed=1), trial(dataset, name="again"),
        trial(dataset, method="deterministic", name="plain", settings={"weight_decay": 0.5}),
        trial(dataset, method="deterministic", name="wild", settings={"lr": 1e12, "clip_norm": 1e12}),
        trial(dataset, method="magnitude", epochs=5, train_size=60, dev_size=9),
    )  # fmt: skip
    result = script("inference.search", *flags(folder), "--jobs", 2)
    assert result.returncode == 0, result.stderr
    (folder / "said").write_text(result.stdout)
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "kept" / "r.jsonl").read_text().splitlines()]


def test_every_trial_has_a_record_once(searched: Path) -> None:
    found = {(r["trial"]["method"], r["trial"]["seed"], r["trial"].get("name")): r for r in records(searched)}
    assert len(found) == len(records(searched)) == 5  # the trial named twice ran once
    dropout = found["dropout:0.2", 0, None]
    for name in ("accuracy", "nll", "brier", "ece"):
        assert 0 <= dropout[f"{name}_calibrated"] < 10 and 0 <= dropout[f"{name}_uncalibrated"] < 10
    assert 0.1 <= dropout["temperature"] <= 10 and 0 < dropout["val_nll_calibrated"] < 10 and dropout["seconds"] > 0
    assert (dropout["train_size"], dropout["val_size"], dropout["dev_size"]) == (30, 3, 45)
    assert dropout["samples"] == 3 and dropout["retention_mean"] == 1 and dropout["pruned_fraction"] == 0
    changed = dropout["settings"]
    assert (changed["drop_rate"], changed["epochs"], changed["batch_size"]) == (0.2, 2, 10)
    assert changed["vit"]["width"] == 8 and "weight_decay" not in changed and "lr" not in changed
    plain = found["deterministic", 0, "plain"]  # has no temperature of its own, and gets one here
    assert plain["settings"]["weight_decay"] == 0.5 and plain["temperature"] != 1
    magnitude = found["magnitude", 0, None]
    assert magnitude["pruned_fraction"] == pytest.approx(0.6, abs=0.01) and magnitude["dev_size"] == 9
    assert (magnitude["settings"]["epochs"], magnitude["settings"]["finetune_epochs"]) == (4, 1)


def test_no_folder_of_this_machine_is_recorded(searched: Path) -> None:
    assert str(searched) not in (searched / "kept" / "r.jsonl").read_text()
    assert {r["trial"]["dataset"] for r in records(searched)} == {"npz:images.npz"}


def test_a_training_that_diverged_is_recorded_with_its_error(searched: Path) -> None:
    (wild,) = [r for r in records(searched) if r["trial"].get("name") == "wild"]
    assert "the loss became" in wild["error"] and "nll_calibrated" not in wild
    table = (searched / "said").read_text()
    assert "1 diverged" in table and table.index("plain") < table.index("wild")


def test_the_tables_have_means_over_seeds_with_their_spread(searched: Path) -> None:
    table = (searched / "said").read_text()
    values = [r["nll_calibrated"] for r in records(searched) if r["trial"]["method"] == "dropout:0.2"]
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in table
    assert "made, n = 30" in table and "made, n = 60" in table and "dropout:0.2 width=8" in table
    assert "5 trials done, 0 failed" in table


def test_a_second_call_trains_nothing_and_a_cut_line_is_written_again(searched: Path) -> None:
    path = searched / "kept" / "r.jsonl"
    before = path.read_text()
    again = script("inference.search", *flags(searched))
    assert again.returncode == 0 and "5 trials, 5 of them done already" in again.stderr
    assert path.read_text() == before
    *whole, last = before.splitlines(keepends=True)
    path.write_text("".join(whole) + last[: len(last) // 2])  # as if killed while it was written
    more = script("inference.search", *flags(searched))
    assert more.returncode == 0 and "5 trials, 4 of them done already" in more.stderr
    old, new = json.loads(last), json.loads(path.read_text().splitlines()[-1])
    assert path.read_text().startswith("".join(whole))
    old.pop("seconds", None), new.pop("seconds", None)
    assert new == old  # the same numbers too


def test_defaults_that_have_changed_since_are_tried_again(tmp_path: Path) -> None:
    one = make_trial(trial(images(tmp_path)), "data", "cpu")
    record = {"trial": one.given, "resolved": json.loads(json.dumps(one.resolved()))}
    assert one.is_that_of(record) and not one.is_that_of(None) and "device" not in record["resolved"]
    assert one.is_that_of({"trial": one.given})  # of an earlier version, which did not say
    older = {name: value for name, value in record["resolved"].items() if name != "shrinkage"}
    assert one.is_that_of({"trial": one.given, "resolved": older})  # a setting that was added since
    assert not one.is_that_of({"trial": one.given, "resolved": record["resolved"] | {"shrinkage": 77.0}})


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"trial": {"dataset": "a"}}\n{"trial": {"dataset": "b"}}')
    assert [record["trial"]["dataset"] for record in read_records(path)] == ["a", "b"]
    assert path.read_text().endswith("}\n") and len(read_records(path)) == 2


def test_the_test_part_is_not_looked_at(tmp_path: Path) -> None:
    """Other test images, with other labels, change nothing; and none of them is in any part."""
    dataset = images(tmp_path, test_images=np.full((9, 6, 6), 7, np.uint8))
    given = make_trial(trial(dataset), "data", "cpu")
    first = run_trial(given)
    data = development_data(given.config.data, given.dev_size)
    for part in (data.train, data.val, data.test):
        assert not (part.images[:] == 7).flatten(1).all(1).any()
    images(tmp_path, test_images=pixels(9, 6, 6, seed=9), test_labels=np.zeros(9, np.uint8))
    second = run_trial(given)
    assert first.pop("seconds") > 0 and second.pop("seconds") > 0 and first == second


def test_without_a_test_part(tmp_path: Path) -> None:
    """A fifth then stands for it and is left alone."""
    dataset = images(tmp_path, test_images=None, test_labels=None)
    data = development_data(DataConfig(dataset, train_size=30))
    assert (len(data.train), len(data.val), len(data.test)) == (30, 3, 36)  # of 72
    assert "error" not in run_trial(make_trial(trial(dataset), "data", "cpu"))


def test_development_images_are_the_same_with_every_seed(tmp_path: Path) -> None:
    dataset = images(tmp_path)
    first, second = (development_data(DataConfig(dataset, train_size=30), 20, seed) for seed in (0, 1))
    assert (first.test.images[:] == second.test.images[:]).all() and len(first.test) == 20
    assert not (first.train.images[:] == second.train.images[:]).all()
    parts = [{image.tobytes() for image in part.images[:].numpy()} for part in (first.train, first.val, first.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 53  # no image is in two parts


def test_too_few_images_for_development(tmp_path: Path) -> None:
    dataset = images(tmp_path)
    write_trials(tmp_path / "t.json", trial(dataset, train_size=88))
    refused(script("inference.search", *flags(tmp_path)), "90 images", "1 trials failed")
    assert not (tmp_path / "kept" / "r.jsonl").read_text()  # not recorded: it may be put right


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"drop_rat": 0.1}}, ["unknown setting drop_rat", "drop_rate"]),
        ({"settings": {"lr": "high"}}, ["lr", "number"]),
        ({"settings": {"lr": -1}}, ["lr", "positive"]),
        ({"settings": {"sparsity": 2}}, ["sparsity"]),
        ({"settings": {"seed": 3}}, ["seed", "key of the trial"]),
        ({"settings": {"epochs": 3}}, ["epochs", "key of the trial"]),
        ({"settings": {"finetune_epochs": 2}}, ["epochs", "at least 1"]),
        ({"settings": 3}, ["settings"]),
        ({"vit": {"widht": 3}}, ["widht", "width"]),
        ({"vit": {"pool": "max"}}, ["pool"]),
        ({"methd": "x"}, ["unknown key methd", "method"]),
        ({"method": "nope"}, ["nope", "deterministic"]),
        ({"method": "deterministic:3"}, ["deterministic:3", "no number"]),
        ({"train_size": "many"}, ["train_size", "many"]),
        ({"seed": True}, ["seed"]),
        ({"preset": "nope"}, ["nope", "paper-28"]),
        ({"dev_size": 0}, ["dev_size", "at least 1"]),
        ({"init": "runs/a", "vit": {"depth": 7}}, ["init", "vit"]),
        ({"init": "runs/a", "preset": "small"}, ["init", "preset"]),
    ],
)
def test_bad_trials_are_refused_by_name_before_anything_trains(change: dict, words: list[str], tmp_path: Path) -> None:
    write_trials(tmp_path / "t.json", trial("digits"), trial("digits") | change)
    result = here("inference.search", *flags(tmp_path))
    refused(result, "trial 2", *words)
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "kept").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[3]", "[{}]", "[" * 100_000])
def test_files_that_hold_no_trials(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    refused(here("inference.search", *flags(tmp_path)), "t.json")
    assert not (tmp_path / "kept").exists()


def test_bad_places_for_records(tmp_path: Path) -> None:
    write_trials(tmp_path / "t.json", trial("digits"))
    start = ["--trials", tmp_path / "t.json", "--device", "cpu", "--records"]
    refused(here("inference.search", *start, tmp_path), "takes a file")
    (tmp_path / "r.jsonl").write_text('{"trial": {}}\nnothing\n{"trial": {}}\n')
    refused(here("inference.search", *start, tmp_path / "r.jsonl"), "damaged in line 2")
    refused(here("inference.search", *start, tmp_path / "t.json" / "r"), "cannot write")


def test_a_trial_of_every_method_is_made_from_its_own_defaults() -> None:
    for name, row in METHODS.items():
        config = make_trial({"dataset": "digits", "method": name}, "data", "cpu").config
        assert (config.ising, config.baseline) == (row.ising, row.baseline)
        assert (config.train.weight_decay, config.train.calibrate) == (row.train.weight_decay, row.train.calibrate)
        assert config.train.samples == 16 and config.vit.patch_size == 2


def test_multiply_accumulates_are_shown_where_there_are_some(capsys) -> None:
    scores = {"accuracy_calibrated": 0.5, "nll_calibrated": 1.0, "macs": 123456}
    print_tables([(make_trial({"dataset": "digits", "name": "[b]\x1b[2J"}, "data", "cpu"), scores)])
    shown = capsys.readouterr().out
    assert "MACs" in shown and "123,456" in shown and "[b]" in shown and "\x1b" not in shown
