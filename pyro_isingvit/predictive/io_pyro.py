"""Pyro-specific conversion code.

This file is written as it would be proposed to arviz-base, as a sibling of its ``io_numpyro``: it imports nothing
of this library, and its docstrings follow numpydoc. ``from_pyro`` is this library's own door to it.
"""

from typing import TYPE_CHECKING

import lazy_loader as _lazy
import numpy as np
from arviz_base.base import dict_to_dataset, requires
from arviz_base.rcparams import rc_context, rcParams
from xarray import DataTree

if TYPE_CHECKING:
    import pyro
    import torch
else:
    pyro = _lazy.load("pyro")
    torch = _lazy.load("torch")


class _InputError(ValueError):
    """Wrong input of the converter, as opposed to a ValueError of the model."""


def _sites(trace):
    """Select the sites of a trace that have a meaning: no plate indices, factors or other auxiliary sites."""
    subsample = pyro.poutine.util.site_is_subsample
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["infer"].get("is_auxiliary") and not subsample(site)
    }


def _subsamples(trace):
    """Get the indices of the plates that choose them at random, so that all draws see the same ones."""
    plates = {name: site for name, site in trace.nodes.items() if pyro.poutine.util.site_is_subsample(site)}
    sizes = {name: (site["fn"].subsample_size, site["fn"].size) for name, site in plates.items()}
    return {name: plates[name]["value"] for name, (part, size) in sizes.items() if part and part < size}


def _with_plate_axes(draws, trace):
    """Insert axes of length 1 between sample and event axes, as many as the plates of the model are deep.

    `pyro.infer.Predictive` cannot tell batch axes from event axes. It would line draws of shape (sample, event) up
    with the plates: an error, or silently wrong numbers if the sizes happen to agree.
    """
    stacks = [site["cond_indep_stack"] for site in _sites(trace).values()]
    depth = max((-frame.dim for stack in stacks for frame in stack if frame.vectorized), default=0)
    missing = {name: depth - len(trace.nodes[name]["fn"].batch_shape) for name in draws if name in trace.nodes}
    return {name: draws[name].reshape(-1, *[1] * more, *draws[name].shape[1:]) for name, more in missing.items()}


def _resampled(model):
    """Let the observed sites of a model be sampled, except deterministic ones, which Pyro takes for observed."""

    class Unobserved(pyro.poutine.uncondition_messenger.UnconditionMessenger):
        def _pyro_sample(self, msg):
            if not msg["infer"].get("_deterministic"):
                super()._pyro_sample(msg)

    return Unobserved()(model)


def _to_numpy(values):
    """Convert tensors and other array-likes of a mapping."""
    return {
        name: value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
        for name, value in values.items()
    }


def _dims_of(sites):
    """Infer dim names from the plates and from `infer={"event_dims": ...}` of the sites of a trace.

    Parameters
    ----------
    sites : mapping of {str : dict}
        Sites of a Pyro trace.

    Returns
    -------
    dict of {str : list of (str or None)}
        Names of batch and event dims. None stands for a default name, at a batch axis without a plate.
    """
    dims = {}
    for name, site in sites.items():
        shape = site["value"].shape
        frames = sorted((frame for frame in site["cond_indep_stack"] if frame.name != "sample"), key=lambda x: x.dim)
        batch = shape[: len(shape) - site["fn"].event_dim]
        plates = {(frame.dim, frame.size): frame.name for frame in frames}
        if site["infer"].get("_deterministic") and not batch:  # its event_dim was left out: plates lead, if they fit
            batch = shape[: len(frames)]
            plates = {(i - len(frames), frame.size): frame.name for i, frame in enumerate(frames)}
        named = [plates.get((axis, batch[axis])) for axis in range(-len(batch), 0)]
        dims[name] = named + list(site["infer"].get("event_dims", []))
    return dims


