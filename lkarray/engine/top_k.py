"""The top-k sink: the best entries of each row of a Gram, which itself is never held."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from lkarray.engine.contraction import Contraction, ContractionLayer, Tile, compute_tile
from lkarray.engine.device_tiles import Wanted, best_of_tile
from lkarray.engine.numbers import top_k

#: Bytes that the sink needs for each element of a tile: a partitioned copy and masks, once.
TOP_K_BYTES = 12
_SLAB = 64  # rows of a tile compared at once
_MERGED = 8  # tiles whose best are merged at once


class Ask(NamedTuple):
    """What is wanted: how many, which end, and which pairs do not count.

    ``groups`` (one code a row) leaves out pairs within a group; ``rule(i, j)``, given arrays
    of positions that broadcast, says which pairs to leave out.
    """

    k: int
    largest: bool
    groups: np.ndarray | None
    rule: Any


class Candidates(NamedTuple):
    """Columns and values that may be among the best, for each of some rows.

    Compressed rows, counted from 0: those of row ``r`` are ``slice(starts[r], starts[r + 1])``.
    """

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray


class Thresholds:
    """For each row the k-th best value that this process has seen: what is below cannot count.

    Only ever a bound: results do not depend on which tiles this process has seen.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, np.ndarray] = {}

    def of(self, name: str, c: Contraction) -> np.ndarray:
        """Return the thresholds of one search, shared by its tasks while ``c`` lives."""
        with self._lock:
            if name not in self._rows:
                self._rows[name] = np.full(c.x.n, -np.inf, c.dtype)
                weakref.finalize(c, self._rows.pop, name, None)
            return self._rows[name]


THRESHOLDS = Thresholds()


def top_k_held(n: int, k: int) -> int:
    """Return the bytes of the candidates that are held, of tiles and in the end.

    The first tile of a row leaves k; thresholds let few through after that.
    """
    return n * k * (2 * 8 + 8 + 12)


def still_array(c: Contraction) -> da.Array:
    """Return which rows of a square Gram do not vary, ``(rows,)``: they have no neighbours."""
    name = f"still-{tokenize(c)}"
    node = f"{name}-contraction"
    graph: dict[Any, Any] = {node: c}
    graph |= {(name, i): (_still_rows, node, i) for i in range(len(c.plan.rows))}
    layers = HighLevelGraph({name: ContractionLayer(graph, c)}, {name: set()})
    return da.Array(layers, name, (tuple(s.stop - s.start for s in c.plan.rows),), dtype=bool)


def _still_rows(c: Contraction, i: int) -> np.ndarray:
    plan, rows = c.plan, c.plan.rows[i]
    if len(plan.pieces) == 1:  # by way of the panel that tiles need too
        panel = c.x.low_panel if c.precision == "bfloat16" else c.x.panel
        panel((), rows, plan.pieces, 0, plan.cache)
    return c.x.still((), rows, plan.pieces)


