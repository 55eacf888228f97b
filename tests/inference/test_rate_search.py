"""The search for learning rates: its networks, its records, and that it resumes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import here, refused

import inference.rates
from analysis.rates import best_of, curves, table
from analysis.rates import main as draw
from inference.rates import RatesArguments, best_rate, main, make_cells, settings
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.methods.registry import METHODS

SHORT = ["--dataset", "digits", "--train-size", "60", "--patch-size", "4", "--epochs", "2", "--widths", "16", "32",
         "--depths", "1", "2", "--rates", "1e-3", "4e-3", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    main([*SHORT, "--methods", "deterministic", "--out", str(folder)])
    return folder


def records(folder: Path) -> list[dict]:
    return json.loads((folder / "rates.json").read_text())


def test_widths_at_the_first_depth_and_depths_at_the_first_width() -> None:
    cells = [*make_cells(RatesArguments(Path("x"), rates=(1e-3, 2e-3), methods=("ising",)))]
    shapes = [(64, 2), (128, 2), (192, 2), (384, 2), (64, 4), (64, 6), (64, 12)]
    assert [(c.vit.width, c.vit.depth, c.train.lr) for c in cells] == [(*s, lr) for s in shapes for lr in (1e-3, 2e-3)]
    assert all(c.vit.width == 16 * c.vit.heads and c.ising == METHODS["ising"].ising for c in cells)


def test_methods_have_their_own_defaults() -> None:
    for method in ("dropout", "l0", "ising-sparse"):
        one = RatesArguments(Path("x"), (1e-3,), methods=(method,), epochs=10, widths=(64,), depths=(2,))
        (cell,) = make_cells(one)
        assert cell.baseline == METHODS[method].baseline and cell.ising == METHODS[method].ising
        assert cell.train.epochs + cell.train.finetune_epochs == 10


def test_every_network_has_a_record_for_each_rate(out: Path) -> None:
    told = [(r["settings"]["width"], r["settings"]["depth"], r["settings"]["rate"]) for r in records(out)]
    assert sorted(told) == [(w, d, lr) for w, d in ((16, 1), (16, 2), (32, 1)) for lr in (1e-3, 4e-3)]
    for record in records(out):
        assert 0 <= record["accuracy"] <= 1 and record["nll"] > 0 and record["seconds"] > 0


def test_how_images_are_read_is_part_of_a_record() -> None:
    one = RatesArguments(Path("x"), (1e-3,), methods=("ising",), widths=(64,), depths=(2,))
    changes = ({"image_size": 32}, {"val_fraction": 0.3}, {"intensity": "percentile 1 99"}, {"groups": "p"})
    told = [settings(next(iter(make_cells(replace(one, data=DataConfig(**change)))))) for change in ({}, *changes)]
    assert "read" not in told[0] and all(a != b for i, a in enumerate(told) for b in told[:i])
    elsewhere = DataConfig(data_root="there", cache="here", download=True)
    assert settings(next(iter(make_cells(replace(one, data=elsewhere))))) == told[0]


def test_it_resumes_and_adds(out: Path) -> None:
    before = records(out)
    (out / "rates.json").write_text(json.dumps(before[:3] + before[4:]))
    main([*SHORT, "--methods", "deterministic", "--out", str(out)])
    again = records(out)
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in (*before[:3], *before[4:], before[3])]
    main([*SHORT, "--methods", "deterministic", "--rules", "uniform", "--widths", "32", "--out", str(out)])
    assert records(out)[: len(again)] == again and {r["settings"]["rule"] for r in records(out)} == {
        "transfer",
        "uniform",
    }


def test_two_commands_at_a_time_keep_what_both_found(out: Path, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "rates"
    flags = [*SHORT, "--methods", "deterministic", "--widths", "32", "--depths", "1", "--out", str(place)]
    done = list[int]()

    def found(config) -> dict:
        if not done:  # the other command begins and ends while this one trains
            done.append(1)
            main([*flags, "--rules", "uniform"])
        return {"accuracy": 0.5, "nll": 1.0, "seconds": 0.0}

    monkeypatch.setattr(inference.rates, "score", found)
    main([*flags, "--rules", "transfer"])
    assert {record["settings"]["rule"] for record in records(place)} == {"transfer", "uniform"}


def test_the_table_and_the_figure(out: Path, capsys) -> None:
    draw(["--results", str(out)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| method | `rate_rule` | width | depth | 0.001 | 0.004 | best rate |"
    wide = [r for r in records(out) if (r["settings"]["width"], r["settings"]["rule"]) == (32, "transfer")]
    lowest = min(wide, key=lambda r: r["nll"])
    row = next(line for line in shown if line.startswith("| `deterministic` | transfer | 32 | 1 |"))
    assert f"**{lowest['nll']:.3f}**" in row and row.endswith(f"| {lowest['settings']['rate']:.2g} |")
    assert (out / "rates.png").stat().st_size > 10_000


def test_the_best_rate_lies_between_the_tried_ones() -> None:
    assert best_rate([1.0, 2.0, 4.0, 8.0], [3.0, 1.0, 1.0, 3.0]) == pytest.approx(2 * 2**0.5)
    assert best_rate([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]) == 1.0 and best_rate([1.0, 2.0], [2.0, 1.0]) == 2.0
    made = [{"settings": {"method": "m", "rule": "r", "width": 1, "depth": 1, "rate": rate}, "nll": nll}
            for rate, nll in ((4.0, 2.0), (1.0, 2.0), (2.0, 1.0))]  # fmt: skip
    assert best_of(next(iter(curves(made).values()))) == 2.0 and table(curves(made)).endswith("**1.000** | 2.000 | 2 |")


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--widths", "40"], "multiples of 16"), (["--methods", "nope"], "unknown method"), (["--rates"], "--rates"),
     (["--val-fraction", "0"], "validation images")],
)  # fmt: skip
def test_bad_input(flags: list[str], word: str, tmp_path: Path) -> None:
    refused(here("inference.rates", *SHORT, *flags, "--out", tmp_path), word)


def test_damaged_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text('[{"settings": {}}]')
    refused(here("inference.rates", *SHORT, "--out", tmp_path), "is damaged")
    (tmp_path / "rates.json").write_text("[]")
    refused(here("analysis.rates", "--results", tmp_path), "no records")


@pytest.mark.parametrize("rates", [[1e-3, 2e-3, 4e-3, 8e-3], [1e-3, 2.5e-3, 1e-2], [5e-4, 4e-3, 5e-3, 6e-3]])
def test_the_best_rate_is_that_of_the_parabola_whatever_the_factors(rates: list[float]) -> None:
    assert best_rate(rates, [math.log(rate / 3e-3) ** 2 for rate in rates]) == pytest.approx(3e-3)


def test_a_file_is_known_by_its_name_and_other_defaults_are_measured_again(out: Path, tmp_path: Path) -> None:
    config = next(iter(make_cells(RatesArguments(tmp_path))))
    named = {
        settings(replace(config, data=replace(config.data, dataset=name)))["data"]
        for name in ("npz:d.npz", "npz:/a/b/d.npz")
    }
    assert named == {"d.npz"} and settings(config)["data"] == "digits"
    kept = records(out)
    kept[0]["resolved"]["shrinkage"] = 99.0  # what another version had
    kept[0]["nll"] = -1.0
    (tmp_path / "rates.json").write_text(json.dumps(kept))
    main([*SHORT, "--methods", "deterministic", "--out", str(tmp_path)])
    again = records(tmp_path)
    assert len(again) == len(kept) and min(record["nll"] for record in again) > 0