class PyroSVIConverter:
    """Encapsulate Pyro specific logic for results of variational inference."""

    # pylint: disable=too-many-instance-attributes

    def __init__(
        self, *, model=None, guide=None, model_args=None, model_kwargs=None, prior=None, posterior_predictive=True,
        predictions=None, predictions_args=None, predictions_kwargs=None, observed_data=None, constant_data=None,
        predictions_constant_data=None, log_likelihood=False, index_origin=None, coords=None, dims=None,
        pred_dims=None, extra_event_dims=None, num_samples=1000, parallel=False, seed=0,
    ):  # fmt: skip
        """Draw from the guide and the model.

        The parameters are those of :func:`from_pyro_svi`.
        """
        given = (prior, posterior_predictive or None, predictions, constant_data, predictions_constant_data)
        empty = all(data is None or data is True for data in given)
        if (model is None) != (guide is None) or (model is None and empty):
            raise _InputError("Pass the fitted `svi`, or both `model` and `guide`; or samples to convert.")
        if num_samples < 1:
            raise _InputError(f"`num_samples` must be at least 1, not {num_samples}.")
        self.model = model
        self.guide = guide
        self._args = tuple(model_args or ())
        self._kwargs = dict(model_kwargs or {})
        self.prior = prior
        self.posterior_predictive = None if isinstance(posterior_predictive, bool) else posterior_predictive
        self.predictions = predictions
        self.observations = observed_data
        self.constant_data = constant_data
        self.predictions_constant_data = predictions_constant_data
        self.log_likelihood = None
        self.index_origin = rcParams["data.index_origin"] if index_origin is None else index_origin
        self.coords = coords
        self.num_samples = num_samples
        self.parallel = parallel
        self.pred_dims = pred_dims

        self.posterior = None
        self.dims = {} if dims is None else dict(dims)
        if model is None:
            return
        fork_rng = torch.random.fork_rng
        with fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            torch.manual_seed(seed)
            trace = self._sample_posterior()
            self.dims = self._named(self._all, extra_event_dims, dims)
            if posterior_predictive is True:
                free = _resampled(model)
                known = self._latent | self._derived
                wanted = {name: site for name, site in self._all.items() if name not in known}
                self.posterior_predictive = self._sample(free, wanted, trace, self._args, self._kwargs)
            if predictions is None and (predictions_args is not None or predictions_kwargs is not None):
                other_args = self._args if predictions_args is None else tuple(predictions_args)
                other_kwargs = self._kwargs | dict(predictions_kwargs or {})
                sites = self._sample_predictions(other_args, other_kwargs)
                self.pred_dims = self._named(sites, extra_event_dims, dims, pred_dims)
            if log_likelihood:
                self.log_likelihood = self._log_likelihood(trace)

    @staticmethod
    def _named(sites, extra_event_dims, *given):
        """Infer dims, and let those that are given take their place."""
        dims = _dims_of(sites)
        for name, event_dims in (extra_event_dims or {}).items():
            dims[name] = dims.get(name, []) + list(event_dims)
        for mapping in given:
            dims |= mapping or {}
        return dims

    def _sample_posterior(self):
        """Draw from the guide, then the deterministic sites of the model; return a trace of the model."""
        poutine = pyro.poutine
        guide_trace = poutine.trace(self.guide).get_trace(*self._args, **self._kwargs)
        event_dims = {}

        def remember(site):  # replaying puts the guide's `infer` in the place of the model's
            event_dims[site["name"]] = site["infer"].get("event_dims", [])
            return {}

        replayed = poutine.replay(poutine.infer_config(self.model, remember), guide_trace)
        trace = poutine.trace(replayed).get_trace(*self._args, **self._kwargs)
        self._all = _sites(trace)
        for name, site in self._all.items():
            site["infer"] = site["infer"] | {"event_dims": event_dims[name]}
        own = self._all.keys() & _sites(guide_trace).keys()
        self._latent = {k: v for k, v in self._all.items() if k in own and not v["is_observed"]}
        if not self._latent:
            raise _InputError("The guide samples no site of the model; pass the guide fitted to this model.")
        self._derived = {k: v for k, v in self._all.items() if v["infer"].get("_deterministic")}
        self._draws = {}
        self._draws = self._sample(self.guide, self._latent, guide_trace, self._args, self._kwargs)
        derived = self._sample(self.model, self._derived, trace, self._args, self._kwargs)
        self.posterior = self._draws | derived
        if self.observations is None:
            self.observations = {
                k: v["value"] for k, v in self._all.items() if v["is_observed"] and k not in self._derived
            }
        return trace

    def _sample(self, program, wanted, trace, args, kwargs):
        """Draw the wanted sites of a program, given the draws of the posterior so far."""
        if not wanted:
            return {}
        given = _with_plate_axes(self._draws, trace) if self.parallel else self._draws
        program = pyro.poutine.condition(program, _subsamples(trace))
        sampler = pyro.infer.Predictive(program, given or None, None, self.num_samples, tuple(wanted), self.parallel)
        values = sampler(*args, **kwargs)  # padded with axes of length 1, which the reshape takes away
        return {name: values[name].reshape(self.num_samples, *site["value"].shape) for name, site in wanted.items()}

    def _sample_predictions(self, args, kwargs):
        """Draw all sites but those of the guide for other inputs; return them as in a single run."""
        free = _resampled(self.model)
        start = {name: site["value"] for name, site in self._latent.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(free, start)).get_trace(*args, **kwargs)
        wanted = {k: v for k, v in _sites(trace).items() if k not in self._latent}
        self.predictions = self._sample(free, wanted, trace, args, kwargs)
        return wanted

    def _log_likelihood(self, trace):
        """Compute the log likelihood of every observation of the posterior's trace under every draw."""
        poutine, part = pyro.poutine, _subsamples(trace)
        observed = [k for k, v in self._all.items() if v["is_observed"] and k not in self._derived]
        data = {name: [] for name in observed}
        for i in range(self.num_samples):
            draw = {name: values[i] for name, values in self._draws.items()} | part
            seen = poutine.trace(poutine.condition(self.model, draw)).get_trace(*self._args, **self._kwargs)
            for name in observed:
                site = seen.nodes[name]
                data[name].append(site["fn"].log_prob(site["value"]))
        return {name: torch.stack(values) for name, values in data.items()}

    def _dataset(self, data, dims, *, sampled=True, **kwargs):
        """Convert a dictionary of arrays to a dataset."""
        return dict_to_dataset(
            _to_numpy(data),
            inference_library=pyro,
            coords=self.coords,
            dims={name: list(value) for name, value in (dims or {}).items()},
            sample_dims=None if sampled else [],
            index_origin=self.index_origin,
            **kwargs,
        )

    @requires("posterior")
    def posterior_to_xarray(self):
        """Convert the posterior to an xarray dataset."""
        return self._dataset(self.posterior, self.dims)

    @requires("log_likelihood")
    def log_likelihood_to_xarray(self):
        """Convert the log likelihood to an xarray dataset."""
        return self._dataset(self.log_likelihood, self.dims, skip_event_dims=True)

    @requires("posterior_predictive")
    def posterior_predictive_to_xarray(self):
        """Convert posterior predictive samples to an xarray dataset."""
        return self._dataset(self.posterior_predictive, self.dims)

    @requires("predictions")
    def predictions_to_xarray(self):
        """Convert predictions to an xarray dataset."""
        return self._dataset(self.predictions, self.pred_dims or self.dims)

    def priors_to_xarray(self):
        """Convert prior samples, and the prior predictive ones among them, to xarray datasets."""
        if self.prior is None:
            return {}
        split = {"prior": {}, "prior_predictive": {}}
        for name, value in self.prior.items():
            known = self.posterior is None or name in self.posterior
            split["prior" if known else "prior_predictive"][name] = value
        return {group: self._dataset(data, self.dims) for group, data in split.items()}

    @requires("observations")
    def observed_data_to_xarray(self):
        """Convert observed data to an xarray dataset."""
        return self._dataset(self.observations, self.dims, sampled=False)

    @requires("constant_data")
    def constant_data_to_xarray(self):
        """Convert constant data to an xarray dataset."""
        return self._dataset(self.constant_data, self.dims, sampled=False)

    @requires("predictions_constant_data")
    def predictions_constant_data_to_xarray(self):
        """Convert constant data of the predictions to an xarray dataset."""
        return self._dataset(self.predictions_constant_data, self.pred_dims or self.dims, sampled=False)

    def to_datatree(self):
        """Convert all available data to a DataTree; groups without variables are left out."""
        groups = {
            "posterior": self.posterior_to_xarray(),
            "log_likelihood": self.log_likelihood_to_xarray(),
            "posterior_predictive": self.posterior_predictive_to_xarray(),
            "predictions": self.predictions_to_xarray(),
            **self.priors_to_xarray(),
            "observed_data": self.observed_data_to_xarray(),
            "constant_data": self.constant_data_to_xarray(),
            "predictions_constant_data": self.predictions_constant_data_to_xarray(),
        }
        return DataTree.from_dict({name: ds for name, ds in groups.items() if ds is not None and ds.data_vars})


