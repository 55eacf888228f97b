import logging
from unittest.mock import Mock

import arviz as az
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers import around
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_median

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import Split
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.predictive.datatree import load_datatree, save_datatree
from pyro_isingvit.predictive.from_pyro import from_pyro_svi
from pyro_isingvit.predictive.tree import predictions_to_datatree
from pyro_isingvit.runs import tree as module
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.tree import run_to_datatree

CLASSES = ("cat", "dog", "été")
VIT = ViTConfig(patch_size=2, width=8, heads=2, depth=2, mlp_ratio=2)


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def fit(model, guide, *args, steps=200, lr=0.1, elbo=TraceMeanField_ELBO):
    schedule = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": 0.02 ** (1 / steps)}
    )
    svi = SVI(model, guide, schedule, elbo(num_particles=8, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(*args)
        schedule.step()


def tiny_run(granularity="weight", depth=2, head="linear", seed=0):
    torch.manual_seed(seed)
    vit = ViTConfig(patch_size=2, width=8, heads=2, depth=depth, mlp_ratio=2, head=head)
    config = RunConfig(vit=vit, ising=IsingConfig(granularity=granularity, init_scale=0.05))
    info = DataInfo("digits", CLASSES, 1, 6, 6, (0.5,), (0.25,))
    model, guide = IsingMethod(config, info, num_data=50).posterior
    with torch.no_grad():
        for name in guide.layout.sites:
            guide.logits(name).copy_(2 * torch.randn_like(guide.logits(name)))
        for loc in guide.loc.values():  # far from zero: |w| > 0.5 exactly where the mask is 1
            loc.copy_(torch.where(torch.rand_like(loc) < 0.5, -1.0, 1.0))
    return around(model, guide, config)


def tiny_split(count=12):
    return Split(torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8), torch.arange(count) % 3)


# Any Pyro SVI fit -------------------------------------------------------------------------------------------


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def closed_form(y):  # prior N(0, 4), unit noise
    variance = 1 / (1 / 4 + len(y))
    return variance * float(y.sum()), variance**0.5


@pytest.mark.parametrize("parallel", [False, True])
def test_conjugate_normal_matches_the_closed_form(parallel):
    y = torch.randn(20) + 1.5
    guide = AutoNormal(conjugate)
    fit(conjugate, guide, y)
    tree = from_pyro_svi(conjugate, guide, y, num_samples=2000, parallel=parallel)
    mean, sd = closed_form(y)
    mu = tree.posterior["mu"]
    assert mu.dims == ("sample",)
    assert abs(float(mu.mean()) - mean) < 0.3 * sd
    assert float(mu.std()) == pytest.approx(sd, rel=0.15)
    drawn = tree.posterior_predictive["y"]
    assert drawn.dims == ("sample", "data") and drawn.shape == (2000, 20)
    assert float(drawn.var()) == pytest.approx(1 + sd**2, rel=0.1)
    # y_s is drawn with mu_s, not with another draw of mu
    assert np.corrcoef(mu, drawn.mean("data"))[0, 1] == pytest.approx(2**-0.5, abs=0.06)
    np.testing.assert_array_equal(tree.observed_data["y"], y)
    assert set(tree.children) == {"posterior", "posterior_predictive", "observed_data"}
    assert tree.posterior.attrs["inference_library"] == "pyro"
    assert tree.posterior.attrs["sample_dims"] == ["sample"]


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    pyro.deterministic("log_sigma", sigma.log())
    pyro.factor("nothing", torch.zeros(()))
    with pyro.plate("row", len(x)):
        mean = pyro.deterministic("mean", w[..., 0] * x[:, 0] + w[..., 1] * x[:, 1], event_dim=0)
        return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


@pytest.mark.parametrize("parallel", [False, True])
def test_regression_with_a_plate_and_other_inputs(parallel):
    x = torch.randn(60, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 0.3 * torch.randn(60)
    guide = AutoMultivariateNormal(regression, init_scale=0.05)
    fit(regression, guide, x, y, elbo=Trace_ELBO)
    exact = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    options = {
        "num_samples": 60,
        "parallel": parallel,
        "constant_data": {"x": x},
        "coords": {"term": ["a", "b"]},
    }
    tree = from_pyro_svi(regression, guide, x, y, dims={"w": ["term"], "x": ["row", "term"]}, **options)
    assert set(tree.posterior.data_vars) == {"w", "sigma", "log_sigma", "mean"}  # no _latent, no factor
    assert tree.posterior["w"].dims == ("sample", "term") and list(tree.posterior["term"]) == ["a", "b"]
    assert tree.posterior["sigma"].dims == ("sample",)
    np.testing.assert_allclose(tree.posterior["w"].mean("sample"), exact, atol=0.1)
    np.testing.assert_allclose(tree.posterior["log_sigma"], np.log(tree.posterior["sigma"]), rtol=1e-5)
    w = tree.posterior["w"].values
    np.testing.assert_allclose(tree.posterior["mean"], w @ x.numpy().T, atol=1e-5)  # S = N: axes not mixed up
    assert tree.constant_data["x"].dims == ("row", "term")
    assert set(tree.posterior_predictive.data_vars) == {"y"}

    new = torch.randn(7, 2)
    for arguments in ({"predictive_args": (new,)}, {"predictive_args": (new, None)}):
        other = from_pyro_svi(regression, guide, x, y, num_samples=30, parallel=parallel, **arguments)
        assert other.posterior_predictive["y"].shape == (30, 7)
        w = other.posterior["w"].values
        np.testing.assert_allclose(other.posterior_predictive["mean"], w @ new.numpy().T, atol=1e-5)
        assert other.observed_data["y"].shape == (60,)
    by_name = from_pyro_svi(regression, guide, x, y=y, num_samples=3, predictive_kwargs={"y": None})
    assert by_name.posterior_predictive["y"].shape == (3, 60)
    unseen = from_pyro_svi(regression, guide, x, num_samples=3)
    assert "observed_data" not in unseen.children and unseen.posterior_predictive["y"].shape == (3, 60)


def coin(heads):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("toss", len(heads)):
        pyro.sample("heads", dist.Bernoulli(p), obs=heads)


def coin_guide(heads):
    a = pyro.param("a", torch.tensor(5.0), constraint=dist.constraints.positive)
    b = pyro.param("b", torch.tensor(5.0), constraint=dist.constraints.positive)
    pyro.sample("p", dist.Beta(a, b))


def test_handwritten_guide_and_discrete_observations():
    heads = torch.tensor([1.0] * 14 + [0.0] * 6)
    fit(coin, coin_guide, heads)
    tree = from_pyro_svi(coin, coin_guide, heads, num_samples=2000)
    exact = dist.Beta(2.0 + 14, 2.0 + 6)
    assert float(tree.posterior["p"].mean()) == pytest.approx(float(exact.mean), abs=0.03)
    assert float(tree.posterior["p"].std()) == pytest.approx(float(exact.stddev), rel=0.2)
    tosses = tree.posterior_predictive["heads"]
    assert set(np.unique(tosses)) == {0.0, 1.0} and tosses.dims == ("sample", "toss")
    assert float(tosses.mean()) == pytest.approx(float(exact.mean), abs=0.03)


@pytest.mark.parametrize("parallel", [False, True])
def test_latent_sites_within_plates(parallel):
    def model():
        top = pyro.sample("top", dist.Normal(torch.arange(3.0), 0.1).to_event(1))  # an event axis as long as S
        with pyro.plate("group", 2, dim=-2):
            level = pyro.sample("level", dist.Normal(10 * top[..., 2], 0.1))
            with pyro.plate("row", 3, dim=-1):
                pyro.sample("y", dist.Normal(level, 0.01), obs=torch.zeros(2, 3))

    guide = AutoNormal(model, init_loc_fn=init_to_median)
    tree = from_pyro_svi(model, guide, num_samples=3, parallel=parallel)
    assert tree.posterior["top"].dims == ("sample", "top_dim_0")
    level, y = tree.posterior["level"], tree.posterior_predictive["y"]
    assert level.dims[:2] == ("sample", "group") and level.shape == (3, 2, 1)
    assert y.dims == ("sample", "group", "row") and y.shape == (3, 2, 3)
    assert np.abs(y.values - level.values).max() < 0.1


def test_subsampled_plate_keeps_one_subsample():
    y = torch.arange(40.0)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 40, subsample_size=5) as rows:
            pyro.deterministic("rows", rows, event_dim=0)
            pyro.sample("y", dist.Normal(mu + y[rows], 0.01), obs=y[rows])

    tree = from_pyro_svi(model, AutoNormal(model), num_samples=20)
    assert set(tree.posterior.data_vars) == {"mu", "rows"}
    rows = tree.observed_data["y"].values
    np.testing.assert_array_equal(tree.posterior["rows"], np.broadcast_to(rows, (20, 5)))
    gap = tree.posterior_predictive["y"].values - rows - tree.posterior["mu"].values[:, None]
    assert np.abs(gap).max() < 0.1


def test_converter_is_seeded_and_leaves_the_random_state():
    y = torch.randn(5)
    guide = AutoNormal(conjugate)
    guide(y)
    before = torch.get_rng_state()
    first = from_pyro_svi(conjugate, guide, y, num_samples=7, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    again = from_pyro_svi(conjugate, guide, y, num_samples=7, seed=3)
    xr.testing.assert_equal(first, again)
    other = from_pyro_svi(conjugate, guide, y, num_samples=7, seed=4)
    assert not np.allclose(first.posterior["mu"], other.posterior["mu"])
    assert len(np.unique(first.posterior["mu"])) == 7


def test_converter_options():
    y = torch.randn(5)
    guide = AutoNormal(conjugate)
    tree = from_pyro_svi(
        conjugate, guide, y, num_samples=2, posterior_predictive=False, observed_data={"other": np.zeros(3)}
    )
    assert set(tree.children) == {"posterior", "observed_data"} and set(tree.observed_data.data_vars) == {"other"}


def test_converter_errors():
    y = torch.randn(5)
    with pytest.raises(UserError, match="num_samples"):
        from_pyro_svi(conjugate, AutoNormal(conjugate), y, num_samples=0)
    with pytest.raises(UserError, match="samples no site"):
        from_pyro_svi(conjugate, lambda y: None, y)
    with pytest.raises(UserError, match="samples no site"):
        from_pyro_svi(conjugate, lambda y: pyro.sample("u", dist.Normal(0, 1), infer={"is_auxiliary": True}), y)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("granularity", ["weight", "head"])
def test_converter_on_isingvit(granularity, parallel):
    run = tiny_run(granularity)
    split = tiny_split(6)  # S = B, where wrong batch axes would go unnoticed
    x = run.info.normalise(split.images)
    tree = from_pyro_svi(
        run.model, run.guide, x, split.labels, num_samples=6, predictive_args=(x,), parallel=parallel,
        log_likelihood=True,
    )  # fmt: skip
    sites = {f"xi_{name}" for name in run.guide.layout.sites} | {f"w_{kind}" for kind in run.guide.loc}
    assert set(tree.posterior.data_vars) == sites
    for name, site in run.guide.layout.sites.items():
        mask = tree.posterior[f"xi_{name}"].values
        assert mask.shape == (6, *site.shape) and set(np.unique(mask)) <= {0.0, 1.0}
    masks = {name: torch.tensor(tree.posterior[f"xi_{name}"].values) for name in run.guide.layout.sites}
    weights = {kind: torch.tensor(tree.posterior[f"w_{kind}"].values) for kind in run.guide.loc}
    for kind, weight in weights.items():  # masks and weights of one joint draw
        assert torch.equal(weight.abs() > 0.5, (run.guide.layout.expand(kind, masks) == 1).expand_as(weight))
    with torch.no_grad():
        probs = run.model.vit(weights, x).softmax(-1)
    drawn = tree.posterior_predictive
    assert drawn["probs"].dims[:2] == ("sample", "data")
    np.testing.assert_allclose(drawn["probs"], probs, atol=1e-5)
    assert drawn["y"].shape == (6, 6) and int(drawn["y"].max()) < 3
    np.testing.assert_array_equal(tree.observed_data["y"], split.labels)
    logs = np.log(probs.numpy())[:, np.arange(6), split.labels]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], logs, atol=1e-4)