def still_sides(c: Contraction, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Say which rows and which columns of a tile do not vary."""
    rows, cols = c.plan.rows[tile.i], c.plan.cols[tile.j]
    return (
        c.x.still(tile.entry, rows, c.plan.pieces),
        c.other.still(tile.entry, cols, c.plan.pieces),
    )


def top_k_arrays(c: Contraction, ask: Ask) -> tuple[da.Array, da.Array]:
    """Return positions and values of the ``k`` best entries of each row of a square Gram.

    Each tile above the diagonal serves its rows and its columns, and leaves only what may
    be among their ``k`` best. The entry with itself does not count, nor one with a row that does
    not vary. Rows with fewer than ``k`` entries end in position -1 and value NaN. Ties go to the
    lower position.
    """
    graph: dict[Any, Any] = {}
    name = f"top-{tokenize(c, ask)}"
    node, asked = f"{name}-contraction", f"{name}-ask"
    graph[node], graph[asked] = c, ask
    sides = tile_sides(graph, name, c, (_best_of_tile, node, asked, name))
    for i, own in sides.items():
        graph[(name, i)] = gather(graph, name, i, own, (_merge, node, asked, name, i))
    return best_arrays(graph, name, asked, c, ask.k)


def best_arrays(
    graph: dict[Any, Any], name: str, asked: Any, c: Contraction, k: int
) -> tuple[da.Array, da.Array]:
    """Return positions and values as arrays, from the `Candidates` of each panel, ``(name, i)``."""
    names = (f"{name}-position", f"{name}-value")
    picks = {
        out: {(out, i, 0): (finish, (name, i), asked, side) for i in range(len(c.plan.rows))}
        for side, out in enumerate(names)
    }
    layers: dict[str, Any] = {name: ContractionLayer(graph, c)} | picks
    whole = HighLevelGraph(layers, {name: set()} | {out: {name} for out in names})
    chunks = (tuple(s.stop - s.start for s in c.plan.rows), (k,))
    position = da.Array(whole, names[0], chunks, dtype=np.int64)
    return position, da.Array(whole, names[1], chunks, dtype=c.dtype)


def tile_sides(
    graph: dict[Any, Any], name: str, c: Contraction, task: tuple[Any, ...]
) -> dict[int, list[tuple[Any, int]]]:
    """Add the task of each tile; return for each panel the tiles' keys, and which side it is."""
    sides: dict[int, list[tuple[Any, int]]] = {i: [] for i in range(len(c.plan.rows))}
    for tile in c.tiles():
        key = (f"{name}-tile", tile.i, tile.j)
        graph[key] = (*task, tile)
        sides[tile.i].append((key, 0))
        if tile.i < tile.j:  # a tile above the diagonal serves its columns too
            sides[tile.j].append((key, 1))
    return sides


def gather(
    graph: dict[Any, Any], name: str, i: int, sides: list[tuple[Any, int]], merge: tuple[Any, ...]
) -> Any:
    """Add the merges of one panel's tiles, a few at a time so that few are ever held.

    Tiles are taken in the order in which they are made, every other row of them backwards, so
    that panels which the cache kept from one row serve the next. Return the key of the last
    merge.
    """
    before: Any = None
    sides = sides[::-1] if i % 2 else sides
    for step in range(0, len(sides), _MERGED):
        keys, which = zip(*sides[step : step + _MERGED], strict=True)
        key = (f"{name}-merge", i, step)
        graph[key] = (*merge, before, list(keys), which)
        before = key
    return before


def _best_of_tile(c: Contraction, ask: Ask, name: str, tile: Tile) -> tuple[Candidates, ...]:
    if c.plan.placed is not None and (found := _best_on_device(c, ask, name, tile)) is not None:
        return found
    values = compute_tile(c, tile)
    places = c.plan.rows[tile.i], c.plan.cols[tile.j]
    leave_out(values, c, ask, *places, still_sides(c, tile))
    sides = 1 if c.is_diagonal(tile) else 2
    least = [THRESHOLDS.of(name, c)[place] for place in places[:sides]]
    best: list[Candidates | None] = [
        _best(values if side == 0 else values.T, ask.k, places[1 - side].start, least[side])
        if is_fresh(least[side])
        else None
        for side in range(sides)
    ]
    wanted = [bound if own is None else None for bound, own in zip(least, best, strict=True)]
    for side, entries in enumerate(reaching(lambda a, b: values[a:b], values.shape, wanted)):
        if entries is not None:
            starts = np.searchsorted(entries.row, np.arange(values.shape[side] + 1))
            columns = (entries.column + places[1 - side].start).astype(np.int32)
            candidates = Candidates(starts, columns, entries.value)
            _raise(least[side], candidates, ask.k)
            best[side] = candidates
    return tuple(candidates for candidates in best if candidates is not None)


def _best_on_device(
    c: Contraction, ask: Ask, name: str, tile: Tile
) -> tuple[Candidates, ...] | None:
    """Take the best of a tile where it was made, so that only they come back.

    None where the device's memory ends: the tile comes back then, in halves.
    """
    places = rows, cols = c.plan.rows[tile.i], c.plan.cols[tile.j]
    i, j = np.arange(rows.start, rows.stop)[:, None], np.arange(cols.start, cols.stop)[None, :]
    mask = None if ask.rule is None else np.broadcast_to(ask.rule(i, j), (i.size, j.size))
    codes = None if ask.groups is None else (ask.groups[rows], ask.groups[cols])
    wanted = Wanted(ask.k, ask.largest, codes, mask, partial(still_sides, c, tile))
    found = best_of_tile(c.factors(tile), c.finish(tile), wanted)
    if found is None:
        return None
    out = []
    for side, (column, value) in enumerate(found):
        least = THRESHOLDS.of(name, c)[places[side]]
        keep = value >= np.maximum(least, np.finfo(value.dtype).min)[:, None]
        if column.shape[1] == ask.k:
            np.maximum(least, value[:, -1], out=least)
        starts = np.concatenate(([0], np.cumsum(keep.sum(axis=1))))
        columns = (column[keep] + places[1 - side].start).astype(np.int32)
        out.append(Candidates(starts, columns, value[keep]))
    return tuple(out)


def leave_out(
    values: np.ndarray,
    c: Contraction,
    ask: Ask,
    rows: slice,
    cols: slice,
    still: tuple[np.ndarray, np.ndarray],
) -> None:
    """Make larger better, and worst what does not count, in place, in a block of the Gram.

    ``still`` says which of its rows, and which of its columns, do not vary.
    """
    if not ask.largest:
        np.negative(values, out=values)
    if ask.groups is not None:
        values[ask.groups[rows][:, None] == ask.groups[cols][None, :]] = -np.inf
    if ask.rule is not None:
        i, j = np.arange(rows.start, rows.stop), np.arange(cols.start, cols.stop)
        values[np.broadcast_to(ask.rule(i[:, None], j[None, :]), values.shape)] = -np.inf
    values[still[0]] = -np.inf
    values[:, still[1]] = -np.inf
    # The entries of rows with themselves, where the block crosses the diagonal.
    same = np.arange(max(rows.start, cols.start), min(rows.stop, cols.stop))
    if c.symmetric:
        values[same - rows.start, same - cols.start] = -np.inf


def is_fresh(least: np.ndarray) -> bool:
    """Say whether most rows have no threshold yet, so that a tile's own best set one."""
    return bool(np.isneginf(least).mean() > 0.5)


class Entries(NamedTuple):
    """Entries of a tile, sorted by row."""

    row: np.ndarray
    column: np.ndarray
    value: np.ndarray


def reaching(
    slab: Callable[[int, int], np.ndarray],
    shape: tuple[int, ...],
    least: list[np.ndarray | None],
) -> list[Entries | None]:
    """Return the entries of a tile that reach the threshold of their row, and of their column.

    Parameters
    ----------
    slab
        Gives the rows from one up to another: few at a time stay in the processor's cache.
    shape
        Of the tile.
    least
        Thresholds of the rows and, where wanted, of the columns; None leaves a side out.

    Returns
    -------
    list
        For each side its entries, those of columns as entries of the transposed tile.
    """
    columns = shape[1]
    passed: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in least]  # (place, value)
    for start in range(0, shape[0], _SLAB):
        values = slab(start, min(start + _SLAB, shape[0]))
        for side, bounds in enumerate(least):
            if bounds is not None:
                bound = bounds[start : start + _SLAB, None] if side == 0 else bounds
                # What was left out is -inf, and below whatever threshold there is.
                bound = np.maximum(bound, np.finfo(values.dtype).min)
                places = np.flatnonzero((values >= bound).ravel())
                passed[side].append((places + start * columns, values.ravel()[places]))
    out: list[Entries | None] = []
    for side, bounds in enumerate(least):
        if bounds is None:
            out.append(None)
            continue
        row, column = np.divmod(np.concatenate([places for places, _ in passed[side]]), columns)
        value = np.concatenate([values for _, values in passed[side]])
        if side == 1:
            order = np.argsort(column, kind="stable")
            row, column, value = column[order], row[order], value[order]
        out.append(Entries(row, column, value))
    return out


