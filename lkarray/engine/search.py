"""The top-k sink in two steps: candidates in low precision, ranks by float32 products.

Rounding a row ``a`` of norm one to ``a'`` leaves ``|a - a'| = d_a``, which is measured, so an
entry ``a . b`` differs from ``a' . b'`` by at most ``d_a + d_b + d_a d_b`` (Cauchy-Schwarz), and
from what the product returns by its own rounding besides. An entry whose upper bound lies
below the k-th best lower bound of its row cannot be among the k best: that is the certificate.
All others are computed again from float32 panels. Tiles in which too few can be ruled out are
computed again whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize

from lkarray.engine.blas import product_slot
from lkarray.engine.contraction import Contraction, Tile, compute_tile
from lkarray.engine.lowprecision import multiply_coarse, products_of_pairs, turn
from lkarray.engine.numbers import top_k
from lkarray.engine.top_k import (
    THRESHOLDS,
    Ask,
    Candidates,
    Entries,
    best_arrays,
    gather,
    is_fresh,
    leave_out,
    merge_candidates,
    reaching,
    still_sides,
    tile_sides,
)

#: Bytes a process must be allowed: what torch keeps for its own products is not planned for.
SEARCH_BUDGET = 160 << 20
_ROUNDING = 2.0**-8  # of a product's result: bfloat16 keeps 8 bits, and some slack
_SUMS = 1e-5  # of float32 sums, in either precision
_DENSE = 0.05  # share of a tile's entries from which it is computed again whole


class Maybe(NamedTuple):
    """Entries that may be among the best of some rows, in compressed rows, with bounds.

    ``whole`` lists the panels of columns that must be computed again as whole tiles.
    """

    starts: np.ndarray
    columns: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    whole: tuple[int, ...]


def search_arrays(c: Contraction, ask: Ask) -> tuple[da.Array, da.Array]:
    """Return what `lkarray.engine.top_k.top_k_arrays` returns, by way of bfloat16."""
    graph: dict[Any, Any] = {}
    name = f"search-{tokenize(c, ask)}"
    node, asked = f"{name}-contraction", f"{name}-ask"
    graph[node], graph[asked] = c, ask
    sides = tile_sides(graph, name, c, (_maybe_of_tile, node, asked, name))
    merge = (_merge, node, asked, name)
    before = {i: gather(graph, name, i, own, (*merge, i)) for i, own in sides.items()}
    # Candidates first, all of them: both steps keep panels, of different kinds, and interleaved
    # they evict each other (each panel was read five times).
    over = f"{name}-over"
    graph |= {(f"{name}-done", i): (_done, key) for i, key in before.items()}
    graph[over] = (_done, [(f"{name}-done", i) for i in before])
    for i, key in before.items():
        graph[(name, i)] = (_rank, node, asked, i, key, over)
    return best_arrays(graph, name, asked, c, ask.k)


def _done(_: Any) -> None:
    """Say that a task is over, without its result, which stays where it is."""


def _maybe_of_tile(c: Contraction, ask: Ask, name: str, tile: Tile) -> tuple[Maybe, ...]:
    places = rows, cols = c.plan.rows[tile.i], c.plan.cols[tile.j]
    a = c.x.low_panel(tile.entry, rows, c.plan.pieces, 0, c.plan.cache)
    b = a if tile.i == tile.j else c.x.low_panel(tile.entry, cols, c.plan.pieces, 0, c.plan.cache)
    with product_slot(many=True):
        coarse = multiply_coarse(a, b)
    error = a.error.max(initial=0) + b.error.max(initial=0) * (1 + a.error.max(initial=0)) + _SUMS

    still = still_sides(c, tile)

    def slab(start: int, stop: int) -> np.ndarray:
        values, own = coarse.slab(start, stop), slice(rows.start + start, rows.start + stop)
        leave_out(values, c, ask, own, cols, (still[0][start:stop], still[1]))
        return values

    sides = 1 if tile.i == tile.j else 2
    least = [THRESHOLDS.of(name, c)[place] for place in places[:sides]]
    shape = coarse.bits.shape
    if any(is_fresh(bound) for bound in least):
        values = slab(0, shape[0])
        for side, bound in enumerate(least):
            if is_fresh(bound):
                _begin(values if side == 0 else values.T, ask.k, bound, error)
        del values
    best = []
    for side, entries in enumerate(reaching(slab, shape, [_reach(x, error) for x in least])):
        assert entries is not None
        panel = (tile.j, tile.i)[side]
        best.append(_maybe(entries, shape[side], shape[1 - side], places[1 - side], panel, error))
    return tuple(best)


def _begin(values: np.ndarray, k: int, least: np.ndarray, error: float) -> None:
    """Set thresholds from the lower bounds of a tile's ``k`` best."""
    if k <= values.shape[1]:
        square = np.ascontiguousarray(values)
        kth = np.take_along_axis(square, top_k(square, k)[:, -1:], axis=1)[:, 0]
        np.maximum(least, _lower(kth, error), out=least)


def _reach(least: np.ndarray, error: float) -> np.ndarray:
    """Return the smallest values whose upper bounds reach the thresholds."""
    reach = least - error
    out: np.ndarray = np.where(reach > 0, reach / (1 + _ROUNDING), reach / (1 - _ROUNDING))
    return np.nextafter(out.astype(np.float32), np.float32(-np.inf))


