"""Made losses, their kernels by definition, and schedulers that count or forbid."""

from __future__ import annotations

import os
import threading
from collections import Counter

import dask.array as da
import numpy as np
import xarray as xr

#: Address of a scheduler: all that a test computes with Dask then runs there (tests/cluster).
CLUSTER = os.environ.get("LKARRAY_TEST_CLUSTER")


def random_losses(
    rng: np.random.Generator,
    chains: int = 3,
    draws: int = 20,
    samples: int = 17,
    dtype: str = "float32",
) -> xr.DataArray:
    """A loss tensor with structure: a few shared directions, offsets and scales."""
    shared = rng.normal(size=(chains * draws, 4)) @ rng.normal(size=(4, samples))
    values = shared + rng.normal(size=shared.shape) + rng.normal(size=samples) * 3
    values = (values * np.exp(rng.normal(size=samples))).reshape(chains, draws, samples)
    if np.dtype(dtype).kind in "iu":
        values = np.round(values * 10)
    return xr.DataArray(
        values.astype(dtype),
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(samples), "label": ("sample", np.arange(samples) % 4)},
        name="loss",
    )


def numpy_covariance(losses: xr.DataArray, center: str = "pooled") -> np.ndarray:
    """The kernel in float64, by its definition."""
    x = losses.transpose("chain", "draw", "sample").values.astype(np.float64)
    chains, draws, samples = x.shape
    axis, means = {"pooled": ((0, 1), 1), "chain": ((1,), chains), "draw": ((0,), draws)}[center]
    x = (x - x.mean(axis=axis, keepdims=True)).reshape(-1, samples)
    return x.T @ x / (chains * draws - means)


def numpy_correlation(losses: xr.DataArray, center: str = "pooled") -> np.ndarray:
    k = numpy_covariance(losses, center)
    scale = np.sqrt(np.diag(k))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = k / np.outer(scale, scale)
    # A mean may miss a constant by rounding: no variance is told by the values themselves.
    dims = {"pooled": ("chain", "draw"), "chain": ("draw",), "draw": ("chain",)}[center]
    same = losses.max(dims) == losses.min(dims)
    constant = same.all([d for d in ("chain", "draw") if d not in dims]).values
    varies = (scale > 0) & ~constant
    return np.where(np.outer(varies, varies), r, 0.0)


class Forbidding:
    """A Dask scheduler that fails a test in which something computes too early."""

    def __call__(self, graph: object, keys: object, **options: object) -> None:
        raise AssertionError(f"computed {keys} although nothing was asked for")


def counting(losses, chunks):
    """The losses in Dask chunks that count how often each is computed."""
    reads, lock = Counter(), threading.Lock()

    def read(block, block_info=None):
        with lock:
            reads[tuple(block_info[0]["chunk-location"])] += 1
        return block

    data = da.from_array(losses.values, chunks=chunks).map_blocks(read, dtype=losses.dtype)
    return losses.copy(data=data), reads


VALUES = np.arange(256, dtype="f4").reshape(16, 16)


LABELS = np.array([f"picture {i}" for i in range(16)])


def kernel(values=VALUES, name="k", *, computed=None, **coords):
    """A lazy kernel of four tiles; ``computed`` collects those that are computed."""

    def note(block, block_info=None):
        if computed is not None and block_info is not None:
            computed.append(tuple(block_info[0]["chunk-location"]))
        return block

    data = da.from_array(values, chunks=8).map_blocks(note, dtype=values.dtype, meta=values[:0, :0])
    coords = {"label": ("sample", np.resize(LABELS, len(values))), **coords}
    return xr.DataArray(data, dims=("sample", "sample_2"), coords=coords, name=name)


def with_center(losses, nbeta=3.0):
    """Losses with those at w* beside them, 1 nat each."""
    center = losses.isel(chain=0, draw=0, drop=True) * 0 + 1.0
    return xr.Dataset({"loss": losses, "center_loss": center}, attrs={"nbeta": nbeta})
