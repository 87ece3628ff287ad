"""Counts of pairs of labels in a neighbour table, in blocks and never n x n."""

from __future__ import annotations

from typing import Any

import dask
import numpy as np
import xarray as xr
from scipy import sparse

from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.schema import CONSTANT, RANK

_PAIRS = 2**22  # in memory, at a time
_DENSE = 2**24  # entries of a table of counts that are counted without sorting


def as_table(obj: Any) -> Any:
    """Return a node that holds a neighbour table as its Dataset, anything else as it is."""
    if isinstance(obj, xr.DataTree) and "neighbor" in obj.data_vars:
        return obj.to_dataset()
    return obj


def table_rows(neighbors: xr.Dataset) -> str:
    """Return the samples' dim of a neighbour table.

    Raises
    ------
    SchemaError
        It is none.
    """
    if not isinstance(neighbors, xr.Dataset):
        raise TypeError(
            f"neighbors must be the Dataset of lk.neighbors, not {type(neighbors).__name__}"
        )
    if "neighbor" not in neighbors or RANK not in neighbors["neighbor"].dims:
        raise SchemaError("neighbors has no neighbor(sample, rank); pass lk.neighbors(...)")
    table = neighbors["neighbor"]
    if table.ndim != 2 or not table.size:
        raise SchemaError(
            f"neighbors: neighbor has dims {dict(table.sizes)}; expected samples and 'rank'"
        )
    return str(next(dim for dim in neighbors["neighbor"].dims if dim != RANK))


def constant_rows(neighbors: xr.Dataset, rows: str) -> np.ndarray:
    """Say which samples of a table have losses that do not vary; none where that is not known.

    They take no part in the search, and so none in what chance would give.

    Raises
    ------
    SchemaError
        All are constant.
    """
    n = neighbors.sizes[rows]
    if CONSTANT not in neighbors:
        return np.zeros(n, bool)
    if neighbors[CONSTANT].dims != (rows,):
        dims = neighbors[CONSTANT].dims
        raise SchemaError(f"neighbors: {CONSTANT!r} has dims {dims}, expected {(rows,)}")
    constant = np.asarray(neighbors[CONSTANT].values, bool)
    if constant.all():
        raise SchemaError(
            f"the losses of all {n} samples are constant, so that none has neighbours; observe "
            "inputs that the model is less certain of, or sample with a larger step size"
        )
    return constant


def labels_of(neighbors: xr.Dataset, rows: str, label: str, name: str = "label") -> np.ndarray:
    """Return the samples' values of a coordinate."""
    if label not in neighbors.coords or neighbors.coords[label].dims != (rows,):
        there = sorted(str(name) for name in sample_coords(neighbors, rows))
        raise SchemaError(
            f"{name}: {label!r} is not a coordinate of {rows!r}; there are {there}. Give labels "
            f"with neighbors.assign_coords({label}=({rows!r}, values)), or at sampling with coords="
        )
    return np.asarray(neighbors.coords[label].values)


def count_pairs(
    neighbors: xr.Dataset, rows: str, first: np.ndarray, second: np.ndarray, shape: tuple[int, int]
) -> tuple[sparse.csr_array, int]:
    """Count, for each code of the queries and of their neighbours, the pairs of a table.

    Parameters
    ----------
    neighbors
        ``neighbor(sample, rank)``, in memory or lazy; a lazy one is read block by block.
    rows
        The samples' dim.
    first, second
        Codes of each sample as a query and as a neighbour, shape ``(sample,)``.
    shape
        Number of codes of each.

    Returns
    -------
    tuple
        The counts, sparse, ``shape``; and how many entries are missing (-1).

    Raises
    ------
    SchemaError
        An entry is not among the samples.
    """
    table = neighbors["neighbor"].transpose(rows, RANK)
    if table.dtype.kind not in "iu":
        raise SchemaError(f"neighbor must hold integers, the samples' index, not {table.dtype}")
    index = neighbors.indexes.get(rows)
    if index is not None and not index.is_unique:
        raise SchemaError(f"the index of {rows!r} has values twice; make them distinct")
    names = None if index is None or _is_range(index) else index
    counted = _Counter(names, first, second, shape)
    counted_blocks: list[Any]
    if dask.is_dask_collection(table.data):
        lazy = table.data.rechunk({1: -1})
        starts = np.cumsum([0, *lazy.chunks[0][:-1]])
        blocks = lazy.to_delayed()[:, 0]
        count = dask.delayed(counted, pure=False)
        counted_blocks = list(
            dask.compute(*(count(b, int(start)) for b, start in zip(blocks, starts, strict=True)))
        )
        return _added([p[0] for p in counted_blocks], shape), sum(p[1] for p in counted_blocks)
    values, step = table.values, max(1, _PAIRS // max(1, table.shape[1]))
    total, missing = sparse.csr_array(shape, dtype=np.int64), 0
    for start in range(0, len(values), step):
        counts, absent = counted(values[start : start + step], start)
        total, missing = total + counts, missing + absent
    return total, missing


class _Counter:
    """Counts the pairs of a block of a table."""

    def __init__(
        self, names: Any, first: np.ndarray, second: np.ndarray, shape: tuple[int, int]
    ) -> None:
        self.names, self.first, self.second, self.shape = names, first, second, shape

    def __call__(self, block: np.ndarray, start: int) -> tuple[sparse.csr_array, int]:
        n = len(self.second)
        there = block >= 0
        position = block
        if self.names is not None:
            position = self.names.get_indexer(block.ravel()).reshape(block.shape)
        wrong = (there & (position < 0)) | (position >= n) | (block < -1)
        if wrong.any():
            row, rank = np.argwhere(wrong)[0]
            raise SchemaError(
                f"the neighbour {block[row, rank]} at row {start + row}, rank {rank} is not among "
                f"the {n} samples of the table; take neighbours of exactly these samples"
            )
        own = np.repeat(self.first[start : start + len(block)], there.sum(axis=1))
        key = own.astype(np.int64) * self.shape[1] + self.second[position[there]]
        size = self.shape[0] * self.shape[1]
        if size <= _DENSE:
            counts = np.bincount(key, minlength=size).reshape(self.shape)
            return sparse.csr_array(counts), int(there.size - len(key))
        keys, counts = np.unique(key, return_counts=True)
        cells = (keys // self.shape[1], keys % self.shape[1])
        return sparse.csr_array((counts, cells), shape=self.shape), int(there.size - len(key))


def _is_range(index: Any) -> bool:
    return index.dtype.kind in "iu" and np.array_equal(index, np.arange(len(index)))


def _added(tables: list[sparse.csr_array], shape: tuple[int, int]) -> sparse.csr_array:
    total = sparse.csr_array(shape, dtype=np.int64)
    for table in tables:
        total = total + table
    return total
