"""A result as its node in a tree, its Dataset or its DataArray: one way in for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xarray as xr

from lkarray.errors import SchemaError

Result = xr.DataTree | xr.Dataset | xr.DataArray


def as_array(obj: Any, what: str, *, prefer: Iterable[str] = ()) -> xr.DataArray:
    """Return the DataArray that a node, a Dataset or a DataArray holds.

    Parameters
    ----------
    obj
        Such as ``tree["derived/correlation"]``, its Dataset, or the DataArray itself.
    what
        What it is to be, for messages.
    prefer
        Names of the variable meant, where there are several: the first that is there.

    Raises
    ------
    TypeError
        ``obj`` is none of these.
    SchemaError
        It holds no variable, or several.
    """
    if isinstance(obj, xr.DataArray):
        return obj
    if not isinstance(obj, xr.Dataset | xr.DataTree):
        raise TypeError(
            f"{what} must be an xarray.DataArray, or the Dataset or node of a store that holds it, "
            f"not {type(obj).__name__}"
        )
    ds = as_dataset(obj, what)
    there = [str(name) for name in ds.data_vars]
    names = [name for name in prefer if name in there][:1] or there
    if len(names) != 1:
        raise SchemaError(
            f"{what} must hold one variable, and there are {sorted(names)}; pass the one "
            "you mean, for example ds['correlation']"
        )
    return ds[names[0]]


def as_dataset(obj: Any, what: str) -> xr.Dataset:
    """Return the Dataset that a node holds, or the Dataset itself.

    Raises
    ------
    TypeError
        ``obj`` is neither.
    SchemaError
        The node holds no variables, but only other nodes.
    """
    if isinstance(obj, xr.DataTree):
        if not obj.data_vars:
            raise SchemaError(
                f"{what}: this node holds no variables, only the groups {sorted(obj.children)}; "
                "pass the one you mean, for example tree['derived/correlation']"
            )
        return obj.to_dataset()
    if not isinstance(obj, xr.Dataset):
        raise TypeError(
            f"{what} must be an xarray.Dataset, or the node of a store that holds it, not "
            f"{type(obj).__name__}"
        )
    return obj


def alone(obj: Any, what: str) -> Any:
    """Return the only variable of a node or a Dataset; anything else as it is."""
    ds = opened(obj, what)
    return as_array(ds, what) if isinstance(ds, xr.Dataset) and len(ds.data_vars) == 1 else ds


def opened(obj: Any, what: str) -> Any:
    """Return a node's Dataset; anything else as it is."""
    return as_dataset(obj, what) if isinstance(obj, xr.DataTree) else obj
