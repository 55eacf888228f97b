"""Laws that hold for any input, tried on many: round trips, bounds, signs, agreement with other libraries."""

import dataclasses
import io
import json
import math
import zipfile
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.untrusted import csv_text, file_stem, printable
from pyro_isingvit.data.load import load_data
from pyro_isingvit.ising.coupling import COUPLINGS, Network
from pyro_isingvit.ising.distributions import (
    SelectionMask,
    SpikeAndSlab,
    SpikeAndSlabPosterior,
    bernoulli_kl,
    slab_kl,
)
from pyro_isingvit.methods.sparse import sparse_vd_kl
from pyro_isingvit.nets.readers import vit_readers
from pyro_isingvit.predictive.calibration import fit_temperature, temper
from pyro_isingvit.predictive.from_pyro import from_pyro_svi
from pyro_isingvit.predictive.metrics import classification_metrics, entropy

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def many(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=SLOW, database=None)


# ---- settings


def of(kind: Any) -> st.SearchStrategy:
    """Values that a field of this type may have."""
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    simple = {
        int: st.integers(-(2**31) + 1, 2**31 - 1), str: st.text(max_size=20), bool: st.booleans(),
        type(None): st.none(),
    }  # fmt: skip
    if kind in simple:
        return simple[kind]
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if dataclasses.is_dataclass(kind):
        fields = {field.name: of(field.type) for field in dataclasses.fields(kind) if field.name != "format"}
        return st.builds(kind, **fields)
    if get_origin(kind) is tuple:  # tuple[kind, ...]
        return st.lists(of(get_args(kind)[0]), max_size=3).map(tuple)
    return st.one_of([of(each) for each in get_args(kind)])


@many(60)
@given(of(RunConfig))
def test_settings_survive_json(config: RunConfig) -> None:
    assert RunConfig.from_json(config.to_json()) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@many(150)
@given(st.data(), JSON)
def test_any_json_is_settings_or_refused(data: Any, value: Any) -> None:
    raw = json.loads(RunConfig().to_json())
    part = data.draw(st.sampled_from([None, *(name for name in raw if isinstance(raw[name], dict))]))
    target = raw if part is None else raw[part]
    target[data.draw(st.sampled_from([*target, "other"]))] = value
    for text in (json.dumps(raw), json.dumps(value)):
        try:
            config = RunConfig.from_json(text)
        except UserError as error:
            assert "config.json" in str(error)
        else:
            assert RunConfig.from_json(config.to_json()) == config


# ---- data


SHAPES = st.sampled_from([(), (0,), (5,), (5, 1), (5, 2), (5, 4, 4), (7, 4, 4), (5, 4, 4, 1), (5, 4, 4, 3),
                          (5, 4, 4, 2), (5, 4, 5), (0, 4, 4), (5, 0, 4), (5, 4, 4, 4, 4), (12, 4, 4),
                          (12,), (12, 1)])  # fmt: skip
DTYPES = st.sampled_from(["u1", "i1", "i8", "u8", "f4", "f8", "?", "c8", "U3", "S2", "M8[s]", "V4", "O"])
ARRAYS = st.one_of(
    st.tuples(DTYPES, SHAPES).map(lambda spec: np.zeros(spec[1], spec[0])),
    hnp.arrays(np.int64, st.sampled_from([(12,), (5,)]), elements=st.integers(-2, 4)),
    hnp.arrays(np.float64, (5,), elements=st.floats()), st.just(np.arange(12) % 2), st.just(np.zeros((12, 4, 4), "u1")),
)  # fmt: skip
KEYS = [f"{part}_{kind}" for part in ("train", "val", "test") for kind in ("images", "labels")]


@many(150)
@given(st.dictionaries(st.sampled_from([*KEYS, "other"]), ARRAYS), st.integers(-1, 20) | st.none(), st.floats())
def test_any_npz_loads_or_is_refused(tmp_path, arrays: dict, size: int | None, fraction: float) -> None:
    np.savez(tmp_path / "a.npz", **arrays, allow_pickle=True)
    try:
        data = load_data(f"npz:{tmp_path / 'a.npz'}", train_size=size, val_fraction=fraction)
    except UserError as error:
        assert str(error)
    else:
        assert len(data.train) and set(data.train.labels.tolist()) == set(range(data.info.num_classes))


