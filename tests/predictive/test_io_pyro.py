# pylint: disable=no-member, invalid-name, redefined-outer-name
"""The converter that could be arviz-base's, tested in the manner of its ``test_data_numpyro.py``."""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
from pathlib import Path

import numpy as np
import pytest
from arviz_base import from_numpyro_svi, rcParams
from arviz_base.io_numpyro import NumPyroConverter

from pyro_isingvit.predictive import io_pyro
from pyro_isingvit.predictive.io_pyro import PyroSVIConverter, from_pyro_svi

# Skip all tests if torch or pyro not installed
torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
dist = pyro.distributions
autoguide = importlib.import_module("pyro.infer.autoguide")


def check_multiple_attrs(test_dict, parent):
    """Groups and variables that the tree lacks, or has although their name starts with ~; as in arviz_base.testing."""
    fails = []
    for group, names in test_dict.items():
        absent = group.startswith("~")
        if absent == (group.lstrip("~") in parent.children):
            fails.append(group)
        elif not absent:
            found = parent[group].data_vars
            fails += [(group, name) for name in names if name.startswith("~") == (name.lstrip("~") in found)]
    return fails


@pytest.fixture(scope="module")
def eight_schools_params():
    return {
        "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sigma": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    }


def eight_schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        return pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def custom_guide(sigma, y=None):
    loc = pyro.param("custom_loc", torch.zeros(()))
    log_tau = pyro.param("custom_log_tau", torch.zeros(()))
    pyro.sample("mu", dist.Normal(loc, 1.0))
    pyro.sample("tau", dist.LogNormal(log_tau, 0.5))
    with pyro.plate("school", len(sigma)):
        pyro.sample("eta", dist.Normal(pyro.param("custom_eta", torch.zeros(len(sigma))), 1.0))


