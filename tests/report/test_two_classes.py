"""What the page of a run with two classes shows."""

import json

import numpy as np
import pytest
import xarray as xr
from helpers import EVIL
from made import make_run, make_tree

from pyro_isingvit.predictive.datatree import save_datatree
from pyro_isingvit.predictive.metric_table import class_rows, metric_rows
from pyro_isingvit.report.run_report import write_report
from pyro_isingvit.report.two_classes import ranking_curves, shown_threshold, threshold_table

CLASSES = ["healthy", "ill"]


def part(images=200, skill=1.5, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random(images) < 0.3).astype(int)
    p = 1 / (1 + np.exp(-(skill * (2 * y - 1) + rng.normal(size=images) * 1.2)))
    return {"prob_mean": np.stack([1 - p, p], 1).astype(np.float32), "y": y}


def test_thresholds_come_from_the_validation_part_where_there_is_one() -> None:
    test, validation = part(), part(80, seed=1)
    rows, told = threshold_table(test, validation, CLASSES)
    alone, honest = threshold_table(test, {}, CLASSES)
    assert "chosen on the 80 images of the validation part" in told and "optimistic" not in told
    assert "chosen on the test part itself" in honest and "optimistic" in honest
    assert [row.rule for row in rows] == [row.rule for row in alone]
    values = set(validation["prob_mean"][:, 1].tolist())
    assert all(row.value in values for row in rows[1:]) and rows[0].value == 0.5
    calls = test["prob_mean"][:, 1] >= rows[1].value
    assert rows[1].sensitivity == pytest.approx(calls[test["y"] == 1].mean())  # judged on the test part
    assert alone[2].sensitivity is not None and alone[2].sensitivity >= 0.95
    one_class = {"prob_mean": validation["prob_mean"], "y": np.zeros(80, int)}
    assert threshold_table(test, one_class, CLASSES) == (alone, honest)
    assert shown_threshold(rows[0])[:2] == ["0.5", "0.500"] and shown_threshold(rows[0])[2].endswith(" %")


def test_the_curves_name_their_areas() -> None:
    test = part()
    for narrow in (False, True):
        figure = ranking_curves(test["prob_mean"], test["y"], CLASSES, threshold_table(test, {}, CLASSES)[0], narrow)
        texts = [text.get_text() for ax in figure.axes for text in ax.get_legend().get_texts()]
        assert any(text.startswith("AUROC 0.9") and " to " in text for text in texts)
        assert f"chance, prevalence {test['y'].mean():.2f}" in texts
        assert sum(text == "threshold: Youden" for text in texts) == 2


@pytest.mark.parametrize("classes", [("healthy", EVIL), ("a", "b", "c")])
def test_the_page_has_them_for_two_classes_alone(classes, tmp_path) -> None:
    page = write_report(make_run(tmp_path / "run", classes)).read_text()
    two = len(classes) == 2
    for text in ('id="ranking"', "Youden", "images of the validation part", "Called positive"):
        assert (text in page) == two
    assert (tmp_path / "run" / "report" / "ranking.png").exists() == two
    assert "<script>" not in page


def test_a_run_that_keeps_its_validation_part_is_not_optimistic(tmp_path) -> None:
    tree, validation = make_tree(CLASSES), part(60)
    tree["validation"] = xr.DataTree(xr.Dataset({
        "prob_mean": (("image_val", "class"), validation["prob_mean"]), "y": ("image_val", validation["y"]),
    }))  # fmt: skip
    page = write_report(make_run(tmp_path / "run", CLASSES, tree=tree)).read_text()
    assert "chosen on the 60 images of the validation part" in page and "optimistic" not in page


def test_test_images_of_one_class_alone_have_no_curves(tmp_path) -> None:
    tree = make_tree(CLASSES)
    tree["predictive_summary"]["y"][:] = 0
    folder = make_run(tmp_path / "run", CLASSES)
    save_datatree(tree, folder / "posterior.nc")
    assert 'id="ranking"' not in write_report(folder).read_text()


def test_metrics_are_shown_with_their_intervals(tmp_path) -> None:
    row = {"class": EVIL, "images": 12, "sensitivity": 0.5, "sensitivity_interval": [0.25, 0.75], "specificity": None,
           "specificity_interval": None, "auroc": 0.75, "auroc_interval": None, "average_precision": 0.5,
           "average_precision_interval": [0.4, 0.6]}  # fmt: skip
    metrics = {
        "accuracy": 0.9, "auroc_macro": 0.75, "worst_class_sensitivity": 0.5, "worst_class": EVIL, "by_class": [row],
        "intervals": {"auroc_macro": [0.7, 0.8], "worst_class_sensitivity": None},
    }  # fmt: skip
    shown = {title: value for title, value, _ in metric_rows(metrics)}
    assert shown["AUROC, macro"] == "0.7500 (0.7000 to 0.8000)" and shown["Accuracy"] == "90.00 %"
    assert shown[f"Worst class: {EVIL}"] == "50.00 %"
    assert class_rows(metrics)[0][1:] == [
        "12",
        "50.00 % (25.00 % to 75.00 %)",
        "–",
        "0.7500",
        "0.5000 (0.4000 to 0.6000)",
    ]
    assert class_rows({}) == []  # a run of version 0.6
    folder = make_run(tmp_path / "run", CLASSES)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(folder).read_text()
    assert "Each class" in page and "0.7500 (0.7000 to 0.8000)" in page and "<script>" not in page
