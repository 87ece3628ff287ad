"""One operand of a contraction: a labelled variable that can be read by panels."""

from __future__ import annotations

import sys
import uuid
import weakref
from collections.abc import Hashable, Mapping
from math import prod
from typing import Any

import dask.base
import numpy as np
import xarray as xr

from lkarray.engine.cache import CACHE, MOMENTS
from lkarray.engine.numbers import Moments, reciprocal, standardise
from lkarray.errors import NonFiniteError

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

    def panel(
        self, at: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int, limit: int
    ) -> np.ndarray:
        """Return piece ``p`` of the panel ``rows``, standardised: ``(contracted, rows)``.

        Cached up to ``limit`` bytes in this process.
        """
        if not hasattr(self, "_finalizer"):
            # Whoever drops the last reference to the operand frees its panels.
            self._finalizer = weakref.finalize(self, _drop, self.token)
        key = (self.token, at, rows.start, rows.stop, pieces[p])
        size = self.piece_bytes(rows, pieces[p])
        panel: np.ndarray = CACHE.get(
            key, lambda: self._load(at, rows, pieces, p, limit), size=size, limit=limit
        )
        return panel

    def piece_bytes(self, rows: slice, piece: Piece) -> int:
        """Return the bytes of a piece of a panel in memory."""
        length = prod(stop - start for start, stop in piece)
        return int(length * (rows.stop - rows.start) * self.dtype.itemsize)

    def _load(
        self, at: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int, limit: int
    ) -> np.ndarray:
        block = self._read(at, rows, pieces[p])
        if self.center is None and not self.cosine:
            self._check(np.abs(block).max(axis=(0, 1)), at, rows)
            return block.reshape(-1, block.shape[-1])
        if len(pieces) == 1:
            moments = Moments.of(block, centred=self.center is not None)
        else:
            moments = self._moments(at, rows, pieces)
        norm = moments.norm()
        self._check(norm, at, rows)
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
        """Return a block as a fresh array ``(group, contracted, rows)``."""
        select: dict[Hashable, Any] = dict(zip(self.each, at, strict=True))
        select |= {dim: slice(*part) for dim, part in zip(self.over, piece, strict=True)}
        select[self.rows] = rows
        part = self.variable.isel(select)
        values = part.data if part.chunks is None else part.data.compute(scheduler="synchronous")
        block = np.array(values, dtype=self.dtype, order="C", copy=True)
        groups = block.shape[0] if self.center == "chain" else 1
        return block.reshape(groups, -1, block.shape[-1])

    def _check(self, norm: np.ndarray, at: tuple[int, ...], rows: slice) -> None:
        bad = np.flatnonzero(~np.isfinite(norm))
        if len(bad):
            where = f"{self.rows} at position {rows.start + int(bad[0])}"
            if self.each:
                where += f" and {dict(zip(self.each, at, strict=True))}"
            raise NonFiniteError(
                f"{self.name!r} holds NaN or infinity, first in {where} ({len(bad)} of {len(norm)} "
                f"rows of its panel), somewhere along {self.over}; drop those entries (for example "
                "x.isel(chain=[...]) for a diverged chain), or check the store with lk.verify"
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
