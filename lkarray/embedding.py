"""Maps: low-dimensional embeddings of a neighbour graph, by UMAP."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping

import numpy as np
import xarray as xr

from lkarray.engine.numbers import top_k
from lkarray.errors import SchemaError
from lkarray.kernels.gradients import require_kernel
from lkarray.kernels.gram import sample_coords
from lkarray.schema import COMPONENT, RANK, second

_ROWS = 1024  # of a kernel in memory, at a time


def embed(
    neighbors_or_kernel: xr.Dataset | xr.DataArray,
    method: str = "umap",
    n_components: int = 2,
    seed: int = 0,
    *,
    k: int = 30,
    min_dist: float = 0.1,
) -> xr.DataArray:
    """Embed samples by UMAP, at distance ``1 - R`` (loss-kernel section 3).

    Parameters
    ----------
    neighbors_or_kernel
        What `lkarray.neighbors` returns (with ``exclude="label"``, edges within a label are
        gone before the search, as loss-kernel appendix B advises), or a square correlation
        kernel, read by rows and never held whole.
    method
        ``"umap"`` (umap-learn; McInnes et al. 2018).
    n_components
        Dimensions of the map.
    seed
        Makes the map repeatable on one machine and version of umap-learn.
    k
        Neighbours of each sample, where a kernel is given.
    min_dist
        UMAP's least distance between points of the map.

    Returns
    -------
    xarray.DataArray
        ``embedding(sample, component)``, float32, computed, with the samples' coordinates.
        Memory: n times k.

    Raises
    ------
    ValueError
        The method is unknown, or the kernel is not a correlation, or an influence operator.
    SchemaError, TypeError
        It is neither a neighbour table nor a square kernel.
    """
    if method != "umap":
        raise ValueError(f"method must be 'umap', not {method!r}")
    if n_components < 1:
        raise ValueError(f"n_components must be at least 1, not {n_components}")
    if isinstance(neighbors_or_kernel, xr.Dataset | xr.DataArray):
        require_kernel(neighbors_or_kernel, "embed")
    if isinstance(neighbors_or_kernel, xr.Dataset):
        rows, index, similarity, coords = _from_neighbors(neighbors_or_kernel)
    elif isinstance(neighbors_or_kernel, xr.DataArray):
        rows, index, similarity, coords = _from_kernel(neighbors_or_kernel, k)
    else:
        raise TypeError(
            "embed takes the Dataset of lk.neighbors or the DataArray of lk.correlation, not "
            f"{type(neighbors_or_kernel).__name__}"
        )
    points = _umap(index, 1 - similarity, n_components, seed, min_dist)
    return xr.DataArray(
        points,
        dims=(rows, COMPONENT),
        coords=coords,
        name="embedding",
        attrs={"method": method, "seed": seed, "k": index.shape[1], "min_dist": min_dist},
    )


Table = tuple[str, np.ndarray, np.ndarray, Mapping[Hashable, xr.Variable]]


def _from_neighbors(ds: xr.Dataset) -> Table:
    missing = {"neighbor", "similarity"} - set(ds.data_vars)
    if missing or RANK not in ds["neighbor"].dims:
        raise SchemaError(
            f"embed: the Dataset lacks {sorted(missing) or RANK}; pass lk.neighbors(...)"
        )
    rows = str(next(dim for dim in ds["neighbor"].dims if dim != RANK))
    ds = ds.transpose(rows, RANK, ...).compute()
    index, similarity = ds["neighbor"].values, ds["similarity"].values
    if rows in ds.indexes:
        if not ds.indexes[rows].is_unique:
            raise SchemaError(f"embed: the index of {rows!r} has values twice; make them distinct")
        index = ds.indexes[rows].get_indexer(index.ravel()).reshape(index.shape)
    elif index.max(initial=-1) >= len(index):
        raise SchemaError(f"embed: a neighbour is not among the {len(index)} rows of the table")
    if (index < 0).all():
        raise SchemaError(
            "embed: no row has a neighbour in the table; exclude less, or select less"
        )
    return rows, index, similarity, sample_coords(ds, rows)


def _from_kernel(kernel: xr.DataArray, k: int) -> Table:
    if kernel.ndim != 2 or kernel.dims[1] != second(kernel.dims[0]) or len(set(kernel.shape)) != 1:
        raise SchemaError(
            f"embed: a kernel must be square, with dims ('sample', 'sample_2'), not "
            f"{dict(kernel.sizes)}; pass lk.correlation(losses)"
        )
    rows, n = str(kernel.dims[0]), kernel.shape[0]
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    k = min(k, n - 1)
    index, similarity = np.empty((n, k), int), np.empty((n, k), np.float32)
    lengths = kernel.chunksizes.get(rows) or [min(_ROWS, n - a) for a in range(0, n, _ROWS)]
    start = 0
    for length in lengths:  # a row of tiles at a time, so that none is computed twice
        part = np.array(kernel[start : start + length].values)
        if not np.abs(part).max() <= 1 + 1e-3:
            raise ValueError(
                "embed needs correlations between -1 and 1; pass lk.correlation(losses) rather "
                "than a covariance"
            )
        part[np.arange(length), start + np.arange(length)] = -np.inf
        best = top_k(part, k)
        index[start : start + length] = best
        similarity[start : start + length] = np.take_along_axis(part, best, axis=1)
        start += length
    return rows, index, similarity, sample_coords(kernel, rows)


def _umap(
    index: np.ndarray, distance: np.ndarray, n_components: int, seed: int, min_dist: float
) -> np.ndarray:
    n = len(index)
    if n < 4:
        raise ValueError(f"UMAP needs at least 4 samples, not {n}")
    # UMAP must have fewer neighbours than samples, the point itself counted.
    index, distance = index[:, : n - 2], distance[:, : n - 2]
    k = index.shape[1]
    # UMAP counts a point as its own first neighbour. A missing one (-1) is skipped there.
    own = np.arange(n)[:, None]
    index = np.concatenate([own, index], axis=1).astype(np.int32)
    distance = np.concatenate([np.zeros((n, 1)), np.nan_to_num(distance, nan=2.0)], axis=1)
    distance = np.clip(distance, 0, 2).astype(np.float32)
    # The graph comes from the table alone; UMAP uses these only to place whole components.
    stand_in = np.random.default_rng(seed).normal(size=(n, n_components)).astype(np.float32)
    with warnings.catch_warnings():
        # "knn_search_index is not an NNDescent object": new points are not embedded here.
        warnings.filterwarnings("ignore", message=r"(?s).*knn_search_index.*")
        # A graph that falls into many parts is laid out part by part, as intended.
        warnings.filterwarnings("ignore", message=r"(?s).*Spectral initiali[sz]ation failed.*")
        # "Tensorflow not installed": it is needed for parametric UMAP only.
        warnings.simplefilter("ignore", ImportWarning)
        from umap import UMAP

        model = UMAP(
            n_neighbors=k + 1,
            n_components=n_components,
            min_dist=min_dist,
            precomputed_knn=(index, distance),
            random_state=seed,
            n_jobs=1,
        )
        points: np.ndarray = model.fit_transform(stand_in)
    return points.astype(np.float32)
