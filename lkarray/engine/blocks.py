"""What steps do with a strip besides multiplying it, on the cores or on a device.

A strip is an array of NumPy or a tensor of torch, and a step is written once for both: products are
``a @ b`` of either.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def wide(b: Any) -> Any:
    """Return ``b`` in float64."""
    return b.astype(np.float64) if isinstance(b, np.ndarray) else b.double()


def like(b: Any, array: np.ndarray) -> Any:
    """Return an array at the precision of ``b``, and where ``b`` is."""
    if isinstance(b, np.ndarray):
        return array.astype(b.dtype, copy=False)
    return b.new_tensor(np.ascontiguousarray(array))


def sums(b: Any, axis: int) -> Any:
    """Return the sums along an axis, in float64."""
    if isinstance(b, np.ndarray):
        return b.sum(axis, dtype=np.float64)
    return b.double().sum(axis)


def squares(b: Any, axis: int) -> np.ndarray:
    """Return the sums of squares along an axis, in float64, as an array."""
    if isinstance(b, np.ndarray):
        pattern = "ij,ij->j" if axis == 0 else "ij,ij->i"
        return np.einsum(pattern, b, b, dtype=np.float64)
    return fetched((b.double() ** 2).sum(axis))


def fetched(b: Any) -> Any:
    """Return what a device holds as an array; tuples part by part, and arrays as they are."""
    if isinstance(b, tuple):
        return tuple(fetched(part) for part in b)
    return b.cpu().numpy() if hasattr(b, "cpu") else b
