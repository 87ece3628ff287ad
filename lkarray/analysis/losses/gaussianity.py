"""How Gaussian losses and outcomes are over draws: skew and kurtosis, with their errors."""

from __future__ import annotations

from math import prod

import dask
import numpy as np
import xarray as xr

from lkarray.engine import Operand
from lkarray.engine.strips import Strips, make_strips
from lkarray.kernels.operands import free_dim
from lkarray.schema import POSTERIOR

_WORKING = 24  # bytes for each element of a strip: deviations in float64, and powers of them


def shapes(x: xr.DataArray, memory: int | str | None) -> np.ndarray:
    """Return skew and excess kurtosis of each row over all draws, ``(2, rows)``.

    One pass. NaN where a row does not vary.
    """
    rows = free_dim(x, "losses", POSTERIOR, ())
    operand = Operand(x, over=POSTERIOR, each=(), rows=rows, center=None, cosine=False)
    strips = make_strips(operand, memory=memory, rows=True, needs={"widened": _WORKING})
    node = dask.delayed(strips, traverse=False)
    parts = dask.compute(*(dask.delayed(_of_strips)(node, share) for share in strips.shares))
    return np.concatenate(parts, axis=1)


def _of_strips(strips: Strips, share: range) -> np.ndarray:
    return np.concatenate([moments(strips.blocks(k)[0]) for k in share], axis=1)


def moments(block: np.ndarray) -> np.ndarray:
    """Return skew and excess kurtosis along the first axis, ``(2, rows)``."""
    deviation = block - block.mean(axis=0, dtype=np.float64)
    spread = np.sqrt(np.einsum("ij,ij->j", deviation, deviation) / len(deviation))
    varies = (block != block[0]).any(axis=0)
    deviation /= np.where(varies, spread, np.nan)
    square = deviation**2
    skew = np.einsum("ij,ij->j", square, deviation) / len(deviation)
    kurtosis = np.einsum("ij,ij->j", square, square) / len(deviation) - 3
    return np.stack([skew, kurtosis])


def errors(draws: int, ess: np.ndarray) -> np.ndarray:
    r"""Return standard errors of skew and excess kurtosis, were draws Gaussian, ``(2, rows)``.

    .. math:: \sqrt{\tfrac{6}{N} \sum_t r_t^3}, \quad \sqrt{\tfrac{24}{N} \sum_t r_t^4}

    for autocorrelations r at all lags (Lobato and Velasco 2004), here of a first-order
    autoregression with the effective sample size ``ess`` of N draws.
    """
    per_effective = np.maximum(draws / ess, 1)
    r = (per_effective - 1) / (per_effective + 1)
    powers = [(6, r**3), (24, r**4)]
    return np.stack([np.sqrt(c / draws * (1 + p) / (1 - p)) for c, p in powers])


def of_outcomes(
    losses: xr.DataArray,
    outcomes: xr.DataArray,
    ess: np.ndarray,
    memory: int | str | None,
) -> dict[str, np.ndarray]:
    """Return the figures of a report on outcomes, and the losses made of them, by name.

    ``ess`` are effective draws, by ranks: of the losses or, all the same for a monotone link, of
    the outcomes.
    """
    skew, kurtosis = shapes(outcomes, memory)
    skew_error, kurtosis_error = errors(prod(losses.sizes[dim] for dim in POSTERIOR), ess)
    return {
        "outcome_skew": skew,
        "outcome_skew_error": skew_error,
        "outcome_kurtosis": kurtosis,
        "outcome_kurtosis_error": kurtosis_error,
    }


#: Names of these figures, all of which are of each sample.
OF_OUTCOMES = (
    "outcome_skew",
    "outcome_skew_error",
    "outcome_kurtosis",
    "outcome_kurtosis_error",
)
