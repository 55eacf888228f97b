"""``analysis.shift_table``: runs, compact networks and ONNX files in one table."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from helpers import here, refused

from analysis.shift_table import MARKERS, Entry, check_rows, main, table
from pyro_isingvit import compact, fit, load_data, load_run
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.methods.registry import spec_of
from pyro_isingvit.pruning.export import export_onnx
from pyro_isingvit.pruning.onnx_members import export_members


@pytest.fixture(autouse=True)
def quiet(caplog) -> None:
    caplog.set_level(logging.CRITICAL)


def test_everything_that_predicts(digits_run: Path, tmp_path: Path, capsys) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    second = shutil.copytree(digits_run, tmp_path / "second")
    run = load_run(digits_run)
    small, bayes = compact(run, keep=0.6), compact(run, "bayes", keep=0.6)
    small.save_pretrained(tmp_path / "small")
    bayes.save_pretrained(tmp_path / "bayes")
    export_onnx(small, tmp_path / "one.onnx")
    export_members(bayes, tmp_path / "many.onnx", 3)
    page = tmp_path / "page.md"
    page.write_text("\n".join(("before", *MARKERS, "after")))
    entries = [digits_run, second, *(tmp_path / name for name in ("small", "bayes", "one.onnx", "many.onnx"))]
    main(["--run", *map(str, entries), "--out", str(tmp_path / "o"), "--samples", "3", "--max-images", "30", "--ood",
          "noise", "--device", "cpu", "--page", str(page)])  # fmt: skip
    found = json.loads((tmp_path / "o" / "shift" / "results.json").read_text(), parse_constant=pytest.fail)["entries"]
    first, again, mean, draws, one, many = (found[str(path)] for path in entries)
    assert first == again and first["kind"] == "`ising`"
    assert [each["kind"] for each in (mean, draws, one, many)] == [
        "compact", "compact, 3 draws", "ONNX, one network", "ONNX, 3 networks"
    ]  # fmt: skip
    for ours, theirs in ((mean, one), (draws, many)):  # the same networks, by another runtime
        assert ours["clean"]["nll"] == pytest.approx(theirs["clean"]["nll"], abs=1e-3)
        assert ours["mean"]["nll"] == pytest.approx(theirs["mean"]["nll"], abs=1e-3)
    text = page.read_text()
    assert "AUROC, noise" in text and "| `ising` | " in text and text.count("± 0.000") >= 8


def test_what_cannot_be(digits_run: Path, tmp_path: Path) -> None:
    refused(here("analysis.shift_table", "--run", tmp_path), "starts with the folder of a run")
    refused(here("analysis.shift_table", "--run", digits_run, tmp_path / "none"), "none")
    refused(here("analysis.shift_table", "--run", digits_run, tmp_path / "none.onnx"), "none.onnx")
    refused(here("analysis.shift_table", "--run", digits_run, "--samples", 0), "--samples")
    refused(here("analysis.shift_table", "--run", digits_run, "--seed", -1), "--seed must not be negative")
    refused(here("analysis.shift_table", "--run", digits_run, "--ood", "noise", "noise"), "--ood")


def test_the_table_by_hand() -> None:
    def entry(kind: str, accuracy: float) -> dict[str, object]:
        scores = {"accuracy": accuracy, "nll": 1.0, "ece": 0.1}
        return {"kind": kind, "clean": scores, "mean": scores, "strange": {"noise": {"auroc": 0.9, "fpr95": None}}}

    rows = table([entry("a", 0.5), entry("b", 0.1), entry("a", 0.7)])
    assert rows[0][1:4] == ["accuracy, clean", "NLL, clean", "ECE, clean"] and rows[0][-1] == "FPR95, noise"
    assert rows[1][:2] == ["a", "0.600 ± 0.141"] and rows[2][:2] == ["b", "0.100"]


def test_runs_of_one_row_are_seeds_of_one_training(digits_run: Path, tmp_path: Path) -> None:
    data = load_data("digits", train_size=100, val_fraction=0.1, seed=3)
    for name, settings in (("low", {"drop_rate": 0.2}), ("high", {"drop_rate": 0.6}), ("long", {"epochs": 2})):
        usual = {"method": "dropout", "epochs": 1, "progress": False, "drop_rate": 0.2, "seed": 3}
        run = fit("digits", data, **(usual | settings))
        run.evaluate(data.test)
        run.save(tmp_path / name)
    low, high, long = (load_run(tmp_path / name) for name in ("low", "high", "long"))
    assert (spec_of(low.config), spec_of(high.config)) == ("dropout:0.2", "dropout:0.6")
    entries = [Entry(name, f"`{spec_of(run.config)}`", lambda x: x, (), run.config) for name, run in
               (("low", low), ("high", high))]  # fmt: skip
    check_rows(entries)
    with pytest.raises(UserError, match=r"low and long would be seeds of one row, `dropout:0.2`, but their settings"):
        check_rows([*entries, Entry("long", "`dropout:0.2`", lambda x: x, (), long.config)])