# A run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(1)
    run, split = tiny_run(), tiny_split()
    draws = draw_predictive(run, split.images, num_samples=40, seed=5)
    return run, split, draws, run_to_datatree(run, split, draws, seed=5)


def test_run_tree_follows_the_contract(made):
    run, split, draws, tree = made
    assert tree.attrs["library"] == "pyro-isingvit" and tree.attrs["part"] == "test"
    assert RunConfig.from_json(tree.attrs["config"]) == run.config
    assert tree.attrs["dataset"] == "digits" and tree.attrs["method"] == "ising"
    assert tree.attrs["num_samples"] == 40 and tree.attrs["seed"] == 0
    assert tree.attrs["classes"] == '["cat", "dog", "\\u00e9t\\u00e9"]'
    kept = {"kept_patch", "kept_qkv", "kept_attn_out", "kept_fc1", "kept_fc2", "kept_head", "kept_heads"}
    masks = {f"xi_{name}" for name in run.guide.layout.sites}
    assert set(tree.posterior.data_vars) == kept | masks  # a small network
    assert tree.posterior["kept_patch"].dims == ("sample",)
    assert tree.posterior["kept_qkv"].dims == ("sample", "layer")
    assert tree.posterior["kept_heads"].dims == ("sample", "layer", "head")
    assert tree.posterior["xi_qkv"].dims == ("sample", "layer", "out_qkv", "in_qkv")
    assert tree.posterior["xi_qkv"].dtype == np.int8 and tree.posterior["kept_qkv"].dtype == np.float32
    for kind, shape in run.model.vit.matrix_shapes.items():
        for name, values in (
            ("retention", run.guide.weight_retention(kind)),
            ("loc", run.guide.loc[kind]),
            ("scale", run.guide.log_scale[kind].exp()),
        ):
            stored = tree.variational[f"{name}_{kind}"]
            layer = ("layer",) if shape[0] > 1 else ()
            assert stored.dims == (*layer, f"out_{kind}", f"in_{kind}") and stored.dtype == np.float32
            np.testing.assert_array_equal(stored, values.detach().squeeze(0))
    np.testing.assert_array_equal(tree.posterior_predictive["probs"], draws.probs)
    assert tree.posterior_predictive["probs"].dims == ("sample", "image", "class")
    assert list(tree.posterior_predictive["class"].values) == list(CLASSES)
    summary = tree.predictive_summary
    np.testing.assert_allclose(summary["prob_mean"], draws.mean)
    np.testing.assert_allclose(summary["prob_low"], np.quantile(draws.probs, 0.05, axis=0), rtol=1e-5)
    np.testing.assert_allclose(summary["prob_high"], np.quantile(draws.probs, 0.95, axis=0), rtol=1e-5)
    for name in ("entropy", "expected_entropy", "mutual_information"):
        np.testing.assert_allclose(summary[name], getattr(draws, name))
        assert summary[name].dims == ("image_all",)
    assert summary["prob_mean"].dims == ("image_all", "class")
    np.testing.assert_array_equal(summary["y"], split.labels)
    np.testing.assert_array_equal(tree.observed_data["y"], split.labels)
    assert tree.constant_data["pixels"].dtype == np.uint8
    assert tree.constant_data["pixels"].dims == ("image", "channel", "height", "width")
    np.testing.assert_array_equal(tree.constant_data["pixels"], split.images)


