"""Errors of tables over labels and chains: resampling, the jackknife, normal intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def resampled(labels: int, replicates: int, seed: int) -> np.ndarray:
    """Return how often each label is drawn, ``(replicate, label)``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(labels, np.full(labels, 1 / labels), size=replicates).astype(float)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide, NaN where the divisor is 0 or NaN."""
    above, below = np.broadcast_arrays(above, below)
    out = np.full(above.shape, np.nan)
    np.divide(above, below, out=out, where=below > 0)
    return out


def spread(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation over the first axis, NaN left out; NaN below two values."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    mean = ratio(np.where(known, values, 0).sum(axis=0), count)
    squares = np.where(known, (values - mean) ** 2, 0).sum(axis=0)
    return np.asarray(np.sqrt(ratio(squares, count - 1.0)))


def jackknife(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the standard error from values without each part in turn (Efron 1982)."""
    return np.asarray(spread(np.stack(values)) * (len(values) - 1) / np.sqrt(len(values)))


def interval(
    value: np.ndarray, errors: Sequence[np.ndarray], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the normal interval of independent errors; NaN ones count as 0."""
    squares = sum(np.nan_to_num(error) ** 2 for error in errors)
    half = NormalDist().inv_cdf(0.5 + level / 2) * np.sqrt(squares)
    known = np.logical_or.reduce([np.isfinite(error) for error in errors])
    half = np.where(known, half, np.nan)
    return value - half, value + half
