"""One operand of a contraction: a labelled variable that can be read by panels."""

from __future__ import annotations

import sys
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from math import prod
from typing import Any

import dask.base
import numpy as np
import xarray as xr
from dask.array.optimization import optimize
from dask.core import flatten, get_dependencies
from dask.core import get as core_get

from lkarray.engine.cache import CACHE, MOMENTS
from lkarray.engine.lowprecision import LowPanel
from lkarray.engine.numbers import Moments, reciprocal, standardise
from lkarray.errors import DamagedError, NonFiniteError

#: Chunks that are read while one is copied to its place.
AHEAD = 2

#: A piece of the contracted dims: one slice each, as (start, stop).
Piece = tuple[tuple[int, int], ...]


class Operand:
    """A variable as ``(*each, *over, rows)``, read panel by panel.

    Holds the variable's *own* Dask graph (or array, or lazily indexed file): a panel is that
    graph culled to the panel and run inside the calling task. So arithmetic and selections
    made on the variable count, and any Dataset will do.

    Parameters
    ----------
    x
        The tensor.
    over
        Dims to contract. With ``center="chain"``, means are kept apart along ``chain``.
    each
        Dims kept in step.
    rows
        The dim that remains.
    center
        ``None``, ``"pooled"`` or ``"chain"``.
    cosine
        Whether rows are scaled to norm one.
    """

    def __init__(
        self,
        x: xr.DataArray,
        *,
        over: tuple[str, ...],
        each: tuple[str, ...],
        rows: str,
        center: str | None,
        cosine: bool,
    ) -> None:
        _refuse_futures(x)
        if center == "chain":
            over = ("chain", *(dim for dim in over if dim != "chain"))
        self.over, self.each, self.rows = over, each, rows
        self.center, self.cosine = center, cosine
        self.variable = x.variable.transpose(*each, *over, rows)
        # Panels keep the source's own order, rows first or last: to turn each chunk is slow.
        self._rows_first = x.dims[-1] in over and center != "chain"
        self.dtype = np.result_type(x.dtype, np.float32)
        self.name = str(x.name)
        lazy_file = x.chunks is None and not x.variable._in_memory
        data = uuid.uuid4().hex if lazy_file else x.data
        self.token = dask.base.tokenize(data, x.dims, over, each, rows, center, cosine)

    def __dask_tokenize__(self) -> str:
        return self.token

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_finalizer"}

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the contracted dims."""
        return tuple(self.variable.sizes[dim] for dim in self.over)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.variable.sizes[self.rows]

    def grain(self) -> tuple[tuple[int, ...], int]:
        """Return the largest chunk along each contracted dim and along rows; 1 if unchunked.

        Whatever is read, whole chunks of the variable are computed.
        """
        chunks = self.variable.chunksizes
        return tuple(max(chunks.get(d, (1,))) for d in self.over), max(chunks.get(self.rows, (1,)))

    def source_chunk(self) -> int | None:
        """Return the bytes of the largest chunk of the variable, if it is read chunk by chunk."""
        if self.variable.chunks is None:
            return 0 if self.variable._in_memory else None
        first: dict[Hashable, Any] = dict.fromkeys(self.each, 0)
        first[self.rows] = slice(0, self.grain()[1])
        part = self.variable.isel(first)
        keys = list(flatten(part.data.__dask_keys__()))
        if _shares_work(optimize(part.data.__dask_graph__(), keys)):
            return None
        lengths, width = self.grain()
        return int(prod(lengths) * width * self.variable.dtype.itemsize)

    def panel(
        self, at: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int, limit: int
    ) -> np.ndarray:
        """Return piece ``p`` of the panel ``rows``, standardised: ``(contracted, rows)``.

        Cached up to ``limit`` bytes in this process.
        """
        size = self.piece_bytes(rows, pieces[p])
        key = ("float", at, rows.start, rows.stop, pieces[p])
        panel: np.ndarray = self._cached(
            key, lambda: self._load(at, rows, pieces, p), size=size, limit=limit
        )
        return panel

    def low_panel(
        self, at: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int, limit: int
    ) -> LowPanel:
        """Return the panel rounded to bfloat16, ``(rows, contracted)``; cached likewise."""
        size = self.piece_bytes(rows, pieces[p]) // 2
        key = ("bfloat16", at, rows.start, rows.stop, pieces[p])
        panel: LowPanel = self._cached(
            key, lambda: LowPanel.of(self._load(at, rows, pieces, p)), size=size, limit=limit
        )
        return panel

    def turned_panel(
        self,
        rows: slice,
        pieces: tuple[Piece, ...],
        limit: int,
        turn: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Return a whole panel as ``(rows, contracted)``, for products of pairs of rows."""
        panel: np.ndarray = self._cached(
            ("turned", rows.start, rows.stop),
            lambda: turn(self._load((), rows, pieces, 0)),
            size=self.piece_bytes(rows, pieces[0]),
            limit=limit,
        )
        return panel

    def forget_low_panels(self) -> None:
        """Free the panels in bfloat16 that this process keeps."""
        CACHE.forget(self.token, "bfloat16")

    def _cached(
        self, key: tuple[Hashable, ...], load: Callable[[], Any], *, size: int, limit: int
    ) -> Any:
        if not hasattr(self, "_finalizer"):
            # Whoever drops the last reference to the operand frees its panels.
            self._finalizer = weakref.finalize(self, _drop, self.token)
        return CACHE.get((self.token, *key), load, size=size, limit=limit)

    def piece_bytes(self, rows: slice, piece: Piece) -> int:
        """Return the bytes of a piece of a panel in memory."""
        length = prod(stop - start for start, stop in piece)
        return int(length * (rows.stop - rows.start) * self.dtype.itemsize)

    def _load(
        self, at: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int
    ) -> np.ndarray:
        block = self._read(at, rows, pieces[p])
        if self.center is None and not self.cosine:
            if not np.isfinite(block.min()) or not np.isfinite(block.max()):
                raise self._not_finite(at, rows, pieces)
            return block.reshape(-1, block.shape[-1])
        if len(pieces) == 1:
            moments = Moments.of(block, centred=self.center is not None)
        else:
            moments = self._moments(at, rows, pieces)
        norm = moments.norm()
        if not np.isfinite(norm).all():
            raise self._not_finite(at, rows, pieces)
        groups = slice(*pieces[p][0]) if self.center == "chain" else slice(None)
        standardise(block, moments.mean[groups], reciprocal(norm) if self.cosine else None)
        if not norm.all():
            block[:, :, norm == 0] = 0  # a constant row: leave no rounding behind
        return block.reshape(-1, block.shape[-1])

    def _moments(self, at: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...]) -> Moments:
        """Return the moments of a panel in pieces, one pass over it, kept for the next piece."""
        groups = self.shape[0] if self.center == "chain" else 1
        key = (self.token, "moments", at, rows.start, rows.stop)
        size = 16 * groups * (rows.stop - rows.start)

        def load() -> Moments:
            zeros = np.zeros((groups, rows.stop - rows.start))
            total = Moments(np.zeros(groups, int), zeros, zeros)
            centred = self.center is not None
            for piece in pieces:
                part = Moments.of(self._read(at, rows, piece), centred=centred)
                if self.center == "chain":
                    part = _spread(part, piece[0], groups)
                total = total.merge(part, centred=centred)
            return total

        moments: Moments = MOMENTS.get(key, load, size=size, limit=sys.maxsize)
        return moments

    def _read(self, at: tuple[int, ...], rows: slice, piece: Piece) -> np.ndarray:
        """Return a block as a fresh array ``(group, contracted, rows)``, or a view of one."""
        select: dict[Hashable, Any] = dict(zip(self.each, at, strict=True))
        select |= {dim: slice(*part) for dim, part in zip(self.over, piece, strict=True)}
        select[self.rows] = rows
        part = self.variable.isel(select)
        if self._rows_first:
            turned = part.transpose(self.rows, *self.over)
            block = read(turned, self.dtype, self.name, select)
            return block.reshape(len(block), -1).T[np.newaxis]
        block = read(part, self.dtype, self.name, select)
        groups = block.shape[0] if self.center == "chain" else 1
        return block.reshape(groups, -1, block.shape[-1])

    def _not_finite(
        self, at: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...]
    ) -> NonFiniteError:
        """Return the error that says where NaN or infinity stands in a panel."""
        bad = np.zeros(rows.stop - rows.start, bool)
        first: dict[str, int] = dict(zip(self.each, at, strict=True))
        entries: dict[str, set[int]] = {dim: set() for dim in self.over}
        for piece in pieces:
            shape = tuple(stop - start for start, stop in piece)
            wrong = ~np.isfinite(self._read(at, rows, piece).reshape(*shape, -1))
            for axis, (dim, (start, _)) in enumerate(zip(self.over, piece, strict=True)):
                others = tuple(a for a in range(wrong.ndim) if a != axis)
                entries[dim] |= set((start + np.flatnonzero(wrong.any(axis=others))).tolist())
            bad |= wrong.any(axis=tuple(range(wrong.ndim - 1)))
        first[self.rows] = rows.start + int(np.argmax(bad))
        found = {dim: sorted(at)[:5] for dim, at in entries.items()}
        return NonFiniteError(
            f"{self.name!r} holds NaN or infinity, first in {first} ({int(bad.sum())} of "
            f"{len(bad)} rows of its panel), at the positions {found} of what is contracted (the "
            "first five of each); drop those entries (for example x.isel(chain=[...]) without a "
            "diverged chain; rows of padding, which are NaN throughout, with "
            f"x.dropna({self.rows!r})), or, where a chunk was never written, see lk.verify"
        )


