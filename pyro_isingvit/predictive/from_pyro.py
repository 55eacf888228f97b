"""Any Pyro SVI fit as an ArviZ DataTree, with this library's errors and marks; ``io_pyro`` does the work.

Draws lie along one dimension, ``sample``: SVI draws are independent, there are no chains to diagnose.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xarray as xr

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive import io_pyro
from pyro_isingvit.predictive.datatree import make_tree


def from_pyro_svi(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    posterior_predictive: bool = True,
    log_likelihood: bool = False,
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
    - ``log_likelihood`` (sample, ...), where it is asked for: log p(y | z_s) of the values observed, nats.
    - ``observed_data``, ``constant_data``.

    Axes of a plate carry its name, event axes are ``<site>_dim_<k>``. A plate that subsamples at random keeps
    one subsample for all draws. Straight-through masks are kept as hard 0/1 values. All draws are in memory.

    Args:
        model: the model, a function or module.
        guide: its fitted guide: a function with parameters in the param store, an AutoGuide or a module.
        *args: what both were fitted with, data included: they give sites, shapes and observed values.
        num_samples: S.
        posterior_predictive: draw the observed sites too.
        log_likelihood: add the log-likelihood of the observed values.
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
    elsewhere = predictive_args is not None or predictive_kwargs is not None
    try:
        tree = io_pyro.from_pyro_svi(
            model=model, guide=guide, model_args=args, model_kwargs=kwargs, num_samples=num_samples,
            posterior_predictive=posterior_predictive and not elsewhere, log_likelihood=log_likelihood,
            predictions_args=predictive_args if posterior_predictive else None,
            predictions_kwargs=predictive_kwargs if posterior_predictive else None,
            observed_data=observed_data, constant_data=constant_data, coords=coords, dims=dims, parallel=parallel,
            seed=seed,
        )  # fmt: skip
    except io_pyro._InputError as error:
        raise UserError(str(error)) from error
    names = {"predictions": "posterior_predictive"}
    groups = {names.get(name, name): group.to_dataset() for name, group in tree.children.items()}
    return make_tree(groups, {"num_samples": num_samples, "draw_seed": seed})
