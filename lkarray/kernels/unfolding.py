"""The gradient tensor as a matrix, and parts of it: unfoldings and selections of parameters."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from fnmatch import fnmatchcase
from itertools import chain, pairwise
from math import prod
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.schema import GRADIENT, GRADIENTS, MODULE, PARAM, START, STOP, TENSOR
from lkarray.tensors import Losses, as_gradients

_CHUNK = 128 << 20  # bytes of a merged chunk, at most


@checked()
def unfold(G: Losses, *, keep: str | Iterable[str]) -> xr.DataArray:
    """Return the gradient tensor as a matrix, lazily.

    Every kernel and spectrum here takes the tensor itself and the dims to contract
    (``lk.gram``, ``lk.svd``); a matrix is for what else one might do with it.

    Parameters
    ----------
    G
        Gradients ``(time, example, param)``, or what holds them.
    keep
        Dims of the rows; all others become columns. ``"time"`` is the mode-1 unfolding,
        ``"example"`` the path features of eq. 13, ``"param"`` mode 3, and
        ``("time", "example")`` the joint one.

    Returns
    -------
    xarray.DataArray
        Two dims; several that were merged are joined by ``_``: ``unfold(G, keep="time")`` is
        ``(time, example_param)``. Entries are in C order of the dims in that name, those of the
        columns in the order of ``G``. Rows and columns keep their coordinates; those of merged
        dims are repeated, unless ``param`` is among them.

    Raises
    ------
    SchemaError
        ``keep`` names a dim that is not there, twice, or all of them.

    Notes
    -----
    Nothing is computed. Where the outer of the merged dims has chunks of one entry, as times
    have in a store, chunks stay as they are; otherwise the inner ones are made whole, in chunks
    of at most 128 MiB.

    References
    ----------
    - Anonymous 2026, A.6.3 and eq. 13: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.unfold(G, keep="time").dims
    ('time', 'example_param')
    >>> lk.unfold(G, keep="example").values.tolist()
    [[3.0, 4.0, 0.0, 2.0], [1.0, 0.0, 1.0, 0.0]]
    """
    x = as_gradients(G)
    rows = (keep,) if isinstance(keep, str) else tuple(keep)
    columns = tuple(str(dim) for dim in x.dims if dim not in rows)
    missing = [dim for dim in rows if dim not in x.dims]
    if missing or not rows or not columns or len(set(rows)) != len(rows):
        raise SchemaError(
            f"keep={keep!r} must name some of the dims {x.dims}, each once, and leave at least one "
            "for the columns"
        )
    names = "_".join(rows), "_".join(columns)
    matrix = merge(merge(x.variable, rows, names[0]), columns, names[1]).transpose(*names)
    coords: dict[Hashable, xr.Variable] = {}
    for dims, name in zip((rows, columns), names, strict=True):
        for label, coord in x.coords.items():
            if (
                coord.dims
                and set(coord.dims) <= set(dims)
                and (len(dims) == 1 or PARAM not in dims)
            ):
                variable = coord.variable.to_base_variable()
                if len(dims) > 1:
                    whole = variable.set_dims({dim: x.sizes[dim] for dim in dims})
                    variable = whole.stack({name: dims})
                coords[label] = variable
    return xr.DataArray(matrix, coords=coords, name=x.name, attrs=x.attrs)


def merge(x: xr.Variable, dims: tuple[str, ...], name: str) -> xr.Variable:
    """Return ``x`` with some dims merged into one, the first, in C order; lazy if it is."""
    others = tuple(dim for dim in x.dims if dim not in dims)
    x = x.transpose(*dims, *others)
    if len(dims) == 1:
        return xr.Variable((name, *others), x._data, x.attrs)
    if x.chunks is None and not x._in_memory:
        x = x.chunk({})
    shape = (prod(x.sizes[dim] for dim in dims), *(x.sizes[dim] for dim in others))
    if x.chunks is None:
        return xr.Variable((name, *others), x.values.reshape(shape), x.attrs)
    x = x.chunk(_blocks(x, dims))
    return xr.Variable((name, *others), da.reshape_blockwise(x.data, shape), x.attrs)


def _blocks(x: xr.Variable, dims: tuple[str, ...]) -> dict[Any, int]:
    """Return chunks each of which is one run of the merged dim, so that merging moves nothing."""
    largest = {dim: max(lengths) for dim, lengths in x.chunksizes.items()}
    outer = next((at for at, dim in enumerate(dims) if largest[dim] > 1), len(dims) - 1)
    inner = dims[outer + 1 :]
    if not inner:
        return {}
    cell = x.dtype.itemsize * prod(x.sizes[dim] for dim in inner)
    cell *= prod(largest[dim] for dim in x.dims if dim not in dims)
    if cell > _CHUNK:
        return dict.fromkeys(dims[:-1], 1)
    return {dims[outer]: min(largest[dims[outer]], _CHUNK // cell)} | dict.fromkeys(inner, -1)


@checked(G=None)
def params(G: Losses, pattern: str | Iterable[str]) -> xr.Dataset:
    """Select parameters by the names of their tensors or modules, lazily.

    Parameters
    ----------
    G
        The Dataset with ``gradient(..., param)`` and, on ``tensor``, its names and ``start``,
        ``stop`` (and ``module``); or a tree that has it as ``gradients``.
    pattern
        A shell pattern or several: ``"fc1.*"`` selects ``fc1.weight`` and ``fc1.bias``;
        ``"fc1"`` does by the name of the module.

    Returns
    -------
    xarray.Dataset
        ``G`` with those tensors' parameters, in the order in which they lie along ``param``, and
        ``start``, ``stop`` counted anew.

    Raises
    ------
    TypeError
        ``G`` is a DataArray, which cannot know where tensors lie.
    SchemaError
        Nothing matches; or ``start`` and ``stop`` are missing, or do not fit ``param``.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> from lkarray.kernels.unfolding import params
    >>> G = xr.Dataset(
    ...     {"gradient": (("example", "param"), np.arange(10.0).reshape(2, 5))},
    ...     coords={
    ...         "tensor": ["fc1.weight", "fc1.bias", "fc2.weight"],
    ...         "start": ("tensor", [0, 2, 3]),
    ...         "stop": ("tensor", [2, 3, 5]),
    ...     },
    ... )
    >>> params(G, "*.weight")["gradient"].values.tolist()
    [[0.0, 1.0, 3.0, 4.0], [5.0, 6.0, 8.0, 9.0]]
    """
    ds = _dataset(G)
    every = _spans(ds)
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    known = [name for name in (TENSOR, MODULE.name) if name in ds.variables]
    names = list(zip(*(map(str, ds[each].values) for each in known), strict=True))
    chosen = [
        at
        for at, own in enumerate(names)
        if any(fnmatchcase(name, each) for name in own for each in patterns)
    ]
    if not chosen:
        raise SchemaError(
            f"pattern: no tensor matches {list(patterns)}; there are {[own[0] for own in names]}"
        )
    chosen.sort(key=lambda at: tuple(every[at]))
    spans = [(int(start), int(stop)) for start, stop in every[chosen]]
    edges = np.cumsum([0, *(stop - start for start, stop in spans)])
    part = _take(ds, spans).isel({TENSOR: chosen})
    moved = {START.name: (TENSOR, edges[:-1]), STOP.name: (TENSOR, edges[1:])}
    return part.assign_coords(moved) if START.name in ds.coords else part.assign(moved)


def _dataset(G: Losses) -> xr.Dataset:
    if isinstance(G, xr.DataArray):
        raise TypeError(
            "params needs to know where tensors lie, which a DataArray cannot say; pass the "
            "Dataset that it is from (tree['gradients']), and take the DataArray afterwards"
        )
    as_gradients(G)
    if isinstance(G, xr.DataTree):
        G = (G if GRADIENT.name in G.data_vars else G.children[GRADIENTS]).to_dataset()
    missing = [name for name in (START.name, STOP.name, TENSOR) if name not in G.variables]
    if missing:
        raise SchemaError(
            f"G lacks {missing}; params needs the names of the tensors as the coordinate 'tensor', "
            "and start(tensor) and stop(tensor) beside the gradients"
        )
    if any(G[name].dims != (TENSOR,) for name in (START.name, STOP.name)) or not G.sizes[TENSOR]:
        raise SchemaError("G: start and stop must be along 'tensor', one for each tensor")
    return G


def _spans(ds: xr.Dataset) -> np.ndarray:
    """Return start and stop of each tensor, ``(tensor, 2)``, checked against the parameters."""
    spans = np.stack([ds[spec.name].values for spec in (START, STOP)], axis=-1)
    start, stop = spans[np.lexsort(spans.T[::-1])].T
    end, size = int(stop[-1]), ds.sizes[PARAM]
    if start[0] != 0 or end != size or (start[1:] != stop[:-1]).any():
        raise SchemaError(
            f"start and stop describe parameters up to {end}, but 'param' has {size} of them, or "
            "there are gaps: it was selected from without them; select with lk.params only, or "
            "pass the Dataset as it was stored"
        )
    return spans


def _take(ds: xr.Dataset, spans: list[tuple[int, int]]) -> xr.Dataset:
    """Return the parameters of some spans in order: by slices where the array is lazy."""
    runs = [spans[0]]
    for (_, end), span in pairwise(spans):
        if span[0] == end:
            runs[-1] = (runs[-1][0], span[1])
        else:
            runs.append(span)
    if len(runs) == 1:
        return ds.isel({PARAM: slice(*runs[0])})
    lazy = [name for name, v in ds.variables.items() if PARAM in v.dims and v.chunks is not None]
    index = np.fromiter(chain.from_iterable(range(*run) for run in runs), np.int64)
    out = ds.drop_vars(lazy).isel({PARAM: index}, missing_dims="ignore")
    for name in lazy:
        # Slices, where an index array would make Dask shuffle.
        pieces = [ds.variables[name].isel({PARAM: slice(*run)}) for run in runs]
        out[name] = xr.Variable.concat(pieces, PARAM)
    return out.set_coords([name for name in lazy if name in ds.coords])
