"""An elementwise power series of a tile of cosines, made while a slab of it is in the cache.

.. math:: f_{ij} = \\sum_{k \\ge 1} a_k(i) a_k(j) \\rho_{ij}^k

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

_TABLE = 400  # bytes of a row's table and moments, at most
_LEFT = 2.0**-22  # of sqrt(f_ii f_jj), at most, that terms which are left out may add up to
_SLAB = 1 << 15  # elements of a tile at once: with their sum and a term, within the L2 cache


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
    of the variances, float64; ``left`` for each number of terms the root of the largest share of
    a row's variance that the terms after them have, ``(1 + terms,)``.
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
        return cls(unit.astype(dtype), scale, np.sqrt(after.max(axis=1, initial=0)))


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
        key = (x.token, "series", tokenize(expansion), self.degrees, dtype.name, entry)

        def load() -> Table:
            moments = x.moments(entry, rows, pieces)
            mean = moments.count @ moments.mean / moments.count.sum()
            sd = moments.norm() / np.sqrt(self.degrees)
            return Table.of(*expansion.coefficients(mean, sd), dtype)

        size = _TABLE * (rows.stop - rows.start)
        key += (rows.start, rows.stop)
        table: Table = MOMENTS.get(key, load, size=size, limit=sys.maxsize)
        return table


class Terms(NamedTuple):
    """What a tile of cosines becomes: the series of two tables, times a factor."""

    rows: Table
    cols: Table
    cosine: bool
    factor: float

    def count(self, largest: float) -> int:
        """Return how many terms leave nothing that counts, of cosines up to ``largest``."""
        most = min(len(self.rows.unit), len(self.cols.unit))
        tail = self.rows.left[: most + 1] * self.cols.left[: most + 1]
        enough = tail * largest ** np.arange(1, most + 2) <= _LEFT
        return max(int(np.argmax(enough)), 1) if enough.any() else most


def apply_series(tile: np.ndarray, terms: Terms, *, diagonal: bool) -> None:
    """Replace a tile of cosines ``(rows, cols)`` by its series, in place.

    ``diagonal`` says that rows and columns are the same.
    """
    if diagonal:
        np.fill_diagonal(tile, 0)  # else every slab would need the terms of a cosine of 1
    rows, cols = _scales(terms)
    step = max(1, _SLAB // max(tile.shape[1], 1))
    term = np.empty((step, tile.shape[1]), tile.dtype)
    for start in range(0, len(tile), step):
        rho = tile[start : start + step]
        largest = max(float(rho.max(initial=0)), -float(rho.min(initial=0)))
        count, own = terms.count(min(largest, 1.0)), term[: len(rho)]
        a, b = terms.rows.unit[:, start : start + step, None], terms.cols.unit
        total = a[count - 1] * b[count - 1]
        for k in range(count - 2, -1, -1):
            total *= rho
            np.multiply(a[k], b[k], out=own)
            total += own
        np.multiply(rho, total, out=rho)
        if rows is not None:
            rho *= rows[start : start + step, None].astype(tile.dtype)
            rho *= cols.astype(tile.dtype)
    if terms.cosine:
        np.clip(tile, -abs(terms.factor), abs(terms.factor), out=tile)
    if diagonal:
        np.fill_diagonal(tile, own_entries(terms))


def _scales(terms: Terms) -> tuple[Any, Any]:
    """Return what rows and columns are multiplied by after the series; None for cosines."""
    if terms.cosine and terms.factor == 1:
        return None, None
    ones = np.ones(1)
    if terms.cosine:
        return np.broadcast_to(ones * terms.factor, len(terms.rows.scale)), ones
    return terms.rows.scale * terms.factor, terms.cols.scale


def own_entries(terms: Terms) -> np.ndarray:
    """Return the entries of rows with themselves: their variances, or 1 where these are not 0."""
    own = terms.rows.scale > 0 if terms.cosine else terms.rows.scale**2
    entries: np.ndarray = own * terms.factor
    return entries


def series_on_device(tile: Any, terms: Terms, *, diagonal: bool) -> None:
    """Do the same to a tensor, where it is."""
    import torch

    if diagonal:
        tile.fill_diagonal_(0)
    rows, cols = _scales(terms)
    count = terms.count(min(float(tile.abs().max()), 1.0)) if tile.numel() else 1
    like: dict[str, Any] = {"dtype": tile.dtype, "device": tile.device}
    a, b = (torch.as_tensor(np.ascontiguousarray(t.unit[:count]), **like) for t in terms[:2])
    step = max(1, _DEVICE_SLAB // max(tile.shape[1], 1))
    for start in range(0, len(tile), step):
        rho, own = tile[start : start + step], a[:, start : start + step, None]
        total = own[count - 1] * b[count - 1]
        term = torch.empty_like(total)
        for k in range(count - 2, -1, -1):
            torch.mul(own[k], b[k], out=term)
            total.mul_(rho).add_(term)
        rho.mul_(total)
    if rows is not None:
        tile.mul_(torch.as_tensor(np.array(rows), **like)[:, None])
        tile.mul_(torch.as_tensor(np.array(cols), **like))
    if terms.cosine:
        tile.clamp_(-abs(terms.factor), abs(terms.factor))
    if diagonal:
        tile.diagonal().copy_(torch.as_tensor(own_entries(terms), **like))


_DEVICE_SLAB = 1 << 22  # elements of a tile at once: three such arrays stay in a GPU's L2 cache
