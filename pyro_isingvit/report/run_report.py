"""The page of a run: metrics, figures and settings, in a single HTML file that needs nothing else."""

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from pyro_isingvit.core.checkpoint import write_text
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig, ViTConfig
from pyro_isingvit.data.load import is_named
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.predictive.metric_table import class_rows, metric_rows
from pyro_isingvit.predictive.thresholds import Threshold
from pyro_isingvit.pruning.assembly import structure
from pyro_isingvit.report import attention_figures, figures, mask_figures, pruning_figures, style, two_classes
from pyro_isingvit.report.decisions import decision_sections
from pyro_isingvit.report.section import Section
from pyro_isingvit.report.verdicts import verdicts
from pyro_isingvit.runs.folder import CONFIG, HISTORY, METRICS, POSTERIOR, is_evaluated, read_config, read_history

PAGE = "index.html"
THRESHOLD = 0.5  # retention below it: pruned


def write_report(folder: Path) -> Path:
    """Writes ``report/index.html`` and the figures as PNG into a run folder.

    Args:
        folder: an evaluated run.

    Returns:
        the page.

    Raises:
        UserError: no such folder, a run that was cut short, or a file that is damaged.
    """
    config = read_config(folder)
    metrics, history = read_metrics(folder), read_history(folder / HISTORY)
    if not (folder / POSTERIOR).is_file():
        raise UserError(_not_evaluated(folder, POSTERIOR))
    tree = load_datatree(folder / POSTERIOR)
    try:
        shown = [_draw(section, folder / "report") for section in _sections(tree, history, config)]
        confusions, summary = _confusions(tree), _arrays(tree, "predictive_summary")
        thresholds, told = _thresholds(tree)
        judged = verdicts(summary["prob_mean"], summary["y"])
    except UserError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / POSTERIOR} lacks what the report shows ({error}); train again.") from error
    finally:
        tree.close()

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        config=config, version=tree.attrs.get("version") or config.version, metrics=metric_rows(metrics),
        sections=shown, verdicts=judged, confusions=confusions, configuration=config.to_json(),
        folder=folder.resolve().name, by_class=class_rows(metrics),
        thresholds=[two_classes.shown_threshold(row) for row in thresholds], thresholds_told=told,
    )  # fmt: skip
    write_text(folder / "report" / PAGE, page)
    return folder / "report" / PAGE


def _draw(section: Section, target: Path) -> dict[str, Any]:
    """The figure as addresses for the page, wide and narrow; the wide one is written as PNG too."""
    images = {}
    if section.draw is not None:
        for layout in ("wide", "narrow"):
            figure = section.draw(narrow=layout == "narrow")
            images[layout] = _data_address(style.to_svg(figure))
            if layout == "wide":
                style.save_png(figure, target / f"{section.name}.png")
    return {"section": section, "images": images}


def resume_evaluates(folder: Path) -> bool:
    """Whether a run was trained on data that it can find again, but is not evaluated, so that resuming evaluates it."""
    trained = (folder / CONFIG).is_file() and (folder / HISTORY).is_file() and not is_evaluated(folder)
    return trained and is_named(read_config(folder).data.dataset)


def _not_evaluated(folder: Path, name: str) -> str:
    if resume_evaluates(folder):
        return f"{folder / name} is missing: the run is not evaluated yet; resume the run for that"
    return (
        f"{folder / name} is missing: the run is not evaluated; do so with its test images and save it again: "
        f"`run.evaluate(data)`, `run.save(folder, overwrite=True)`."
    )