def _maybe(
    entries: Entries, rows: int, columns: int, place: slice, panel: int, error: float
) -> Maybe:
    """Return entries with bounds, or the wish for the whole tile where they are many."""
    if len(entries.row) > _DENSE * rows * columns:
        return _whole(rows, panel)
    value = entries.value
    starts = np.searchsorted(entries.row, np.arange(rows + 1))
    lower, upper = _lower(value, error), value + error + _ROUNDING * np.abs(value)
    column = (entries.column + place.start).astype(np.int32)
    return Maybe(starts, column, lower, upper.astype(np.float32), ())


def _whole(rows: int, panel: int) -> Maybe:
    none = np.zeros(0, np.float32)
    return Maybe(np.zeros(rows + 1, int), np.zeros(0, np.int32), none, none, (panel,))


def _lower(values: np.ndarray, error: float) -> np.ndarray:
    # One step of float32 down, so that rounding this bound cannot raise it.
    bound = (values - error - _ROUNDING * np.abs(values)).astype(np.float32)
    return np.nextafter(bound, np.float32(-np.inf))


def _merge(
    c: Contraction,
    ask: Ask,
    name: str,
    i: int,
    before: Maybe | None,
    tiles: list[tuple[Maybe, ...]],
    sides: tuple[int, ...],
) -> Maybe:
    """Keep what may be among the ``k`` best of some tiles and those before."""
    candidates = [] if before is None else [before]
    candidates += [tile[side] for tile, side in zip(tiles, sides, strict=True)]
    rows = len(candidates[0].starts) - 1
    row = np.concatenate([np.repeat(np.arange(rows), np.diff(m.starts)) for m in candidates])
    lower = np.concatenate([m.lower for m in candidates])
    order = np.lexsort((-lower, row))
    row, lower = row[order], lower[order]
    starts = np.searchsorted(row, np.arange(rows + 1))
    least = THRESHOLDS.of(name, c)[c.plan.rows[i]]
    full = np.flatnonzero(np.diff(starts) >= ask.k)
    least[full] = np.maximum(least[full], lower[starts[full] + ask.k - 1])
    upper = np.concatenate([m.upper for m in candidates])[order]
    column = np.concatenate([m.columns for m in candidates])[order]
    keep = upper >= least[row]
    counts = np.bincount(row[keep], minlength=rows)
    whole = tuple(panel for m in candidates for panel in m.whole)
    starts = np.concatenate(([0], np.cumsum(counts)))
    return Maybe(starts, column[keep], lower[keep], upper[keep], whole)


def _rank(c: Contraction, ask: Ask, i: int, maybe: Maybe, over: None) -> Candidates:
    """Return the ``k`` best of a panel's rows, by float32 products of what may be among them."""
    c.x.forget_low_panels()  # 700 MiB of the peak, once
    best: Candidates | None = None
    for exact in _exact(c, ask, i, maybe):
        best = merge_candidates([exact] if best is None else [best, exact], ask.k)
    rows = c.plan.rows[i].stop - c.plan.rows[i].start
    none = Candidates(np.zeros(rows + 1, int), np.zeros(0, np.int32), np.zeros(0, np.float32))
    return best or none


def _exact(c: Contraction, ask: Ask, i: int, maybe: Maybe) -> Iterator[Candidates]:
    """Yield exact values, one panel of columns at a time."""
    plan = c.plan
    rows = plan.rows[i].stop - plan.rows[i].start
    row = np.repeat(np.arange(rows), np.diff(maybe.starts))
    bounds = np.array([s.start for s in plan.cols] + [plan.cols[-1].stop])
    panel_of = np.searchsorted(bounds, maybe.columns, side="right") - 1
    sign = 1 if ask.largest else -1
    mine: np.ndarray | None = None
    for j in range(len(plan.cols))[:: -1 if i % 2 else 1]:
        own = np.flatnonzero(panel_of == j)
        if j in maybe.whole:
            yield _whole_tile(c, ask, i, j)
        elif len(own):
            mine = _turned(c, i) if mine is None else mine
            theirs = mine if i == j else _turned(c, j)
            columns = maybe.columns[own] - bounds[j]
            order = np.lexsort((columns, row[own]))
            own, columns = own[order], columns[order]
            starts = np.searchsorted(row[own], np.arange(rows + 1))
            value = products_of_pairs(mine, theirs, starts, columns) * sign
            yield Candidates(starts, maybe.columns[own], value)


def _turned(c: Contraction, i: int) -> np.ndarray:
    return c.x.turned_panel(c.plan.rows[i], c.plan.pieces, c.plan.cache, turn)


def _whole_tile(c: Contraction, ask: Ask, i: int, j: int) -> Candidates:
    exact = replace(c, precision="float32")
    tile = Tile((), min(i, j), max(i, j))
    values = compute_tile(exact, tile)
    places = c.plan.rows[tile.i], c.plan.cols[tile.j]
    leave_out(values, exact, ask, *places, still_sides(exact, tile))
    if i > j:
        values = np.ascontiguousarray(values.T)
    k = min(ask.k, values.shape[1])
    index = top_k(values, k)
    starts = np.arange(len(values) + 1) * k
    columns = (index + c.plan.cols[j].start).astype(np.int32).ravel()
    return Candidates(starts, columns, np.take_along_axis(values, index, axis=1).ravel())
