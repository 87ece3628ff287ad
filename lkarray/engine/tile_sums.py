"""Sums over all tiles, for what is linear or quadratic in a kernel that is no product of factors.

`lkarray.engine.passes` needs only the factors of a Gram. A series of its entries has none, so means
between groups and products of kernels are added up tile by tile, never n x n.
"""

from __future__ import annotations

from typing import NamedTuple

import dask.array as da
import numpy as np

from lkarray.engine.contraction import Contraction, Tile, compute_tile
from lkarray.engine.tasks import ADDED, Tasks

#: Bytes that sums by groups need for each element of a tile: a copy in the order of groups.
GROUPED_BYTES = 16


def added_bytes(length: int) -> int:
    """Return the bytes of the results of ``length`` float64 that are held while they are added."""
    return (ADDED + 1) * 8 * length


class Groups(NamedTuple):
    """The group of each row, numbered, and how many groups there are."""

    codes: np.ndarray
    number: int


def group_sums_array(c: Contraction, groups: Groups) -> da.Array:
    """Return the sums of entries between groups, and of rows' entries with themselves.

    Shape ``(group, group + 1)``, float64, of a symmetric Gram; the last column has the latter.
    """
    tasks = Tasks("group-sums", c, *groups)
    node, asked = tasks.hold(c), tasks.hold(groups)
    total = tasks.added([tasks.then(_sum_groups, node, asked, tile) for tile in c.tiles()])
    return tasks.array([total], (groups.number, groups.number + 1), np.float64)


def _sum_groups(c: Contraction, groups: Groups, tile: Tile) -> np.ndarray:
    values = compute_tile(c, tile)
    rows, cols = groups.codes[c.plan.rows[tile.i]], groups.codes[c.plan.cols[tile.j]]
    there, sums = _by_group(values, rows)
    across, sums = _by_group(np.ascontiguousarray(sums.T), cols)
    out = np.zeros((groups.number, groups.number + 1))
    out[np.ix_(there, across)] = sums.T
    if c.is_diagonal(tile):
        own = np.einsum("ii->i", values).astype(np.float64)
        out[:, -1] = np.bincount(rows, own, minlength=groups.number)
    else:
        out[np.ix_(across, there)] += sums
    return out


def _by_group(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups that rows are of, and the sums of each one's rows, in float64."""
    order = np.argsort(codes, kind="stable")
    there, starts = np.unique(codes[order], return_index=True)
    sums: np.ndarray = np.add.reduceat(values[order], starts, axis=0, dtype=np.float64)
    return there, sums


class KernelSums(NamedTuple):
    """What products of n x n kernels are made of, in float64.

    ``products`` of pairs, ``(pair,)``: sums of entry times entry, and those of the diagonals,
    ``diagonal_products``. Of each kernel the sums of rows and the diagonal, ``(kernel, n)``.
    """

    products: np.ndarray
    diagonal_products: np.ndarray
    rows: np.ndarray
    diagonals: np.ndarray

    @classmethod
    def read(cls, flat: np.ndarray, pairs: int, kernels: int) -> KernelSums:
        """Return the parts of sums of what `tile_moments` gives, as views."""
        rest = flat[2 * pairs :].reshape(2, kernels, -1)
        return cls(flat[:pairs], flat[pairs : 2 * pairs], rest[0], rest[1])


def tile_moments(
    kernels: list[Contraction], pairs: list[tuple[int, int]], tile: Tile
) -> np.ndarray:
    """Return what a tile adds to `KernelSums`, as one array; of kernels in the same panels."""
    rows, cols = kernels[0].plan.rows[tile.i], kernels[0].plan.cols[tile.j]
    same, n = kernels[0].is_diagonal(tile), kernels[0].x.n
    out = np.zeros(2 * len(pairs) + 2 * len(kernels) * n)
    parts = KernelSums.read(out, len(pairs), len(kernels))  # views
    tiles = [compute_tile(c, tile) for c in kernels]
    for k, values in enumerate(tiles):
        parts.rows[k, rows] += values.sum(1, dtype=np.float64)
        if same:
            parts.diagonals[k, rows] = np.einsum("ii->i", values)
        else:
            parts.rows[k, cols] += values.sum(0, dtype=np.float64)
    for p, (i, j) in enumerate(pairs):
        # Row by row in float64, so that a tile of float32 is never copied whole.
        product = sum(
            float(a.astype(np.float64) @ b) for a, b in zip(tiles[i], tiles[j], strict=True)
        )
        parts.products[p] = product if same else 2 * product
        if same:
            parts.diagonal_products[p] = parts.diagonals[i, rows] @ parts.diagonals[j, rows]
    return out
