"""Losses without what inputs of one label have in common."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import checked
from lkarray.kernels.groups import group_codes
from lkarray.kernels.operands import free_dim
from lkarray.schema import POSTERIOR
from lkarray.tensors import Losses, as_losses

_VALUES = 2**24  # of losses in memory at a time


@checked()
def residualize(losses: Losses, groups: Hashable | Any = "label") -> xr.DataArray:
    """Return losses without the component that the samples of a group share.

    From each sample's series of losses over the draws, its regression on the mean series of the
    *other* samples of its group is taken away (series standardised first, so that no sample
    outweighs another in the mean). Kernels of what remains cannot owe their structure to
    perturbations that move the whole group alike, such as those of an output layer's row for
    its label (Adam et al. 2025a, appendix B).

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    groups
        A coordinate of the samples, or one label for each sample (as for `lkarray.group_mean`). A
        sample alone in its group is left as it is.

    Returns
    -------
    xarray.DataArray
        ``loss(chain, draw, sample)``, in nats, lazy, with mean 0 over chains and draws, for every
        function that takes losses' covariation.

    Raises
    ------
    SchemaError
        There is no such coordinate, or not one label for each sample.

    Notes
    -----
    The groups' means are computed at once, in two passes over the losses, ``2 n S`` operations,
    and kept: ``S x g`` numbers (float32) for g groups. Within a group the remainders correlate
    negatively by construction: use ``exclude=`` for neighbours.

    References
    ----------
    - Adam et al. 2025a, appendix B: "The Loss Kernel", arXiv:2509.26537.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> shared = [0.0, 1.0, 2.0]
    >>> values = [[[s, s + 1.0, s - (s == 1.0)] for s in shared]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> lk.residualize(losses, ["cat", "cat", "cat"]).values.round(3).tolist()
    [[[-0.211, -0.211, 0.333], [0.289, 0.289, -0.667], [-0.077, -0.077, 0.333]]]
    """
    x = as_losses(losses)
    rows = free_dim(x, "losses", POSTERIOR, ())
    x = x.transpose(*POSTERIOR, rows)
    name, values, codes = group_codes(x, rows, groups)
    counts = np.bincount(codes, minlength=len(values))
    n, draws = x.sizes[rows], x.sizes["chain"] * x.sizes["draw"]
    step = max(1, _VALUES // draws)
    spans = [slice(start, start + step) for start in range(0, n, step)]
    mean, norm = np.empty(n), np.empty(n)
    shared = np.zeros((len(values), draws))
    for span in spans:
        z, mean[span], norm[span] = _standardised(_block(x, rows, span))
        np.add.at(shared, codes[span], z)
    slope = np.zeros(n)
    for span in spans:
        z, _, _ = _standardised(_block(x, rows, span), mean[span], norm[span])
        own = shared[codes[span]]
        others = own - z
        product = np.einsum("ij,ij->i", z, others)
        square = np.einsum("ij,ij->i", others, others)
        alone = (counts[codes[span]] < 2) | (square <= 1e-12 * counts[codes[span]] ** 2)
        slope[span] = np.where(alone, 0, product / np.where(alone, 1, square))
    data = x.data if dask.is_dask_collection(x.data) else da.from_array(x.data, name=False)
    kept = shared.astype(np.float32).reshape(len(values), x.sizes["chain"], x.sizes["draw"])
    out = da.map_blocks(
        _remainder,
        data,
        dask.delayed(kept, pure=True),
        codes,
        mean,
        norm,
        slope,
        dtype=data.dtype,
        meta=np.empty((0, 0, 0), data.dtype),
    )
    return x.copy(data=out).rename("loss").assign_attrs(residual_of=name)


def _block(x: xr.DataArray, rows: str, span: slice) -> np.ndarray:
    losses = np.asarray(x.isel({rows: span}).values, np.float64)
    return losses.reshape(-1, losses.shape[-1]).T


def _standardised(
    series: np.ndarray, mean: np.ndarray | None = None, norm: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``(sample, draw)`` series of mean 0 and norm 1, constant ones 0; means and norms."""
    mean = series.mean(axis=1) if mean is None else mean
    z = series - mean[:, None]
    norm = np.sqrt(np.einsum("ij,ij->i", z, z)) if norm is None else norm
    return z / np.where(norm > 0, norm, 1)[:, None], mean, norm


def _remainder(
    block: np.ndarray,
    shared: np.ndarray,
    codes: np.ndarray,
    mean: np.ndarray,
    norm: np.ndarray,
    slope: np.ndarray,
    block_info: Any = None,
) -> np.ndarray:
    """``norm (z - slope (group sum - z))`` of a block, in the losses' own units."""
    chain, draw, sample = (slice(*span) for span in block_info[0]["array-location"])
    centred = block - mean[sample].astype(block.dtype)
    own = np.moveaxis(shared[codes[sample], chain, draw], 0, -1)
    factor = slope[sample]
    out = centred * (1 + factor) - own * (factor * norm[sample])
    return np.asarray(out, block.dtype)
