"""Figures and page of compact networks: both layouts, odd sizes, damaged files."""

import json
from pathlib import Path

import pytest
from made import DENSE, FULL, block, point

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.report import pruning_figures, style
from pyro_isingvit.report.pruning_report import is_compact, write_pruning_report


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("heads", "units", "depth"), [(1, 1, 1), (4, 100, 4), (16, 1024, 2), (3, 33, 12)])
def test_structure(heads: int, units: int, depth: int, narrow: bool) -> None:
    figure = pruning_figures.kept_structure([block(heads, units, layer / depth) for layer in range(depth)], narrow)
    assert len(figure.axes) == 2 * depth
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == [f"0 of {heads} heads", f"0 of {units} units"]
    assert style.to_svg(figure).startswith("<?xml")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_frontier(count: int, narrow: bool) -> None:
    points = [point(0.9 / (i + 1)) for i in range(count)]
    figure = pruning_figures.frontier(points, FULL, {"kept": 0.45}, DENSE, narrow)
    lines = figure.axes[3].get_lines()[0]
    assert list(lines.get_xdata()) == sorted(p["kept"] for p in points)
    assert style.to_svg(figure).startswith("<?xml")


def test_damaged_files(tmp_path: Path) -> None:
    assert not is_compact(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.json is missing"):
        write_pruning_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "frontier.json").write_text("[]")
    with pytest.raises(UserError, match=r"frontier\.json is damaged"):
        write_pruning_report(tmp_path)
    (tmp_path / "frontier.json").write_text(json.dumps({"structure": [block(2, 4, 0.5)], "points": []}))
    with pytest.raises(UserError, match="lacks what the page shows"):
        write_pruning_report(tmp_path)


def test_networks_without_a_report_are_told_so(tmp_path: Path) -> None:
    (tmp_path / "compact.json").write_text("{}")
    with pytest.raises(UserError, match="without a report"):
        write_pruning_report(tmp_path)  # as in bayes/
    for name in ("metrics.json", "branches.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="without a report"):
        write_pruning_report(tmp_path)
    (tmp_path / "branches.json").unlink()
    with pytest.raises(UserError, match=r"frontier\.json is missing"):
        write_pruning_report(tmp_path)