@pytest.mark.parametrize("granularity", ["weight", "unit", "head"])
def test_kept_shares_agree_with_retention(granularity):
    run, split = tiny_run(granularity), tiny_split(2)
    draws = draw_predictive(run, split.images, num_samples=2)
    tree = run_to_datatree(run, split, draws, num_samples=300)
    fields = {kind: run.guide.weight_retention(kind) for kind in run.guide.loc}
    for kind, field in fields.items():
        kept = tree.posterior[f"kept_{kind}"]
        error = np.maximum(kept.std("sample").values, 1e-6) / 300**0.5
        assert np.all(np.abs(kept.mean("sample").values - field.mean((1, 2)).squeeze(0).numpy()) < 4 * error)
    width, heads, d = 8, 2, 4
    qkv = fields["qkv"].view(2, 3, heads, d, width)
    out = fields["attn_out"].view(2, width, heads, d)
    expected = [
        [float(torch.cat([qkv[x, :, h].flatten(), out[x, :, h].flatten()]).mean()) for h in range(heads)]
        for x in range(2)
    ]
    kept = tree.posterior["kept_heads"]
    assert np.all(np.abs(kept.mean("sample") - expected) < 4 * kept.std("sample") / 300**0.5)
    if granularity == "head":
        assert tree.posterior["xi_attention"].dims == ("sample", "layer", "head")
        assert tree.posterior["xi_fc1"].dims == ("sample", "layer", "out_fc1")
        assert tree.posterior["xi_head"].dims == ("sample", "in_head")
        np.testing.assert_allclose(kept, tree.posterior["xi_attention"], atol=1e-6)  # one mask a head
    joint = tree.posterior[f"xi_{'qkv' if granularity != 'head' else 'attention'}"].values.reshape(300, -1)
    assert len(np.unique(joint, axis=0)) > 10  # the draws differ


