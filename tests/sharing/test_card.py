"""Model cards: what they tell, and that no text of a user becomes Markdown, HTML or YAML."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EVIL, ROOT
from markdown_it import MarkdownIt

from pyro_isingvit import TrainedRun, compact, load_run
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.intervals import overall_intervals
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.sharing.card import Card, front_matter, markdown_text, write_card

NAMES = (
    EVIL, "a|b", "`code`", "two\nlines", "**bold** _it_ [x](http://e.vil) ![y](z)", "<!-- -->", "&lt;", "$x$ ~~s~~",
    "www.e.vil", "me@e.vil", "# h", "1. one", "- two", "\\|", "été", "```", "---", "\u202eabc", "", "{{ 7*7 }}", "😀",
)  # fmt: skip
BY_CLASS = ("sensitivity", "specificity", "auroc", "average_precision")
CARD = Card("digits", NAMES, (1, 8, 8), "uint8", "TrainedRun", "A network.", {"training": 100, "test": 30}, 1234,
            "model.safetensors", 5_000_000)  # fmt: skip


def html(card: str) -> str:
    """As GitHub and the Hub show it."""
    body = card.split("---\n", 2)[2]
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body)


def text_of(page: str) -> str:
    import html as library

    return library.unescape(re.sub(r"<[^>]*>", "", page))


OURS = ("h1", "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "a", "code", "pre")
SHOWN = (EVIL, "a|b", "`code`", "two\\nlines", "**bold** _it_ [x](http://e.vil) ![y](z)", "&lt;", "www.e.vil", "😀")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are_and_do_nothing(name: str) -> None:
    numbers = {f"{metric}{end}": None for metric in BY_CLASS for end in ("", "_interval")}
    rows = [{"class": each, "images": 3, **numbers} for each in NAMES]
    metrics = {"accuracy": 0.5, "worst_class": EVIL, "worst_class_sensitivity": 0.1, "by_class": rows, "intervals": {}}
    card = replace(CARD, dataset=name, metrics=metrics, intended_use=name, ood=[(name, 3, "entropy", 0.9, 0.1)],
                   prior=[1 / len(NAMES)] * len(NAMES), version=name)  # fmt: skip
    page = html(write_card(card))
    assert set(re.findall(r"</?(\w+|!--)", page)) <= {*OURS, "!--"}
    assert page.count("<!--") == page.count("<a ") == page.count("<h1>") == 1 and page.count("<pre>") == 2
    cells = [row.count("<td") for row in re.findall(r"<tr>(.*?)</tr>", page, re.S) if "<td" in row]
    assert sorted(set(cells)) == [2, 3, 5, 6] and cells.count(6) == len(NAMES)
    for each in SHOWN:
        assert each in text_of(page), each


def test_links_and_mentions_are_not_made_of_names() -> None:
    assert "www." not in markdown_text("www.e.vil") and "@" not in markdown_text("me@e.vil")


def test_long_and_many_names_are_cut() -> None:
    card = write_card(replace(CARD, classes=[f"class number {i}" for i in range(1000)], dataset="x" * 500))
    assert "and 940 more" in card and "x" * 79 in card and "x" * 80 not in card and len(card) < 8000


@pytest.mark.parametrize("name", ["digits", *NAMES])
def test_the_front_matter_is_yaml_that_the_hub_reads(name: str) -> None:
    from huggingface_hub import ModelCard

    metrics = {"accuracy": 0.987, "nll": 0.1, "ece": None}
    card = ModelCard(write_card(replace(CARD, dataset=name, metrics=metrics, license="mit")))
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("pyro-isingvit", "mit", "image-classification")
    assert {each.metric_type: each.metric_value for each in data.eval_results} == {"accuracy": 0.987, "nll": 0.1}
    assert "bayesian" in data.tags
    ModelCard(front_matter(CARD) + "x")
    for wrong in ("mit\ntags: x", "MIT", "a b", ""):
        with pytest.raises(UserError, match="identifier"):
            write_card(replace(CARD, license=wrong))


@pytest.mark.parametrize("kind", ["run", "compact"])
def test_the_example_of_the_card_runs(kind: str, digits_run: Path, tmp_path: Path) -> None:
    run = load_run(digits_run)
    if kind == "run":
        run.save_pretrained(tmp_path)
    else:
        compact(run, keep=0.5).save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor(") == {"run": 4, "compact": 2}[kind]


@pytest.mark.parametrize("pixels", ["uint16", "float32"])
def test_the_example_has_the_pixels_of_the_run(pixels: str) -> None:
    assert f"np.{pixels})" in write_card(replace(CARD, pixels=pixels))


def test_the_card_of_a_run_has_its_numbers(digits_run: Path, tmp_path: Path) -> None:
    import json

    metrics = json.loads((digits_run / "metrics.json").read_text())
    shared = load_run(digits_run).save_pretrained(tmp_path / "x", license="mit", intended_use="Teaching.\n- not a list")
    card = (shared / "README.md").read_text()
    low, high = json.loads((shared / "metrics.json").read_text())["intervals"]["accuracy"]
    assert low < metrics["accuracy"] < high
    assert f"| Accuracy | {100 * metrics['accuracy']:.2f} % ({100 * low:.2f} % to {100 * high:.2f} %) |" in card
    assert f"| training images | {metrics['train_size']:,} |" in card
    for told in ("| test images | 360 |", "licence | mit", "Teaching. - not a list",
                 "(figures/calibration.png)", "### Calibration", "was not measured", "Balanced accuracy"):  # fmt: skip
        assert told in card, told
    assert (shared / "figures" / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    page = html(card)
    assert page.count("<table>") == 3 and "{{" not in page and "None" not in page


def test_a_run_that_was_not_evaluated_says_so(digits_run: Path, tmp_path: Path) -> None:
    run = TrainedRun.from_pretrained(load_run(digits_run).save_pretrained(tmp_path / "first"))
    card = (run.save_pretrained(tmp_path / "second") / "README.md").read_text()
    assert "It was not evaluated" in card and "95%" not in card
    assert not (tmp_path / "second" / "metrics.json").exists() and not (tmp_path / "second" / "figures").exists()


# Intervals ---------------------------------------------------------------------------------------------------------


def random_predictions(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and labels drawn from them: calibrated."""
    made = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(count, 3, generator=made)).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=made).squeeze(1)


