"""The kernel of losses by both estimators: whether they agree, and which is the poorer."""

from __future__ import annotations

from math import prod

import numpy as np
import xarray as xr

from lkarray.analysis.losses.reliability import divisions, spearman_brown
from lkarray.engine.numbers import reciprocal
from lkarray.engine.plan import memory_budget
from lkarray.engine.series import Table, Terms, apply_series
from lkarray.errors import NonFiniteError
from lkarray.links import Link, as_link
from lkarray.schema import CHAIN, LINK, POSTERIOR
from lkarray.waiting import computed

_SAMPLES = 300  # at most: their 44,850 pairs err by less than the draws do
_FEWEST = 5  # samples of which a correlation over pairs says something
_SPLITS = 4
_SURE = 3.0  # standard errors of no correlation, above which halves are not noise
_BYTES = 48  # for each draw of a sample: two tensors, their halves, and deviations in float64

#: Names of the figures, all of the whole run.
OF_ESTIMATES = ("estimators_agree", "sample_reliability", "gaussian_reliability", "compared")


def of_estimates(
    losses: xr.DataArray, outcomes: xr.DataArray, seed: int, memory: int | str | None
) -> dict[str, np.ndarray]:
    r"""Return how far both estimates of R agree beyond noise, and the reliability of each.

    Of two halves of the chains, one estimate of each: with r the correlation over pairs of samples
    of two kernels,

    .. math:: r(s_1, g_2) / \sqrt{r(s_1, s_2) \, r(g_1, g_2)}

    which noise does not lower (Spearman 1904). Of random samples, as many as the budget holds and
    300 at most (``compared``); NaN where these are too few, or a half's kernels are noise.
    """
    n, draws = losses.sizes[losses.dims[-1]], prod(losses.sizes[dim] for dim in POSTERIOR)
    count = min(n, _SAMPLES, memory_budget(memory) // (_BYTES * draws))
    unknown = dict(zip(OF_ESTIMATES, np.array([np.nan, np.nan, np.nan, 0]), strict=True))
    if count < _FEWEST:
        return unknown
    chosen = np.sort(np.random.default_rng(seed).choice(n, count, replace=False))
    link = as_link(outcomes.attrs[LINK], what=f"variable {outcomes.name!r}")
    own = [
        computed(x.transpose(*POSTERIOR, ...).isel({x.dims[-1]: chosen}))
        for x in (losses, outcomes)
    ]
    sides = [divisions(x, _SPLITS, seed) for x in own]
    pairs = list(zip(sides[0][0], sides[1][0], strict=True))
    try:
        each = np.array([_compared(*both, link) for both in pairs])
    except NonFiniteError:  # a link that is not defined for these outcomes
        return unknown
    cross, sample, gaussian = each.mean(axis=0)
    factor = 2.0 if sides[0][1] == "draws" else losses.sizes[CHAIN] / (losses.sizes[CHAIN] // 2)
    chance = _SURE / np.sqrt(count * (count - 1) / 2)
    noise = sample * gaussian if min(sample, gaussian) > chance else np.nan
    numbers = (cross / np.sqrt(noise), *(spearman_brown(r, factor) for r in (sample, gaussian)))
    return dict(zip(OF_ESTIMATES, np.array([*numbers, count]), strict=True))


def _compared(
    losses: tuple[xr.DataArray, xr.DataArray],
    outcomes: tuple[xr.DataArray, xr.DataArray],
    link: Link,
) -> tuple[float, float, float]:
    """Return the correlations over pairs of different estimates, and of each with itself."""
    plain = [x.values.reshape(-1, x.shape[-1]).astype(np.float64) for x in losses]
    odds = [x.values.reshape(-1, x.shape[-1]).astype(np.float64) for x in outcomes]
    usable = np.all([np.isfinite(x).all(axis=0) & (np.ptp(x, axis=0) > 0) for x in plain + odds], 0)
    if usable.sum() < _FEWEST:
        return (np.nan,) * 3
    pairs = np.triu_indices(int(usable.sum()), 1)
    one, two = (_cosines(x[:, usable])[pairs] for x in plain)
    first, second = (_gaussian(x[:, usable], link)[pairs] for x in odds)
    r = np.corrcoef([one, two, first, second])
    return (r[0, 3] + r[1, 2]) / 2, r[0, 1], r[2, 3]


def _cosines(x: np.ndarray) -> np.ndarray:
    deviation = x - x.mean(axis=0)
    deviation *= reciprocal(np.linalg.norm(deviation, axis=0))
    kernel: np.ndarray = deviation.T @ deviation
    return kernel


def _gaussian(x: np.ndarray, link: Link) -> np.ndarray:
    table = Table.of(*link.coefficients(x.mean(axis=0), x.std(axis=0, ddof=1)), x.dtype)
    kernel = _cosines(x)
    apply_series(kernel, Terms(table, table, cosine=True, factor=1.0), diagonal=True)
    return kernel
