"""Errors of tables over labels and chains: resampling, the jackknife, intervals of Student's t."""

from __future__ import annotations

from collections.abc import Sequence

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
    value: np.ndarray, errors: Sequence[tuple[np.ndarray, float]], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the interval of several independent errors together.

    Parameters
    ----------
    value
        What the errors are of.
    errors
        Standard errors with the degrees of freedom that each was estimated from, which is one less
        than the labels, blocks or chains; NaN counts as 0.
    level
        Of the interval.

    Returns
    -------
    tuple
        Student's t with the degrees of freedom of Satterthwaite 1946: from 4 chains an interval of
        95% is 3.18 errors either way, not 1.96. NaN where no error is known.
    """
    from scipy.stats import t

    pairs = [(np.nan_to_num(error) ** 2, freedom) for error, freedom in errors]
    total = np.asarray(sum(square for square, _ in pairs))
    doubt = np.asarray(sum(square**2 / freedom for square, freedom in pairs))
    # Where all is exact, any number of degrees of freedom gives the interval of length 0.
    freedom = np.divide(total**2, doubt, out=np.ones(total.shape), where=doubt > 0)
    half = t.ppf(0.5 + level / 2, freedom) * np.sqrt(total)
    known = np.logical_or.reduce([np.isfinite(error) for error, _ in errors])
    half = np.where(known, half, np.nan)
    return value - half, value + half
