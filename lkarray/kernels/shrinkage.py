"""Ledoit-Wolf shrinkage of covariance kernels, without n x n where n exceeds the draws."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import checked
from lkarray.engine.passes import Passes
from lkarray.engine.strips import make_strips
from lkarray.kernels.operands import kernel_operand
from lkarray.tensors import Losses, as_losses


@checked()
def ledoit_wolf(
    losses: Losses, *, center: str = "pooled", memory: int | str | None = None
) -> xr.DataArray:
    """Return the shrinkage intensity of Ledoit and Wolf (2004), lazily.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    center
        ``"pooled"``, ``"chain"`` or ``"draw"``.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataArray
        ``shrinkage``, 0-d float64 in [0, 1], as ``sklearn.covariance.ledoit_wolf_shrinkage``; 0
        where nothing varies. It takes draws for independent: for correlated ones it is too
        small, so thin the losses first.

    Notes
    -----
    One pass, ``2 n S q`` operations for the shorter side q, and ``q x q`` numbers.

    References
    ----------
    - Ledoit and Wolf 2004: "A well-conditioned estimator for large-dimensional covariance
      matrices", doi:10.1016/S0047-259X(03)00096-4.
    - docs/methods/uncertainty.md.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> noise = np.random.default_rng(0).normal(size=(4, 100, 6))
    >>> losses = xr.DataArray(noise, dims=("chain", "draw", "sample"))
    >>> share = lk.ledoit_wolf(losses)
    >>> bool(0 < share <= 1)
    True
    """
    _, operand, _ = kernel_operand(as_losses(losses), "covariance", center)
    draws = int(np.prod(operand.shape))
    short = min(draws, operand.n)
    needs = {"held": 12 * short**2, "alone": 16 * short**2}
    strips = make_strips(operand, memory=memory, needs=needs)
    passes = Passes("ledoit-wolf", strips)
    sums = passes.total(strips, _rows_step if strips.rows else _draws_step)
    share = passes.then(_intensity, sums, draws, operand.n, strips.rows)
    return xr.DataArray(passes.array([share], (), np.float64), name="shrinkage")


def _rows_step(blocks: tuple[np.ndarray, ...], span: slice) -> tuple[np.ndarray, float]:
    return blocks[0] @ blocks[0].T, 0.0


def _draws_step(blocks: tuple[np.ndarray, ...], span: slice) -> tuple[np.ndarray, float]:
    (b,) = blocks
    norms = np.einsum("ij,ij->j", b, b, dtype=np.float64)
    return b @ b.T, float(norms @ norms)


def _intensity(sums: tuple[np.ndarray, Any], draws: int, n: int, rows: bool) -> np.ndarray:
    gram, fourth = sums
    own = np.diagonal(gram)
    if rows:  # the Gram is of the draws: its diagonal has their squared norms
        fourth = own @ own
    # Scikit-learn's mu, delta and beta are mean, distance and error here.
    mean = own.sum() / (draws * n)
    square = (gram**2).sum() / draws**2
    distance = square / n - mean**2
    error = (float(fourth) / draws - square) / (n * draws)
    share = min(max(error, 0.0), distance) / distance if distance > 0 else 0.0
    return np.asarray(share)


def shrunk(kernel: xr.DataArray, share: Any, mean: xr.DataArray) -> xr.DataArray:
    """Return ``(1 - share) K + share * mean * I``, lazily, tile by tile."""
    amount = da.asarray(share.data if isinstance(share, xr.DataArray) else np.float64(share))
    level = da.asarray(mean.data)
    data = da.map_blocks(_shrink, kernel.data, amount, level, dtype=kernel.dtype)
    return kernel.copy(data=data)


def _shrink(
    tile: np.ndarray, share: np.ndarray, mean: np.ndarray, block_info: Any = None
) -> np.ndarray:
    out: np.ndarray = tile * tile.dtype.type(1 - share)
    rows, cols = block_info[0]["array-location"]
    if rows == cols:  # a tile on the diagonal
        own = np.einsum("ii->i", out)
        own += tile.dtype.type(share * mean)
    return out
