"""Nearest neighbours under the loss correlation kernel, without n x n."""

from __future__ import annotations

import operator

import dask.array as da
import numpy as np
import xarray as xr

from lkarray import engine
from lkarray.errors import SchemaError
from lkarray.kernels.gram import CENTERS, degrees_of_freedom, free_dim, one_of, sample_coords
from lkarray.schema import POSTERIOR, RANK, Losses, as_losses


def neighbors(
    losses: Losses,
    k: int = 30,
    *,
    exclude: str | None = None,
    largest: bool = True,
    center: str = "pooled",
    memory: int | str | None = None,
) -> xr.Dataset:
    """Return each sample's ``k`` most (or least) correlated samples, lazily.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``, or what holds one: n samples, S draws.
    k
        Neighbours of each sample.
    exclude
        A coordinate of the samples, such as ``"label"``: pairs that share its value are left
        out *before* the k are taken (loss-kernel B: noise in the output layer alone makes
        inputs of one label correlate). A sample is never its own neighbour.
    largest
        ``False`` takes the most negatively correlated.
    center
        ``"pooled"`` or ``"chain"``, as for `covariance`.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.Dataset
        ``neighbor(sample, rank)``, values of the (integer) ``sample`` index, and
        ``similarity(sample, rank)``, the correlation R, best first. Where fewer than k
        remain, rows end in -1 and NaN. Compute both variables at once:
        ``neighbors(...).compute()``.

    Raises
    ------
    TypeError, ValueError, SchemaError
        ``k`` is not between 1 and n - 1, ``exclude`` is no coordinate of the samples, or the
        losses lack dims or draws.
    NonFiniteError
        On computing: a loss is NaN or infinite.

    Notes
    -----
    ``n**2 * S`` operations and n k results: each product serves its rows and its columns.
    """
    x = as_losses(losses)
    rows = free_dim(x, "losses", POSTERIOR, ())
    one_of("center", center, CENTERS)
    degrees_of_freedom(x, POSTERIOR, center)
    k = operator.index(k)
    n = x.sizes[rows]
    if not 1 <= k < n:
        raise ValueError(f"k must be between 1 and {n - 1}, the other samples there are, not {k}")
    index = _index(x, rows)
    operand = engine.Operand(x, over=POSTERIOR, each=(), rows=rows, center=center, cosine=True)
    plan = engine.make_plan(
        operand, memory=memory, sink=engine.TOP_K_BYTES, held=engine.top_k_held(n, k)
    )
    codes = None if exclude is None else _codes(x, rows, exclude)
    position, value = engine.top_k_arrays(operand, plan, k, largest=largest, groups=codes)
    if index is not None:
        position = da.map_blocks(_labels, position, index=index, dtype=np.int64)
    coords = sample_coords(x, rows)
    return xr.Dataset(
        {
            "neighbor": ((rows, RANK), position, {"long_name": f"{rows} of the neighbour"}),
            "similarity": ((rows, RANK), value, {"long_name": "loss correlation R"}),
        },
        coords=coords | {RANK: np.arange(k)},
        attrs={
            "k": k,
            "exclude": exclude or "none",
            "largest": int(largest),
            "over": list(POSTERIOR),
            "center": center,
        },
    )


def _index(x: xr.DataArray, rows: str) -> np.ndarray | None:
    """Return the samples' integer labels, by which neighbours are named; -1 means none."""
    if rows not in x.indexes:
        return None
    index = np.asarray(x.indexes[rows])
    if index.dtype.kind not in "iu" or index.min() < 0:
        raise SchemaError(
            f"the index of {rows!r} must be integers of at least 0, by which neighbours are named, "
            f"not {index.dtype}; keep it as a label: x.rename({rows}='name') or "
            f"x.assign_coords({rows}=np.arange({len(index)}))"
        )
    return index.astype(np.int64)


def _codes(x: xr.DataArray, rows: str, exclude: str) -> np.ndarray:
    if exclude not in x.coords or x.coords[exclude].dims != (rows,):
        labels = sorted(str(name) for name, c in x.coords.items() if c.dims == (rows,))
        raise SchemaError(
            f"exclude={exclude!r} is not a coordinate of {rows!r}; there are {labels}. Give labels "
            f"with x.assign_coords({exclude}=({rows!r}, values)), or at sampling with coords="
        )
    return np.unique(x.coords[exclude].values, return_inverse=True)[1]


def _labels(position: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.where(position < 0, -1, index[position])
