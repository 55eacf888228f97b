"""Model cards: README.md of a shared network, Markdown with the front matter that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.predictive.metric_table import class_rows, metric_rows
from pyro_isingvit.sharing.folder import MARK

LIBRARY = "pyro-isingvit"
LISTED = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy", "auroc_macro": "AUROC, macro",
          "nll": "NLL (nats)", "brier": "Brier score", "ece": "ECE (15 bins)"}  # fmt: skip
SHOWN = ("accuracy", "balanced_accuracy", "worst_class_sensitivity", "sensitivity", "specificity", "auroc_macro",
         "average_precision_macro", "f1_macro", "nll", "brier", "ece", "auroc_right_wrong", "aurc",
         "credible_set_coverage", "credible_set_size", "temperature", "retention_mean", "samples")  # fmt: skip
MANY = 60  # classes that are listed by name
LONG = 80  # letters of a name
# What Markdown, GitHub's too, may take for more than a letter; a dot after www or a list's number, a dash that begins.
MEANINGFUL = re.compile(r"(?:(?<=www)|(?<=^\d)(?=\. )|(?<=^\d\d)(?=\. ))\.|^[-+]|[^\w .,;%'()/…–+-]|_", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """What a card tells; all texts are escaped when it is written."""

    dataset: str
    classes: Sequence[str]
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    pixels: str
    """Type of the pixels: uint8, uint16 or float32."""
    loader: str
    """Public class that loads the folder."""
    kind: str
    """What the network is, one sentence in Markdown of ours."""
    sizes: Mapping[str, int]
    """Images of each part."""
    parameters: int
    weights: str
    """Name of the file of weights."""
    size: int
    """Its bytes."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """As in metrics.json; empty: not evaluated."""
    figures: Sequence[tuple[str, str, str]] = ()
    """Heading, file, what it shows; Markdown of ours."""
    ood: Sequence[tuple[str, int, str, float, float]] = ()
    """Images without a class of ours: name, how many, score, AUROC, FPR95."""
    prior: Sequence[float] | None = None
    """Shares of the classes that the probabilities stand for."""
    version: str = ""
    """Of this library."""
    license: str | None = None
    """Identifier of a licence, such as mit."""
    intended_use: str | None = None
    """What it is meant for, in the user's words."""
    repo: str | None = None
    """owner/name, where it is known."""


def check_license(license: str | None) -> str | None:
    """The identifier of a licence.

    Raises:
        UserError: something else.
    """
    known = license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,62}", license)
    need(known, f"`license` takes an identifier such as mit, apache-2.0 or other, not {license!r:.60}.")
    return license


def markdown_text(text: object, most: int = LONG) -> str:
    """A text that Markdown and HTML show as it is: one line, every character with a meaning as an entity.

    Args:
        text: from a user.
        most: longer texts are cut.
    """
    line = printable(str(text))
    line = line if len(line) <= most else line[: most - 1] + "…"
    return MEANINGFUL.sub(lambda found: f"&#{ord(found[0])};", line)


def front_matter(card: Card) -> str:
    """YAML between two lines of dashes; every text is written as JSON, which is YAML too."""
    metrics = [
        {"type": name, "name": title, "value": round(float(card.metrics[name]), 6)}
        for name, title in LISTED.items()
        if isinstance(card.metrics.get(name), int | float)
    ]
    name = printable(card.dataset)[:LONG]
    lines = [f"library_name: {LIBRARY}", "pipeline_tag: image-classification"]
    lines += [f"license: {card.license}"] if card.license else []
    lines += ["tags:", *(f"- {tag}" for tag in (LIBRARY, "bayesian", "uncertainty", "vision-transformer"))]
    if metrics:
        result = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"type": re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "unnamed", "name": name,
                        "split": "test"},
            "metrics": metrics,
        }  # fmt: skip
        lines += [f"model-index: {json.dumps([{'name': f'{name}, {LIBRARY}', 'results': [result]}])}"]
    return "\n".join(["---", *lines, "---", ""])


def write_card(card: Card) -> str:
    """The text of README.md.

    Raises:
        UserError: a licence that is none.
    """
    import jinja2

    check_license(card.license)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["text"] = markdown_text
    shown = {name: card.metrics[name] for name in SHOWN if name in card.metrics}
    rows = metric_rows({**shown, "intervals": card.metrics.get("intervals", {}),
                        "worst_class": card.metrics.get("worst_class")})  # fmt: skip
    body = environment.get_template("card.md.j2").render(
        card=card, rows=rows, named=[f"{i} = {markdown_text(name)}" for i, name in enumerate(card.classes[:MANY])],
        shares=[f"{markdown_text(name)} {x:.3f}" for name, x in zip(card.classes, card.prior or (), strict=False)],
        by_class=class_rows(dict(card.metrics))[:MANY], many=MANY, mark=MARK,
        megabytes=f"{card.size / 1e6:.2f}", intended=" ".join((card.intended_use or "").split()),
    )  # fmt: skip
    return front_matter(card) + body