def _best(values: np.ndarray, k: int, start: int, least: np.ndarray) -> Candidates:
    """Return the ``k`` best of each row of a tile, and raise the rows' thresholds."""
    values = np.ascontiguousarray(values)
    index = top_k(values, min(k, values.shape[1]))
    best = np.take_along_axis(values, index, axis=1)
    if index.shape[1] == k:
        np.maximum(least, best[:, -1], out=least)
    starts = np.arange(len(values) + 1) * index.shape[1]
    return Candidates(starts, (index + start).astype(np.int32).ravel(), best.ravel())


def _raise(least: np.ndarray, candidates: Candidates, k: int) -> None:
    """Raise thresholds where a tile alone holds ``k`` better values."""
    starts = candidates.starts
    for r in np.flatnonzero(np.diff(starts) >= k):
        own = candidates.values[starts[r] : starts[r + 1]]
        least[r] = max(least[r], np.partition(own, len(own) - k)[len(own) - k])


def _merge(
    c: Contraction,
    ask: Ask,
    name: str,
    i: int,
    before: Candidates | None,
    tiles: list[tuple[Candidates, ...]],
    sides: tuple[int, ...],
) -> Candidates:
    """Keep the ``k`` best of some tiles and those before, and raise the rows' thresholds."""
    candidates = [] if before is None else [before]
    candidates += [tile[side] for tile, side in zip(tiles, sides, strict=True)]
    best = merge_candidates(candidates, ask.k)
    least = THRESHOLDS.of(name, c)[c.plan.rows[i]]
    full = np.flatnonzero(np.diff(best.starts) == ask.k)
    least[full] = np.maximum(least[full], best.values[best.starts[full] + ask.k - 1])
    return best


def merge_candidates(candidates: list[Candidates], k: int) -> Candidates:
    """Return the ``k`` best of each row, best first; ties go to the lower column."""
    rows = len(candidates[0].starts) - 1
    row = np.concatenate([np.repeat(np.arange(rows), np.diff(c.starts)) for c in candidates])
    column = np.concatenate([c.columns for c in candidates])
    value = np.concatenate([c.values for c in candidates])
    order = np.lexsort((column, -value, row))  # by row, then best first, then lower column
    row, column, value = row[order], column[order], value[order]
    starts = np.searchsorted(row, np.arange(rows + 1))
    keep = np.arange(len(row)) - starts[row] < k  # the rank in its row
    counts = np.minimum(np.diff(starts), k)
    return Candidates(np.concatenate(([0], np.cumsum(counts))), column[keep], value[keep])


def finish(best: Candidates, ask: Ask, side: int) -> np.ndarray:
    """Return positions (0) or values (1), filled to ``k`` where there are fewer."""
    rows = len(best.starts) - 1
    row = np.repeat(np.arange(rows), np.diff(best.starts))
    rank = np.arange(len(row)) - best.starts[row]
    counts = best.values > -np.inf
    if side == 0:
        out = np.full((rows, ask.k), -1, np.int64)
        out[row[counts], rank[counts]] = best.columns[counts]
        return out
    values = np.full((rows, ask.k), np.nan, best.values.dtype)
    values[row[counts], rank[counts]] = best.values[counts] * (1 if ask.largest else -1)
    return values