def from_pyro_svi(
    svi=None, *, model=None, guide=None, model_args=None, model_kwargs=None, prior=None, posterior_predictive=True,
    predictions=None, predictions_args=None, predictions_kwargs=None, observed_data=None, constant_data=None,
    predictions_constant_data=None, log_likelihood=False, index_origin=None, coords=None, dims=None, pred_dims=None,
    extra_event_dims=None, num_samples=1000, parallel=False, seed=0,
):  # fmt: skip
    """Convert Pyro SVI results into a DataTree object.

    SVI draws are independent: they lie along the single dimension ``sample``. If no dims are provided, batch dim
    names are inferred from the plates of the model; names of event dims can be provided in ``pyro.sample``, with
    ``infer={"event_dims": dim_names}``, or in `extra_event_dims`.

    Parameters
    ----------
    svi : pyro.infer.SVI, optional
        Fitted SVI instance. Its parameters are in the param store or in the modules. If neither it nor `model` and
        `guide` are provided, there is no posterior, and the other data that are provided are converted.
    model, guide : callable, optional
        Model and fitted guide, instead of `svi`.
    model_args : tuple, optional
        Positional arguments that model and guide were fitted with, data included.
    model_kwargs : dict, optional
        Keyword arguments that model and guide were fitted with.
    prior : dict, optional
        Prior samples from a Pyro model. Variables that the posterior lacks become ``prior_predictive``.
    posterior_predictive : bool or dict, default True
        Sample the observed sites anew, each given its own posterior draw; or posterior predictive samples.
    predictions : dict, optional
        Out of sample predictions.
    predictions_args : tuple, optional
        Positional arguments of the model for out of sample predictions, which are then drawn.
    predictions_kwargs : dict, optional
        Keyword arguments for the same; they are added to `model_kwargs`.
    observed_data : dict, optional
        Observed data. Will be taken from the observed sites of the model if not provided.
    constant_data : dict, optional
        Dictionary containing constant data variables mapped to their values.
    predictions_constant_data : dict, optional
        Constant data used for out-of-sample predictions.
    log_likelihood : bool, default False
        Whether to compute and include the log likelihood of every observation under every draw.
    index_origin : int, optional
        Starting value of generated integer coordinate values.
    coords : dict of {str : array_like}, optional
        Map of dimensions to coordinates.
    dims : dict of {str : list of str}, optional
        Map variable names to their dimensions, without the sample dimension. Takes the place of the inferred ones.
    pred_dims : dict of {str : list of str}, optional
        Dims for predictions data. Will be inferred if they are not provided.
    extra_event_dims : dict of {str : list of str}, optional
        Event dims that cannot be inferred, such as those of deterministic sites.
    num_samples : int, default 1000
        Number of posterior samples to generate.
    parallel : bool, default False
        Run model and guide once under a plate of samples. Both must broadcast over it.
    seed : int, default 0
        Seed of the draws. The global random state is left as it was.

    Returns
    -------
    DataTree

    Raises
    ------
    ValueError
        With a model but no guide or with nothing to convert, with less than one sample, or with a guide that samples
        no site of the model.

    See Also
    --------
    arviz_base.from_numpyro_svi
        The same for NumPyro

    References
    ----------
    .. [1] Rubin, D. B. (1981). Estimation in parallel randomized experiments. Journal of Educational Statistics,
       6(4), 377-401.

    Examples
    --------
    The eight schools of [1]_, with a mean field guide:

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    >>> sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    >>> def eight_schools(sigma, y=None):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    ...     with pyro.plate("school", len(sigma)):
    ...         eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
    ...         theta = pyro.deterministic("theta", mu + tau * eta)
    ...         pyro.sample("obs", dist.Normal(theta, sigma), obs=y)
    >>> pyro.set_rng_seed(0)
    >>> pyro.clear_param_store()
    >>> guide = pyro.infer.autoguide.AutoNormal(eight_schools)
    >>> optimizer = pyro.optim.Adam({"lr": 0.02})
    >>> svi = pyro.infer.SVI(eight_schools, guide, optimizer, pyro.infer.Trace_ELBO())
    >>> for _ in range(500):
    ...     loss = svi.step(sigma, y)

    Draws, predictions for the same schools and the data become one tree:

    >>> tree = from_pyro_svi(svi, model_args=(sigma, y), log_likelihood=True, num_samples=500)
    >>> list(tree.children)
    ['posterior', 'log_likelihood', 'posterior_predictive', 'observed_data']
    >>> dict(tree["posterior"].sizes)
    {'sample': 500, 'school': 8}
    >>> bool(tree["posterior"]["mu"].mean() > 0)
    True
    """
    if svi is not None:
        model, guide = svi.model, svi.guide
    with rc_context(rc={"data.sample_dims": ["sample"]}):
        return PyroSVIConverter(
            model=model, guide=guide, model_args=model_args, model_kwargs=model_kwargs, prior=prior,
            posterior_predictive=posterior_predictive, predictions=predictions, predictions_args=predictions_args,
            predictions_kwargs=predictions_kwargs, observed_data=observed_data, constant_data=constant_data,
            predictions_constant_data=predictions_constant_data, log_likelihood=log_likelihood,
            index_origin=index_origin, coords=coords, dims=dims, pred_dims=pred_dims,
            extra_event_dims=extra_event_dims, num_samples=num_samples, parallel=parallel, seed=seed,
        ).to_datatree()  # fmt: skip