@pytest.fixture
def double():
    """As Pyro users often set it; a network computes in float32 all the same."""
    yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("granularity", ["weight", "unit", "head", "float64"])
def test_full_draws_are_joint_and_those_of_the_predictions(granularity, caplog, double):
    run, split = tiny_run("unit" if granularity == "float64" else granularity, head="mlp"), tiny_split(4)
    if granularity == "float64":
        double()
    draws = draw_predictive(run, split.images, num_samples=5, seed=8)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="pyro_isingvit.runs.tree"):
        tree = run_to_datatree(run, split, draws, full=True, seed=8)
    assert torch.equal(before, torch.get_rng_state())
    masks_size = sum(np.prod(site.shape) for site in run.guide.layout.sites.values())
    size = 5 * (4 * run.model.num_masked_weights + masks_size) / 1e6
    assert f"{size:.1f} MB" in caplog.text
    weights = {}
    for kind, shape in run.model.vit.matrix_shapes.items():
        weights[kind] = torch.tensor(tree.posterior[f"w_{kind}"].values).view(5, *shape)
    masks = {
        name: torch.tensor(tree.posterior[f"xi_{name}"].values).view(5, *site.shape)
        for name, site in run.guide.layout.sites.items()
    }
    for kind, weight in weights.items():
        mask = run.guide.layout.expand(kind, masks).expand_as(weight)
        assert torch.equal(weight.abs() > 0.5, mask == 1)
        kept = mask.float().mean((2, 3))
        np.testing.assert_allclose(tree.posterior[f"kept_{kind}"].values.reshape(5, -1), kept, atol=1e-6)
    with torch.no_grad():
        probs = run.model.vit(weights, run.info.normalise(split.images)).softmax(-1)
    np.testing.assert_allclose(tree.posterior_predictive["probs"], probs, atol=1e-5)


