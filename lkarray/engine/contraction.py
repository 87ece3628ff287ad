"""One contraction, its tiles, and the lazy Dask view of them.

A task is opaque to Dask: it is given the contraction (one shared node, so the operands'
graphs travel once) and which tile, reads its two panels through the process's cache,
multiplies, and returns a tile or what a sink makes of one. Nothing large flows through the
scheduler but tiles that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from lkarray.engine.blas import multiply, multiply_signed, product_slot
from lkarray.engine.device_tiles import Factors, Finish, sum_on_device, tile_on_device
from lkarray.engine.devices import made_on
from lkarray.engine.lowprecision import choose, multiply_low
from lkarray.engine.numbers import finish_cosine
from lkarray.engine.operand import Operand
from lkarray.engine.plan import Plan
from lkarray.engine.series import Series, Terms, apply_series


class Tile(NamedTuple):
    """Which tile: the entry of the dims kept in step, and the numbers of its two panels."""

    entry: tuple[int, ...]
    i: int
    j: int


@dataclass(frozen=True)
class Contraction:
    """What is multiplied with what, and how.

    Attributes
    ----------
    x, y
        The operands; ``y=None`` is the symmetric Gram of ``x``.
    plan
        The panels.
    scale
        Factor of every entry.
    precision
        ``"float32"`` (the operands' own) or ``"bfloat16"``.
    series
        What is made of each entry, of operands whose rows have norm one; None leaves it.
    """

    x: Operand
    y: Operand | None
    plan: Plan
    scale: float = 1.0
    precision: str = "float32"
    series: Series | None = None

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        other = None if self.y is None else self.y.token
        return (self.x.token, other, self.plan, self.scale, self.precision, self.series)

    @property
    def symmetric(self) -> bool:
        """Whether only one triangle is computed."""
        return self.y is None

    @property
    def other(self) -> Operand:
        """The operand of the columns."""
        return self.x if self.y is None else self.y

    @property
    def dtype(self) -> np.dtype:
        """Of the result."""
        return np.result_type(self.x.dtype, self.other.dtype)

    @property
    def each(self) -> tuple[int, ...]:
        """Sizes of the dims kept in step."""
        return tuple(self.x.variable.sizes[dim] for dim in self.x.each)

    @property
    def operations(self) -> int:
        """Multiplications and additions: ``n**2 S`` of a symmetric Gram, twice that of others."""
        return (
            (1 if self.symmetric else 2)
            * prod(self.each)
            * self.x.n
            * self.other.n
            * prod(self.x.shape)
        )

    def at_precision(self, precision: str, *, search: bool = False) -> Contraction:
        """Return the contraction at ``"float32"``, or in low precision where ``"auto"`` pays.

        On a device, and with signs, always ``"float32"``: what rounding more would cost there was
        not measured.
        """
        if self.plan.placed is not None or self.x.minus is not None:
            return self
        chosen = choose(precision, self.operations, self.dtype, search=search)
        return replace(self, precision=chosen)

    def factors(self, tile: Tile) -> Factors:
        """Return what a tile is the product of, for a device."""
        rows, cols = self.plan.rows[tile.i], self.plan.cols[tile.j]
        return Factors(self.x, self.other, self.plan, tile.entry, rows, cols)

    def terms(self, tile: Tile) -> Terms | None:
        """Return what the series makes a tile of, if there is one."""
        if self.series is None:
            return None
        series, p = self.series, self.plan
        place, dtype = (tile.entry, p.rows[tile.i], p.pieces), self.dtype
        rows = series.table(self.x, series.rows, *place, dtype)
        place = (tile.entry, p.cols[tile.j], p.pieces)
        cols = series.table(self.other, series.cols, *place, dtype)
        return Terms(rows, cols, series.cosine, self.scale)

    def finish(self, tile: Tile) -> Finish:
        """Return what is done on a device to the sum of a tile's products."""
        return Finish(self.scale, self.dtype, self.x.cosine, lambda: self.terms(tile))

    @property
    def made_on(self) -> dict[str, str]:
        """Attributes of a result that say which device made it, and how exactly; none of cores."""
        return made_on(None if self.plan.placed is None else self.plan.placed.device, self.dtype)

    def tiles(self) -> Iterator[Tile]:
        """Yield the tiles to compute: of a symmetric Gram, those with ``i <= j``."""
        for entry in np.ndindex(*self.each):
            for i in range(len(self.plan.rows)):
                for j in range(i if self.symmetric else 0, len(self.plan.cols)):
                    yield Tile(entry, i, j)

    def is_diagonal(self, tile: Tile) -> bool:
        """Say whether both panels of a tile are the same."""
        return self.symmetric and tile.i == tile.j


def compute_tile(c: Contraction, tile: Tile) -> np.ndarray:
    """Return the tile, with a leading axis of length one for each dim kept in step."""
    if c.plan.placed is not None and c.series is not None:
        made = tile_on_device(c.factors(tile), c.finish(tile))
        if made is not None:  # else the device's memory ended: the sum comes back, in halves
            return made.reshape((1,) * len(tile.entry) + made.shape)
    return finish_tile(c, tile, sum_pieces(c, tile, 0, len(c.plan.pieces)))


def sum_pieces(c: Contraction, tile: Tile, start: int, stop: int) -> np.ndarray:
    """Return the sum of the products of some pieces of the contracted dims.

    A sum of several is float64, in the order of the pieces.
    """
    if c.plan.placed is not None:
        return sum_on_device(c.factors(tile), start, stop)
    total: np.ndarray | None = None
    for p in range(start, stop):
        product = _product(c, tile, p)
        if len(c.plan.pieces) == 1:
            return product  # float32, as BLAS summed it
        total = product.astype(np.float64) if total is None else np.add(total, product, total)
    assert total is not None
    return total


def _product(c: Contraction, tile: Tile, p: int) -> np.ndarray:
    plan = c.plan
    args = (plan.pieces, p, plan.cache)
    rows, cols = plan.rows[tile.i], plan.cols[tile.j]
    if c.precision == "bfloat16":
        low = c.x.low_panel(tile.entry, rows, *args)
        other = low if c.is_diagonal(tile) else c.other.low_panel(tile.entry, cols, *args)
        with product_slot(many=False):  # torch uses all threads for one product
            return multiply_low(low, other)
    a = c.x.panel(tile.entry, rows, *args)
    b = a if c.is_diagonal(tile) else c.other.panel(tile.entry, cols, *args)
    if c.x.minus is not None:
        ((start, stop),) = plan.pieces[p]
        return multiply_signed(a, b, min(max(c.x.minus - start, 0), stop - start), many=plan.many)
    return multiply(a, b, many=plan.many)


def finish_tile(c: Contraction, tile: Tile, *sums: np.ndarray) -> np.ndarray:
    """Add the sums of a tile's pieces in their order, scale and clip; see `compute_tile`."""
    total = sums[0]
    for addend in sums[1:]:
        total = total + addend  # not in place: Dask may hold the first for a task that runs again
    terms = c.terms(tile)
    if c.scale != 1 and terms is None:
        total *= c.scale
    out = total.astype(c.dtype, copy=False)
    if c.x.cosine:
        signed = c.x.minus is not None
        finish_cosine(out, diagonal=c.is_diagonal(tile), signed=signed)
    if terms is not None:
        apply_series(out, terms, diagonal=c.is_diagonal(tile))
    return out.reshape((1,) * len(tile.entry) + out.shape)


def flip(tile: np.ndarray) -> np.ndarray:
    """Return the tile of the other triangle."""
    return tile.swapaxes(-1, -2)


class ContractionLayer(MaterializedLayer):
    """A graph layer that knows the contraction it was made from, for `plan_of` and saving."""

    def __init__(self, mapping: Mapping[Any, Any], contraction: Contraction) -> None:
        super().__init__(mapping)
        self.contraction = contraction


def contraction_of(array: Any) -> Contraction | None:
    """Return the contraction that a Dask array is a view of, or is computed from."""
    graph = array.__dask_graph__() if hasattr(array, "__dask_graph__") else None
    for layer in getattr(graph, "layers", {}).values():
        if isinstance(layer, ContractionLayer):
            return layer.contraction
    return None


def count_tasks(array: da.Array) -> int:
    """Return the tasks of a view of a contraction; the input's graph is inside the contraction."""
    graph: Any = array.__dask_graph__()
    return sum(len(layer) for layer in graph.layers.values() if layer.is_materialized())


def gram_array(c: Contraction) -> da.Array:
    """Return the Gram as a Dask array ``(*each, rows, cols)``, one tile a chunk.

    Of a symmetric Gram only the tiles on and above the diagonal are computed.
    """
    name = f"gram-{tokenize(c)}"
    node = f"{name}-contraction"
    graph: dict[Any, Any] = {node: c}
    for tile in c.tiles():
        key = (name, *tile.entry, tile.i, tile.j)
        graph[key] = _tile_task(graph, name, node, c, tile)
        if c.symmetric and tile.i < tile.j:
            graph[(name, *tile.entry, tile.j, tile.i)] = (flip, key)
    lengths = tuple(tuple(s.stop - s.start for s in p) for p in (c.plan.rows, c.plan.cols))
    chunks = (*((1,) * size for size in c.each), *lengths)
    layer = ContractionLayer(graph, c)
    return da.Array(HighLevelGraph({name: layer}, {name: set()}), name, chunks, dtype=c.dtype)


def _tile_task(
    graph: dict[Any, Any], name: str, node: str, c: Contraction, tile: Tile
) -> tuple[Any, ...]:
    """Return the task of a tile, or of adding the sums that several tasks make of its pieces."""
    if c.plan.shares == 1:
        return (compute_tile, node, tile)
    bounds = np.linspace(0, len(c.plan.pieces), c.plan.shares + 1).astype(int).tolist()
    keys = []
    for share, (start, stop) in enumerate(pairwise(bounds)):
        keys.append((f"{name}-share", *tile.entry, tile.i, tile.j, share))
        graph[keys[-1]] = (sum_pieces, node, tile, start, stop)
    return (finish_tile, node, tile, *keys)
