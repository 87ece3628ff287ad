"""Maps: low-dimensional embeddings of a neighbour graph, by UMAP, and how true they are."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from lkarray.arguments import COUNT, REPEATS, Limits, checked
from lkarray.engine.numbers import top_k
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.groups import group_codes
from lkarray.kernels.kinds import require_kernel, verdict_of
from lkarray.labels import in_order, squared
from lkarray.results import Result, alone, as_array
from lkarray.schema import COMPONENT, RANK, second
from lkarray.values import require_real
from lkarray.waiting import workers_awaited

PAIRS = "pairs"
_TABLE = ("neighbor", "similarity")
_ROWS = 1024  # of a kernel in memory, at a time


@workers_awaited("computed")
@checked(
    n_components=COUNT,
    seed=Limits(least=0, most=2**32 - 1),
    k=COUNT,
    min_dist=Limits(least=0, below=1),
)
def embed(
    neighbors_or_kernel: Result,
    method: str = "umap",
    n_components: int = 2,
    seed: int = 0,
    *,
    k: int = 30,
    min_dist: float = 0.1,
) -> xr.DataArray:
    """Embed samples by UMAP, at distance ``1 - R``.

    Parameters
    ----------
    neighbors_or_kernel
        What `lkarray.neighbors` returns (with ``exclude="label"``, edges within a label are
        gone before the search, as Adam et al. 2025a, appendix B advises), or a square correlation
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
        ``embedding(sample, component)``, float32, computed, with the samples' coordinates. NaN of
        samples that have no neighbours and are nobody's, such as those whose losses do not vary;
        the attribute ``left_out`` counts them. Memory: n times k.

    Raises
    ------
    ValueError
        The method is unknown, ``n_components`` exceeds the samples less two, or the kernel is
        not a correlation, or an influence operator.
    SchemaError, TypeError
        It is neither a neighbour table nor a square kernel.

    References
    ----------
    - McInnes et al. 2018: "UMAP: uniform manifold approximation and projection for dimension
      reduction", arXiv:1802.03426.
    - Adam et al. 2025a, section 3 and appendix B: "The Loss Kernel", arXiv:2509.26537.
    """
    if method != "umap":
        raise ValueError(f"method must be 'umap', not {method!r}")
    neighbors_or_kernel = alone(neighbors_or_kernel, "neighbors_or_kernel")
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
    known = verdict_of(neighbors_or_kernel)
    linked = np.asarray((index >= 0).any(axis=1))
    linked[index[index >= 0]] = True
    place = np.append(np.cumsum(linked) - 1, -1)  # the last is of those that are missing
    placed = _umap(place[index[linked]], 1 - similarity[linked], n_components, seed, min_dist)
    points = np.full((len(index), n_components), np.nan, np.float32)
    points[linked] = placed
    return xr.DataArray(
        points,
        dims=(rows, COMPONENT),
        coords=coords,
        name="embedding",
        attrs={
            "method": method,
            "seed": seed,
            "k": index.shape[1],
            "min_dist": min_dist,
            "left_out": int((~linked).sum()),
        }
        | known,
    )


@workers_awaited("computed")
@checked(bins=REPEATS)
def similarity_by_distance(
    kernel: Result, points: Result, groups: Hashable | Any = "label", *, bins: int = 20
) -> xr.Dataset:
    """Return how a kernel goes with distance on its map, within groups and between them.

    Over all pairs of different samples: is the map that a kernel was given true to it (Anonymous
    2026, section 6.2)?

    Parameters
    ----------
    kernel
        Square, as from `lkarray.ips` or `lkarray.correlation`.
    points
        Its map, ``(sample, component)``, as from `lkarray.embed`; in any order, where kernel and
        map have labels of the samples.
    groups
        A coordinate of the samples of ``points``, or one label for each sample of the kernel, as
        for `lkarray.group_mean`.
    bins
        Of distance, equally wide from the smallest to the largest of either kind of pairs.

    Returns
    -------
    xarray.Dataset
        Computed. Over ``pairs`` (``within``, ``between``) and ``bin``: ``mean`` and ``sd`` of the
        kernel, NaN where no pair is, ``count``, and ``distance``, the middle of each bin in units
        of the map; and ``rank_correlation(pairs)``, Spearman's of kernel and distance (negative
        where near samples are alike; NaN where either is constant). Memory: some 60 bytes a
        pair, 120 MB of 2,000 samples.

    Raises
    ------
    ValueError
        ``bins`` is below 1, or the kernel is an influence operator.
    SchemaError
        The kernel is not square, or the points or groups are not of its samples.

    References
    ----------
    - Anonymous 2026, section 6.2: "Path-Integrated Loss-Gradient Kernels".
    """
    from scipy.spatial.distance import pdist

    kernel, points = as_array(kernel, "kernel"), as_array(points, "points")
    require_kernel(kernel, "similarity_by_distance")
    rows = _require_square(kernel, "similarity_by_distance")
    if set(points.dims) != {rows, COMPONENT} or points.sizes[rows] < kernel.sizes[rows]:
        raise SchemaError(
            f"points have {dict(points.sizes)}; expected {rows!r} and {COMPONENT!r} of "
            f"{kernel.sizes[rows]} samples, as lk.embed(kernel) returns"
        )
    kernel = squared(kernel, "kernel")
    for name, x in (("kernel", kernel), ("points", points)):
        require_real(name, x)
    points = in_order(points, rows, kernel.indexes.get(rows), kernel.sizes[rows], what="points")
    _, _, codes = group_codes(points if isinstance(groups, str) else kernel, rows, groups)
    first, last = np.triu_indices(len(codes), 1)
    values = kernel.values[first, last].astype(np.float64)
    apart = pdist(points.transpose(rows, COMPONENT).values)
    same = codes[first] == codes[last]
    kinds = [_binned(values[at], apart[at], bins) for at in (same, ~same)]
    curves = xr.concat(kinds, xr.Variable(PAIRS, ["within", "between"]))
    return curves.assign_attrs(kernel=str(kernel.name), samples=len(codes))


def _binned(values: np.ndarray, distance: np.ndarray, bins: int) -> xr.Dataset:
    """Return mean, spread and count of values by distance, and their rank correlation."""
    from scipy.stats import spearmanr

    low, high = (distance.min(), distance.max()) if len(distance) else (np.nan, np.nan)
    edges = np.linspace(low, high, bins + 1)
    place = np.clip(np.searchsorted(edges, distance, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    divisor = np.where(count, count, np.nan)
    mean = np.bincount(place, values, bins) / divisor
    square = np.bincount(place, (values - mean[place]) ** 2, bins) / divisor
    varied = len(values) > 1 and np.ptp(values) and np.ptp(distance)
    columns = {"distance": (edges[1:] + edges[:-1]) / 2, "mean": mean, "sd": np.sqrt(square)}
    return xr.Dataset(
        {name: ("bin", column) for name, column in (columns | {"count": count}).items()}
        | {"rank_correlation": spearmanr(values, distance).statistic if varied else np.nan}
    )


Table = tuple[str, np.ndarray, np.ndarray, Mapping[Hashable, xr.Variable]]


def _from_neighbors(ds: xr.Dataset) -> Table:
    missing = set(_TABLE) - set(ds.data_vars)
    if missing or any(RANK not in ds[name].dims or ds[name].ndim != 2 for name in _TABLE):
        raise SchemaError(
            f"embed: neighbors_or_kernel lacks {sorted(missing) or RANK}, or has other dims; pass "
            "lk.neighbors(...)"
        )
    rows = str(next(dim for dim in ds["neighbor"].dims if dim != RANK))
    ds = ds.transpose(rows, RANK, ...).compute()
    index, similarity = ds["neighbor"].values, ds["similarity"].values
    if rows in ds.indexes:
        if not ds.indexes[rows].is_unique:
            raise SchemaError(
                f"embed: neighbors_or_kernel: the index of {rows!r} has values twice; make them "
                "distinct"
            )
        index = ds.indexes[rows].get_indexer(index.ravel()).reshape(index.shape)
    elif index.max(initial=-1) >= len(index):
        raise SchemaError(
            f"embed: neighbors_or_kernel: a neighbour is not among the {len(index)} rows of the "
            "table"
        )
    if (index < 0).all():
        raise SchemaError(
            "embed: neighbors_or_kernel: no row has a neighbour in the table; exclude less, or "
            "select less"
        )
    return rows, index, similarity, sample_coords(ds, rows)


def _require_square(kernel: xr.DataArray, name: str) -> str:
    """Return the dim of a square kernel's rows."""
    if kernel.ndim != 2 or kernel.dims[1] != second(kernel.dims[0]) or len(set(kernel.shape)) != 1:
        raise SchemaError(
            f"{name}: a kernel must be square, with dims ('sample', 'sample_2'), not "
            f"{dict(kernel.sizes)}; pass lk.correlation(losses)"
        )
    return str(kernel.dims[0])


