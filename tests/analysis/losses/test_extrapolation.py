"""Statistics without end of draws: a line in one over their number, on losses of known R."""

import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray.analysis.losses.extrapolation import at_infinity

N = 12
PAIRS = np.triu_indices(N, 1)


def loadings(rng):
    """Return what makes Gaussian losses of independent draws, and the mean square of their R."""
    mixing = np.linalg.cholesky(0.4 + 0.6 * np.eye(N)) * rng.uniform(0.5, 2, N)[:, None]
    cov = mixing @ mixing.T
    scale = np.sqrt(np.diag(cov))
    return mixing, np.square(cov / scale / scale[:, None])[PAIRS].mean()


def made(rng, mixing, chains=8, draws=64):
    return xr.DataArray(
        rng.normal(size=(chains, draws, N)) @ mixing.T, dims=("chain", "draw", "sample")
    )


def squares(x):
    return np.square(np.corrcoef(x.values.reshape(-1, N).T)[PAIRS]).mean()


def test_line__is_exact_of_a_line():
    draws = np.array([400, 200, 100])
    values = np.array([[2.0, -1.0]]) + np.outer(1 / draws, [30.0, 7.0])
    limit, slope, misfit = at_infinity(draws, values)
    np.testing.assert_allclose(limit, [2, -1], rtol=1e-12)
    np.testing.assert_allclose(slope, [30, 7], rtol=1e-11)
    np.testing.assert_allclose(misfit, 0, atol=1e-12)


def test_limit__is_free_of_bias_and_its_interval_holds_the_truth():
    rng = np.random.default_rng(0)
    mixing, truth = loadings(rng)
    sets = [lk.extrapolated(made(rng, mixing, chains=6, draws=16), squares) for _ in range(60)]
    limits = np.array([float(line["limit"]) for line in sets])
    plain = np.array([float(line["value"][0]) for line in sets])
    error = limits.std(ddof=1) / np.sqrt(len(sets))
    assert abs(limits.mean() - truth) < 3.5 * error
    assert abs(plain.mean() - truth) > 2 * abs(limits.mean() - truth)
    held = np.mean([float(s["low"]) < truth < float(s["high"]) for s in sets])
    assert 0.85 <= held <= 1.0
    errors = np.array([float(s["standard_error"]) for s in sets])
    within = np.mean(np.abs(limits - truth) < 2 * errors)
    assert 0.8 <= within <= 1.0
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(limits.std(), rel=0.3)


def test_points__are_means_over_disjoint_stretches(rng):
    mixing, _ = loadings(rng)
    losses = made(rng, mixing, chains=3, draws=19)
    line = lk.extrapolated(losses, squares)
    assert line["draws"].values.tolist() == [57, 27, 12]
    expected = np.mean([squares(losses[:, a : a + 4]) for a in (0, 4, 8, 12)])
    assert float(line["value"][2]) == pytest.approx(expected)
    assert line["low"] < line["limit"] < line["high"]


def test_error__is_unknown_of_few_chains(rng):
    mixing, _ = loadings(rng)
    line = lk.extrapolated(made(rng, mixing, chains=2), squares)
    assert np.isnan(line["standard_error"])
    assert np.isfinite(line["limit"])


def test_bad_input__is_refused(rng):
    losses = made(rng, np.eye(N), draws=15)
    with pytest.raises(ValueError, match="stretches need 4"):
        lk.extrapolated(losses, squares)
    with pytest.raises(TypeError, match="must be a function"):
        lk.extrapolated(losses, "mean")
    with pytest.raises(ValueError, match="statistic fails"):
        lk.extrapolated(losses, lambda x: x, halvings=1)