@many(60)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_no_npz(tmp_path, content: bytes, member: bool) -> None:
    if member:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("train_images.npy", b"\x93NUMPY" + content)
        content = buffer.getvalue()
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError):
        load_data(f"npz:{tmp_path / 'a.npz'}")


@many(200)
@given(st.text(st.characters(), max_size=200))
def test_any_name_is_harmless(name: str) -> None:
    shown, stem = printable(name), file_stem(name)
    assert (
        len(shown.encode()) >= len(name) and "\x1b" not in shown and "\0" not in shown and len(shown.splitlines()) <= 1
    )
    assert printable(shown) == shown and file_stem(stem) == stem
    assert 0 < len(stem) <= 80 and not set(stem) & set('/\\\0:*?"<>| ') and not stem.startswith(".")
    first = csv_text(shown)[:1]
    assert first not in ("=", "@", "\t", "\r") and (first not in ("+", "-") or math.isfinite(float(shown)))


# ---- coupling


@many(60)
@given(
    st.sampled_from(list(COUPLINGS)), st.integers(1, 3), st.sampled_from([(4, 1), (4, 2), (6, 3)]), st.booleans(),
    st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6]), st.floats(0, 1), st.integers(0, 999),
)  # fmt: skip
def test_couplings_lie_in_0_1(name, depth, shape, two_layer, scale, decay, seed) -> None:
    (width, heads), draw = shape, torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        keep = torch.rand(size, generator=draw) < torch.rand((), generator=draw)
        return torch.randn(size, generator=draw).pow(2) * keep

    shapes = {"patch": (1, width, 5), "qkv": (depth, 3 * width, width), "attn_out": (depth, width, width),
              "fc1": (depth, 7, width), "fc2": (depth, width, 7)}  # fmt: skip
    if two_layer:
        shapes["head_hidden"] = (1, width // 2, width)
    shapes["head"] = (1, 3, width // 2 if two_layer else width)
    squared = {kind: scale * random(*size) for kind, size in shapes.items()}
    seen = set()

    def update(kind: str, layer: int, c: torch.Tensor) -> torch.Tensor:
        assert torch.isfinite(c).all() and (c >= 0).all() and (c <= 1 + 1e-5).all(), (kind, layer)
        seen.add((kind, layer))
        matrix = squared[kind][layer]
        assert torch.broadcast_shapes(c.shape, matrix.shape) == matrix.shape
        return torch.rand(matrix.shape, generator=draw).round(decimals=1)

    readers = vit_readers(patch=5, width=width, heads=heads, depth=depth, hidden=7, classes=3,
                          top=width // 2 if two_layer else None)  # fmt: skip
    assert readers.shapes == shapes
    COUPLINGS[name](Network(squared, random(2 * depth + 1, width), readers, decay), update)
    assert seen == {(kind, layer) for kind, size in shapes.items() for layer in range(size[0])}


# ---- divergences


LOGITS = st.floats(-60, 60)
SCALES = st.floats(1e-6, 1e4)
LOCS = st.floats(-1e4, 1e4)


@many(200)
@given(LOGITS, LOGITS, LOCS, SCALES, SCALES, st.floats(0, 1))
def test_divergences_are_not_negative(a, b, loc, scale, tau, retention) -> None:
    a, b, loc, scale, retention = (torch.tensor(x, dtype=torch.double) for x in (a, b, loc, scale, retention))
    for value in (bernoulli_kl(a, b), slab_kl(loc, scale, tau), bernoulli_kl(a.float(), b.float())):
        assert torch.isfinite(value) and value >= -1e-9
    assert slab_kl(loc.float(), scale.float(), tau) >= -1e-6
    assert bernoulli_kl(a, a) <= 1e-12 and abs(slab_kl(torch.zeros(()), torch.tensor(tau), tau)) < 1e-6
    mask = SelectionMask(torch.tensor(0.5), logits=a.float()[None])
    assert (torch.distributions.kl_divergence(mask, torch.distributions.Bernoulli(logits=b.float()[None])) >= 0).all()
    xi = torch.ones(1)
    q = SpikeAndSlabPosterior(loc.float()[None], scale.float()[None], xi, retention.float()[None], 1e-3)
    assert (torch.distributions.kl_divergence(q, SpikeAndSlab(xi, 1e-3, tau)) >= -1e-6).all()
    assert sparse_vd_kl(a) >= 0


@many(100)
@given(st.floats(-15, 15), st.floats(-15, 15))  # beyond, torch's own becomes infinite
def test_bernoulli_divergence_is_torch_s(a, b) -> None:
    p, q = (torch.distributions.Bernoulli(logits=torch.tensor(x, dtype=torch.double)) for x in (a, b))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(bernoulli_kl(p.logits, q.logits), expected, atol=1e-9, rtol=1e-6)


# ---- metrics


@many(40)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 9999), st.sampled_from([0.1, 1.0, 4.0]))
def test_metrics_are_scikit_learn_s(classes: int, images: int, seed: int, sharpness: float) -> None:
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(images, classes))
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = rng.integers(0, classes, images)
    found = classification_metrics(torch.from_numpy(p), torch.from_numpy(y))
    guess, every = p.argmax(1), list(range(classes))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, guess))
    for name, score in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
        expected = score(y, guess, labels=every, average="macro", zero_division=0)
        assert found[f"{name}_macro"] == pytest.approx(expected)
    assert found["nll"] == pytest.approx(-np.log(np.maximum(p[np.arange(images), y], 1e-12)).mean(), rel=1e-6, abs=1e-9)
    assert found["brier"] == pytest.approx(((p - np.eye(classes)[y]) ** 2).sum(1).mean(), abs=1e-9)
    right = guess == y
    if 0 < right.sum() < images:
        assert found["auroc_right_wrong"] == pytest.approx(sk.roc_auc_score(right, p.max(1)), abs=1e-6)
    for name in ("accuracy", "f1_macro", "fpr_macro", "ece", "ece_adaptive", "aurc"):
        assert -1e-9 <= found[name] <= 1 + 1e-6
    h = entropy(torch.from_numpy(p))
    assert (h >= -1e-9).all() and (h <= math.log(classes) + 1e-9).all()
    json.dumps(found, allow_nan=False)


