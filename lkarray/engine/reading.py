"""Reading a block of a labelled variable, chunk by chunk, within the task that needs it.

The variable's own graph is run here, not by the scheduler: a chunk is computed, copied to its
place and freed, while the next ones are read ahead.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import xarray as xr
from dask.array.optimization import optimize
from dask.core import flatten, get_dependencies
from dask.core import get as core_get

from lkarray.errors import DamagedError

#: Chunks that are read while one is copied to its place.
AHEAD = 2

#: What Zarr's codecs and stores raise on a chunk that is cut short, changed or unreadable.
_UNREADABLE = (ValueError, OSError, RuntimeError)


def read(
    variable: xr.Variable, dtype: np.dtype, name: str, select: Mapping[Hashable, Any]
) -> np.ndarray:
    """Return a variable's values as a fresh array, each chunk copied to its place at once.

    Raises
    ------
    DamagedError
        A chunk cannot be read; the message says which.
    """
    block = np.empty(variable.shape, dtype)
    if variable.chunks is None:
        try:
            block[...] = variable.values
        except _UNREADABLE as error:
            raise _damaged(name, select, error) from error
        return block
    keys, graph = _own_graph(variable)
    # One at a time where chunks share no work: memory freed by one serves the next.
    groups = [keys] if _shares_work(graph) else [[key] for key in keys]
    starts = [np.cumsum((0, *lengths[:-1])) for lengths in variable.chunks]
    places = np.ndindex(*variable.data.numblocks)
    ahead = _ahead(graph, groups)
    for group in groups:
        try:
            values = next(ahead)
        except _UNREADABLE as error:
            raise _damaged(name, *_culprit(variable, graph, keys, select, error)) from error
        for index, value in zip(islice(places, len(group)), values, strict=True):
            place = tuple(
                slice(begin[i], begin[i] + lengths[i])
                for i, begin, lengths in zip(index, starts, variable.chunks, strict=True)
            )
            block[place] = value
        del value, values
    return block


def _ahead(graph: Mapping[Any, Any], groups: list[list[Any]]) -> Iterator[Any]:
    """Yield the values of groups of keys, each computed while the one before is used."""
    if len(groups) == 1:
        yield core_get(_below(graph, groups[0]), groups[0])
        return
    # Threads of its own: shared ones could wait for themselves where a graph reads panels too.
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="lkarray-read") as readers:
        waiting: deque[Future[Any]] = deque()
        for group in groups:
            waiting.append(readers.submit(core_get, _below(graph, group), group))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _below(graph: Mapping[Any, Any], keys: list[Any]) -> dict[Any, Any]:
    """Return the tasks of a graph that some keys need."""
    needed: dict[Any, Any] = {}
    left = list(keys)
    while left:
        task = left.pop()
        if task not in needed:
            needed[task] = graph[task]
            left += get_dependencies(graph, task)
    return needed


def read_by_chunks(variable: xr.Variable) -> bool:
    """Say whether chunks of a lazy variable are computed one by one: none shares work with another.

    Where they do, as after a rechunk into smaller ones, all are computed together, so that what
    they share is computed once.
    """
    return not _shares_work(_own_graph(variable)[1])


def _own_graph(variable: xr.Variable) -> tuple[list[Any], Mapping[Any, Any]]:
    """Return the keys of a lazy variable's chunks, and the graph that computes them, optimized."""
    keys = list(flatten(variable.data.__dask_keys__()))
    return keys, optimize(variable.data.__dask_graph__(), keys)


def _shares_work(graph: Mapping[Any, Any]) -> bool:
    """Say whether any task, other than data at hand, is used by several others."""
    used: set[Any] = set()
    for task in graph:
        for key in get_dependencies(graph, task):
            if key in used and (hasattr(graph[key], "func") or isinstance(graph[key], tuple)):
                return True
            used.add(key)
    return False


def _culprit(
    variable: xr.Variable,
    graph: Any,
    keys: list[Any],
    select: Mapping[Hashable, Any],
    error: Exception,
) -> tuple[Mapping[Hashable, Any], Exception]:
    """Return which chunk fails when it is read alone, and how."""
    assert variable.chunks is not None
    for index, key in zip(np.ndindex(*variable.data.numblocks), keys, strict=True):
        try:
            core_get(_below(graph, [key]), [key])
        except _UNREADABLE as alone:
            where = dict(select)
            for dim, i, lengths in zip(variable.dims, index, variable.chunks, strict=True):
                start = (select[dim].start or 0) + sum(lengths[:i])
                where[dim] = slice(start, start + lengths[i])
            return where, alone
    return select, error


def _damaged(name: str, select: Mapping[Hashable, Any], error: Exception) -> DamagedError:
    where = ", ".join(
        f"{dim}={s.start or 0}:{s.stop}" if isinstance(s, slice) else f"{dim}={s}"
        for dim, s in select.items()
    )
    return DamagedError(
        f"{name!r} cannot be read at {where}: {error}. If it is a store, lk.verify(path) names "
        "the damaged chunks; restore them from a copy, or sample those chains again"
    )


def refuse_futures(x: xr.DataArray) -> None:
    """Refuse an array persisted on a cluster: its panels cannot be read inside a task."""
    if "distributed" not in sys.modules or x.chunks is None:
        return
    from distributed import Future

    graph: Mapping[Any, Any] = x.data.__dask_graph__()
    for layer in getattr(graph, "layers", {"": graph}).values():
        value = next(iter(dict(layer).values()), None)
        if isinstance(getattr(value, "value", value), Future):
            raise TypeError(
                f"{x.name!r} was persisted on a cluster, which the engine cannot read by panels; "
                "pass the lazy array from before .persist() (panels are cached on the workers), "
                "or x.compute()"
            )
