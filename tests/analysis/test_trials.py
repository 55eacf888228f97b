"""The table of a search's trials, from records that are written by hand."""

import json
from pathlib import Path

import pytest
from helpers import here, refused

from analysis.trials import place, table, told
from pyro_isingvit.core.errors import UserError


def record(
    size: int, seed: int, nll: float | None, epochs: int = 40, method: str = "ising", **settings: object
) -> dict:
    trial = {"dataset": "npz:x.npz", "label": "made", "train_size": size, "seed": seed, "method": method,
             "epochs": epochs, "vit": {"depth": 2}, "settings": {"margin": 1, **settings}}  # fmt: skip
    return {"trial": trial, **({"error": "diverged"} if nll is None else {"nll_calibrated": nll, "macs": 12_345})}


RECORDS = [
    record(300, 0, 0.7, 60, max_keep=0.9), record(300, 1, 0.8, 60, max_keep=0.9), record(2000, 0, 0.5, max_keep=0.9),
    record(300, 0, 0.6, 60, max_keep=0.98), record(2000, 0, None, max_keep=0.98), record(2000, 0, 0.45, max_keep=0.9),
    record(2000, 0, 0.4, 80, max_keep=0.9),
]  # fmt: skip


def test_rows_are_settings_and_columns_data_sets() -> None:
    text = table(RECORDS, "nll_calibrated")
    shared, _, heading, _, *rows = text.splitlines()
    assert shared == "all: margin 1, method ising"
    assert heading == "| trial | made 300 | made 2,000 |"
    assert rows == [
        "| max_keep=0.9 | 0.7500 (2) | 0.4750 (2) |",  # 60 and 40 epochs are the usual ones there
        "| epochs=80 max_keep=0.9 |  | 0.4000 |",
        "| max_keep=0.98 | 0.6000 |  |",  # with 2,000 images it diverged
    ]


def test_rows_with_few_numbers_are_left_out_on_demand() -> None:
    text = table(RECORDS, "nll_calibrated", cells=2)
    assert text.splitlines()[0] == "all: margin 1, max_keep 0.9, method ising"
    assert text.splitlines()[4:] == ["| as above | 0.7500 (2) | 0.4750 (2) |"]
    assert "12,345" in table(RECORDS, "macs") and "12,345.0" not in table(RECORDS, "macs")
    with pytest.raises(UserError, match="no trials with nll_calibrated in 3"):
        table(RECORDS, "nll_calibrated", cells=3)


def test_what_a_trial_says() -> None:
    bare = {"dataset": "digits"}
    assert place(bare) == ("digits", 0) and told(bare) == {"method": "ising"}


def test_the_script_filters_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*RECORDS, record(300, 0, 0.9, 60, "dropout:0.2")]))
    shown = here("analysis.trials", "--records", path, "--methods", "dropout")
    assert shown.returncode == 0 and "0.9000" in shown.stdout and "0.7" not in shown.stdout
    assert "0.7000" in here("analysis.trials", "--records", path, "--seeds", 0).stdout
    refused(here("analysis.trials", "--records", path, "--methods", "l0"), "no trials of these methods")
    refused(here("analysis.trials", "--records", tmp_path / "none"), "is not there")
    path.write_text("nothing\n")
    refused(here("analysis.trials", "--records", path), "damaged in line 1")


def test_the_best_row_comes_first_whatever_is_better() -> None:
    made = [
        record(300, 0, 0.5, max_keep=keep) | {"accuracy_calibrated": score} for keep, score in ((0.9, 0.5), (0.8, 0.7))
    ]
    rows = table(made, "accuracy_calibrated").splitlines()[4:]
    assert [row.split(" |")[0] for row in rows] == ["| max_keep=0.8", "| max_keep=0.9"]


def test_a_trial_without_a_seed_is_that_of_seed_0(tmp_path: Path) -> None:
    one, other = record(300, 0, 0.7), record(300, 0, 0.7)
    del other["trial"]["seed"]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (one, other)))
    shown = here("analysis.trials", "--records", path).stdout
    assert "0.7000" in shown and "(2)" not in shown
