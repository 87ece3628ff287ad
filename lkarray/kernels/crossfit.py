"""Similarities of neighbours from draws that had no part in choosing them, with errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from lkarray.engine import Contraction, Piece
from lkarray.engine.operand import volume
from lkarray.schema import CHAIN, DRAW

_BLOCKS = 6  # at least, from which a standard error is taken
_TOGETHER = 1 << 18  # numbers of pairs' draws in memory, at once
#: Columns of what a report has of each neighbour.
_REPORT = 3  # correlation, standard error, p value


def halves_of(x: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, str]:
    """Return two halves of the draws, and what they are halves of.

    Even and odd chains, which are independent; of a lone chain its first and its second half.
    """
    if x.sizes[CHAIN] > 1:
        return x.isel({CHAIN: slice(0, None, 2)}), x.isel({CHAIN: slice(1, None, 2)}), "chains"
    middle = x.sizes[DRAW] // 2
    return x.isel({DRAW: slice(0, middle)}), x.isel({DRAW: slice(middle, 2 * middle)}), "draws"


def blocks_of(c: Contraction) -> tuple[Piece, ...]:
    """Return stretches of draws, nearly of one length, that are taken for independent.

    They are chains where these are many; few are cut up, so that an error has some spread to go by.
    """
    sizes = dict(zip(c.x.over, c.x.shape, strict=True))
    chains, draws = sizes[CHAIN], sizes[DRAW]
    by_draw = c.x.center == "draw"
    parts = min(-(-_BLOCKS // (1 if by_draw else chains)), draws)
    spans = list(pairwise(np.linspace(0, draws, parts + 1).astype(int).tolist()))
    if by_draw:
        return tuple((span, (0, chains)) for span in spans)
    return tuple(((chain, chain + 1), span) for chain in range(chains) for span in spans)


def reported(c: Contraction, position: da.Array, largest: bool) -> da.Array:
    """Return correlation, error and p value of each neighbour: ``(rows, rank, 3)``, lazily.

    Parameters
    ----------
    c
        The correlation of the draws that report.
    position
        Neighbours' positions, ``(rows, rank)``, chosen on other draws; -1 is none.
    largest
        Whether correlations are to exceed 0, or to lie below.
    """
    lengths = tuple(s.stop - s.start for s in c.plan.rows)
    position = position.rechunk((lengths, -1))
    pieces = blocks_of(c)
    name = f"crossfit-{tokenize(c, position.name, largest)}"
    node = f"{name}-contraction"
    graph: dict[Any, Any] = {node: c}
    for i in range(len(lengths)):
        graph[(name, i, 0, 0)] = (_report, node, (position.name, i, 0), i, pieces, largest)
    below: list[Any] = [position]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=below)
    chunks = (lengths, (position.shape[1],), (_REPORT,))
    return da.Array(layers, name, chunks, dtype=np.float64)


def _report(
    c: Contraction, position: np.ndarray, i: int, pieces: tuple[Piece, ...], largest: bool
) -> np.ndarray:
    """Return the report of a panel's rows; NaN where there is no neighbour, or one is constant.

    With u and v of norm one, R is the sum of u v, and the influence of a stretch of draws on it is
    that of u v - R (u^2 + v^2) / 2 (its influence function); the spread of these over stretches
    gives the error.
    """
    lengths = np.array([volume(piece) for piece in pieces])
    sums = np.zeros((len(pieces), 3, *position.shape))  # of u v, u u and v v, by block
    for j, columns in enumerate(c.plan.cols):
        row, rank = np.nonzero((position >= columns.start) & (position < columns.stop))
        if not len(row):
            continue
        column = position[row, rank] - columns.start
        for b in range(len(pieces)):
            u = c.x.panel((), c.plan.rows[i], pieces, b, c.plan.cache)
            v = u if i == j else c.other.panel((), columns, pieces, b, c.plan.cache)
            step = max(1, _TOGETHER // len(u))
            for start in range(0, len(row), step):
                some = slice(start, start + step)
                one, two = u[:, row[some]], v[:, column[some]]  # (draws of the block, pairs)
                products = [_dot(one, two), _dot(one, one), _dot(two, two)]
                sums[b, :, row[some], rank[some]] = np.stack(products, axis=1)
    whole = sums.sum(axis=0)  # of u u and v v: 1
    known = (position >= 0) & (whole[1] > 0) & (whole[2] > 0)
    scale = np.sqrt(np.where(known, whole[1] * whole[2], 1))
    r = np.clip(whole[0] / scale, -1, 1)
    blocks = len(pieces)
    own = [sums[:, k] / np.where(known, whole[k], 1) for k in (1, 2)]
    psi = sums[:, 0] / scale - r / 2 * (own[0] + own[1])  # (block, rows, rank)
    psi *= (lengths.sum() / lengths)[:, None, None]  # of the mean over a block
    psi -= psi.mean(axis=0)
    error = np.sqrt((psi**2).sum(axis=0) / (blocks * max(blocks - 1, 1)))
    out = np.stack([r, error, _p_value(r if largest else -r, error, blocks - 1)], axis=-1)
    out[~known] = np.nan
    return out


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("sp,sp->p", a, b, dtype=np.float64)


def _p_value(r: np.ndarray, error: np.ndarray, freedom: int) -> np.ndarray:
    """Return how likely at least this is, by Student's t, where there is no correlation."""
    from scipy.stats import t

    score = np.divide(r, error, out=np.where(r > 0, np.inf, 0.0), where=error > 0)
    return t.sf(score, max(freedom, 1))


def q_values(p: da.Array) -> da.Array:
    """Return the false discovery rate at which each of all entries counts, lazily.

    Of Benjamini and Yekutieli (2001), whatever the dependence between them; NaN stays.
    """
    whole = p.rechunk(-1)
    return whole.map_blocks(_benjamini_yekutieli, dtype=np.float64)


def _benjamini_yekutieli(p: np.ndarray) -> np.ndarray:
    out = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    values = p[known]
    m = len(values)
    if not m:
        return out
    order = np.argsort(values)
    rank = np.arange(1, m + 1)
    raised = values[order] * m * (1 / rank).sum() / rank
    q = np.empty(m)
    q[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1)
    out[known] = q
    return out
