"""Stored arrays as labelled variables, read or left on disk."""

from __future__ import annotations

from collections.abc import Callable, Container

import dask.array as da
import numpy as np
import xarray as xr
import zarr

from lkarray.store.chunks import read_whole
from lkarray.store.committed import array_names, lazily, reading
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.typed import dims_of


def variables(
    root: zarr.Group,
    path: str,
    *,
    lazy: Container[str],
    sparse: Container[str] = (),
    skip: Container[str] = (),
    read: Callable[[zarr.Array], np.ndarray] = read_whole,
) -> dict[str, xr.Variable]:
    """Return the arrays of a group by name: those in ``lazy`` on Dask, the others by ``read``.

    The group is not opened as one Dataset: growth that was killed leaves arrays of several
    lengths; and reading labels must not start a Dask computation. Those in ``sparse`` are on Dask
    too, and may lack chunks.

    Raises
    ------
    DamagedError
        An array or a chunk of it is missing or cannot be read; of lazy ones, when it is computed.
    """
    by_name = {}
    for name in array_names(group_at(root, path)):
        if name in skip:
            continue
        array = stored_at(root, f"{path}/{name}")
        with reading(root.store, f"{path}/{name}"):
            if name in sparse:
                data = da.from_zarr(array)
            else:
                data = lazily(array) if name in lazy else read(array)
            dims = dims_of(array)
            by_name[name] = xr.Variable(dims, data, dict(array.attrs))
    return by_name
