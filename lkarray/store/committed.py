"""Reading what must be there: an array, a group, or a chunk that is missing is never a default."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
import zarr
from dask.base import tokenize
from zarr.abc.store import Store

from lkarray.errors import DamagedError
from lkarray.store.chunks import (
    chunk_key,
    damaged,
    missing,
    read,
    require_chunks,
)
from lkarray.store.location import local_path
from lkarray.store.nodes import group_at
from lkarray.store.seals import broken_seals, seal_of


@contextmanager
def reading(store: Store, path: str) -> Iterator[None]:
    """Turn what reading a damaged node raises into a `DamagedError` that names it."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:  # zarr and xarray name no common base
        # What a disk, a server or the machine's memory says is no damage; a file that is gone is.
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError):
            raise
        raise damaged(store, f"{path} cannot be read ({error or repr(error)})") from error


def array_names(group: zarr.Group) -> list[str]:
    """Return the names of a group's arrays; those that its seal names must be there."""
    with reading(group.store, group.path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of folders without metadata, which are named below
        names = set(group.array_keys())
    lost = sorted(set((seal_of(group) or {"arrays": ()})["arrays"]) - names)
    if lost:
        raise damaged(group.store, f"{group.path}/{lost[0]}/zarr.json is missing")
    return sorted(names)


def require_seals(root: zarr.Group, *paths: str) -> None:
    """Raise `DamagedError` where a group is not as it was sealed."""
    for path in paths:
        group = group_at(root, path)
        with reading(root.store, f"{path}/zarr.json"):
            for problem in broken_seals(group):
                raise damaged(root.store, f"{problem.path}: {problem.detail}")


def read_rows(array: zarr.Array, start: int, stop: int) -> np.ndarray:
    """Return rows of which every chunk was committed.

    Raises
    ------
    DamagedError
        A chunk is missing or cannot be read.
    """
    depth = array.chunks[0]
    for number in range(start // depth, -(-stop // depth)):
        require_chunks(array, (number,))
    return read(array, slice(start, stop))


def lazily(array: zarr.Array) -> da.Array:
    """Return an array on Dask; computing one of its chunks that is missing is a `DamagedError`."""
    name = f"committed-{tokenize(array, array.chunks)}"
    meta = np.empty((0,) * array.ndim, array.dtype)
    return da.from_array(_Committed(array), array.chunks, name=name, meta=meta)


class _Committed:
    """A stored array as Dask reads it, that does not take a missing chunk for its fill value."""

    def __init__(self, array: zarr.Array) -> None:
        self._array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, place: Any) -> np.ndarray:
        array = self._array
        values = read(array, place)
        local = local_path(array.store) is not None
        if local or self._has_fill(values):  # else asking costs a request for each chunk
            lost = missing(array.store, (chunk_key(array, at) for at in self._touched(place)))
            if lost:
                raise damaged(array.store, f"{lost[0]} was committed, but is missing or empty")
        return values

    def _has_fill(self, values: np.ndarray) -> bool:
        fill = self._array.fill_value
        return bool((np.isnan(values) if fill != fill else values == fill).any())

    def _touched(self, place: Any) -> Iterator[tuple[int, ...]]:
        given = place if isinstance(place, tuple) else (place,)
        whole = (*given, *(slice(None),) * (self.ndim - len(given)))
        sides = (
            np.unique(np.atleast_1d(np.arange(n)[k]) // c).tolist()
            for k, n, c in zip(whole, self.shape, self._array.chunks, strict=True)
        )
        return product(*sides)
