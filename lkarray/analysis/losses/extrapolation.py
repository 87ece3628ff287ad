"""A statistic of a kernel without end of draws: a straight line in one over their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from lkarray.analysis.losses.reliability import Statistic, evaluated
from lkarray.arguments import REPEATS, SHARE, checked
from lkarray.schema import CHAIN, DRAW
from lkarray.tensors import Losses, as_losses
from lkarray.waiting import workers_awaited

_FEWEST = 4  # draws of a stretch


@workers_awaited("computed")
@checked(halvings=REPEATS, level=SHARE)
def extrapolated(
    losses: Losses, statistic: Statistic, *, halvings: int = 2, level: float = 0.95
) -> xr.Dataset:
    r"""Return a statistic of a kernel at nested numbers of draws, and its limit for many.

    A statistic that is not linear in the kernel is biased by the kernel's noise: shares of
    neighbours and lifts too low, squares too high. To first order the bias goes with the variance,
    so with one over the number of draws S:

    .. math:: s(S) = s_\infty + b / S

    Each chain is cut into 1, 2, 4, ... stretches; the statistic of the kernel of each (of all
    chains), averaged over the stretches, is a point of the line.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    statistic
        Takes such a tensor, gives a number, as for `at_equal_reliability`.
    halvings
        How often draws are halved: points of the line less one.
    level
        Of the interval.

    Returns
    -------
    xarray.Dataset
        Computed. ``value(draws)``, the mean of the statistic over stretches of so many draws of all
        chains; 0-d ``limit``; ``standard_error`` of it, from leaving chains out one at a time (NaN
        below three chains), and its interval ``low``, ``high`` of Student's t; ``slope``, b; and
        ``misfit``, the root of the mean square of what the line leaves, next to which the limit is
        no more exact.

    Raises
    ------
    TypeError
        ``statistic`` is no function.
    ValueError
        It fails or gives no number, or stretches would have fewer than 4 draws.

    Notes
    -----
    Costs ``(2**(halvings + 1) - 1) (C + 1)`` evaluations of the statistic for C chains. Stretches
    must be longer than chains remember: there neighbouring draws repeat each other, and the line
    bends. What the limit is free of in bias it has more in noise than
    ``value``.

    References
    ----------
    - docs/methods/uncertainty.md.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> noise = np.random.default_rng(0).normal(size=(8, 64, 20))
    >>> losses = xr.DataArray(noise, dims=("chain", "draw", "sample"))
    >>> squares = lambda x: (lk.correlation(x).values[np.triu_indices(20, 1)] ** 2).mean()
    >>> line = lk.extrapolated(losses, squares)  # of independent samples: R is 0
    >>> [round(1 / float(value)) for value in line["value"]]
    [521, 243, 126]
    >>> bool(abs(line["limit"]) < 2e-4)
    True
    """
    if not callable(statistic):
        raise TypeError(f"statistic must be a function of losses, not {type(statistic).__name__}")
    x = as_losses(losses)
    chains, length = x.sizes[CHAIN], x.sizes[DRAW]
    cuts = [2**halving for halving in range(halvings + 1)]
    if length // cuts[-1] < _FEWEST:
        raise ValueError(
            f"{length} draws of a chain, halved {halvings} times, leave {length // cuts[-1]}; "
            f"stretches need {_FEWEST}: take more draws, or pass a smaller halvings="
        )
    counts = np.array([length // cut for cut in cuts])  # of a chain

    def points(own: list[int]) -> np.ndarray:
        kept = x if len(own) == chains else x.isel({CHAIN: own})
        return np.array([_mean(statistic, kept, cut) for cut in cuts])

    value = points(list(range(chains)))
    limit, slope, misfit = at_infinity(chains * counts, value)
    error = np.nan
    if chains > 2:
        left = [points([c for c in range(chains) if c != gone]) for gone in range(chains)]
        limits = [at_infinity((chains - 1) * counts, own)[0] for own in left]
        error = float(np.sqrt((chains - 1) * np.var(limits)))
    return _labelled(
        {"limit": limit, "standard_error": error, "slope": slope, "misfit": misfit},
        (chains * counts, value),
        level,
        max(chains - 1, 1),
    )


def _labelled(
    numbers: dict[str, Any], points: tuple[np.ndarray, np.ndarray], level: float, degrees: int
) -> xr.Dataset:
    from scipy.stats import t

    draws, value = points
    half = float(t.ppf(0.5 + level / 2, degrees)) * numbers["standard_error"]
    known = {name: float(number) for name, number in numbers.items()}
    known |= {"low": known["limit"] - half, "high": known["limit"] + half}
    return xr.Dataset({"value": ("draws", value)} | known, {"draws": draws}, {"level": level})


def _mean(statistic: Statistic, x: xr.DataArray, cut: int) -> float:
    """Return the mean of the statistic over as many disjoint stretches of the draws."""
    length = x.sizes[DRAW] // cut
    parts = [x.isel({DRAW: slice(i * length, (i + 1) * length)}) for i in range(cut)]
    return float(np.mean([evaluated(statistic, part) for part in parts]))


def at_infinity(
    draws: Sequence[int] | np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return limit, slope and misfit of lines in ``1 / draws``, by least squares.

    Parameters
    ----------
    draws
        Of each point; two or more that differ.
    values
        Shape ``(point, ...)``; each of the rest has a line of its own.
    """
    x = 1 / np.asarray(draws, float)
    away = x - x.mean()
    slope = np.tensordot(away, values, axes=(0, 0)) / (away @ away)
    limit = np.mean(values, axis=0) - slope * x.mean()
    line = limit + np.multiply.outer(x, slope)
    return limit, slope, np.sqrt(np.mean(np.square(values - line), axis=0))