def _from_kernel(kernel: xr.DataArray, k: int) -> Table:
    rows, n = _require_square(kernel, "embed"), kernel.shape[0]
    kernel = squared(kernel, "kernel")
    k = min(k, n - 1)
    index, similarity = np.empty((n, k), int), np.empty((n, k), np.float32)
    lengths = kernel.chunksizes.get(rows) or [min(_ROWS, n - a) for a in range(0, n, _ROWS)]
    start, own = 0, np.empty(n)
    for length in lengths:  # a row of tiles at a time, so that none is computed twice
        part = np.array(kernel[start : start + length].values, np.float32)
        if not np.abs(part).max() <= 1 + 1e-3:
            raise ValueError(
                "embed needs correlations between -1 and 1; pass lk.correlation(losses) rather "
                "than a covariance"
            )
        diagonal = np.arange(length), start + np.arange(length)
        own[start : start + length] = part[diagonal]
        part[diagonal] = -np.inf
        best = top_k(part, k)
        index[start : start + length] = best
        similarity[start : start + length] = np.take_along_axis(part, best, axis=1)
        start += length
    constant = own == 0  # what does not vary is alike to nothing: its zeros are no neighbours
    away = constant[:, None] | constant[index]
    index[away], similarity[away] = -1, np.nan
    if away.all():
        raise SchemaError(f"embed: the kernel is zero: the losses of all {n} samples are constant")
    return rows, index, similarity, sample_coords(kernel, rows)


def _umap(
    index: np.ndarray, distance: np.ndarray, n_components: int, seed: int, min_dist: float
) -> np.ndarray:
    n = len(index)
    if n < 4:
        raise ValueError(
            f"UMAP needs at least 4 samples, and neighbors_or_kernel is of {n}; take more"
        )
    if n_components > n - 2:
        raise ValueError(
            f"n_components must be at most {n - 2}, two less than the samples, not {n_components}"
        )
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
        # "IProgress not found": no bar is drawn.
        warnings.filterwarnings("ignore", message=r"IProgress not found.*")
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