def test_large_networks_store_less(monkeypatch, caplog):
    run, split = tiny_run(depth=1), tiny_split(3)
    draws = draw_predictive(run, split.images, num_samples=2)
    monkeypatch.setattr(module, "SMALL_MASKS", 10)
    monkeypatch.setattr(module, "LARGE_NETWORK", 10)
    with caplog.at_level(logging.INFO, logger="pyro_isingvit.runs.tree"):
        tree = run_to_datatree(run, split, draws)
    assert all(str(name).startswith("kept_") for name in tree.posterior.data_vars)
    summaries = ("retention_mean_", "loc_norm_", "mask_retention_")
    assert all(str(name).startswith(summaries) for name in tree.variational.data_vars)
    assert tree.variational["loc_norm_fc1"].dims == ("out_fc1",)
    norms = run.guide.loc["fc1"][0].detach().norm(dim=-1)
    np.testing.assert_allclose(tree.variational["loc_norm_fc1"], norms, rtol=1e-5)
    if run.guide.config.granularity != "weight":
        assert tree.variational["mask_retention_fc1"].dims == ("out_fc1",)
    assert tree.variational["retention_mean_qkv"].dims == ()  # one layer
    assert tree.posterior["kept_qkv"].dims == ("sample",)
    assert tree.posterior["kept_heads"].dims == ("sample", "layer", "head")
    expected = run.guide.weight_retention("fc1").mean()
    assert float(tree.variational["retention_mean_fc1"]) == pytest.approx(float(expected), rel=1e-5)
    assert "layers are summarised" in caplog.text


