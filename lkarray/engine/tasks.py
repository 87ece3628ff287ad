"""A lazy Dask graph that grows a task at a time: keys, names and layers stay in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
from dask.base import tokenize
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

#: What a task takes for the value of another one; as an argument, alone or in a list.
Key = tuple[Any, ...]
#: Results that are added at once.
ADDED = 16


class Tasks:
    """Tasks that lead to arrays, or to a value.

    Parameters
    ----------
    label
        What is computed: the start of the names that a dashboard shows.
    *distinct
        What tells this work from others of the same label. Equal work gets equal keys, so that
        Dask computes it once.
    """

    def __init__(self, label: str, *distinct: Any) -> None:
        self.name = f"{label}-{tokenize(*distinct)}"
        self._graph: dict[Any, Any] = {}
        self._below: list[Any] = []

    def hold(self, value: Any) -> Key:
        """Add a value that tasks share: it travels once to each worker."""
        return self._add("held", value)

    def then(self, function: Callable[..., Any], *args: Any) -> Key:
        """Add the task ``function(*args)``, where an argument may be the key of another task."""
        return self._add(function.__name__.strip("_"), (function, *args))

    def added(self, keys: Sequence[Key]) -> Key:
        """Add the tasks that sum what others give, in a tree: few of these are ever held."""
        while len(keys) > 1:
            keys = [
                self.then(sum, list(keys[start : start + ADDED]))
                for start in range(0, len(keys), ADDED)
            ]
        return keys[0]

    def block(self, array: da.Array, index: tuple[int, ...]) -> Key:
        """Return the key of a block of an array, whose graph becomes a part of this one."""
        if not any(array is known for known in self._below):
            self._below.append(array)
        return (array.name, *index)

    def array(self, blocks: Sequence[Key], shape: Sequence[Any], dtype: Any) -> da.Array:
        """Return an array of what tasks give, ``blocks`` along its first axis.

        Parameters
        ----------
        shape
            Of the array; for the first axis the lengths of the blocks, where there are several.
        """
        whole, name = self._whole(), "-".join(map(str, blocks[0]))
        rest = (0,) * (len(shape) - 1)
        layer = {(name, *((b, *rest) if shape else ())): key for b, key in enumerate(blocks)}
        layers: dict[str, Any] = {**whole.layers, name: layer}
        graph = HighLevelGraph(layers, {**whole.dependencies, name: {self.name}})
        chunks = tuple(size if isinstance(size, tuple) else (size,) for size in shape)
        return da.Array(graph, name, chunks, dtype=dtype)

    def delayed(self, key: Key) -> Delayed:
        """Return what a task gives as a lazy value."""
        return Delayed(key, self._whole(), layer=self.name)

    def _add(self, what: str, value: Any) -> Key:
        key = (f"{self.name}-{what}", len(self._graph))
        self._graph[key] = value
        return key

    def _whole(self) -> HighLevelGraph:
        # One dict for all arrays, whose graphs Dask merges layer by layer: the same, not a copy.
        return HighLevelGraph.from_collections(self.name, self._graph, self._below)
