"""Skew and kurtosis of outcomes, their errors, and the verdict on losses that jump."""

import numpy as np
import pytest
import xarray as xr
from scipy import signal, stats

import lkarray as lk
from lkarray.analysis.losses.gaussianity import errors, moments


def log_odds(rng, chains=4, draws=250, samples=6, mean=-4.0):
    o = (mean + 2 * rng.normal(size=(chains, draws, samples))).astype("float32")
    dims = ("chain", "draw", "sample")
    return xr.DataArray(o, dims=dims, name="log_odds", attrs={"link": "softplus"})


def with_losses(o):
    loss = np.logaddexp(0, o).rename("loss").drop_attrs()
    return xr.Dataset({"loss": loss, "log_odds": o})


def test_moments__are_those_of_scipy(rng):
    block = (1e3 + rng.gamma(2, size=(500, 4))).astype("float32")
    block[:, 2] = 0.1
    skew, kurtosis = moments(block)
    wide = block[:, [0, 1, 3]].astype("float64")
    np.testing.assert_allclose(skew[[0, 1, 3]], stats.skew(wide), rtol=1e-10)
    np.testing.assert_allclose(kurtosis[[0, 1, 3]], stats.kurtosis(wide), rtol=1e-9)
    assert np.isnan([skew[2], kurtosis[2]]).all()


@pytest.mark.parametrize("r", [0.0, 0.8])
def test_errors__are_the_spread_of_many_series(rng, r):
    draws = 2_000
    noise = rng.normal(size=(draws + 100, 600))
    series = signal.lfilter([1], [1, -r], noise, axis=0)[100:]
    spread = moments(series).std(axis=1)
    expected = errors(draws, np.array([draws * (1 - r) / (1 + r)]))[:, 0]
    np.testing.assert_allclose(spread, expected, rtol=0.12)


def test_diagnostics__say_how_gaussian_outcomes_are(rng):
    o = log_odds(rng)
    report = lk.diagnostics(with_losses(o))
    flat = o.values.reshape(-1, 6).astype("float64")
    np.testing.assert_allclose(report["outcome_skew"], stats.skew(flat), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(report["outcome_kurtosis"], stats.kurtosis(flat), atol=1e-9)
    flat = np.logaddexp(0, o.values).reshape(-1, 6).astype("float64")
    np.testing.assert_allclose(report["loss_kurtosis"], stats.kurtosis(flat), rtol=1e-6)
    assert (np.abs(report["outcome_kurtosis"]) < 4 * report["outcome_kurtosis_error"]).all()
    assert report["outcome_skew_error"].dims == ("sample",)
    assert report["outcome_skew"].attrs["long_name"]
    (line,) = (line for line in report.attrs["verdicts"] if "estimator=" in line)
    assert line.startswith("losses jump (excess kurtosis ")
    assert np.isnan(report["estimators_agree"])  # of independent samples: nothing to agree on
    alone = lk.diagnostics(o)
    assert "outcome_skew" not in alone
    assert "estimators_agree" not in alone


def test_diagnostics__advise_nothing_where_nothing_is_won(rng):
    near_linear = log_odds(rng, mean=3.0)
    skewed = with_losses(np.exp(log_odds(rng)).assign_attrs(link="softplus").rename("log_odds"))
    for tree in (with_losses(near_linear), skewed):
        assert not any("estimator=" in line for line in lk.diagnostics(tree).attrs["verdicts"])


def test_diagnostics__leave_diverged_chains_and_components_apart(rng):
    runs = xr.concat([with_losses(log_odds(rng)) for _ in range(2)], "component")
    runs = runs.assign_coords(component=["first", "second"])
    runs["log_odds"].attrs["link"] = "softplus"
    runs["loss"][0, 1, 100:] = np.nan
    runs["log_odds"][0, 1, 100:] = np.nan
    flags = xr.DataArray(np.zeros((2, 4, 250), bool), dims=("component", "chain", "draw"))
    flags[0, 1, 100:] = True
    tree = xr.DataTree.from_dict({"losses": runs, "sample_stats": xr.Dataset({"diverged": flags})})
    report = lk.diagnostics(tree)
    assert report["outcome_kurtosis"].dims == ("component", "sample")
    flat = runs["log_odds"].values[0][[0, 2, 3]].reshape(-1, 6).astype("float64")
    np.testing.assert_allclose(report["outcome_kurtosis"][0], stats.kurtosis(flat), atol=1e-9)


def of_weights(rng, weights, mean, scale, samples=60):
    """Return losses and log-odds that are linear in weights (chain, draw, param), with noise."""
    o = mean + scale * weights @ rng.normal(size=(weights.shape[-1], samples))
    o += 0.5 * scale * rng.normal(size=o.shape)
    dims, attrs = ("chain", "draw", "sample"), {"link": "softplus"}
    return with_losses(xr.DataArray(o.astype("float32"), dims=dims, name="log_odds", attrs=attrs))


def test_diagnostics__compare_both_estimates_beyond_noise(rng):
    tree = of_weights(rng, rng.normal(size=(4, 200, 5)), mean=-6.0, scale=1.3)
    report = lk.diagnostics(tree)
    assert report["estimators_agree"] > 0.9
    assert report["gaussian_reliability"] > report["sample_reliability"] + 0.05
    assert report["compared"] == 60
    for estimator in ("sample", "gaussian"):
        halves = [
            lk.correlation(tree.isel(chain=own), estimator=estimator).values[np.triu_indices(60, 1)]
            for own in ([0, 1], [2, 3])
        ]
        r = np.corrcoef(halves)[0, 1]
        stepped_up = float(report[f"{estimator}_reliability"])
        assert stepped_up == pytest.approx(2 * r / (1 + r), abs=0.1)  # one of three divisions
    (line,) = (line for line in report.attrs["verdicts"] if "estimator=" in line)
    assert line.startswith("R of losses has reliability 0.")
    assert "on 60 samples" in line


def test_diagnostics__compare_as_many_samples_as_the_budget_holds(rng):
    tree = of_weights(rng, rng.normal(size=(2, 2_000, 5)), mean=-3.0, scale=1.0, samples=150)
    report = lk.diagnostics(tree, memory="19.2 MB")
    assert report["compared"] == 100
    assert np.isfinite(report["estimators_agree"])


@pytest.mark.parametrize("regime", ["linear", "bent", "far", "unknown"])
def test_diagnostics__tell_gradients_from_outcomes_from_long_chains(rng, regime):
    weights = rng.normal(size=(4, 250, 5))
    if regime == "far":
        weights *= rng.standard_t(3, size=(4, 250, 1))
    mean, scale = (3.0, 0.2) if regime == "linear" else (-4.0, 1.0)
    tree = of_weights(rng, weights, mean, scale)
    report = lk.diagnostics(tree["loss"] if regime == "unknown" else tree)
    assert report.attrs["regime"] == regime
    remedy = {
        "linear": "lk.laplace gives",
        "bent": 'estimator="gaussian"',
        "far": "long chains",
        "unknown": "lk.log_odds(tree)",
    }
    assert remedy[regime] in report.attrs["advice"]
