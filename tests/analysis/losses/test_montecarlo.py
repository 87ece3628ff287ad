from itertools import pairwise

import dask
import numpy as np
import pytest
import xarray as xr
from sklearn.covariance import ledoit_wolf_shrinkage

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import Forbidding, numpy_correlation, numpy_covariance, random_losses


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


@pytest.mark.parametrize("samples", [20, 150])
def test_shrinkage__equals_sklearn(rng, samples):
    losses = random_losses(rng, samples=samples)
    flat = losses.values.reshape(-1, samples).astype("f8")
    share = ledoit_wolf_shrinkage(flat)
    lazy = losses.chunk(chain=1, sample=40)
    assert float(lk.ledoit_wolf(lazy, memory="2 MiB")) == pytest.approx(share, rel=1e-5)
    plain = numpy_covariance(losses)
    for asked, used in (("ledoit-wolf", share), (0.3, 0.3), (0.0, 0.0)):
        shrunk = lk.covariance(lazy, shrinkage=asked, memory="2 MiB")
        expected = (1 - used) * plain + used * np.trace(plain) / samples * np.eye(samples)
        np.testing.assert_allclose(shrunk, expected, rtol=1e-4, atol=1e-4)
    for wrong in (1.5, "oas"):
        with pytest.raises(ValueError, match="ledoit-wolf"):
            lk.covariance(losses, shrinkage=wrong)
    with pytest.raises(ValueError, match="without y"):
        lk.covariance(losses, losses, shrinkage=0.1)


@pytest.mark.parametrize("kernel", ["correlation", "covariance"])
@pytest.mark.parametrize("groups", ["label", None])
@pytest.mark.parametrize("memory", [None, "100 KiB"])
def test_histogram__counts_every_pair_once(rng, kernel, groups, memory):
    losses = random_losses(rng, samples=60)
    whole = (numpy_correlation if kernel == "correlation" else numpy_covariance)(losses)
    bounds = (-0.5, 0.6) if kernel == "correlation" else (-3.0, 4.0)
    histogram = lk.histogram(
        losses, groups, bins=7, bounds=bounds, kernel=kernel, memory=memory
    ).compute()
    total = histogram["count"].sum("bin") + histogram["below"] + histogram["above"]
    assert int(total.sum()) == 60 * 59
    labels = losses["label"].values if groups else np.zeros(60, int)
    name = groups or "group"
    assert histogram["count"].dims == (name, f"{name}_2", "bin")
    for a in histogram[name].values:
        for b in histogram[f"{name}_2"].values:
            pairs = (labels[:, None] == a) & (labels == b) & ~np.eye(60, dtype=bool)
            at = {name: a, f"{name}_2": b}
            counts, edges = np.histogram(whole[pairs], 7, bounds)
            np.testing.assert_array_equal(histogram["count"].sel(at), counts)
            np.testing.assert_allclose(histogram["bin_left"], edges[:-1])
            assert int(histogram["below"].sel(at)) == (whole[pairs] < bounds[0]).sum()


def test_histogram__refuses_unclear_requests(rng):
    losses = random_losses(rng)
    with pytest.raises(ValueError, match="loss_variance"):
        lk.histogram(losses, kernel="covariance")
    with pytest.raises(ValueError, match="ascend"):
        lk.histogram(losses, bounds=(1, -1))
    with pytest.raises(errors.SchemaError, match="no coordinate"):
        lk.histogram(losses, "colour")


def test_errors_and_counts__are_lazy(rng):
    losses = random_losses(rng)
    losses = losses.copy(data=losses.chunk(sample=5).data)
    with dask.config.set(scheduler=Forbidding()):
        lk.mcse(losses)
        lk.covariance(losses, shrinkage="ledoit-wolf")
        lk.histogram(losses, "label")
