"""Kernels as operators of SciPy, without n x n."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lkarray.arguments import checked
from lkarray.engine.passes import Passes, apply_step, project_step, times_step
from lkarray.engine.strips import Strips, make_strips
from lkarray.kernels.operands import kernel_operand
from lkarray.tensors import Losses
from lkarray.waiting import compute

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@checked()
def linear_operator(
    losses: Losses,
    *,
    kernel: str = "covariance",
    center: str = "pooled",
    memory: int | str | None = None,
) -> LinearOperator:
    """Return the kernel as a SciPy operator, for `scipy.sparse.linalg.eigsh` and its like.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    kernel
        ``"covariance"`` or ``"correlation"``.
    center
        ``"pooled"``, ``"chain"`` or ``"draw"``.
    memory
        Byte budget of a process.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator
        n x n, symmetric, float64. Each product with a vector or a block of them reads the
        data once or twice, on the Dask scheduler of the moment, and costs ``4 n S`` operations a
        vector; products are float32 for float32 losses, so ask for tolerances above 1e-6.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> operator = lk.linear_operator(losses)
    >>> (operator @ [1.0, 0.0, 0.0]).tolist()
    [1.0, 2.0, -1.0]
    """
    from scipy.sparse.linalg import LinearOperator

    _, operand, scale = kernel_operand(losses, kernel, center)
    strips = make_strips(operand, memory=memory)

    def multiply(vectors: np.ndarray) -> np.ndarray:
        block = np.asarray(vectors, np.float64).reshape(operand.n, -1)
        product = _multiply(strips, block) * scale
        return product.reshape(np.shape(vectors))

    return LinearOperator(
        (operand.n, operand.n),
        matvec=multiply,
        rmatvec=multiply,
        matmat=multiply,
        rmatmat=multiply,
        dtype=np.float64,
    )


def _multiply(strips: Strips, block: np.ndarray) -> np.ndarray:
    """Return ``K M`` for vectors ``M``, ``(n, vectors)``, without the kernel's factor."""
    passes = Passes("operator", strips, block)
    vectors = passes.hold(block)
    if strips.rows:  # X' (X M): the second pass needs the whole sum of the first
        inner = passes.total(strips, times_step, vectors)
        product = passes.then(np.concatenate, passes.joined(strips, project_step, inner))
    else:
        product = passes.total(strips, apply_step, vectors)
    (out,) = compute(passes.delayed(product))
    return np.asarray(out, np.float64)
