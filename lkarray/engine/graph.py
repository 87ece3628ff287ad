"""Tile tasks, and what is made of them: the lazy Dask view and the top-k sink.

A task is opaque to Dask: it is given the operands (one shared node each, so their graph
travels once), reads its two panels through the process's cache, multiplies, and returns a
tile or the few best entries of one. Nothing large flows through the scheduler but tiles
that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from lkarray.engine.cache import multiply
from lkarray.engine.numbers import finish_cosine, top_k
from lkarray.engine.operand import Operand, Piece
from lkarray.engine.plan import Plan


@dataclass(frozen=True)
class Tile:
    """One tile: which panels, in which pieces, scaled how."""

    at: tuple[int, ...]
    rows: slice
    cols: slice
    diagonal: bool
    pieces: tuple[Piece, ...]
    cache: int
    scale: float
    cosine: bool


def compute_tile(x: Operand, y: Operand | None, tile: Tile) -> np.ndarray:
    """Return the tile, with a leading axis of length one for each dim kept in step."""
    other = x if y is None else y
    total: np.ndarray | None = None
    for p in range(len(tile.pieces)):
        a = x.panel(tile.at, tile.rows, tile.pieces, p, tile.cache)
        b = a if tile.diagonal else other.panel(tile.at, tile.cols, tile.pieces, p, tile.cache)
        product = multiply(a, b)
        if len(tile.pieces) == 1:
            total = product
        else:
            # Sums over pieces are float64, in the order of the pieces.
            total = product.astype(np.float64) if total is None else np.add(total, product, total)
    assert total is not None
    if tile.scale != 1:
        total *= tile.scale
    out = total.astype(np.result_type(x.dtype, other.dtype), copy=False)
    if tile.cosine:
        finish_cosine(out, diagonal=tile.diagonal)
    return out.reshape((1,) * len(tile.at) + out.shape)


def flip(tile: np.ndarray) -> np.ndarray:
    """Return the tile of the other triangle."""
    return tile.swapaxes(-1, -2)


def gram_array(x: Operand, y: Operand | None, plan: Plan, *, scale: float = 1.0) -> da.Array:
    """Return the Gram of the operands as a Dask array ``(*each, rows, rows)``, one tile a chunk.

    Of a symmetric Gram only the tiles on and above the diagonal are computed.
    """
    graph: dict[Any, Any] = {}
    name = f"gram-{tokenize(x, y, plan, scale)}"
    keys = _operand_keys(graph, x, y)
    for at, i, j, tile in _tiles(x, plan, y is None, scale):
        graph[(name, *at, i, j)] = (compute_tile, *keys, tile)
        if y is None and i < j:
            graph[(name, *at, j, i)] = (flip, (name, *at, i, j))
    each = tuple((1,) * x.variable.sizes[dim] for dim in x.each)
    lengths = tuple(tuple(s.stop - s.start for s in part) for part in (plan.rows, plan.cols))
    dtype = np.result_type(x.dtype, x.dtype if y is None else y.dtype)
    return da.Array(
        HighLevelGraph.from_collections(name, graph), name, (*each, *lengths), dtype=dtype
    )


def top_k_arrays(
    x: Operand, plan: Plan, k: int, *, largest: bool, groups: np.ndarray | None
) -> tuple[da.Array, da.Array]:
    """Return positions and values of the ``k`` best entries of each row of the Gram of ``x``.

    Each tile above the diagonal serves its rows and its columns, and leaves only its ``k``
    best; n x n is never held. The entry with itself, and those within a row's own group
    where ``groups`` (one code a row) is given, do not count. Rows with fewer than ``k``
    entries end in position -1 and value NaN. Ties go to the lower position.
    """
    graph: dict[Any, Any] = {}
    name = f"top-{tokenize(x, plan, k, largest, groups)}"
    operand, _ = _operand_keys(graph, x, None)
    codes = f"{name}-groups"
    graph[codes] = groups
    parts: dict[int, list[tuple[Any, int]]] = {i: [] for i in range(len(plan.rows))}
    for _, i, j, tile in _tiles(x, plan, True, 1.0):
        part = (f"{name}-part", i, j)
        graph[part] = (_best_of_tile, operand, codes, k, largest, tile)
        parts[i].append((part, 0))
        if i < j:
            parts[j].append((part, 1))
    for i, found in parts.items():
        # A few at a time, in the order in which tiles are made, so that few are ever held.
        before: Any = None
        for step in range(0, len(found), _MERGED):
            keys, sides = zip(*found[step : step + _MERGED], strict=True)
            last = step + _MERGED >= len(found)
            key = (name, i) if last else (f"{name}-merge", i, step)
            graph[key] = (_merge, before, list(keys), sides, k)
            before = key
    names = (f"{name}-position", f"{name}-value")
    picks = {
        out: {(out, i, 0): (_finish, (name, i), k, largest, side) for i in parts}
        for side, out in enumerate(names)
    }
    layers = HighLevelGraph({name: graph} | picks, {name: set()} | {out: {name} for out in names})
    chunks = (tuple(s.stop - s.start for s in plan.rows), (k,))
    position = da.Array(layers, names[0], chunks, dtype=np.int64)
    return position, da.Array(layers, names[1], chunks, dtype=x.dtype)


#: Bytes that `top_k_arrays` needs for each element of a tile: a transposed and a partitioned
#: copy, and masks.
TOP_K_BYTES = 12
_MERGED = 4  # tiles whose best are merged at once


def top_k_held(n: int, k: int) -> int:
    """Return the bytes of the best entries that `top_k_arrays` holds, of tiles and in the end."""
    return n * k * (8 * _MERGED + 12)


def _operand_keys(graph: dict[Any, Any], x: Operand, y: Operand | None) -> tuple[str, str | None]:
    graph[f"operand-{x.token}"] = x
    if y is None:
        return f"operand-{x.token}", None
    graph[f"operand-{y.token}"] = y
    return f"operand-{x.token}", f"operand-{y.token}"


def _tiles(
    x: Operand, plan: Plan, symmetric: bool, scale: float
) -> Iterator[tuple[tuple[int, ...], int, int, Tile]]:
    for at in np.ndindex(*(x.variable.sizes[dim] for dim in x.each)):
        for i, rows in enumerate(plan.rows):
            for j, cols in enumerate(plan.cols):
                if symmetric and i > j:
                    continue
                diagonal = symmetric and i == j
                tile = Tile(at, rows, cols, diagonal, plan.pieces, plan.cache, scale, x.cosine)
                yield at, i, j, tile


Best = tuple[np.ndarray, np.ndarray]


def _best_of_tile(
    x: Operand, groups: np.ndarray | None, k: int, largest: bool, tile: Tile
) -> tuple[Best, ...]:
    values = compute_tile(x, None, tile)
    if not largest:
        np.negative(values, out=values)
    if groups is not None:
        values[groups[tile.rows][:, None] == groups[tile.cols][None, :]] = -np.inf
    if tile.diagonal:
        np.fill_diagonal(values, -np.inf)
    best = [_best(values, k, tile.cols.start)]
    if not tile.diagonal:
        best.append(_best(np.ascontiguousarray(values.T), k, tile.rows.start))
    return tuple(best)


def _best(values: np.ndarray, k: int, start: int) -> Best:
    index = top_k(values, min(k, values.shape[1]))
    return (index + start).astype(np.int32), np.take_along_axis(values, index, axis=1)


def _merge(
    before: Best | None, parts: list[tuple[Best, ...]], sides: tuple[int, ...], k: int
) -> Best:
    """Merge the best of some tiles of a row with those before, in the order of their columns."""
    found = [] if before is None else [before]
    found += [part[side] for part, side in zip(parts, sides, strict=True)]
    position = np.concatenate([index for index, _ in found], axis=1)
    values = np.concatenate([value for _, value in found], axis=1)
    index = top_k(values, min(k, values.shape[1]))
    return np.take_along_axis(position, index, axis=1), np.take_along_axis(values, index, axis=1)


def _finish(best: Best, k: int, largest: bool, side: int) -> np.ndarray:
    """Return positions (0) or values (1), filled to ``k`` where there are fewer."""
    missing = best[1] == -np.inf
    out = best[side].astype(np.int64) if side == 0 else best[side] * (1 if largest else -1)
    fill = -1 if side == 0 else np.nan
    out[missing] = fill
    return np.pad(out, ((0, 0), (0, k - out.shape[1])), constant_values=fill)
