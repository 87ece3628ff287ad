"""The arithmetic of tiles on plain arrays: no labels, no Dask.

A *panel* is a block of an operand as a matrix ``(contracted, rows)``, contracted dims
first, so that a tile is ``a.T @ b``. Means and norms are float64; products are made at the
operand's precision after the means are subtracted, never from raw sums of products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Means and sums of squares of a panel, mergeable over pieces of the contracted dims.

    Attributes
    ----------
    count
        Shape ``(group,)``: contracted elements seen in each centring group.
    mean
        Shape ``(group, rows)``, float64.
    squares
        Shape ``(group, rows)``, float64: squares about that mean.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, block: np.ndarray, *, centred: bool) -> Moments:
        """Return the moments of ``block``, shape ``(group, contracted, rows)``.

        Without centring the mean is zero and the squares are raw.
        """
        groups, count, rows = block.shape
        mean, squares = np.zeros((groups, rows)), np.zeros((groups, rows))
        for g in range(groups):
            if centred:
                # Relative to the first entry, so that a constant row has exactly that mean.
                first = block[g, 0].astype(np.float64)
                mean[g] = first + _sums(block[g], first, squared=False) / count
            squares[g] = _sums(block[g], mean[g], squared=True)
        return cls(np.full(groups, count), mean, squares)

    @classmethod
    def about_groups(cls, block: np.ndarray) -> Moments:
        """Subtract the mean of each group in place; return the squares of what is left.

        For groups that are many and short, and whole in every piece: of ``(group, contracted,
        rows)`` the means are not kept (zero here), and squares of all groups are one sum.
        """
        rows = block.shape[-1]
        squares = np.zeros((1, rows))
        step = max(1, (1 << 17) // max(block[0].size, 1))  # 1 MiB of float64: stays in the cache
        with np.errstate(invalid="ignore", over="ignore"):  # infinite entries: the norm tells
            for start in range(0, len(block), step):
                part = block[start : start + step]
                # Relative to the first entry, so that equal ones leave exactly nothing.
                shifted = part - part[:, :1].astype(np.float64)  # (group, contracted, rows)
                shifted -= shifted.mean(axis=1, keepdims=True)
                squares += np.einsum("gcr,gcr->r", shifted, shifted)
                part[...] = shifted
        return cls(np.full(1, block.shape[0] * block.shape[1]), np.zeros((1, rows)), squares)

    def merge(self, other: Moments, *, centred: bool) -> Moments:
        """Return the moments of both pieces together (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        if not centred:
            return Moments(count, self.mean, self.squares + other.squares)
        share = (other.count / np.maximum(count, 1))[:, None]
        with np.errstate(invalid="ignore"):
            delta = other.mean - self.mean
            cross = delta * delta * self.count[:, None] * share
            mean, squares = self.mean + delta * share, self.squares + other.squares + cross
        return Moments(count, mean, squares)

    def norm(self) -> np.ndarray:
        """Return the norm of each centred row: exactly zero where it is constant."""
        return np.sqrt(self.squares.sum(axis=0))


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ``a @ b``, as the array that NumPy's types do not say it is."""
    return a @ b


def _sums(block: np.ndarray, origin: np.ndarray, *, squared: bool) -> np.ndarray:
    """Return float64 sums along the first axis of ``block - origin``, or of its square."""
    total = np.zeros(block.shape[1])
    slab = max(1, (1 << 17) // max(block.shape[1], 1))  # 1 MiB of float64: stays in the cache
    with np.errstate(invalid="ignore", over="ignore"):  # infinite entries: the norm tells
        for start in range(0, len(block), slab):
            shifted = block[start : start + slab] - origin  # (slab, rows), float64
            total += np.einsum("ij,ij->j", shifted, shifted) if squared else shifted.sum(axis=0)
    return total


def standardise(block: np.ndarray, mean: np.ndarray, scale: np.ndarray | None) -> None:
    """Subtract ``mean`` (group, rows) and multiply by ``scale`` (rows) in place.

    The float64 mean is subtracted as two numbers of the block's precision: near values leave
    an exact difference, so nothing of the float64 mean is lost.
    """
    if mean.any():
        coarse = mean.astype(block.dtype)
        block -= coarse[:, None]
        block -= (mean - coarse).astype(block.dtype)[:, None]
    if scale is not None:
        largest = np.finfo(block.dtype).max
        if scale.max(initial=0) > largest:  # rows of denormal numbers: in two steps
            root = np.sqrt(scale)
            block *= root.astype(block.dtype)
            scale = np.divide(scale, root, out=np.zeros_like(scale), where=root > 0)
        block *= scale.astype(block.dtype)


def reciprocal(norm: np.ndarray) -> np.ndarray:
    """Return ``1 / norm``, and zero where the norm is zero: such a row correlates with none."""
    return np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)


def finish_cosine(tile: np.ndarray, *, diagonal: bool, signed: bool = False) -> None:
    """Clip rounding beyond [-1, 1] in place; a row's cosine with itself is 1, or 0 if it is 0.

    ``signed`` products of a row with itself may be anything but 0 where it is not 0.
    """
    np.clip(tile, -1.0, 1.0, out=tile)
    if diagonal:
        own = np.einsum("ii->i", tile)
        own[own != 0 if signed else own > 0.5] = 1.0


def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the ``k`` largest of each row, largest first, ties by column.

    ``values`` has shape ``(rows, columns)`` with ``k <= columns`` and no NaN; the result
    ``(rows, k)`` is independent of how columns were split into blocks before. O(columns) a row.
    """
    rows, columns = values.shape
    if k < columns:
        least = np.partition(values, columns - k, axis=1)[:, columns - k]
        chosen = values >= least[:, None]
        for row in np.flatnonzero(chosen.sum(axis=1) > k):
            ties = np.flatnonzero(values[row] == least[row])
            chosen[row, ties[k - int((values[row] > least[row]).sum()) :]] = False
        index = np.nonzero(chosen)[1].reshape(rows, k)
    else:
        index = np.broadcast_to(np.arange(columns), (rows, columns)).copy()
    order = np.argsort(-np.take_along_axis(values, index, axis=1), axis=1, kind="stable")
    return np.take_along_axis(index, order, axis=1)