def test_images_are_thinned(monkeypatch, caplog):
    run, split = tiny_run(), tiny_split(30)
    draws = draw_predictive(run, split.images, num_samples=3)
    with caplog.at_level(logging.INFO, logger="pyro_isingvit.runs.tree"):
        tree = run_to_datatree(run, split, draws, max_images=7, part="val")
    assert "7 of 30" in caplog.text and tree.attrs["part"] == "val"
    index = tree.constant_data["image_index"].values
    assert len(np.unique(index)) == 7 and list(index) == sorted(index)
    for group in ("posterior_predictive", "observed_data", "constant_data"):
        np.testing.assert_array_equal(tree[group]["image"], index)
    np.testing.assert_array_equal(tree.posterior_predictive["probs"], draws.probs[:, index])
    np.testing.assert_array_equal(tree.observed_data["y"], split.labels[index])
    np.testing.assert_array_equal(tree.constant_data["pixels"], split.images[index])
    assert tree.predictive_summary.sizes["image_all"] == 30
    again = run_to_datatree(run, split, draws, max_images=7, part="val")
    np.testing.assert_array_equal(again.constant_data["image_index"], index)
    other = run_to_datatree(run, split, draws, max_images=7, seed=1)
    assert list(other.constant_data["image_index"].values) != list(index)
    monkeypatch.setattr(module, "PIXEL_BYTES", 4 * 36 + 1)
    assert run_to_datatree(run, split, draws).constant_data.sizes["image"] == 4


def test_run_tree_errors(made):
    run, split, draws, _ = made
    for options in ({"num_samples": 0}, {"max_images": 0}):
        with pytest.raises(UserError, match="at least 1"):
            run_to_datatree(run, split, draws, **options)
    with pytest.raises(UserError, match="same images"):
        run_to_datatree(run, split.take(np.arange(3)), draws)


@pytest.mark.parametrize("saved", [False, True])
def test_arviz_reads_a_run(made, saved, tmp_path):
    tree = made[-1]
    if saved:
        save_datatree(tree, tmp_path / "posterior.nc")
        tree = load_datatree(tmp_path / "posterior.nc")
    kept = ["kept_qkv", "kept_head", "kept_heads"]
    table = az.summary(tree, var_names=kept, kind="stats", sample_dims="sample")
    assert table.index[0] == "kept_qkv[0]" and len(table) == 2 + 1 + 4
    interval = az.hdi(tree, var_names=kept, dim="sample", prob=0.9)
    assert interval["kept_qkv"].dims == ("layer", "ci_bound")
    az.plot_forest(tree, var_names=kept)
    az.plot_dist(tree, var_names=kept)
    plt.close("all")
    with az.rc_context({"data.sample_dims": ["sample"]}):
        assert az.summary(tree, var_names=kept, kind="stats").equals(table)
        xr.testing.assert_equal(az.hdi(tree, var_names=kept, prob=0.9), interval)


# Files and predictions --------------------------------------------------------------------------------------


