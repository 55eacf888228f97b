"""Any Pyro SVI fit as an ArviZ DataTree: the converter that ArviZ 1.x has for NumPyro, for Pyro.

Draws lie along one dimension, ``sample``: SVI draws are independent, there are no chains to diagnose.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.random import fork_rng

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.datatree import Dims, make_group, make_tree

Draws = dict[str, Tensor]
Sites = dict[str, dict[str, Any]]  # name -> site of a Pyro trace


def from_pyro_svi(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    posterior_predictive: bool = True,
    predictive_args: Sequence[Any] | None = None,
    predictive_kwargs: Mapping[str, Any] | None = None,
    observed_data: Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    parallel: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> xr.DataTree:
    """Converts an SVI fit, any model with any guide, to an ArviZ DataTree; empty groups are left out.

    - ``posterior`` (sample, ...): z_s ~ q(z), the guide's sites that the model has too, and the model's
      deterministic sites given z_s. Auxiliary sites and the indices of subsampling plates are left out.
    - ``posterior_predictive`` (sample, ...): y_s ~ p(y | z_s), the observed sites sampled anew, and latent
      sites that the guide lacks; with predictive arguments also that run's deterministic sites.
    - ``observed_data``, ``constant_data``.

    Axes of a plate carry its name, event axes are ``<site>_dim_<k>``. A plate that subsamples at random keeps
    one subsample for all draws. Straight-through masks are kept as hard 0/1 values. All draws are in memory.

    Args:
        model: the model, a function or module.
        guide: its fitted guide: a function with parameters in the param store, an AutoGuide or a module.
        *args: what both were fitted with, data included: they give sites, shapes and observed values.
        num_samples: S.
        posterior_predictive: draw the observed sites too.
        predictive_args: positional arguments of the predictive run, in place of ``args``; for other inputs.
        predictive_kwargs: keyword arguments of the predictive run, laid over ``kwargs``, as {"y": None}.
        observed_data: in place of the values found at the observed sites.
        constant_data: arrays to keep with the draws, such as inputs.
        coords: dimension -> coordinate values.
        dims: variable -> dimension names without ``sample``, in place of the inferred ones.
        parallel: run model and guide once under a plate of S, not S times; both must broadcast over it.
        seed: of the draws; the global random state is left as it was.
        **kwargs: keyword arguments of both, as ``args``. Bind those that are named like an option here beforehand,
            with functools.partial.

    Returns:
        the tree, with the groups above.

    Raises:
        UserError: S below 1, or a guide that samples no site of the model.

    Examples:
        A Gaussian whose mean is unknown, under a normal guide:

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_isingvit import from_pyro_svi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(0.5, 0.1))
        >>> tree = from_pyro_svi(model, guide, torch.tensor([0.4, 0.6, 0.5]), num_samples=200)
        >>> sorted(tree.children)
        ['observed_data', 'posterior', 'posterior_predictive']
        >>> dict(tree["posterior_predictive"].sizes)
        {'sample': 200, 'data': 3}
        >>> bool(abs(tree["posterior"]["mu"].mean() - 0.5) < 0.05)
        True
    """
    if num_samples < 1:
        raise UserError(f"`num_samples` must be at least 1, not {num_samples}.")

    def draw(program: Any, wanted: Sites, given: Draws, trace: Any) -> Draws:
        """Draws of the wanted sites, (S, *shape in a single run); the trace is that of a single run."""
        if not wanted:
            return {}
        given = _with_plate_axes(given, trace) if parallel else given
        program = poutine.condition(program, _subsamples(trace))
        sampler = Predictive(program, given or None, None, num_samples, tuple(wanted), parallel)
        values = sampler(*args, **kwargs)  # padded with axes of 1, which the reshape takes away
        shapes = {name: site["value"].shape for name, site in wanted.items()}
        return {name: values[name].reshape(num_samples, *shape) for name, shape in shapes.items()}

    with fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(seed)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
        sites = _sites(trace)
        own = sites.keys() & _sites(guide_trace).keys()
        latent = {name: site for name, site in sites.items() if name in own and not site["is_observed"]}
        if not latent:
            raise UserError("the guide samples no site of the model; pass the guide fitted to this model.")
        derived = {name: site for name, site in sites.items() if site["infer"].get("_deterministic")}
        draws = draw(guide, latent, {}, guide_trace)
        posterior = draws | draw(model, derived, draws, trace)
        free, known, predicted = _Unobserved()(model), latent | derived, {}
        if predictive_args is not None or predictive_kwargs is not None:
            args = args if predictive_args is None else tuple(predictive_args)
            kwargs, known = kwargs | dict(predictive_kwargs or {}), latent
            start = {name: site["value"] for name, site in latent.items()}
            trace = poutine.trace(poutine.condition(free, start)).get_trace(*args, **kwargs)
        if posterior_predictive:
            predicted = {name: site for name, site in _sites(trace).items() if name not in known}
        predictive = draw(free, predicted, draws, trace)
    if observed_data is None:
        seen = {name: site for name, site in sites.items() if site["is_observed"] and name not in derived}
        observed_data = {name: site["value"] for name, site in seen.items()}
    fit_dims, predictive_dims = ({**_plate_dims(group), **(dims or {})} for group in (sites, predicted))
    groups = {
        "posterior": make_group(posterior, fit_dims, coords, "sample"),
        "posterior_predictive": make_group(predictive, predictive_dims, coords, "sample"),
        "observed_data": make_group(observed_data, fit_dims, coords),
        "constant_data": make_group(constant_data or {}, dims or {}, coords),
    }
    return make_tree(groups, {"num_samples": num_samples, "draw_seed": seed})


class _Unobserved(UnconditionMessenger):
    """Samples the observed sites anew; leaves deterministic sites, which Pyro takes for observed, alone."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def _sites(trace: Any) -> Sites:
    """The sites of a trace that mean something: no plate indices, factors or other auxiliary sites."""
    samples = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    auxiliary = {name for name, site in samples.items() if site["infer"].get("is_auxiliary")}
    return {x: site for x, site in samples.items() if x not in auxiliary and not site_is_subsample(site)}