def read_metrics(folder: Path) -> dict[str, Any]:
    """The run's metrics.json.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / METRICS
    if not path.is_file():
        raise UserError(_not_evaluated(folder, METRICS))
    try:
        metrics = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); resume the run to write it again.") from error
    if not isinstance(metrics, dict):
        raise UserError(f"{path} holds no metrics; resume the run to write it again.")
    return metrics


def _data_address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _confusions(tree: xr.DataTree, most: int = 10) -> list[tuple[str, str, int, int]]:
    """The most frequent errors: true class, predicted class, images, images of the true class."""
    classes, table = _classes(tree), _confusion_table(tree)
    wrong = table - np.diag(table.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(i), len(classes)) for i in order]
    return [(classes[t], classes[p], int(wrong[t, p]), int(table[t].sum())) for t, p in pairs if wrong[t, p]]


def _classes(tree: xr.DataTree) -> list[str]:
    return [str(name) for name in json.loads(tree.attrs["classes"])]


def _arrays(tree: xr.DataTree, group: str, start: str = "") -> dict[str, np.ndarray]:
    """The variables of a group whose names begin with ``start``; empty where there is no such group."""
    variables = tree.children[group].dataset.data_vars if group in tree.children else {}
    return {str(name): variables[name].values for name in variables if str(name).startswith(start)}


def _shown(tree: xr.DataTree) -> np.ndarray | None:
    """Images as a screen shows them, (B, 1 or 3, H, W) uint8; None where the run keeps none."""
    constant = _arrays(tree, "constant_data")
    return constant.get("shown", constant.get("pixels"))


def _confusion_table(tree: xr.DataTree) -> np.ndarray:
    summary = _arrays(tree, "predictive_summary")
    guess = summary["prob_mean"].argmax(-1)
    return confusion_matrix(summary["y"], guess, labels=np.arange(len(_classes(tree))))


def _thresholds(tree: xr.DataTree) -> tuple[list[Threshold], str]:
    """The table of thresholds and what to say of it; empty unless there are two classes."""
    summary, classes = _arrays(tree, "predictive_summary"), _classes(tree)
    if not two_classes.has_curves(summary["y"], classes):
        return [], ""
    return two_classes.threshold_table(summary, _arrays(tree, "validation"), classes)


def _sections(tree: xr.DataTree, history: list[dict[str, Any]], config: RunConfig) -> list[Section]:
    """What the page shows, in order; a figure whose data the run lacks has ``draw=None``."""
    classes, summary = _classes(tree), _arrays(tree, "predictive_summary")
    probs, labels = summary["prob_mean"], summary["y"]
    right = probs.argmax(-1) == labels
    retention, means, kept_heads = _retention(tree), _mean_retention(tree), _kept_heads(tree)
    pixels, first = _shown(tree), _first_block(config)
    step = style.naming_step(len(classes))
    return [
        Section(
            "training", "Training",
            "The terms of the objective by epoch. The loss adds the two KL terms, divided by κ and by the "
            "number of images, to the NLL. The training NLL is that of single draws, the validation NLL that "
            "of the mean of several, which is lower; one that rises while training falls is overfitting. "
            "In the pilot phase every mask is at one; the Ising phase updates the masks from the curvature "
            "of the likelihood; fine-tuning freezes them.",
            partial(figures.training_curves, history) if history else None,
        ),
        Section(
            "calibration", "Calibration",
            "Each bar collects the test images whose predicted class got a probability in that range; its "
            "height is the share that was right. Hatching is the gap to the mean confidence: a bar that "
            "ends below the dashed line is overconfident, one above it too modest. Bars of few images "
            "(grey, logarithmic) say little. ECE is the gap averaged over the images."
            + (" The probabilities are those under equal classes (setting balance): where the test part has other "
               "shares, they cause a part of the gap." if config.train.balance != "none" else ""),
            partial(figures.reliability_diagram, probs, labels), half=True,
        ),
        Section(
            "confusion", "Confusion matrix",
            "Rows are true classes, columns predictions (the class of the highest posterior predictive "
            "mean), of all test images. Colour is the share of the row"
            + (f"; one class in {step} is named." if step > 1 else ", numbers are images."),
            partial(figures.confusion_matrix, _confusion_table(tree), classes), half=True,
        ),
        *_ranking(tree),
        Section(
            "uncertainty", "Uncertainty of right and wrong predictions",
            "Entropy is the total uncertainty of a prediction; mutual information is the part that comes "
            "from not knowing the weights. The further the wrong predictions lie to the right of the right"
            " ones, the better the network knows when it errs. Dotted lines are medians.",
            partial(
                figures.uncertainty_histograms, summary["entropy"], summary["mutual_information"],
                right, len(classes),
            ),
        ),
        *decision_sections(tree, probs, labels),
        Section(
            "intervals", "Credible intervals of single images",
            "For the images of highest and lowest entropy: the most probable classes (and the true one, in"
            " green; also above the image). Dots are posterior means, bars hold the middle 90 % of the "
            "posterior draws (5 to 95 %). Wide bars: the draws disagree. Narrow bars at middling values: "
            "they agree that the image is ambiguous.",
            None if pixels is None
            else partial(
                figures.credible_intervals, pixels, _arrays(tree, "posterior_predictive")["probs"],
                _arrays(tree, "observed_data")["y"], classes,
            ),
        ),
        Section(
            "retention", "Retention by layer",
            "Mean posterior probability, in per cent, that a weight of the matrix is kept. Dark matrices "
            "are the ones the data can do without.",
            partial(mask_figures.retention_by_layer, means, first=first) if means else None, half=True,
        ),
        Section(
            "heads", "Retention by attention head",
            "Share of the head's weights (query, key and value rows, output columns), in per cent, that "
            "the posterior draws keep on average. Unequal heads specialise; a head near 0 could be "
            "removed.",
            None if kept_heads is None else partial(mask_figures.retention_by_head, kept_heads, first=first), half=True,
        ),
        *_structure(retention, config),
        Section(
            "masks", "Posterior of the masks",
            "How the retention probabilities of each matrix are distributed (logarithmic counts of "
            "weights; the number after the name is the layer). Weights left of the dashed line (0.5) are "
            "pruned. Mass at both ends means clear decisions; one lump in the middle means that the "
            "likelihood hardly guides the masks. With unit or head masks, weights under one mask share "
            "their probability.",
            partial(mask_figures.mask_posteriors, retention, THRESHOLD, first=first) if retention else None,
        ),
        Section(
            "margins", "Attention margins",
            "|det(I − Σ A)| of every token, at the posterior mean weights: Σ is the covariance of the tokens it "
            "attends to, A = W_kᵀ W_q / √d. 1 where attention does not depend on the token; at 0 some small "
            "change of the token is cancelled by what it attends to. Dotted: median, dashed: smallest. Outlined "
            "is the support token, the position of the image's smallest margin. The theory is that of causal "
            "attention; for images it is a heuristic. "
            + (f"Trained with the log-barrier, λ = {config.train.log_barrier:g}." if config.train.log_barrier
               else "Trained without the log-barrier (setting log_barrier)."),
            _margins(tree, config.vit),
        ),
    ]  # fmt: skip


def _ranking(tree: xr.DataTree) -> list[Section]:
    """ROC and precision-recall of two classes; none for more, or where one has no image."""
    summary, classes = _arrays(tree, "predictive_summary"), _classes(tree)
    if not two_classes.has_curves(summary["y"], classes):
        return []
    draw = partial(two_classes.ranking_curves, summary["prob_mean"], summary["y"], classes, _thresholds(tree)[0])
    return [Section("ranking", "ROC, precision and recall", two_classes.CAPTION, draw)]


def _retention(tree: xr.DataTree) -> dict[str, np.ndarray]:
    """Retention probabilities: kind -> ([L,] out, in); empty for runs too large to keep them."""
    named = _arrays(tree, "variational", "retention_")
    kinds = {name.removeprefix("retention_"): values for name, values in named.items() if values.ndim >= 2}
    return {
        kind: values[None] if values.ndim == 2 and kind not in mask_figures.OUTSIDE else values
        for kind, values in kinds.items()
    }


def _mean_retention(tree: xr.DataTree) -> dict[str, np.ndarray]:
    """Mean retention probability: kind -> (layers,)."""
    full = {kind: values.mean((-2, -1)) for kind, values in _retention(tree).items()}
    means = _arrays(tree, "variational", "retention_mean_")
    slim = {name.removeprefix("retention_mean_"): values for name, values in means.items()}
    return {kind: np.atleast_1d(values) for kind, values in (full or slim).items()}


def _structure(retention: dict[str, np.ndarray], config: RunConfig) -> list[Section]:
    """The drawing of what is left; none for masks of single weights, or where the run does not keep them."""
    kinds = {"qkv", "attn_out", "fc1", "fc2"}
    if config.ising.granularity == "weight" or not kinds <= set(retention):
        return []
    alive = {kind: torch.from_numpy(retention[kind] > THRESHOLD) for kind in kinds}
    return [
        Section(
            "structure", "What the masks leave of each block",
            "Left, the attention heads: filled where value channels (dark) and query-key channels (light) have a "
            "retention above 0.5. Right, the hidden units of the MLP, each above 0.5 in colour. Blocks whose halves "
            "are both empty are bypassed by the skip connections. Pruning cuts the network down to what is left.",
            partial(pruning_figures.kept_structure, structure(alive, config.vit.heads), first=_first_block(config)),
        )
    ]  # fmt: skip


def _first_block(config: RunConfig) -> int:
    """Number of the first block that has masks."""
    blocks = config.ising.bayesian_blocks
    return 0 if blocks is None else config.vit.depth - blocks


def _margins(tree: xr.DataTree, vit: ViTConfig) -> Callable[..., Figure] | None:
    """The figure of the attention margins; None where the run does not keep them."""
    constant = _arrays(tree, "constant_data")
    if "margin_by_layer" not in constant:
        return None
    names = tree.children["constant_data"].dataset["image_margin"].values
    shown = _shown(tree)
    assert shown is not None
    pixels = shown[np.searchsorted(constant["image_index"], names)]
    return partial(
        attention_figures.attention_margins,
        constant["margin_by_layer"],
        pixels,
        names,
        vit.patch_size,
        stride=vit.stride,
        cls=vit.pool == "cls",
    )


def _kept_heads(tree: xr.DataTree) -> np.ndarray | None:
    """Share of each head kept, averaged over the draws, (L, H); None where the run does not say."""
    draws = _arrays(tree, "posterior", "kept_heads").get("kept_heads")  # (S, [L,] H)
    return None if draws is None else np.atleast_2d(draws.mean(0))