def read(
    part: xr.Variable, dtype: np.dtype, name: str, select: Mapping[Hashable, Any]
) -> np.ndarray:
    """Return a variable's values as a fresh array, each chunk copied to its place at once.

    Raises
    ------
    DamagedError
        A chunk cannot be read; the message says which.
    """
    block = np.empty(part.shape, dtype)
    if part.chunks is None:
        try:
            block[...] = part.values
        except _UNREADABLE as error:
            raise _damaged(name, select, error) from error
        return block
    keys = list(flatten(part.data.__dask_keys__()))
    graph = optimize(part.data.__dask_graph__(), keys)
    # One at a time where chunks share no work: memory freed by one serves the next.
    groups = [keys] if _shares_work(graph) else [[key] for key in keys]
    starts = [np.cumsum((0, *lengths[:-1])) for lengths in part.chunks]
    places = np.ndindex(*part.data.numblocks)
    ahead = _ahead(graph, groups)
    for group in groups:
        try:
            values = next(ahead)
        except _UNREADABLE as error:
            raise _damaged(name, *_culprit(part, graph, keys, select, error)) from error
        for index, value in zip(islice(places, len(group)), values, strict=True):
            place = tuple(
                slice(begin[i], begin[i] + lengths[i])
                for i, begin, lengths in zip(index, starts, part.chunks, strict=True)
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
    """Return the part of a graph that some keys need."""
    found: dict[Any, Any] = {}
    left = list(keys)
    while left:
        task = left.pop()
        if task not in found:
            found[task] = graph[task]
            left += get_dependencies(graph, task)
    return found


def _shares_work(graph: Mapping[Any, Any]) -> bool:
    """Say whether any task, other than data at hand, is used by several others."""
    used: set[Any] = set()
    for task in graph:
        for key in get_dependencies(graph, task):
            if key in used and (hasattr(graph[key], "func") or isinstance(graph[key], tuple)):
                return True
            used.add(key)
    return False


#: What Zarr's codecs and stores raise on a chunk that is cut short, changed or unreadable.
_UNREADABLE = (ValueError, OSError, RuntimeError)


def _culprit(
    part: xr.Variable,
    graph: Any,
    keys: list[Any],
    select: Mapping[Hashable, Any],
    error: Exception,
) -> tuple[Mapping[Hashable, Any], Exception]:
    """Return which chunk fails when it is read alone, and how."""
    assert part.chunks is not None
    for index, key in zip(np.ndindex(*part.data.numblocks), keys, strict=True):
        try:
            core_get(_below(graph, [key]), [key])
        except _UNREADABLE as alone:
            where = dict(select)
            for dim, i, lengths in zip(part.dims, index, part.chunks, strict=True):
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


def _drop(token: str) -> None:
    CACHE.drop(token)
    MOMENTS.drop(token)


def _spread(part: Moments, chains: tuple[int, int], groups: int) -> Moments:
    """Place the moments of some chains among those of all of them."""
    start, stop = chains
    count = np.zeros(groups, int)
    mean = np.zeros((groups, part.mean.shape[1]))
    squares = np.zeros_like(mean)
    count[start:stop], mean[start:stop], squares[start:stop] = part.count, part.mean, part.squares
    return Moments(count, mean, squares)


def _refuse_futures(x: xr.DataArray) -> None:
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
