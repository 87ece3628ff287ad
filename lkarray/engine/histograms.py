"""The histogram sink: entries of a Gram counted by pairs of groups, tile by tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from lkarray.engine.contraction import Contraction, ContractionLayer, Tile, compute_tile
from lkarray.engine.device_tiles import Counted, counts_of_tile
from lkarray.engine.tasks import ADDED

#: Bytes that the sink needs for each element of a tile: its bin, in two steps.
HISTOGRAM_BYTES = 24


class Bins(NamedTuple):
    """Even bins between two bounds, for pairs of ``groups`` numbered by ``codes``."""

    low: float
    high: float
    number: int
    codes: np.ndarray
    groups: int


def histogram_array(c: Contraction, bins: Bins) -> da.Array:
    """Return counts ``(group, group, 1 + bins + 1)``: below, in each bin, and above the bounds.

    Ordered pairs of different rows of a symmetric Gram; bins are closed below, the last above too.
    """
    name = f"histogram-{tokenize(c, bins)}"
    node, asked = f"{name}-contraction", f"{name}-bins"
    graph: dict[Any, Any] = {node: c, asked: bins}
    keys: list[Any] = []
    for tile in c.tiles():
        keys.append((f"{name}-tile", tile.i, tile.j))
        graph[keys[-1]] = (_count, node, asked, tile)
    level = 0
    while len(keys) > 1:  # in a tree, so that few counts are ever held
        sums = [(f"{name}-sum", level, start) for start in range(0, len(keys), ADDED)]
        for key in sums:
            graph[key] = (sum, keys[key[2] : key[2] + ADDED])
        keys, level = sums, level + 1
    graph[(name, 0, 0, 0)] = keys[0]
    chunks = ((bins.groups,), (bins.groups,), (bins.number + 2,))
    layers = HighLevelGraph({name: ContractionLayer(graph, c)}, {name: set()})
    return da.Array(layers, name, chunks, dtype=np.int64)


def _count(c: Contraction, bins: Bins, tile: Tile) -> np.ndarray:
    rows, cols = c.plan.rows[tile.i], c.plan.cols[tile.j]
    if c.plan.placed is not None:
        codes = bins.codes[rows], bins.codes[cols]
        counted = Counted(bins.low, bins.high, bins.number, codes, bins.groups)
        found = counts_of_tile(c.factors(tile), c.finish(tile), counted)
        if found is not None:  # else the device's memory ended: the tile comes back, in halves
            return found if c.is_diagonal(tile) else found + found.swapaxes(0, 1)
    values = compute_tile(c, tile)
    width = (bins.high - bins.low) / bins.number
    place = np.floor((values - bins.low) / width)
    # The last bin holds its upper bound, as numpy's does.
    place[(place == bins.number) & (values <= bins.high)] = bins.number - 1
    # One number for the pair of groups and the bin, so that one count serves them all.
    cell = np.clip(place, -1, bins.number).astype(np.int64) + 1
    pair = bins.codes[rows][:, None] * bins.groups + bins.codes[cols]
    cell += pair * (bins.number + 2)
    size = bins.groups**2 * (bins.number + 2)
    if c.is_diagonal(tile):
        cell = cell[~np.eye(len(cell), dtype=bool)]
    counts = np.bincount(cell.ravel(), minlength=size).reshape(bins.groups, bins.groups, -1)
    return counts if c.is_diagonal(tile) else counts + counts.swapaxes(0, 1)