@many(40)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(2, 5), st.integers(0, 999))
def test_temperatures_keep_the_ranking(draws: int, images: int, classes: int, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    probs = (5 * torch.randn(draws, images, classes, generator=noise)).softmax(-1)
    t = fit_temperature(probs, torch.randint(0, classes, (images,), generator=noise))
    assert 0.1 <= t <= 10
    assert torch.equal(temper(probs, t).argmax(-1), probs.argmax(-1))


# ---- any Pyro fit


@many(25)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6))
def test_converted_fits_have_the_shapes_of_their_sites(data_size, samples, event, plates) -> None:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(event), 1.0).to_event(1))
        with pyro.plate("groups", plates, dim=-2):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", w.sum(-1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(x * mean + g.sum(-2), 1.0), obs=y)

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(torch.ones(event), 0.1).to_event(1))
        with pyro.plate("groups", plates, dim=-2):
            pyro.sample("g", dist.Normal(0.0, 0.1))

    x = torch.arange(float(data_size))
    tree = from_pyro_svi(model, guide, x, torch.zeros(data_size), num_samples=samples)
    assert tree["posterior"]["w"].shape == (samples, event)
    assert tree["posterior"]["g"].shape == (samples, plates, 1)
    assert tree["posterior"]["mean"].shape == (samples,)
    assert tree["posterior_predictive"]["y"].shape == (samples, data_size)
    assert tree["observed_data"]["y"].shape == (data_size,)