@pytest.fixture(scope="module", params=["AutoNormal", "AutoMultivariateNormal", "AutoDelta", "custom"])
def svi(request, eight_schools_params):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = custom_guide if request.param == "custom" else getattr(autoguide, request.param)(eight_schools)
    svi = pyro.infer.SVI(eight_schools, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    for _ in range(100):
        svi.step(**eight_schools_params)
    yield svi
    pyro.clear_param_store()


class TestDataPyro:
    def get_inference_data(self, svi, params, **kwargs):
        prior = pyro.infer.Predictive(eight_schools, num_samples=50)(params["sigma"])
        return from_pyro_svi(svi, model_args=(params["sigma"],), model_kwargs={"y": params["y"]}, prior=prior,
                             num_samples=40, **kwargs)  # fmt: skip

    def test_inference_data(self, svi, eight_schools_params):
        inference_data = self.get_inference_data(
            svi,
            eight_schools_params,
            constant_data={"sigma": eight_schools_params["sigma"]},
            dims={"sigma": ["school"]},
            coords={"school": list("ABCDEFGH")},
            log_likelihood=True,
        )
        test_dict = {
            "posterior": ["mu", "tau", "eta", "theta", "~obs", "~_auto_latent"],
            "posterior_predictive": ["obs", "~theta", "~mu"],
            "log_likelihood": ["obs"],
            "prior": ["mu", "tau", "eta", "theta"],
            "prior_predictive": ["obs", "~mu"],
            "observed_data": ["obs", "~theta"],
            "constant_data": ["sigma"],
            "~sample_stats": [],
            "~predictions": [],
        }
        fails = check_multiple_attrs(test_dict, inference_data)
        assert not fails
        assert inference_data.posterior["eta"].dims == ("sample", "school")
        assert inference_data.posterior["mu"].dims == ("sample",)
        assert inference_data.posterior_predictive["obs"].sizes == {"sample": 40, "school": 8}
        assert inference_data.observed_data["obs"].dims == ("school",)
        assert inference_data.constant_data["sigma"].dims == ("school",)
        assert list(inference_data.posterior["school"].values) == list("ABCDEFGH")

    def test_attributes(self, svi, eight_schools_params):
        inference_data = self.get_inference_data(svi, eight_schools_params)
        for name, group in inference_data.children.items():
            assert group.attrs["inference_library"] == "pyro", name
            assert group.attrs["creation_library"] == "ArviZ"
            lead = [] if name == "observed_data" else ["sample"]
            assert group.attrs["sample_dims"] == lead
        assert rcParams["data.sample_dims"] != ["sample"]  # what was set for the conversion is set back

    def test_deterministic_sites_belong_to_the_same_draw(self, svi, eight_schools_params):
        post = self.get_inference_data(svi, eight_schools_params).posterior
        np.testing.assert_allclose(post["theta"], post["mu"] + post["tau"] * post["eta"], rtol=1e-4, atol=1e-4)

    def test_log_likelihood(self, svi, eight_schools_params):
        idata = self.get_inference_data(svi, eight_schools_params, log_likelihood=True)
        y, sigma = (eight_schools_params[name].numpy() for name in ("y", "sigma"))
        z = (y - idata.posterior["theta"].values) / sigma
        expected = -0.5 * z**2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)
        assert idata.log_likelihood["obs"].dims == ("sample", "school")
        np.testing.assert_allclose(idata.log_likelihood["obs"], expected, rtol=1e-4, atol=1e-4)

    def test_index_origin(self, svi, eight_schools_params):
        idata = self.get_inference_data(svi, eight_schools_params, index_origin=1)
        assert idata.posterior["school"].values.tolist() == list(range(1, 9))

    def test_seed(self, svi, eight_schools_params):
        before = torch.get_rng_state()
        first, again = (from_pyro_svi(svi, model_kwargs=eight_schools_params, num_samples=5, seed=3) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert (first.posterior_predictive["obs"] == again.posterior_predictive["obs"]).all()
        other = from_pyro_svi(svi, model_kwargs=eight_schools_params, num_samples=5, seed=4)
        assert not (first.posterior_predictive["obs"] == other.posterior_predictive["obs"]).all()

    def test_model_and_guide_instead_of_svi(self, svi, eight_schools_params):
        kwargs = {"model_kwargs": eight_schools_params, "num_samples": 5}
        first = from_pyro_svi(svi, **kwargs)
        again = from_pyro_svi(model=svi.model, guide=svi.guide, **kwargs)
        assert first.children.keys() == again.children.keys()
        assert (first.posterior["eta"] == again.posterior["eta"]).all()

    def test_inference_data_no_posterior(self, eight_schools_params):
        prior = pyro.infer.Predictive(eight_schools, num_samples=50)(eight_schools_params["sigma"])
        obs = {"obs": torch.zeros(50, 8)}
        for kwargs, test_dict in (
            ({"prior": prior}, {"prior": ["mu", "tau", "eta", "obs"], "~prior_predictive": []}),
            ({"posterior_predictive": obs}, {"posterior_predictive": ["obs"]}),
            ({"predictions": obs}, {"predictions": ["obs"]}),
            ({"constant_data": {"J": 8}}, {"constant_data": ["J"]}),
            ({"predictions_constant_data": {"J": 8}}, {"predictions_constant_data": ["J"]}),
        ):
            inference_data = from_pyro_svi(**kwargs)
            fails = check_multiple_attrs(test_dict | {"~posterior": [], "~observed_data": []}, inference_data)
            assert not fails, f"{kwargs.keys()}: {fails}"

    def test_multiple_observed_rv(self):
        y1, y2 = torch.randn(10), torch.randn(100)

        def model_example_multiple_obs(y1=None, y2=None):
            x = pyro.sample("x", dist.Normal(1.0, 3.0))
            pyro.sample("y1", dist.Normal(x, 1.0).expand([10]).to_event(1), obs=y1)
            pyro.sample("y2", dist.Normal(x, 1.0).expand([100]).to_event(1), obs=y2)

        guide = autoguide.AutoNormal(model_example_multiple_obs)
        idata = from_pyro_svi(
            model=model_example_multiple_obs, guide=guide, model_args=(y1, y2), num_samples=7, log_likelihood=True
        )
        test_dict = {"posterior": ["x"], "observed_data": ["y1", "y2"], "log_likelihood": ["y1", "y2"]}
        assert not check_multiple_attrs(test_dict, idata)
        assert idata.log_likelihood["y1"].dims == ("sample",)  # event dims are summed over
        assert idata.posterior_predictive["y2"].dims == ("sample", "y2_dim_0")

    def test_inference_data_constant_data(self):
        x1, x2 = torch.linspace(0, 1, 10), torch.linspace(0, 1, 4)

        def model_constant_data(x, y1=None):
            slope = pyro.sample("slope", dist.Normal(1.0, 3.0))
            with pyro.plate("row", len(x)):
                pyro.sample("y1", dist.Normal(x * slope, 1e-3), obs=y1)

        idata = from_pyro_svi(
            model=model_constant_data, guide=autoguide.AutoNormal(model_constant_data), num_samples=30,
            model_args=(x1, 2 * x1), predictions_args=(x2,), constant_data={"x1": x1},
            predictions_constant_data={"x2": x2}, dims={"x1": ["row"]}, pred_dims={"x2": ["new"], "y1": ["new"]},
        )  # fmt: skip
        test_dict = {
            "posterior": ["slope"], "posterior_predictive": ["y1"], "predictions": ["y1"], "observed_data": ["y1"],
            "constant_data": ["x1"], "predictions_constant_data": ["x2"],
        }  # fmt: skip
        assert not check_multiple_attrs(test_dict, idata)
        assert idata.predictions["y1"].dims == ("sample", "new") and idata.predictions.sizes["new"] == 4
        expected = idata.posterior["slope"].values[:, None] * x2.numpy()  # each with its own draw of the slope
        np.testing.assert_allclose(idata.predictions["y1"], expected, atol=0.01)

    def test_infer_dims(self):
        def model():
            # note: group2 gets assigned dim=-1 and group1 is assigned dim=-2
            with pyro.plate("group2", 5), pyro.plate("group1", 10):
                pyro.sample("param", dist.Normal(0.0, 1.0))

        idata = from_pyro_svi(model=model, guide=autoguide.AutoNormal(model), num_samples=6)
        assert idata.posterior.param.dims == ("sample", "group1", "group2")

    def test_infer_unsorted_dims(self):
        def model():
            first, second = pyro.plate("group1", 10, dim=-1), pyro.plate("group2", 5, dim=-2)
            with second, first:
                pyro.sample("param", dist.Normal(0.0, 1.0))

        idata = from_pyro_svi(model=model, guide=autoguide.AutoDelta(model), num_samples=6)
        assert idata.posterior.param.dims == ("sample", "group2", "group1")

    def test_infer_event_dims(self):
        def model():
            gamma = pyro.sample("gamma", dist.Normal(0.0, 1.0).expand([4]).to_event(1), infer={"event_dims": ["group"]})
            pyro.deterministic("double", 2 * gamma)

        guide = autoguide.AutoNormal(model)
        idata = from_pyro_svi(model=model, guide=guide, num_samples=6, coords={"group": list("abcd")})
        assert idata.posterior["gamma"].dims == ("sample", "group")
        assert idata.posterior["double"].dims == ("sample", "double_dim_0")
        idata = from_pyro_svi(model=model, guide=guide, num_samples=6, extra_event_dims={"double": ["group"]})
        assert idata.posterior["double"].dims == ("sample", "group")

    def test_log_likelihood_of_a_subsample(self):
        """Every row is of the observations that are in the group of observed data."""
        y = torch.linspace(-3.0, 3.0, 50)

        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 50, subsample_size=5) as rows:
                pyro.sample("obs", dist.Normal(mu, 1.0), obs=y[rows])

        def guide(y):
            pyro.sample("mu", dist.Normal(0.5, 0.1))

        idata = from_pyro_svi(model=model, guide=guide, model_args=(y,), num_samples=8, log_likelihood=True)
        mu, seen = idata.posterior["mu"].values[:, None], idata.observed_data["obs"].values
        expected = -0.5 * (seen - mu) ** 2 - 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(idata.log_likelihood["obs"], expected, rtol=1e-4)

    def test_errors(self, eight_schools_params):
        guide = autoguide.AutoNormal(eight_schools)
        for kwargs, text in (
            ({}, "Pass the fitted"),
            ({"model": eight_schools}, "Pass the fitted"),
            ({"model": eight_schools, "guide": guide, "num_samples": 0}, "num_samples"),
            ({"model": eight_schools, "guide": lambda sigma, y=None: None}, "samples no site"),
        ):
            with pytest.raises(ValueError, match=text):
                from_pyro_svi(**kwargs, model_kwargs=eight_schools_params)

        def broken(sigma, y=None):
            raise ValueError("of the model")

        with pytest.raises(ValueError, match="of the model") as found:  # not told as wrong input
            from_pyro_svi(model=broken, guide=broken, model_kwargs=eight_schools_params)
        assert type(found.value) is ValueError


SOURCE = Path(io_pyro.__file__)


def test_the_file_imports_nothing_of_ours():
    found = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.partition(".")[0])
    assert found == {"typing", "lazy_loader", "numpy", "arviz_base", "xarray", "pyro", "torch"}


def test_its_example_runs():
    result = doctest.testmod(io_pyro)
    assert result.attempted >= 12 and not result.failed


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "eight_schools" in code]
    names, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(example, "extending.md", "exec"), names)
    assert names["tree"]["log_likelihood"]["obs"].sizes == {"sample": 1000, "school": 8}
    assert "theta[St. Paul's]" in shown.getvalue()
    pyro.clear_param_store()


def test_it_has_what_its_sibling_has():
    """Arguments of arviz-base's converter for NumPyro, apart from what only NumPyro needs."""
    theirs, ours = (list(inspect.signature(f).parameters) for f in (from_numpyro_svi, from_pyro_svi))
    assert set(theirs) - set(ours) == {"svi_result"}
    methods = {name for name in vars(PyroSVIConverter) if name.endswith("_to_xarray") or name == "to_datatree"}
    assert methods <= set(vars(NumPyroConverter))
    assert set(ours) <= set(inspect.signature(PyroSVIConverter.__init__).parameters) | {"svi"}
