import base64
import contextlib
import io
import re

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import EVIL
from made import S, make_history, make_run, make_tree, random_probs
from markupsafe import escape
from matplotlib.figure import Figure

from analysis.report import main
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.metric_table import EXPLANATIONS
from pyro_isingvit.predictive.metrics import calibration_error
from pyro_isingvit.report import attention_figures, figures, mask_figures, pruning_figures, style
from pyro_isingvit.report.run_report import write_report

SECTIONS = (
    "training",
    "calibration",
    "confusion",
    "uncertainty",
    "risk",
    "sets",
    "intervals",
    "retention",
    "structure",
    "heads",
    "masks",
    "margins",
)


@pytest.fixture(scope="module")
def shown_and_page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run") / "a run", dataset=f"imagefolder:{EVIL}", stored=4)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(["--run", str(folder)])
    return shown.getvalue(), folder / "report" / "index.html"


@pytest.fixture(scope="module")
def page(shown_and_page):
    return shown_and_page[1]


def test_script_prints_the_page_and_the_main_metrics(shown_and_page):
    shown, page = shown_and_page
    assert page.is_file()
    assert "Accuracy" in shown and "0.5000" in shown and "index.html" in shown


def test_page_has_every_section_and_picture(page):
    text = page.read_text()
    for name in (*SECTIONS, "metrics", "configuration"):
        assert f'<section id="{name}"' in text and f'href="#{name}"' in text
    for name in SECTIONS:
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<figcaption>") == text.count("<picture>") == len(SECTIONS)
    for title, _, why in EXPLANATIONS.values():
        assert str(escape(title)) in text and str(escape(why)) in text
    assert '<meta name="viewport"' in text and "1.2.3" in text
    assert "granularity" in text.split("<pre>")[1]
    assert len(text) < 5e6


def test_page_asks_nothing_of_the_network(page):
    text = page.read_text()
    for encoded in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", text):
        text += base64.b64decode(encoded).decode()
    references = set(re.findall(r"(?:src|href|srcset)=\"(?!data:|#)([^\"]*)", text))
    assert not references
    outside = re.sub(r'(xmlns(:\w+)?|rdf:about|rdf:resource)="[^"]*"', "", text)
    outside = re.sub(r"<metadata>.*?</metadata>|<!DOCTYPE svg.*?>", "", outside, flags=re.S)
    assert not re.search(r"https?://", outside)


def test_names_are_escaped(page):
    text = page.read_text()
    assert "<script" not in text
    assert "imagefolder:&lt;script&gt;alert(1)&lt;/script&gt;" in text  # the data set
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in text  # a class, among the frequent errors


def test_large_runs_keep_layer_means_only(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "to_svg", lambda figure: "<svg/>")
    monkeypatch.setattr(style, "save_png", lambda figure, path: None)
    tree = make_tree(["a", "b", "c"], depth=1, stored=4)
    slim = xr.Dataset({f"retention_mean_{kind}": ("layer", [0.3, 0.4]) for kind in ("qkv", "fc1")})
    tree["variational"] = xr.DataTree(slim)
    del tree["constant_data"]
    text = write_report(make_run(tmp_path / "run", tree=tree)).read_text()
    assert text.count("This run keeps no data for this figure.") == 3  # intervals, masks and margins
    assert text.count("<picture>") == len(SECTIONS) - 4


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "metrics.json", "posterior.nc", "."])
def test_missing_files_are_named(tmp_path, page, missing, capsys):
    folder = tmp_path / "run"
    if missing != ".":
        folder.mkdir()
        for name in ("config.json", "metrics.jsonl", "metrics.json", "posterior.nc"):
            if name != missing:
                (folder / name).write_bytes((page.parent.parent / name).read_bytes())
    with pytest.raises(SystemExit) as left:
        main(["--run", str(folder)])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert (missing if missing != "." else str(folder)) in error and "Traceback" not in error
    if missing in ("metrics.json", "posterior.nc"):
        assert f"--resume {folder}" in error
    assert not (folder / "report").exists()


@pytest.mark.parametrize("name", ["metrics.json", "posterior.nc", "metrics.jsonl", "config.json"])
def test_damaged_files_are_named(tmp_path, page, name):
    folder = tmp_path / "run"
    folder.mkdir()
    for other in ("config.json", "metrics.jsonl", "metrics.json", "posterior.nc"):
        (folder / other).write_bytes((page.parent.parent / other).read_bytes())
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(folder)


