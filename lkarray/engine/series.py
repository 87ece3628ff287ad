r"""An elementwise power series of a tile of cosines, made while a slab of it is in the cache.

.. math:: f_{ij} = \sum_{k \ge 1} a_k(i) a_k(j) \rho_{ij}^k

What the coefficients are, of the means and standard deviations of rows, is not known here. Tables
are kept at unit variance (the sum of the squares of a row's coefficients), so that sums in float32
err by a few of its roundings of ``sqrt(f_ii f_jj)``, and ``f_ii`` is the variance itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from dask.base import tokenize

from lkarray.engine.cache import MOMENTS
from lkarray.engine.numbers import reciprocal
from lkarray.engine.operand import Operand, Piece

#: Bytes that a series needs on a device for each element of a tile: its sum, and a term.
SERIES_BYTES = 8
_TABLE = 400  # bytes of a row's table and moments, at most
_LEFT = 1e-6  # of sqrt(f_ii f_jj), at most, that terms which are left out may add up to
_SLAB = 1 << 16  # elements of a tile at once: with their sum and a term, within the L2 cache
_WIDE = 2048  # columns from which NumPy's own outer product is faster than einsum (0.2 for 0.5 ns)
_LEVELS = np.arange(1, 9) / 8  # magnitudes of cosines, for which terms are counted
_FEW = 2  # terms, to save which is worth no search
_ALONE = 8  # what a term of an entry by itself costs, as times of one in a slab


def table_bytes(x: Operand, y: Operand | None = None) -> int:
    """Return the bytes that a process keeps of the tables of one operand, or two."""
    rows = sum(
        prod(operand.variable.sizes[dim] for dim in operand.each)
        * operand.n
        * (_TABLE + 16 * (operand.shape[0] if operand.center == "chain" else 1))
        for operand in (x, y)
        if operand is not None
    )
    return int(rows)


class Expansion(Protocol):
    """What gives the coefficients of rows."""

    def coefficients(self, mean: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(terms, rows)``, from the first power on, and variances ``(rows,)``."""


class Table(NamedTuple):
    """The coefficients of a panel's rows.

    ``unit`` is ``(terms, rows)``, at variance 1 and the tile's precision; ``scale`` has the roots
    of the variances, float64; ``left`` for each number of terms the root of the share of a row's
    variance that the terms after them have, ``(1 + terms, rows)``.
    """

    unit: np.ndarray
    scale: np.ndarray
    left: np.ndarray

    @classmethod
    def of(cls, a: np.ndarray, variance: np.ndarray, dtype: np.dtype) -> Table:
        """Return the table of coefficients and variances, both float64."""
        scale = np.sqrt(variance)
        unit = a * reciprocal(scale)
        shares = np.square(unit)
        # Beyond the last term: what the variance has over the sum of its squares.
        beyond = np.clip((variance > 0) - shares.sum(0), 0, 1)
        beyond[beyond < 1e-13] = 0  # rounding
        after = np.concatenate([shares, beyond[None]])[::-1].cumsum(0)[::-1]
        return cls(unit.astype(dtype), scale, np.sqrt(after).astype(np.float32))


@dataclass(frozen=True)
class Series:
    """A series of tiles, and whether of its result each entry is divided by both rows' roots.

    Attributes
    ----------
    rows, cols
        What expands each operand.
    degrees
        What squares are divided by for a variance.
    cosine
        Whether the result is a cosine too.
    """

    rows: Expansion
    cols: Expansion
    degrees: int
    cosine: bool

    def table(
        self,
        x: Operand,
        expansion: Expansion,
        entry: tuple[int, ...],
        rows: slice,
        pieces: tuple[Piece, ...],
        dtype: np.dtype,
    ) -> Table:
        """Return the table of a panel's rows, kept in this process while the operand lives."""
        distinct = (tokenize(expansion), self.degrees, dtype.name)
        key = (x.token, "series", *distinct, entry, rows.start, rows.stop)

        def load() -> Table:
            moments = x.moments(entry, rows, pieces)
            mean = moments.count @ moments.mean / moments.count.sum()
            sd = moments.norm() / np.sqrt(self.degrees)
            return Table.of(*expansion.coefficients(mean, sd), dtype)

        size = _TABLE * (rows.stop - rows.start)
        return MOMENTS.get(key, load, size=size, limit=sys.maxsize)


class Terms(NamedTuple):
    """What a tile of cosines becomes: the series of two tables, times a factor."""

    rows: Table
    cols: Table
    cosine: bool
    factor: float

    def needed(self, levels: np.ndarray) -> np.ndarray:
        """Return how many terms leave nothing that counts, ``(level, row)``.

        Of cosines up to each level, with whatever column.
        """
        most = min(len(self.rows.unit), len(self.cols.unit))
        tail = self.rows.left[: most + 1] * self.cols.left[: most + 1].max(axis=1)[:, None]
        powers = levels[:, None] ** np.arange(1, most + 2)
        counts = [(tail * power[:, None] > _LEFT)[:-1].sum(axis=0) for power in powers]
        return np.maximum(counts, 1)


