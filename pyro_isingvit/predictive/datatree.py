"""ArviZ DataTrees: making groups, writing and reading netCDF files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import xarray as xr
from arviz_base import dict_to_dataset
from torch import Tensor

from pyro_isingvit.core.checkpoint import uninterrupted, write_atomically
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.untrusted import check_expansion
from pyro_isingvit.version import __version__

LIBRARY = "pyro-isingvit"

Dims = dict[str, list[str | None]]


def make_group(arrays: Mapping[str, Any], dims: Mapping[str, Any], coords: Any, *lead: str) -> xr.Dataset:
    """One group; ``lead`` are the sample dimensions, in front of the dimensions that ``dims`` names."""
    values = {key: x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x) for key, x in arrays.items()}
    named: Any = {key: list(dims[key]) for key in arrays if key in dims}
    return dict_to_dataset(values, dims=named, coords=coords, sample_dims=lead, inference_library=pyro)


def make_tree(groups: dict[str, xr.Dataset], attrs: Mapping[str, Any]) -> xr.DataTree:
    """The groups that have variables, under one root with the library's mark."""
    tree = xr.DataTree.from_dict({name: group for name, group in groups.items() if group.data_vars})
    tree.attrs = {"library": LIBRARY, "version": __version__, **attrs}
    return tree


def save_datatree(tree: xr.DataTree, path: str | Path) -> None:
    """Writes a tree as compressed netCDF, whole or not at all.

    Args:
        tree: such as ``run_to_datatree`` or ``from_pyro_svi`` gives; it is not changed.
        path: the file, which is replaced if it exists.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.

    Examples:
        >>> import tempfile
        >>> import numpy as np, xarray as xr
        >>> from pyro_isingvit import load_datatree, save_datatree
        >>> draws = xr.Dataset({"mu": ("sample", np.array([0.4, 0.5]))})
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_datatree(xr.DataTree.from_dict({"posterior": draws}), f"{place}/posterior.nc")
        ...     tree = load_datatree(f"{place}/posterior.nc")
        >>> tree["posterior"]["mu"].values
        array([0.4, 0.5])
    """
    tree = tree.copy()
    tree.attrs = {"library": LIBRARY, **tree.attrs}  # the mark that load_datatree looks for
    packed = {"zlib": True, "complevel": 2}
    encoding = {
        node.path: {name: packed for name, x in node.data_vars.items() if x.dtype.kind in "biuf"}
        for node in tree.subtree
    }

    def write(temporary: Path) -> None:
        try:  # xarray picks h5netcdf or netCDF4, by what is installed; both write the same format
            tree.to_netcdf(temporary, encoding=encoding, format="NETCDF4")
        except RuntimeError as error:  # what the libraries raise on a full disk
            raise OSError(str(error)) from error

    write_atomically(Path(path), write)


def _expanded(path: Path) -> int:
    """Bytes that the variables of a netCDF file unpack to; none is read."""
    from netCDF4 import Dataset

    with Dataset(path) as file:
        groups, total = [file], 0
        for group in groups:  # grows while it is walked
            groups += group.groups.values()
            sizes = ((math.prod(map(len, x.get_dims())), np.dtype(x.dtype).itemsize) for x in group.variables.values())
            total += sum(count * max(size, 1) for count, size in sizes)
    return total


def load_datatree(path: str | Path) -> xr.DataTree:
    """Reads what ``save_datatree`` wrote, into memory; the file is closed. ``save_datatree`` shows an example.

    Args:
        path: the file, such as posterior.nc of a run's folder.

    Returns:
        the tree.

    Raises:
        UserError: missing, cut short, damaged, or no file of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; the run was not evaluated to its end, or the name is wrong.")
    try:
        check_expansion(path, _expanded(path))
        with uninterrupted(), xr.open_datatree(path) as file:
            tree = file.load()
    except (ImportError, UserError):
        raise  # no netCDF library: not the file's fault
    except Exception as error:  # the netCDF libraries raise several kinds, by what is damaged
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({line[:160]}); it is damaged or no netCDF file.") from error
    if str(tree.attrs.get("library")) != LIBRARY:
        raise UserError(f"{path} was not written by {LIBRARY}; open it with xarray.open_datatree.")
    for node in tree.subtree:  # netCDF has no lists of one, and ArviZ wants a list
        if "sample_dims" in node.attrs:
            node.attrs["sample_dims"] = np.atleast_1d(node.attrs["sample_dims"]).tolist()
    return tree