def test_a_posterior_without_a_group_is_named(tmp_path):
    tree = make_tree(["a", "b"])
    del tree["predictive_summary"]
    with pytest.raises(UserError, match=r"posterior\.nc lacks what the report shows"):
        write_report(make_run(tmp_path / "run", tree=tree))


# ------------------------------------------------------------------------------------------------- figures


def texts(figure: Figure) -> list[str]:
    """Draws the figure, which raises on bad text or layout, and returns what is written in it."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.mark.parametrize("history", [
    make_history(), make_history(1), make_history(60, validation=False),
    [{"epoch": 1, "phase": "ising", "nll": 1.0, "val_nll": None, "weight_kl": float("nan"), "mask_kl": 0.0}],
], ids=["all", "one epoch", "no validation", "gaps"])  # fmt: skip
def test_training_curves(history):
    written = texts(figures.training_curves(history, narrow=len(history) == 10))
    assert ("validation accuracy" in written) == ("val_accuracy" in history[0])


@pytest.mark.parametrize("classes,images,skill", [(2, 50, 1.0), (10, 300, 50.0), (100, 200, 2.0), (3, 1, 0.0)])
def test_reliability_diagram_writes_the_library_ece(classes, images, skill):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, images)
    probs = random_probs(rng, (images,), classes, labels, skill)
    expected = calibration_error(torch.from_numpy(probs), torch.from_numpy(labels))
    assert f"ECE = {100 * expected:.2f} %" in texts(figures.reliability_diagram(probs, labels))


def test_reliability_gap_is_drawn():
    probs = np.tile([[0.9, 0.1]], (10, 1))
    figure = figures.reliability_diagram(probs, np.array([0] * 5 + [1] * 5))
    heights = [bar.get_height() for bars in figure.axes[0].containers for bar in bars]
    assert heights == pytest.approx([0.5, 0.4])
    assert "10" in texts(figure)


@pytest.mark.parametrize("right", [np.ones(20, bool), np.zeros(20, bool), np.arange(20) < 15])
def test_uncertainty_histograms_without_right_or_wrong(right):
    rng = np.random.default_rng(0)
    entropy = rng.uniform(0, np.log(2), 20)
    for information in (entropy / 2, np.zeros(20)):
        written = texts(figures.uncertainty_histograms(entropy, information, right, 2, narrow=bool(right.all())))
        assert f"wrong ({int((~right).sum())} images)" in written


@pytest.mark.parametrize("depth,granularity", [(1, "weight"), (2, "unit"), (1, "head"), (12, "head")])
def test_mask_figures(depth, granularity):
    rng = np.random.default_rng(0)
    retention = {"patch": rng.random((8, 12)), "head": np.zeros((3, 8))}
    for kind, rows in (("qkv", 24), ("attn_out", 8), ("fc1", 16), ("fc2", 8)):
        size = {"weight": (depth, rows, 8), "unit": (depth, rows, 1), "head": (depth, 1, 1)}[granularity]
        retention[kind] = np.broadcast_to(rng.random(size), (depth, rows, 8))
    written = texts(mask_figures.mask_posteriors(retention, narrow=depth == 2))
    assert any("100" in text and "pruned" in text for text in written)  # the head
    assert sum("pruned" in text for text in written) == 2 + 4 * depth
    means = {kind: np.atleast_1d(values.mean((-2, -1))) for kind, values in retention.items()}
    assert f"{100 * means['qkv'][0]:.0f}" in texts(mask_figures.retention_by_layer(means))
    kept = rng.random((depth, 16))
    assert f"{100 * kept[0, 0]:.0f}" in texts(mask_figures.retention_by_head(kept, narrow=depth == 1))


def test_blocks_without_masks_are_counted():
    """The last two blocks of four."""
    rng = np.random.default_rng(0)
    retention = {kind: rng.random((2, 8, 8)) for kind in ("qkv", "fc1")} | {"head": rng.random((3, 8))}
    written = texts(mask_figures.mask_posteriors(retention, first=2))
    assert [any(text.startswith(f"qkv {i}:") for text in written) for i in range(4)] == [False, False, True, True]
    means = {kind: np.atleast_1d(values.mean((-2, -1))) for kind, values in retention.items()}
    for figure in (
        mask_figures.retention_by_layer(means, first=2),
        mask_figures.retention_by_head(rng.random((2, 4)), first=2),
    ):
        labels = [label.get_text() for label in figure.get_axes()[0].get_yticklabels()]
        assert labels == ["2", "3"]
    kept = {"value": [1.0], "score": [1.0], "hidden": [1.0, 0.0]}
    written = texts(pruning_figures.kept_structure([kept, kept], first=2))
    assert "block 2" in written and "block 3" in written and "block 0" not in written


def test_margins_of_overlapping_patches():
    """8x8 pixels, patches of 4 from two to two pixels: 3x3 of them, the sixth ends the second row."""
    margins = np.ones((1, 1, 9))
    margins[0, 0, 5] = 1e-6
    pixels = np.zeros((1, 1, 8, 8), np.uint8)
    figure = attention_figures.attention_margins(margins, pixels, np.arange(1), 4, stride=2)
    assert "image 0: 1e-06\nlayer 0, patch 5" in texts(figure)
    (box,) = next(ax for ax in figure.get_axes() if ax.get_title().startswith("image 0")).patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((3.5, 1.5), 4, 4)


def test_mask_figures_with_blocks_or_outside_alone():
    for kinds in ({"qkv": np.full((1, 4, 4), 0.9)}, {"head": np.full((4, 4), 0.0)}):
        texts(mask_figures.mask_posteriors(kinds))
        texts(mask_figures.retention_by_layer({kind: np.atleast_1d(v.mean((-2, -1))) for kind, v in kinds.items()}))


@pytest.mark.parametrize("images,depth,narrow", [(1, 1, False), (7, 2, True), (40, 12, False)])
@pytest.mark.parametrize("cls", [False, True])
def test_attention_margins(images, depth, narrow, cls):
    rng = np.random.default_rng(0)
    margins = rng.lognormal(size=(images, depth, 6 + cls))  # 5x8 pixels in patches of 3: 2x3, the last ones cut
    pixels, names = rng.integers(0, 256, (images, 1, 5, 8), dtype=np.uint8), np.arange(images) + 500
    margins[0, depth - 1, -1] = 1e-6
    if images > 1:
        margins[1, 0, 0] = 1e-5
    figure = attention_figures.attention_margins(margins, pixels, names, 3, narrow=narrow)
    written = texts(figure)
    assert f"image 500: 1e-06\nlayer {depth - 1}, patch 5" in written and f"layer {depth - 1}" in written
    if images > 1:
        assert f"image 501: 1e-05\nlayer 0, {'CLS token' if cls else 'patch 0'}" in written
    (box,) = next(ax for ax in figure.get_axes() if ax.get_title().startswith("image 500")).patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((5.5, 2.5), 2, 2)
    shown = [ax for ax in figure.get_axes() if ax.get_title().startswith("image ")]
    assert len(shown) == min(6, images)


def test_equal_margins_are_drawn():
    texts(attention_figures.attention_margins(np.ones((2, 1, 4)), np.zeros((2, 3, 4, 4), np.uint8), np.arange(2), 2))


@pytest.mark.parametrize("classes,channels,images,narrow", [(2, 1, 1, False), (3, 3, 7, True), (100, 3, 40, False)])
def test_credible_intervals(classes, channels, images, narrow):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    probs = random_probs(rng, (S, images), classes, labels)
    pixels = rng.integers(0, 256, (images, channels, 9, 7), dtype=np.uint8)
    figure = figures.credible_intervals(pixels, probs, labels, [f"c{i}" for i in range(classes)], narrow=narrow)
    assert texts(figure)
    assert len(figure.get_axes()) == 2 * min(12, images)


@pytest.mark.parametrize("classes", [2, 10, 20, 100])
def test_confusion_matrix(classes):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 900, (classes, classes))
    table[0] = 0  # a class without test images
    names = [f"class number {i} $x_" for i in range(classes)]
    written = texts(figures.confusion_matrix(table, names, narrow=classes == 10))
    assert (str(table[1, 1]) in written) == (classes <= 20)


def test_labels_survive_any_class_name():
    assert style.label("a" * 40, 3) == "a" * 13 + "…"
    assert style.label("犬", 3) == "class 3" and style.label("  \n", 4) == "class 4"
    assert style.label("cost $5", 0) == r"cost \$5"
    table = np.eye(3, dtype=int)
    texts(figures.confusion_matrix(table, ["$\\frac{", "\x07", "many  words\nhere"]))


def test_style_leaves_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    style.to_svg(mask_figures.retention_by_head(np.eye(2)))
    assert dict(matplotlib.rcParams) == before


def test_the_same_figure_is_the_same_svg():
    assert len({style.to_svg(mask_figures.retention_by_head(np.eye(3))) for _ in range(2)}) == 1
