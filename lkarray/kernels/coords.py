"""Coordinates of results, from those of the tensors they were made from."""

from __future__ import annotations

from collections.abc import Hashable

import xarray as xr

from lkarray.errors import SchemaError
from lkarray.schema import second


def sample_coords(x: xr.DataArray | xr.Dataset, *dims: str) -> dict[Hashable, xr.Variable]:
    """Return the coordinates of ``x`` along ``dims`` alone, and its scalars, each in one chunk."""
    kept = {}
    for name, coord in x.coords.items():
        if set(coord.dims) <= set(dims):
            variable = coord.variable.drop_encoding()
            kept[name] = variable.chunk(-1) if variable.chunks is not None else variable
    return kept


def kernel_coords(
    x: xr.DataArray, y: xr.DataArray, each: tuple[str, ...], rows: str, columns: str
) -> dict[Hashable, xr.Variable]:
    """Return the coordinates of the result: those of x, and those of y's columns, renamed.

    A column coordinate takes the ``_2`` of its dim, or gets one where x has its name too.
    """
    coords = sample_coords(x, *each, rows)
    other = sample_coords(y, *each, columns)
    for name, variable in list(coords.items()):
        if not variable.dims and not (name in other and variable.identical(other[name])):
            del coords[name]  # true of one side only
    taken = set(coords)
    for name, variable in other.items():
        if columns in variable.dims:
            new = second(name) if columns == rows or name in taken else name
            if new in coords:
                raise SchemaError(
                    f"the column coordinate {name!r} would be called {new!r}, which x has already; "
                    f"rename one, for example x.rename({new}=...)"
                )
            dims = [
                second(dim) if columns == rows and dim == columns else dim for dim in variable.dims
            ]
            coords[new] = xr.Variable(dims, variable.data, variable.attrs)
    return coords
