"""Stored arrays as labelled variables, read or left on disk."""

from __future__ import annotations

from collections.abc import Container

import dask.array as da
import numpy as np
import xarray as xr
import zarr

from lkarray.store.layout import stored_at


def variables(
    root: zarr.Group, path: str, *, lazy: Container[str], skip: Container[str] = ()
) -> dict[str, xr.Variable]:
    """Return the arrays of a group by name: those in ``lazy`` on Dask, the others read.

    The group is not opened as one Dataset: growth that was killed leaves arrays of several
    lengths; and reading labels must not start a Dask computation.
    """
    group = root[path]
    assert isinstance(group, zarr.Group)
    found = {}
    for name in sorted(group.array_keys()):
        if name not in skip:
            array = stored_at(root, f"{path}/{name}")
            dims = array.metadata.dimension_names or ()  # type: ignore[union-attr]
            data = da.from_zarr(array) if name in lazy else np.asarray(array[...])
            found[name] = xr.Variable(dims, data, dict(array.attrs))
    return found
