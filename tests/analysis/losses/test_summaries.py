"""Summaries and their standard errors; trees of several runs; observables."""

import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from tests.helpers.losses import Forbidding, random_losses, with_center


def jackknife(values, statistic):
    """The delete-one-chain standard error in float64, by its definition."""
    chains = len(values)
    without = np.array([statistic(np.delete(values, c, axis=0)) for c in range(chains)])
    return np.sqrt((chains - 1) / chains * ((without - without.mean(0)) ** 2).sum(0))


@pytest.mark.parametrize("chunks", [None, {"chain": 1, "sample": 5}, {"draw": 7}])
def test_summaries__carry_the_jackknife_error(rng, chunks):
    losses = random_losses(rng, chains=5, draws=20)
    x = losses.values.astype("f8")
    ds = with_center(losses if chunks is None else losses.chunk(chunks))
    gain = lk.loss_gain(ds)
    np.testing.assert_allclose(gain, x.mean((0, 1)) - 1, rtol=1e-10)
    np.testing.assert_allclose(
        gain["standard_error"], jackknife(x, lambda v: v.mean((0, 1))), rtol=1e-10
    )
    llc = lk.llc(ds)
    assert float(llc) == pytest.approx(3 * (x.mean() - 1), rel=1e-10)
    expected = jackknife(x, lambda v: 3 * v.mean())
    assert float(llc["standard_error"]) == pytest.approx(float(expected), rel=1e-10)
    fluctuation = lk.singular_fluctuation(ds)

    def half_trace(v):
        return 1.5 * v.reshape(-1, v.shape[2]).var(0, ddof=1).mean()

    assert float(fluctuation) == pytest.approx(half_trace(x), rel=1e-10)
    expected = jackknife(x, half_trace)
    assert float(fluctuation["standard_error"]) == pytest.approx(float(expected), rel=1e-8)


def test_summaries__of_a_lone_chain_leave_out_tenths(rng):
    ds = with_center(random_losses(rng, chains=1, draws=50))
    blocks = ds["loss"].values.astype("f8")[0].reshape(10, 5, -1).mean(1)
    expected = blocks.std(0, ddof=1) / np.sqrt(10)
    np.testing.assert_allclose(lk.loss_gain(ds)["standard_error"], expected, rtol=1e-10)
    one = with_center(random_losses(rng, chains=1, draws=1))
    assert np.isnan(lk.loss_gain(one)["standard_error"]).all()
    assert float(lk.llc(one)) == pytest.approx(3 * (float(one["loss"].mean()) - 1), rel=1e-5)


def test_summaries__errors_cover_the_truth(rng):
    """Of correlated chains of mean zero: within two standard errors about 95% of the time."""
    chains, draws, rho = 16, 60, 0.8
    noise = rng.normal(size=(chains, draws + 50, 400))
    for t in range(1, draws + 50):
        noise[:, t] = rho * noise[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
    losses = xr.DataArray(noise[:, 50:], dims=("chain", "draw", "sample"))
    gain = lk.loss_gain(with_center(losses)) + 1
    within = abs(gain) < 2 * gain["standard_error"]
    assert 0.9 < float(within.mean()) < 0.98


def test_summaries__stay_lazy(rng):
    ds = with_center(random_losses(rng).chunk({"sample": 5}))
    with dask.config.set(scheduler=Forbidding()):
        summaries = lk.loss_gain(ds), lk.llc(ds), lk.singular_fluctuation(ds)
    assert all(part.chunks is not None for part in summaries)
    assert all(part["standard_error"].chunks is not None for part in summaries)