def _subsamples(trace: Any) -> Draws:
    """Plate -> indices, of the plates that choose them at random."""
    plates = {name: site for name, site in trace.nodes.items() if site_is_subsample(site)}
    sizes = {name: (site["fn"].subsample_size, site["fn"].size) for name, site in plates.items()}
    return {name: plates[name]["value"] for name, (part, size) in sizes.items() if part and part < size}


def _plate_dims(sites: Sites) -> Dims:
    """Site -> names of its batch axes; None, a default name, for an axis without a plate."""
    dims: Dims = {}
    for name, site in sites.items():
        batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        frames = [frame for frame in site["cond_indep_stack"] if frame.name != "sample"]
        plates = {(frame.dim, frame.size): frame.name for frame in frames}
        dims[name] = [plates.get((axis, batch[axis])) for axis in range(-len(batch), 0)]
    return dims


def _with_plate_axes(draws: Draws, trace: Any) -> Draws:
    """(S, batch, event) -> (S, 1, ..., batch, event), as many batch axes as the model's plates are deep.

    Predictive cannot tell batch from event axes and would line weights (S, event) up with the data plate: an
    error, or silently wrong where S equals the batch size.
    """
    stacks = [site["cond_indep_stack"] for site in _sites(trace).values()]
    depth = max((-frame.dim for stack in stacks for frame in stack if frame.vectorized), default=0)
    missing = {x: depth - len(trace.nodes[x]["fn"].batch_shape) for x in draws if x in trace.nodes}
    return {x: draws[x].reshape(-1, *[1] * more, *draws[x].shape[1:]) for x, more in missing.items()}
