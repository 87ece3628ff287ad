"""Reliability against its definition in numpy, and what equal reliability does to a comparison."""

import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from tests.helpers.losses import Forbidding, numpy_correlation, random_losses


def agreement(losses, first, second):
    pairs = np.triu_indices(losses.sizes["sample"], 1)
    halves = [numpy_correlation(losses.isel(chain=list(c)))[pairs] for c in (first, second)]
    return np.corrcoef(*halves)[0, 1]


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"memory": "300 KiB"}])
@pytest.mark.parametrize("samples", [23, 150])
def test_reliability__is_the_mean_agreement_of_halves_stepped_up(rng, samples, options):
    losses = random_losses(rng, chains=4, draws=15, samples=samples)
    rho = lk.reliability(losses.chunk(chain=1, draw=6, sample=19), **options)
    splits = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    r = np.mean([agreement(losses, *split) for split in splits])
    assert float(rho["halves"]) == pytest.approx(r, abs=1e-4)
    assert float(rho) == pytest.approx(2 * r / (1 + r), abs=1e-4)
    assert rho.attrs["splits"] == 3
    assert rho.attrs["halves_of"] == "chains"


def test_reliability__of_few_chains(rng):
    losses = random_losses(rng, chains=3, draws=15, samples=30)
    three = lk.reliability(losses)
    r = np.mean([agreement(losses, (a,), (b,)) for a, b in ((0, 1), (0, 2), (1, 2))])
    assert float(three) == pytest.approx(3 * r / (1 + 2 * r), abs=1e-4)
    one = lk.reliability(losses.isel(chain=[0]))
    parts = [losses.isel(chain=[0], draw=slice(a, a + 7)) for a in (0, 7)]
    both = xr.concat(parts, "chain")
    r = agreement(both, (0,), (1,))
    assert float(one) == pytest.approx(2 * r / (1 + r), abs=1e-4)
    assert one.attrs["halves_of"] == "draws"
    many = random_losses(rng, chains=10, draws=9, samples=30)
    assert lk.reliability(many, splits=7).attrs["splits"] == 7
    assert float(lk.reliability(many, seed=1)) != float(lk.reliability(many, seed=2))


def test_reliability__leaves_constant_losses_out_and_knows_noise(rng):
    losses = random_losses(rng, chains=4, draws=15, samples=60)
    padded = xr.concat([losses, losses.isel(sample=slice(20)) * 0 + 0.3], "sample")
    assert float(lk.reliability(padded)) == pytest.approx(float(lk.reliability(losses)), abs=1e-5)
    noise = losses.copy(data=rng.normal(size=losses.shape))
    assert abs(float(lk.reliability(noise))) < 0.15
    assert np.isnan(float(lk.reliability(losses * 0)))
    with dask.config.set(scheduler=Forbidding()):
        lk.reliability(losses.chunk())


def made(rng, noise, chains=6, draws=200, samples=60):
    shared = rng.normal(size=(chains, draws, 4)) @ rng.normal(size=(4, samples))
    noisy = shared + noise * rng.normal(size=shared.shape)
    return xr.DataArray(noisy, dims=("chain", "draw", "sample"))


def test_reliability__foresees_the_agreement_of_as_many_draws_again():
    told, seen = [], []
    for seed in range(12):
        both = made(np.random.default_rng(seed), 4.0, chains=12, draws=40)
        told.append(float(lk.reliability(both.isel(chain=slice(6)))))
        seen.append(agreement(both, range(6), range(6, 12)))
    assert np.mean(told) == pytest.approx(np.mean(seen), abs=0.03)


def test_equal_reliability__is_no_difference_where_only_noise_differs(rng):
    mix = rng.normal(size=(4, 60))

    def losses(draws, seed):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=(6, draws, 4)) @ mix
        noisy = shared + 5 * rng.normal(size=shared.shape)
        return xr.DataArray(noisy, dims=("chain", "draw", "sample"))

    kernels = {"few": losses(60, 1), "many": losses(400, 2)}
    fair = lk.at_equal_reliability(kernels, lambda x: lk.neighbors(x, 3)["similarity"].mean())
    few, many = fair.sel(kernel="few"), fair.sel(kernel="many")
    assert float(few["share"]) == 1
    assert float(many["share"]) == pytest.approx(60 / 400, abs=0.05)
    assert float(many["reached"]) == pytest.approx(fair.attrs["target"], abs=0.05)
    gap = float(abs(many["value"] - few["value"]))
    assert gap < 3 * float(np.hypot(few["standard_error"], many["standard_error"]))
    assert gap < abs(float(many["plain"] - few["plain"])) / 3
    assert (fair["low"] < fair["value"]).all()


def test_equal_reliability__refuses_what_cannot_be(rng):
    with pytest.raises(ValueError, match="mapping from names"):
        lk.at_equal_reliability({}, np.mean)
    kernels = {"a": made(rng, 1.0)}
    with pytest.raises(ValueError, match="target must lie between 0 and"):
        lk.at_equal_reliability(kernels, np.mean, target=0.9999)
    # One chain has two groups, the other twins across them: alike in one is unlike in the other.
    first, second = rng.normal(size=(40, 2)), rng.normal(size=(40, 15))
    values = np.stack([np.repeat(first, 15, axis=1), np.tile(second, 2)])
    apart = xr.DataArray(values, dims=("chain", "draw", "sample"))
    with pytest.raises(ValueError, match="no draws are few enough"):
        lk.at_equal_reliability({"apart": apart}, np.mean)