def test_intervals_hold_the_value_and_the_truth() -> None:
    """Of 100 samples of 200 images, 95% intervals hold the accuracy, NLL and Brier score of all in 88 or more."""
    probs, labels = random_predictions(200_000, 0)
    truth = classification_metrics(probs, labels)
    held = dict.fromkeys(("accuracy", "nll", "brier"), 0)
    for i in range(100):
        rows = slice(200 * i, 200 * (i + 1))
        value, ends = classification_metrics(probs[rows], labels[rows]), overall_intervals(probs[rows], labels[rows])
        for name in held:
            low, high = ends[name]
            assert low <= value[name] <= high
            held[name] += low <= truth[name] <= high
        assert ends["ece"][0] >= 0
    assert all(88 <= count <= 100 for count in held.values()), held


def test_the_resampled_metrics_are_those_of_the_resample() -> None:
    """Where all resamples say the same, the interval is the value: images that are all alike."""
    probs, labels = torch.tensor([[0.7, 0.2, 0.1]]).repeat(50, 1), torch.zeros(50, dtype=torch.long)
    value, ends = classification_metrics(probs, labels), overall_intervals(probs, labels)
    for name in ("nll", "brier", "ece"):
        np.testing.assert_allclose(ends[name], value[name], atol=1e-6)
    assert ends["accuracy"] == [pytest.approx(0.9289, abs=1e-3), 1.0]  # Clopper and Pearson, 50 of 50
