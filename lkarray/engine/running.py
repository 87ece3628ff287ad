"""The running sink: Grams kept in step along one dim, added up along it, and summed over rows.

What a column has received from all rows by then, and the sum of the magnitudes of what it has
received from each: without ever holding more than a tile.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from lkarray.engine.contraction import Contraction, ContractionLayer, Tile, compute_tile

#: Bytes that the sink needs for each element of a tile: its running sum, and magnitudes.
RUNNING_BYTES = 16


def running_array(c: Contraction, scale: np.ndarray) -> da.Array:
    """Return net and gross sums over rows of the running sum of tiles: ``(2, times, cols)``.

    Parameters
    ----------
    c
        Two operands with one dim kept in step.
    scale
        Factor of the tiles of each of its entries.
    """
    name = f"running-{tokenize(c, scale)}"
    node, factor = f"{name}-contraction", f"{name}-scale"
    graph: dict[Any, Any] = {node: c, factor: scale}
    for j in range(len(c.plan.cols)):
        panels = [(f"{name}-panel", i, j) for i in range(len(c.plan.rows))]
        for key in panels:
            graph[key] = (_run, node, factor, *key[1:])
        graph[(name, 0, 0, j)] = (sum, panels)
    chunks = ((2,), (len(scale),), tuple(cols.stop - cols.start for cols in c.plan.cols))
    layers = HighLevelGraph({name: ContractionLayer(graph, c)}, {name: set()})
    return da.Array(layers, name, chunks, dtype=np.float64)


def _run(c: Contraction, scale: np.ndarray, i: int, j: int) -> np.ndarray:
    """Return what the rows of panel ``i`` give to the columns of panel ``j``, by each time."""
    rows, cols = c.plan.rows[i], c.plan.cols[j]
    total = np.zeros((rows.stop - rows.start, cols.stop - cols.start))
    out = np.empty((2, len(scale), total.shape[1]))
    for t, factor in enumerate(scale.tolist()):
        tile = compute_tile(c, Tile((t,), i, j))[0]
        total += np.multiply(tile, factor, dtype=np.float64)
        out[0, t], out[1, t] = total.sum(0), np.abs(total).sum(0)
    return out