def apply_series(tile: np.ndarray, terms: Terms, *, diagonal: bool) -> None:
    """Replace a tile of cosines ``(rows, cols)`` by its series, in place.

    Rows are taken in the order of how many terms they need. Where few cosines of a slab are large,
    it gets the terms of the others, and these few are made again by themselves. ``diagonal`` says
    that rows and columns are the same.
    """
    if diagonal:
        np.fill_diagonal(tile, 0)  # else every slab would need the terms of a cosine of 1
    needed = terms.needed(_LEVELS)
    order = np.argsort(needed[len(_LEVELS) // 2], kind="stable")
    step = max(1, _SLAB // max(tile.shape[1], 1))
    buffers = np.empty((3, step, tile.shape[1]), tile.dtype)
    alone: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(tile), step):
        own = order[start : start + step]
        rho, total, term = (buffer[: len(own)] for buffer in buffers)
        np.take(tile, own, axis=0, out=rho, mode="clip")  # "raise" would copy twice
        count, far = _split(np.abs(rho, out=term), needed[:, own].max(axis=1))
        if far is not None:
            i, j = np.divmod(far, tile.shape[1])
            alone.append((own[i], j, rho[i, j]))
        a, b = terms.rows.unit[:count, own], terms.cols.unit
        _outer(a[count - 1], b[count - 1], total)
        for k in range(count - 2, -1, -1):
            total *= rho
            _outer(a[k], b[k], term)
            total += term
        total *= rho
        tile[own] = _scaled(total, terms, own[:, None], slice(None))
    if alone:
        i, j, rho = map(np.concatenate, zip(*alone, strict=True))
        tile[i, j] = _scaled(_entries(rho, terms, i, j), terms, i, j)
    if diagonal:
        np.fill_diagonal(tile, own_entries(terms))


def _scaled(values: np.ndarray, terms: Terms, i: Any, j: Any) -> np.ndarray:
    """Scale entries of rows ``i`` and columns ``j`` to their variances, in place; clip cosines."""
    rows, cols = scales(terms)
    if rows is not None:
        values *= rows.astype(values.dtype)[i]
        values *= cols.astype(values.dtype)[j]
    if terms.cosine:
        np.clip(values, -abs(terms.factor), abs(terms.factor), out=values)
    return values


def _outer(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    if out.shape[1] >= _WIDE:
        np.multiply(a[:, np.newaxis], b, out=out)  # a loop of vector instructions for each row
    else:
        np.einsum("i,j->ij", a, b, out=out)  # starts its loop over a row sooner


def _split(size: np.ndarray, needed: np.ndarray) -> tuple[int, np.ndarray | None]:
    """Return the terms that a slab needs, and the places of entries too large for that, if any.

    ``size`` are the magnitudes of its cosines, and ``needed`` the terms for each of `_LEVELS`.
    """
    top = min(int(np.searchsorted(_LEVELS, size.max(initial=0))), len(_LEVELS) - 1)
    best, level = float(needed[top]), top
    if needed[top] <= needed[0] + _FEW:
        return int(needed[top]), None
    some = size[:: len(size) // 4 or 1]  # rows enough to tell the share that is large
    for below in range(1, top, 2):
        share = np.count_nonzero(some > _LEVELS[below]) / some.size
        cost = needed[below] + _ALONE * needed[-1] * share
        best, level = (cost, below) if cost < best else (best, level)
    far = None if level == top else np.flatnonzero(size.ravel() > _LEVELS[level])
    return int(needed[level]), far


def _entries(rho: np.ndarray, terms: Terms, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the series of single entries, with all its terms."""
    a, b = terms.rows.unit, terms.cols.unit
    out = np.empty_like(rho)
    for start in range(0, len(rho), _SLAB):
        own = slice(start, start + _SLAB)
        total, left, right = np.zeros_like(rho[own]), i[own], j[own]
        for k in range(min(len(a), len(b)) - 1, -1, -1):
            total += a[k][left] * b[k][right]
            total *= rho[own]
        out[own] = total
    return out


def scales(terms: Terms) -> tuple[Any, Any]:
    """Return what rows and columns are multiplied by after the series; None for cosines."""
    if terms.cosine and terms.factor == 1:
        return None, None
    if terms.cosine:
        rows, cols = len(terms.rows.scale), len(terms.cols.scale)
        return np.full(rows, terms.factor), np.ones(cols)
    return terms.rows.scale * terms.factor, terms.cols.scale


def own_entries(terms: Terms) -> np.ndarray:
    """Return the entries of rows with themselves: their variances, or 1 where these are not 0."""
    own = terms.rows.scale > 0 if terms.cosine else terms.rows.scale**2
    return own * terms.factor
