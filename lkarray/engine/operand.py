"""One operand of a contraction: a labelled variable that can be read by panels."""

from __future__ import annotations

import sys
import uuid
import weakref
from collections.abc import Callable, Hashable
from math import prod
from typing import Any

import dask.base
import numpy as np
import xarray as xr

from lkarray.engine.cache import CACHE, DEVICE_PANELS, MOMENTS, PanelCache
from lkarray.engine.lowprecision import LowPanel
from lkarray.engine.numbers import Moments, reciprocal, standardise
from lkarray.engine.reading import read, read_by_chunks, refuse_futures
from lkarray.errors import NonFiniteError

#: A piece of the contracted dims: one slice each, as (start, stop).
Piece = tuple[tuple[int, int], ...]


def volume(piece: Piece) -> int:
    """Return the contracted elements of a piece."""
    return prod(stop - start for start, stop in piece)


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
        Dims to contract. With ``center="chain"`` or ``"draw"``, means are kept apart along it.
    each
        Dims kept in step.
    rows
        The dim that remains.
    center
        ``None``, ``"pooled"``, ``"chain"`` or ``"draw"``.
    cosine
        Whether rows are scaled to norm one.
    keeps_moments
        Whether means and norms of panels are kept beside them: 16 bytes a row and centring group.
    minus
        Of the one contracted dim, the element from which on products are subtracted. Rows are then
        taken as they are: to be of norm one, with ``cosine``, is up to whoever made them.
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
        keeps_moments: bool = False,
        minus: int | None = None,
    ) -> None:
        refuse_futures(x)
        self.grouped = center in ("chain", "draw")
        if self.grouped:
            over = (str(center), *(dim for dim in over if dim != center))
        self.over, self.each, self.rows = over, each, rows
        self.center, self.cosine, self.keeps_moments = center, cosine, keeps_moments
        self.minus = minus
        self.variable = x.variable.transpose(*each, *over, rows)
        # Panels keep the source's own order, rows first or last: to turn each chunk is slow.
        self._rows_first = x.dims[-1] in over and not self.grouped
        self.dtype = np.result_type(x.dtype, np.float32)
        self.name = str(x.name)
        lazy_file = x.chunks is None and not x.variable._in_memory
        data = uuid.uuid4().hex if lazy_file else x.data
        self.token = dask.base.tokenize(data, x.dims, over, each, rows, center, cosine, minus)

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

    @property
    def groups(self) -> int:
        """Means that are kept of each row while it is read in pieces.

        Of a draw none: draws are many, and every piece has whole ones.
        """
        return self.shape[0] if self.center == "chain" else 1

    def grain(self) -> tuple[tuple[int, ...], int]:
        """Return what is not cut along each contracted dim and along rows.

        The largest chunk, since whatever is read, whole chunks of the variable are computed; 1 if
        unchunked. And draws that are centred by themselves.
        """
        lengths, width = self._chunk()
        return ((lengths[0], *self.shape[1:]) if self.center == "draw" else lengths), width

    def _chunk(self) -> tuple[tuple[int, ...], int]:
        chunks = self.variable.chunksizes
        return tuple(max(chunks.get(d, (1,))) for d in self.over), max(chunks.get(self.rows, (1,)))

    def source_chunk(self) -> int | None:
        """Return the bytes of the largest chunk of the variable, if it is read chunk by chunk."""
        if self.variable.chunks is None:
            return 0 if self.variable._in_memory else None
        first: dict[Hashable, Any] = dict.fromkeys(self.each, 0)
        first[self.rows] = slice(0, self.grain()[1])
        if not read_by_chunks(self.variable.isel(first)):
            return None
        lengths, width = self._chunk()
        return int(prod(lengths) * width * self.variable.dtype.itemsize)

    def panel(
        self, entry: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int, limit: int
    ) -> np.ndarray:
        """Return piece ``p`` of the panel ``rows``, standardised: ``(contracted, rows)``.

        Cached up to ``limit`` bytes in this process.
        """
        size = self.piece_bytes(rows, pieces[p])
        key = ("float", entry, rows.start, rows.stop, pieces[p])
        return self._cached(key, lambda: self._load(entry, rows, pieces, p), size=size, limit=limit)

    def low_panel(
        self, entry: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int, limit: int
    ) -> LowPanel:
        """Return the panel rounded to bfloat16, ``(rows, contracted)``; cached likewise."""
        size = self.piece_bytes(rows, pieces[p]) // 2
        key = ("bfloat16", entry, rows.start, rows.stop, pieces[p])
        return self._cached(
            key, lambda: LowPanel.of(self._load(entry, rows, pieces, p)), size=size, limit=limit
        )

    def turned_panel(
        self,
        rows: slice,
        pieces: tuple[Piece, ...],
        limit: int,
        turn: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Return a whole panel as ``(rows, contracted)``, for products of pairs of rows."""
        return self._cached(
            ("turned", rows.start, rows.stop),
            lambda: turn(self._load((), rows, pieces, 0)),
            size=self.piece_bytes(rows, pieces[0]),
            limit=limit,
        )

    def still(self, entry: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...]) -> np.ndarray:
        """Say which rows of a panel do not vary: they correlate with nothing, and are near nothing.

        Known once the panel was read, and kept; read for it otherwise.
        """

        def load() -> np.ndarray:
            if len(pieces) > 1:
                moments = self.moments(entry, rows, pieces)
            else:
                moments = self._moments_of(self._read(entry, rows, pieces[0]))
            return moments.norm() == 0

        return self._known_still(entry, rows, load)

    def _known_still(
        self, entry: tuple[int, ...], rows: slice, load: Callable[[], np.ndarray]
    ) -> np.ndarray:
        key, size = ("still", entry, rows.start, rows.stop), rows.stop - rows.start
        return self._cached(key, load, size=size, limit=sys.maxsize, cache=MOMENTS)

    def forget_low_panels(self) -> None:
        """Free the panels in bfloat16 that this process keeps."""
        CACHE.forget(self.token, "bfloat16")

    def on_device(
        self, key: tuple[Hashable, ...], load: Callable[[], Any], *, size: int, limit: int
    ) -> Any:
        """Return what ``load`` puts on a device, kept there up to ``limit`` bytes."""
        return self._cached(key, load, size=size, limit=limit, cache=DEVICE_PANELS)

    def _cached(
        self,
        key: tuple[Hashable, ...],
        load: Callable[[], Any],
        *,
        size: int,
        limit: int,
        cache: PanelCache = CACHE,
    ) -> Any:
        if not hasattr(self, "_finalizer"):
            # Whoever drops the last reference to the operand frees its panels.
            self._finalizer = weakref.finalize(self, _drop, self.token)
        return cache.get((self.token, *key), load, size=size, limit=limit)

    def piece_bytes(self, rows: slice, piece: Piece) -> int:
        """Return the bytes of a piece of a panel in memory."""
        return int(volume(piece) * (rows.stop - rows.start) * self.dtype.itemsize)

    def _load(
        self, entry: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...], p: int
    ) -> np.ndarray:
        block = self._read(entry, rows, pieces[p])
        if self.minus is not None or (self.center is None and not self.cosine):
            if not np.isfinite(block.min()) or not np.isfinite(block.max()):
                raise self._not_finite(entry, rows, pieces)
            return block.reshape(-1, block.shape[-1])
        if len(pieces) == 1 and not self.keeps_moments:
            moments = self._moments_of(block)
        else:
            moments = self.moments(entry, rows, pieces, block)
            if self.center == "draw" and len(pieces) > 1:
                self._moments_of(block)
        norm = moments.norm()
        if not np.isfinite(norm).all():
            raise self._not_finite(entry, rows, pieces)
        groups = slice(*pieces[p][0]) if self.center == "chain" else slice(None)
        standardise(block, moments.mean[groups], reciprocal(norm) if self.cosine else None)
        self._known_still(entry, rows, lambda: norm == 0)
        if not norm.all():
            block[:, :, norm == 0] = 0  # a constant row: leave no rounding behind
        return block.reshape(-1, block.shape[-1])

    def _moments_of(self, block: np.ndarray) -> Moments:
        """Return the moments of a block; where draws are centred, they are so, in place."""
        if self.center == "draw":
            return Moments.about_groups(block)
        return Moments.of(block, centred=self.center is not None)

    def moments(
        self,
        entry: tuple[int, ...],
        rows: slice,
        pieces: tuple[Piece, ...],
        block: np.ndarray | None = None,
    ) -> Moments:
        """Return the moments of a panel, one pass over it, kept for the next piece or question.

        ``block`` is a panel of one piece that was read already.
        """
        groups = self.groups
        alone = len(pieces) == 1
        key = (self.token, "moments", entry, rows.start, rows.stop, alone)
        size = 16 * groups * (rows.stop - rows.start)

        def load() -> Moments:
            if alone:
                whole = self._read(entry, rows, pieces[0]) if block is None else block
                return self._moments_of(whole)
            zeros = np.zeros((groups, rows.stop - rows.start))
            total = Moments(np.zeros(groups, int), zeros, zeros)
            centred = self.center in ("pooled", "chain")
            for piece in pieces:
                moments = self._moments_of(self._read(entry, rows, piece))
                if self.center == "chain":
                    moments = _spread(moments, piece[0], groups)
                total = total.merge(moments, centred=centred)
            return total

        return MOMENTS.get(key, load, size=size, limit=sys.maxsize)

    def _read(self, entry: tuple[int, ...], rows: slice, piece: Piece) -> np.ndarray:
        """Return a block as a fresh array ``(group, contracted, rows)``, or a view of one."""
        select: dict[Hashable, Any] = dict(zip(self.each, entry, strict=True))
        select |= {dim: slice(*span) for dim, span in zip(self.over, piece, strict=True)}
        select[self.rows] = rows
        variable = self.variable.isel(select)
        if self._rows_first:
            turned = variable.transpose(self.rows, *self.over)
            block = read(turned, self.dtype, self.name, select)
            return block.reshape(len(block), -1).T[np.newaxis]
        block = read(variable, self.dtype, self.name, select)
        groups = block.shape[0] if self.grouped else 1
        return block.reshape(groups, -1, block.shape[-1])

    def _not_finite(
        self, entry: tuple[int, ...], rows: slice, pieces: tuple[Piece, ...]
    ) -> NonFiniteError:
        """Return the error that says where NaN or infinity stands in a panel."""
        bad = np.zeros(rows.stop - rows.start, bool)
        first: dict[str, int] = dict(zip(self.each, entry, strict=True))
        entries: dict[str, set[int]] = {dim: set() for dim in self.over}
        for piece in pieces:
            shape = tuple(stop - start for start, stop in piece)
            wrong = ~np.isfinite(self._read(entry, rows, piece).reshape(*shape, -1))
            for axis, (dim, (start, _)) in enumerate(zip(self.over, piece, strict=True)):
                others = tuple(a for a in range(wrong.ndim) if a != axis)
                entries[dim] |= set((start + np.flatnonzero(wrong.any(axis=others))).tolist())
            bad |= wrong.any(axis=tuple(range(wrong.ndim - 1)))
        first[self.rows] = rows.start + int(np.argmax(bad))
        positions = {dim: sorted(wrong)[:5] for dim, wrong in entries.items()}
        return NonFiniteError(
            f"{self.name!r} holds NaN or infinity, first in {first} ({int(bad.sum())} of "
            f"{len(bad)} rows of its panel), at the positions {positions} of what is contracted "
            "(the first five of each); drop those entries (for example x.isel(chain=[...]) without "
            "a diverged chain; rows of padding, which are NaN throughout, with "
            f"x.dropna({self.rows!r})), or, where a chunk was never written, see lk.verify"
        )


def _drop(token: str) -> None:
    for cache in (CACHE, MOMENTS, DEVICE_PANELS):
        cache.drop(token)


def _spread(moments: Moments, chains: tuple[int, int], groups: int) -> Moments:
    """Place the moments of some chains among those of all of them."""
    start, stop = chains
    count = np.zeros(groups, int)
    mean = np.zeros((groups, moments.mean.shape[1]))
    squares = np.zeros_like(mean)
    count[start:stop], mean[start:stop] = moments.count, moments.mean
    squares[start:stop] = moments.squares
    return Moments(count, mean, squares)
