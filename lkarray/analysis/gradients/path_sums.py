"""Sums over the path of training: the dims that they contract, and the weight of each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lkarray.errors import SchemaError
from lkarray.schema import LEARNING_RATE, PARAM, TIME
from lkarray.values import one_of

#: Powers of the learning rate inside a sum over time: none, one, two.
WEIGHTS = (None, "lr", "lr2")


def root_weight(x: xr.DataArray, weight: str | None) -> xr.Variable | None:
    """Return the root of the weight of each time, checked: the factor of each operand."""
    one_of("weight", weight, WEIGHTS)
    if weight is None:
        return None
    name = LEARNING_RATE.name
    if name not in x.coords or not set(x.coords[name].dims) <= {TIME}:
        raise SchemaError(
            f"weight={weight!r} needs the learning rate of each time, and there is no coordinate "
            "learning_rate(time); add it with G.assign_coords(learning_rate=('time', rates)), "
            "or pass weight=None"
        )
    # One number a time: cheap to read, and a missing one is better known now.
    rate = x.coords[name].variable.compute(scheduler="synchronous")
    values = rate.values.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if len(wrong):
        index = (
            x.indexes[TIME] if TIME in x.indexes and rate.dims else np.arange(x.sizes.get(TIME, 1))
        )
        raise SchemaError(
            "learning_rate is missing, infinite or negative at the times "
            f"{index[wrong[:5]].tolist()}; select times with one (no step follows the last state "
            "of a run), or pass weight=None"
        )
    return xr.Variable(rate.dims, np.sqrt(values) if weight == "lr" else values)


def weighted(x: xr.DataArray, root: xr.Variable | None) -> xr.DataArray:
    """Return ``x`` times a factor of each time, at its own precision, chunks as they are."""
    if root is None:
        return x
    if x.chunks is None and not x.variable._in_memory:
        x = x.chunk({})
    factor = root.astype(np.result_type(x.dtype, np.float32))
    return x.copy(data=(x.variable * factor).transpose(*x.dims).data)


def path_dims(x: xr.DataArray, each: tuple[str, ...]) -> dict[str, Any]:
    """Return which dims are contracted, and which kept in step, of those that there are."""
    kept = [dim for dim in each if dim in x.dims]
    return {"over": [d for d in (TIME, PARAM) if d in x.dims and d not in kept], "each": kept}


def named(x: xr.DataArray, name: str, weight: str | None, *, units: str) -> xr.DataArray:
    """Return a kernel with its name and what it was made with."""
    return x.rename(name).assign_attrs(weight=weight or "none", units=units)
