"""Kernels as operators of SciPy, without n x n."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from lkarray.arguments import checked
from lkarray.engine.strips import Strips, apply_step, joined, make_strips, project_step, total
from lkarray.kernels.operands import kernel_operand
from lkarray.schema import Losses
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
        ``"pooled"`` or ``"chain"``.
    memory
        Byte budget of a process.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator
        n x n, symmetric, float64. Each product with a vector or a block of them reads the
        data once or twice, on the Dask scheduler of the moment, and costs ``4 n S`` operations a
        vector; products are float32 for float32 losses, so ask for tolerances above 1e-6.
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
    name = f"operator-{tokenize(strips, block)}"
    node = f"{name}-strips"
    graph: dict[Any, Any] = {node: strips, f"{name}-block": block}
    if strips.rows:
        inner = total(graph, f"{name}-inner", node, strips, _times, f"{name}-block")
        keys = joined(graph, f"{name}-outer", node, strips, project_step, inner, turn=1)
        graph[name] = (_join, keys)
    else:
        total(graph, name, node, strips, apply_step, f"{name}-block")
    (out,) = compute(Delayed(name, HighLevelGraph.from_collections(name, graph), layer=name))
    product: np.ndarray = np.asarray(out, np.float64)
    return product


def _times(blocks: tuple[np.ndarray, ...], span: slice, block: np.ndarray) -> np.ndarray:
    product: np.ndarray = blocks[0] @ block[span].astype(blocks[0].dtype)
    return product


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts)
