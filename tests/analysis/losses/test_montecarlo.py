from itertools import pairwise

import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from tests.helpers.losses import Forbidding, numpy_correlation, random_losses


def left_out(a, b, blocks, kind):
    """Kernels with each block of draws left out, by numpy; and the jackknife of them."""
    chains, draws, _ = a.shape
    cuts = np.linspace(0, draws, blocks + 1).astype(int)
    x, y = (z.values.astype("f8") for z in (a, b))
    kernels = []
    for c in range(chains):
        for start, stop in pairwise(cuts):
            keep = np.ones((chains, draws), bool)
            keep[c, start:stop] = False
            p, q = x[keep] - x[keep].mean(0), y[keep] - y[keep].mean(0)
            if kind == "correlation":
                p, q = (z / np.linalg.norm(z, axis=0) for z in (p, q))
                kernels.append(p.T @ q)
            else:
                kernels.append(p.T @ q / (keep.sum() - 1))
    return np.sqrt(np.var(kernels, axis=0) * (len(kernels) - 1))


@pytest.mark.parametrize("kind", ["covariance", "correlation"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("memory", [None, "60 KiB"])
def test_mcse__equals_kernels_with_a_block_left_out(rng, kind, blocks, memory):
    losses = random_losses(rng, chains=4, samples=30)
    error = lk.mcse(losses.chunk(draw=6, sample=8), blocks=blocks, memory=memory)[kind]
    expected = left_out(losses, losses, blocks, kind)
    np.testing.assert_allclose(error, expected, rtol=2e-3, atol=1e-5 * expected.max())
    few = losses.isel(sample=slice(3, 9))
    some = lk.mcse(few, losses, blocks=blocks, memory=memory)[kind]
    np.testing.assert_allclose(some, expected[3:9], rtol=2e-3, atol=1e-5 * expected.max())
    assert some.dims == ("sample", "sample_2")


def test_mcse__of_gains_is_that_of_arviz_and_zero_without_variance(rng):
    from arviz_stats.base import array_stats

    losses = random_losses(rng, chains=4, draws=50)
    losses[..., 3] = 0.25
    errors = lk.mcse(losses.chunk(chain=1, draw=20, sample=5))["loss_gain"].values
    assert errors[3] == 0
    expected = array_stats.mcse(losses.values[..., 5].astype("f8"), chain_axis=0, draw_axis=1)
    assert errors[5] == pytest.approx(float(expected))


def test_mcse__is_the_spread_of_independent_repeats():
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(3, 3))
    kernels, gains, claimed, claimed_gain = [], [], [], []
    for _ in range(300):
        values = rng.normal(size=(8, 25, 3)) @ mixing
        x = xr.DataArray(values, dims=("chain", "draw", "sample"), name="loss")
        kernels.append(numpy_correlation(x))
        gains.append(values.mean((0, 1)))
        error = lk.mcse(x)
        claimed.append(error["correlation"].values)
        claimed_gain.append(error["loss_gain"].values)
    off = ~np.eye(3, dtype=bool)
    ratio = np.sqrt(np.mean(np.square(claimed), 0))[off] / np.std(kernels, axis=0)[off]
    np.testing.assert_allclose(ratio, 1, atol=0.15)
    np.testing.assert_allclose(np.mean(claimed_gain, 0) / np.std(gains, axis=0), 1, atol=0.15)


def test_mcse__of_one_chain_needs_blocks(rng):
    one = random_losses(rng, chains=1)
    expected = left_out(one, one, 10, "covariance")
    np.testing.assert_allclose(lk.mcse(one)["covariance"], expected, rtol=2e-3, atol=1e-4)
    with pytest.raises(ValueError, match="blocks=10"):
        lk.mcse(one, blocks=1)
    with pytest.raises(ValueError, match="1 (and|to) 20"):
        lk.mcse(one, blocks=21)


def test_errors_and_counts__are_lazy(rng):
    losses = random_losses(rng)
    losses = losses.copy(data=losses.chunk(sample=5).data)
    with dask.config.set(scheduler=Forbidding()):
        lk.mcse(losses)
        lk.covariance(losses, shrinkage="ledoit-wolf")
        lk.histogram(losses, "label")
