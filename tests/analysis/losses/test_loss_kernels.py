import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import numpy_correlation, random_losses, with_center


def several(rng):
    parts = [random_losses(rng, samples=9) for _ in range(2)]
    joined = xr.concat(parts, xr.DataArray(["a", "b"], dims="component", name="component"))
    return joined, parts


def test_kernels__keep_components_in_step(rng):
    losses, parts = several(rng)
    r = lk.correlation(losses.chunk({"component": 1, "sample": 4}))
    assert r.dims == ("component", "sample", "sample_2")
    for name, part in zip("ab", parts, strict=True):
        np.testing.assert_allclose(r.sel(component=name), numpy_correlation(part), atol=1e-5)
    assert lk.covariance(losses).dims == ("component", "sample", "sample_2")
    assert lk.llc(with_center(losses)).dims == ("component",)
    assert lk.loss_variance(losses).dims == ("component", "sample")
    with pytest.raises(errors.SchemaError, match=r"select with .sel\(component"):
        lk.neighbors(losses, k=3)
    assert lk.neighbors(losses.sel(component="a"), k=3).sizes["rank"] == 3


def test_kernels__say_what_to_do_about_tokens(rng):
    losses = random_losses(rng, samples=12)
    tokens = xr.DataArray(
        losses.values.reshape(3, 20, 4, 3),
        dims=("chain", "draw", "sample", "token"),
        coords={"sample": np.arange(4)},
    )
    with pytest.raises(errors.SchemaError, match=r"mean\('token'\).*stack"):
        lk.correlation(tokens)
    assert lk.correlation(tokens.mean("token")).shape == (4, 4)
    flat = tokens.stack(position=("sample", "token")).reset_index("position")
    np.testing.assert_allclose(lk.correlation(flat), numpy_correlation(losses), atol=1e-5)
    assert lk.loss_gain(with_center(tokens)).dims == ("sample", "token")


def test_influence__of_a_scalar_observable_is_a_susceptibility(rng):
    losses = random_losses(rng)
    values = rng.normal(size=(3, 20))
    observable = xr.DataArray(values, dims=("chain", "draw"), name="size")
    x = losses.values.reshape(60, -1).astype("f8")
    y = values.reshape(60) - values.mean()
    expected = -((x - x.mean(0)) * y[:, None]).sum(0) / 59
    for asked in (observable, observable.to_dataset(), observable.chunk({"chain": 1})):
        influence = lk.influence(losses, asked)
        assert influence.dims == ("sample",)
        np.testing.assert_allclose(influence, expected, rtol=1e-4, atol=1e-5)
