"""Intervals that hold what they promise, and estimates without bias, on made data."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import t

import lkarray as lk
from lkarray.analysis.hierarchy.intervals import interval, jackknife
from lkarray.kernels.crossfit import _benjamini_yekutieli


@pytest.mark.parametrize(("chains", "labels"), [(4, 0.0), (8, 0.0), (4, 0.5), (6, 2.0)])
def test_interval__holds_the_truth_as_often_as_it_says(chains, labels):
    rng = np.random.default_rng(chains)
    values = rng.normal(size=(chains, 500)) * np.sqrt(chains)  # the mean has variance 1
    mean = values.mean(0)
    error = jackknife([(values.sum(0) - value) / (chains - 1) for value in values])
    known = np.full(500, labels) * np.sqrt(rng.chisquare(29, 500) / 29)
    estimate = mean + labels * rng.normal(size=500)
    low, high = interval(estimate, [(error, chains - 1), (known, 29)], 0.95)
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.97


def test_interval__of_exact_values_is_a_point():
    low, high = interval(np.array([2.0, 3.0]), [(np.array([0.0, np.nan]), 3)], 0.95)
    np.testing.assert_array_equal([low[0], high[0]], [2, 2])
    assert np.isnan(low[1])


def gaussian_losses(rng, r, chains, draws):
    """Independent draws of losses whose correlation is known."""
    values = rng.normal(size=(chains, draws, len(r))) @ np.linalg.cholesky(r).T
    return xr.DataArray(values.astype("f4"), dims=("chain", "draw", "sample"))


def known_correlation(n, rng):
    features = rng.normal(size=(n, 12))
    k = features @ features.T / 12 + np.eye(n)
    scale = np.sqrt(np.diag(k))
    return k / np.outer(scale, scale)


def test_crossfit__similarities_are_without_bias_and_intervals_hold_the_truth():
    rng = np.random.default_rng(1)
    r = known_correlation(40, rng)
    excess = {True: [], False: []}
    held = []
    for _ in range(40):
        losses = gaussian_losses(rng, r, 12, 10)
        for crossfit, off in excess.items():
            near = lk.neighbors(losses, 5, crossfit=crossfit).compute()
            true = np.take_along_axis(r, near["neighbor"].values, axis=1)
            off.append((near["similarity"].values - true).mean())
            if crossfit:
                error = near["similarity_error"].values
                held.append(np.abs(near["similarity"].values - true) < t.ppf(0.975, 5) * error)
    spread = {of: np.std(off) / np.sqrt(len(off)) for of, off in excess.items()}
    # The sample correlation itself is too small by r (1 - r^2) / 2 S, here 0.002.
    assert abs(np.mean(excess[True])) < 3 * spread[True] + 0.004
    assert np.mean(excess[False]) > 0.05
    assert 0.93 <= np.mean(held) <= 0.97


def test_crossfit__of_noise_finds_nothing_and_of_structure_finds_it():
    rng = np.random.default_rng(2)
    false = 0
    for _ in range(10):
        near = lk.neighbors(gaussian_losses(rng, np.eye(60), 12, 20), 5, crossfit=True).compute()
        false += int((near["q_value"] < 0.1).any())
    assert false <= 2
    groups = np.kron(np.eye(12), np.full((5, 5), 0.8)) + 0.2 * np.eye(60)
    near = lk.neighbors(gaussian_losses(rng, groups, 24, 20), 4, crossfit=True).compute()
    assert ((near["q_value"] < 0.1) == (near["neighbor"] // 5 == near["sample"] // 5)).all()


def test_q_values__equal_those_of_scipy():
    from scipy.stats import false_discovery_control

    p = np.random.default_rng(0).uniform(size=(6, 4)) ** 3
    p[2, 1] = np.nan
    told = _benjamini_yekutieli(p)
    assert np.isnan(told[2, 1])
    known = ~np.isnan(p)
    np.testing.assert_allclose(told[known], false_discovery_control(p[known], method="by"))
