"""Numbers that tell whether chains have converged: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

_AXES = {"chain_axis": 1, "draw_axis": 2}
LEAST_DRAWS = 4  # of a chain, for ArviZ's definitions
_TAIL = (0.05, 0.95)  # quantiles of the tail's ESS (Vehtari et al. 2021, section 4.3)
_TOGETHER = 1 << 14  # losses at once: few enough for a core's own cache
_TEMPORARY = 160  # bytes for each of them
#: Columns of what `per_sample` returns.
PER_SAMPLE = (
    "rhat",
    "ess_bulk",
    "ess_tail",
    "mcse",
    "between_variance",
    "within_variance",
    "pooling_excess",
    "transient_excess",
)


def working_bytes(draws: int) -> int:
    """Return what `per_sample` and `kernel_ess` need beside series of ``draws`` numbers each."""
    return _TEMPORARY * max(draws, _TOGETHER)


def _batches(n: int, draws: int) -> Iterator[slice]:
    """Yield batches of ``n`` series that are worked on together."""
    step = max(_TOGETHER // draws, 1)
    for start in range(0, n, step):
        yield slice(start, start + step)


def per_sample(values: np.ndarray) -> np.ndarray:
    """Return `PER_SAMPLE` of each series, ``(n, 8)`` in float64, from ``(n, chain, draw)``."""
    figures = [_figures(values[some]) for some in _batches(len(values), prod(values.shape[1:]))]
    return np.concatenate(figures)


def _figures(values: np.ndarray) -> np.ndarray:
    _, chains, draws = values.shape
    x = values.astype(np.float64, order="C")
    # Losses can be large against their fluctuation; and what is constant is zero, exactly.
    x -= x.min(axis=(1, 2), keepdims=True)
    still = x.max(axis=(1, 2)) == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        within = x.var(axis=2, ddof=1).mean(axis=1)
        spread = x.mean(axis=2).var(axis=1, ddof=1) if chains > 1 else np.zeros(len(x))
        # Sums of squares about one mean: those within the chains, and those of their means.
        freedom = chains * draws - 1
        pooled = (chains * (draws - 1) * within + (chains - 1) * draws * spread) / freedom
        excess = pooled / within - 1
        transient = pooled / _about_draws(x) - 1
    between = draws * spread if chains > 1 else np.full(len(x), np.nan)
    told = np.full((len(x), 3), np.nan)  # a constant tells nothing of mixing
    moving = x[~still]
    if len(moving):
        with np.errstate(divide="ignore", invalid="ignore"):  # chains that stand still, each apart
            if chains > 1:
                told[~still, 0] = _arviz().rhat(moving, **_AXES)
            told[~still, 1] = _arviz().ess(moving, **_AXES, method="bulk")
            told[~still, 2] = _arviz().ess(moving, **_AXES, method="tail", prob=_TAIL)
    return np.column_stack([told, mean_error(x), between, within, excess, transient])


def _about_draws(x: np.ndarray) -> np.ndarray:
    """Return the variance about the chains' mean at each draw; NaN of one chain."""
    if x.shape[1] == 1:
        return np.full(len(x), np.nan)
    return x.var(axis=1, ddof=1).mean(axis=1)


def transient_noise(draws: float, chains: int) -> float:
    """Return the standard deviation of a transient's excess where there is none.

    A ratio of variances (F) of as many effective draws, of one chain, and their deviations:
    normal losses, to first order.
    """
    return float(np.sqrt(2 / draws * chains / (chains - 1)) / chains)


def _arviz() -> Any:
    from arviz_stats.base import array_stats

    return array_stats


def mean_error(x: np.ndarray) -> np.ndarray:
    """Return the Monte-Carlo standard error of each mean, 0 where nothing varies."""
    out = np.zeros(len(x))
    varies = x.max(axis=(1, 2)) > x.min(axis=(1, 2))
    if varies.any():
        out[varies] = _arviz().mcse(x[varies], **_AXES, method="mean")
    return out


def drift(mean: np.ndarray) -> np.ndarray:
    """Return the z score of each chain's second half against its first (Geweke 1992).

    ``mean`` is ``(chain, draw)``. The standard error of each half is ArviZ's, of what is left
    about the half's own straight line: a trend is autocorrelation too, and would hide itself (a
    burn-in of five standard deviations scored 1.5). NaN where a half has fewer draws than ArviZ
    needs, or nothing varies.
    """
    half = mean.shape[1] // 2
    if half < LEAST_DRAWS:
        return np.full(len(mean), np.nan)
    shifted = mean - mean.min(axis=1, keepdims=True)
    time = np.arange(half) - (half - 1) / 2
    levels, errors = [], []
    for stretch in (shifted[:, :half], shifted[:, -half:]):
        level = stretch.mean(axis=1, keepdims=True)
        slope = (stretch * time).sum(axis=1, keepdims=True) / (time**2).sum()
        levels.append(level[:, 0])
        errors.append(mean_error((stretch - level - slope * time)[:, None]))
    with np.errstate(divide="ignore", invalid="ignore"):
        z: np.ndarray = (levels[1] - levels[0]) / np.hypot(*errors)
    return z


def random_pairs(n: int, count: int, seed: int) -> np.ndarray:
    """Return ``count`` pairs of different numbers below ``n``, or all pairs if there are fewer."""
    if n * (n - 1) // 2 <= count:
        return np.stack(np.triu_indices(n, 1), axis=1)
    rng = np.random.default_rng(seed)
    first = rng.integers(n, size=count)
    return np.stack([first, (first + rng.integers(1, n, size=count)) % n], axis=1)


def kernel_ess(series: np.ndarray, pairs: np.ndarray) -> float:
    """Return the median effective sample size of the products that make kernel entries.

    ``series`` is ``(k, chain, draw)``, and ``pairs`` index it. Pairs of which one does not vary
    are passed over; NaN where none is left.
    """
    varies = np.ptp(series, axis=(1, 2)) > 0
    pairs = pairs[varies[pairs].all(axis=1)]
    sizes = []
    for some in _batches(len(pairs), prod(series.shape[1:])):
        left, right = (series[index].astype(np.float64) for index in pairs[some].T)
        for factor in (left, right):
            factor -= factor.mean(axis=(1, 2), keepdims=True)
        sizes.append(_arviz().ess(left * right, **_AXES, method="mean"))
    return float(np.median(np.concatenate(sizes))) if sizes else np.nan


def relaxation_steps(step_size: Any, gamma: float | None, sampler: Mapping[str, Any]) -> Any:
    """Return in how many steps a direction without loss forgets where it was; NaN if unknown.

    The slowest rate at which ``E[w] - w*`` decays under the sampler's step with a force of
    ``gamma (w - w*)`` alone, to first order in it.
    """
    if not gamma:
        return step_size * np.nan
    if sampler.get("name") == "InformedLangevin":
        return 2 / step_size  # in units of the law's own relaxation already
    rate = step_size * gamma / 2
    if sampler.get("name") == "RMSpropSGLD":
        rate = rate / sampler.get("damping", 0.1)
    elif sampler.get("name") == "SGHMC":
        friction = sampler.get("friction", 0.1)
        # Overdamped, the slower root; underdamped, both decay at half the friction.
        rate = (friction - np.sqrt(np.maximum(friction**2 - 4 * rate, 0))) / 2
    return 1 / rate
