"""Runs and compact networks of random numbers, for what shows them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import xarray as xr
from helpers import EVIL

from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.predictive.datatree import save_datatree
from pyro_isingvit.predictive.metric_table import EXPLANATIONS
from pyro_isingvit.runs.folder import to_lines

FULL = {"accuracy": 0.9, "nll": 0.3, "ece": 0.02}
DENSE = {"parameters": 100, "macs": 1000}
S = 12  # draws


def point(kept: float) -> dict[str, float]:
    """A row of a frontier."""
    return {
        "threshold": 0.5, "kept": kept, "parameters": int(100 * kept), "nonzero": 10, "macs": int(1000 * kept),
        "latency_1": 0.001, "latency_256": 0.01, "accuracy": 0.8, "nll": 0.5, "ece": 0.03,
    }  # fmt: skip


def block(heads: int, units: int, share: float) -> dict[str, list[float]]:
    """What a pruned block kept of its heads and hidden units."""
    return {
        "value": [share] * heads,
        "score": [0.0] * heads,
        "hidden": [float(i < share * units) for i in range(units)],
    }


def random_probs(rng, shape, classes, labels=None, skill=3.0):
    """Probabilities of any shape; with labels, the likelier the more skill."""
    logits = rng.normal(size=(*shape, classes)) + 1.5 * rng.normal(size=(shape[-1], classes))
    if labels is not None:
        logits[..., np.arange(len(labels)), labels] += skill
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return (exp / exp.sum(-1, keepdims=True)).astype(np.float32)


def make_history(epochs=10, validation=True):
    """What metrics.jsonl holds, in three phases."""
    history = []
    for i in range(epochs):
        phase = "pilot" if i < 2 else "ising" if i < epochs - 2 else "finetune"
        record = {
            "epoch": i + 1, "phase": phase, "loss": 3 / (i + 1), "nll": 2 / (i + 1),
            "weight_kl": 9000 - 500.0 * i, "mask_kl": 0.0 if phase == "pilot" else 400.0 + i, "lr": 1e-3,
            "retention": 0.9 - 0.05 * i, "pruned_fraction": 0.05 * i,
        }  # fmt: skip
        if validation:
            record |= {
                "val_accuracy": 1 - 1 / (i + 2),
                "val_nll": 2.2 / (i + 1),
                "val_brier": 0.2,
                "val_ece": 0.02,
            }
        history.append(record)
    return history


def make_tree(classes, channels=1, side=8, depth=2, heads=4, width=8, images=40, stored=30, seed=0, skill=3.0):
    """A posterior as pyro_isingvit.runs.tree makes it, of random numbers."""
    rng = np.random.default_rng(seed)
    count = len(classes)
    y = rng.integers(0, count, images)
    probs = random_probs(rng, (S, images), count, y, skill)
    mean = probs.mean(0)
    entropy = -(mean * np.log(mean)).sum(-1)
    expected = -(probs * np.log(probs)).sum(-1).mean(0)
    shapes = {
        "patch": (1, width, 12), "qkv": (depth, 3 * width, width), "attn_out": (depth, width, width),
        "fc1": (depth, 2 * width, width), "fc2": (depth, width, 2 * width), "head": (1, count, width),
    }  # fmt: skip
    posterior: dict[str, tuple] = {"kept_heads": (("sample", "layer", "head"), rng.random((S, depth, heads)))}
    variational: dict[str, tuple] = {}
    for kind, (layers, out, inward) in shapes.items():
        lead = ("layer",) if layers > 1 else ()
        dims = (*lead, f"out_{kind}", f"in_{kind}")
        sizes = (layers, out, inward) if lead else (out, inward)
        a = rng.uniform(0.2, 2)
        variational[f"retention_{kind}"] = (dims, 0.9 * rng.beta(a, 1, sizes).astype(np.float32))
        variational[f"loc_{kind}"] = (dims, rng.normal(size=sizes).astype(np.float32))
        posterior[f"kept_{kind}"] = (("sample", *lead), rng.random((S, layers) if lead else (S,)))
    everything = ("image_all", "class")
    groups = {
        "/posterior": xr.Dataset(posterior),
        "/variational": xr.Dataset(variational),
        "/posterior_predictive": xr.Dataset({"probs": (("sample", "image", "class"), probs[:, :stored])}),
        "/predictive_summary": xr.Dataset({
            "prob_mean": (everything, mean), "prob_low": (everything, np.quantile(probs, 0.05, 0)),
            "prob_high": (everything, np.quantile(probs, 0.95, 0)), "entropy": ("image_all", entropy),
            "expected_entropy": ("image_all", expected),
            "mutual_information": ("image_all", entropy - expected), "y": ("image_all", y),
        }),
        "/validation": xr.Dataset(
            {"prob_mean": (("image_val", "class"), mean), "y": ("image_val", y)},
            attrs={"num_samples": S, "draw_seed": 0},
        ),
        "/observed_data": xr.Dataset({"y": ("image", y[:stored])}),
        "/constant_data": xr.Dataset({
            "pixels": (("image", "channel", "height", "width"),
                       rng.integers(0, 256, (min(stored, images), channels, side, side), dtype=np.uint8)),
            "image_index": ("image", np.arange(min(stored, images))),
            "margin_by_layer": (("image_margin", "layer", "token"),
                                rng.lognormal(size=(-(-min(stored, images) // 2), depth, (-(-side // 7)) ** 2))),
        }, coords={"image_margin": np.arange(0, min(stored, images), 2)}),
    }  # fmt: skip
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "library": "pyro-isingvit",
        "version": "1.2.3",
        "classes": json.dumps(list(classes)),
        "part": "test",
    }
    return tree


def make_run(folder: Path, classes=("zero", EVIL, "two & more"), dataset="digits", tree=None, **shape) -> Path:
    """A run's folder as the report reads it, without a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(RunConfig(version="1.2.3"), data=DataConfig(dataset=dataset))
    (folder / "config.json").write_text(config.to_json())
    (folder / "metrics.jsonl").write_text(to_lines(make_history()))
    metrics = {name: 0.5 for name in EXPLANATIONS} | {"dataset": dataset, "method": "ising"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    save_datatree(tree or make_tree(classes, **shape), folder / "posterior.nc")
    return folder


@cache
def real_predictions() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (1497, 10) and labels of real noisy digits, by a classifier that did not see them: 87% right."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels + 3 * np.random.default_rng(0).normal(size=pixels.shape)
    shown, held_out, known, truth = train_test_split(pixels, labels, train_size=300, random_state=0, stratify=labels)
    return LogisticRegression(C=0.01, max_iter=1000).fit(shown, known).predict_proba(held_out), truth