def test_round_trip(made, tmp_path):
    tree = made[-1]
    path = tmp_path / "folder" / "posterior.nc"
    save_datatree(tree, path)
    back = load_datatree(path)
    xr.testing.assert_equal(tree, back)
    assert back.attrs == tree.attrs
    for node in tree.subtree:
        assert back[node.path].attrs == node.attrs
        for name, values in node.data_vars.items():
            assert back[node.path][name].dtype == values.dtype and back[node.path][name].dims == values.dims
    assert [x.name for x in path.parent.iterdir()] == ["posterior.nc"]
    path.rename(path.with_name("moved.nc"))  # closed, and in memory
    assert float(back.posterior["kept_qkv"].mean()) > 0
    save_datatree(back, path)  # what was read can be written
    xr.testing.assert_equal(load_datatree(path), tree)


def test_compression(tmp_path):
    zeros = xr.DataTree.from_dict({"posterior": xr.Dataset({"x": ("sample", np.zeros(100_000))})})
    save_datatree(zeros, tmp_path / "a.nc")
    assert (tmp_path / "a.nc").stat().st_size < 50_000
    assert "library" not in zeros.attrs
    xr.testing.assert_equal(load_datatree(tmp_path / "a.nc"), zeros)


def test_any_fit_round_trips(tmp_path):
    y = torch.randn(5)
    tree = from_pyro_svi(conjugate, AutoNormal(conjugate), y, num_samples=4)
    save_datatree(tree, tmp_path / "fit.nc")
    xr.testing.assert_equal(load_datatree(tmp_path / "fit.nc"), tree)


def test_damaged_files(made, tmp_path):
    path = tmp_path / "posterior.nc"
    with pytest.raises(UserError, match="missing"):
        load_datatree(path)
    save_datatree(made[-1], path)
    whole = path.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="cannot be read"):
            load_datatree(path)
    path.write_text("not a netCDF file, though long enough to look at")
    with pytest.raises(UserError, match="cannot be read"):
        load_datatree(path)
    xr.Dataset({"x": ("a", [1, 2])}).to_netcdf(path)
    with pytest.raises(UserError, match="not written by"):
        load_datatree(path)
    (tmp_path / "file").write_text("")
    path.write_bytes(whole)
    with pytest.MonkeyPatch.context() as patch:  # what netCDF4 raises when the disk is full
        patch.setattr(xr.DataTree, "to_netcdf", Mock(side_effect=RuntimeError("NetCDF: HDF error")))
        with pytest.raises(UserError, match="HDF error"):
            save_datatree(made[-1], path)
    assert path.read_bytes() == whole and sorted(x.name for x in tmp_path.iterdir()) == [
        "file",
        "posterior.nc",
    ]
    with pytest.raises(UserError, match="cannot write"):
        save_datatree(made[-1], tmp_path / "file" / "posterior.nc")


def test_predictions(made, tmp_path):
    _, split, draws, _ = made
    names = [f"image_{i}.png" for i in range(12)]
    tree = predictions_to_datatree(draws, CLASSES, names, split.labels, {"run": "runs/demo"})
    assert tree.attrs["run"] == "runs/demo" and tree.attrs["num_samples"] == 40
    assert list(tree.posterior_predictive["image"].values) == names
    np.testing.assert_array_equal(tree.posterior_predictive["probs"], draws.probs)
    assert tree.predictive_summary["prob_low"].dims == ("image", "class")
    np.testing.assert_allclose(tree.predictive_summary["entropy"], draws.entropy)
    np.testing.assert_array_equal(tree.observed_data["y"], split.labels)
    save_datatree(tree, tmp_path / "predictions.nc")
    xr.testing.assert_equal(load_datatree(tmp_path / "predictions.nc"), tree)
    plain = predictions_to_datatree(draws, CLASSES)
    assert set(plain.children) == {"posterior_predictive", "predictive_summary"}
    assert "y" not in plain.predictive_summary and list(plain.posterior_predictive["image"]) == list(range(12))
    for bad in ({"classes": CLASSES[:2]}, {"names": names[:3]}, {"labels": split.labels[:3]}):
        with pytest.raises(UserError, match="were given"):
            predictions_to_datatree(draws, **({"classes": CLASSES} | bad))
