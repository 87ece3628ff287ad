"""Standard errors of kernel entries: tiles with each block of draws left out in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from lkarray.engine.blas import multiply
from lkarray.engine.contraction import Contraction, ContractionLayer, Tile, flip
from lkarray.engine.numbers import reciprocal
from lkarray.engine.operand import Piece


@dataclass(frozen=True)
class Blocks:
    """Blocks of draws to leave out, as pieces of ``(chain, draw)``; pooled operands."""

    pieces: tuple[Piece, ...]
    cosine: bool

    @property
    def lengths(self) -> list[int]:
        """Draws in each."""
        return [(c1 - c0) * (d1 - d0) for (c0, c1), (d0, d1) in self.pieces]


def jackknife_bytes(blocks: int) -> int:
    """Return the bytes needed for each element of a tile."""
    return 4 * (blocks + 4)


def jackknife_array(c: Contraction, blocks: Blocks) -> da.Array:
    """Return the standard error of each entry as a Dask array, one tile a chunk."""
    name = f"mcse-{tokenize(c, blocks)}"
    node, cut = f"{name}-contraction", f"{name}-blocks"
    graph: dict[Any, Any] = {node: c, cut: blocks}
    for tile in c.tiles():
        key = (name, tile.i, tile.j)
        graph[key] = (_error_tile, node, cut, tile)
        if c.symmetric and tile.i < tile.j:
            graph[(name, tile.j, tile.i)] = (flip, key)
    chunks = tuple(tuple(s.stop - s.start for s in p) for p in (c.plan.rows, c.plan.cols))
    layers = HighLevelGraph({name: ContractionLayer(graph, c)}, {name: set()})
    return da.Array(layers, name, chunks, dtype=c.dtype)


def _error_tile(c: Contraction, blocks: Blocks, tile: Tile) -> np.ndarray:
    """Return the standard errors of a tile (Efron 1982, the jackknife).

    With panels relative to the pooled mean, leaving out T of N draws whose own mean is d leaves
    sums of products ``G - H``, ``H = G_block + d d' T**2 / (N - T)``, about the mean of the rest.
    """
    lengths, total = blocks.lengths, sum(blocks.lengths)
    whole: np.ndarray | None = None  # G, and for cosines its diagonal at the rows and columns
    own: list[np.ndarray] = [np.zeros(1), np.zeros(1)]
    left_out: list[np.ndarray] = []  # H, likewise
    own_out: list[list[np.ndarray]] = []
    for p, size in enumerate(lengths):
        a = c.x.panel((), c.plan.rows[tile.i], blocks.pieces, p, c.plan.cache)
        same = c.is_diagonal(tile)
        b = a if same else c.other.panel((), c.plan.cols[tile.j], blocks.pieces, p, c.plan.cache)
        weight = size**2 / (total - size)
        means = [block.mean(0, dtype=np.float64) for block in (a, b)]
        product = multiply(a, b)  # (rows, cols), of this block of draws
        whole = product.copy() if whole is None else np.add(whole, product, whole)
        product += (weight * means[0][:, None] * means[1]).astype(product.dtype)
        left_out.append(product)
        squares = [np.einsum("ij,ij->j", x, x, dtype=np.float64) for x in (a, b)]
        own = [sums + more for sums, more in zip(own, squares, strict=True)]
        own_out.append([q + weight * m**2 for q, m in zip(squares, means, strict=True)])
    assert whole is not None
    rest = []
    for p, size in enumerate(lengths):
        kept = np.subtract(whole, left_out[p], left_out[p])
        if blocks.cosine:
            norms = [np.sqrt(np.maximum(g - h, 0)) for g, h in zip(own, own_out[p], strict=True)]
            kept *= reciprocal(norms[0])[:, None].astype(kept.dtype)
            kept *= reciprocal(norms[1]).astype(kept.dtype)
        else:
            kept /= total - size - 1
        rest.append(kept)
    mean = np.sum(rest, axis=0, dtype=np.float64) / len(rest)
    spread = np.zeros_like(mean)
    for estimate in rest:
        spread += (estimate - mean) ** 2
    return np.sqrt(spread * (len(rest) - 1) / len(rest)).astype(c.dtype)
