import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from tests.helpers.influences import EPOCHS, N, by_epochs


@pytest.fixture
def epochs(rng):
    return by_epochs(rng)


@pytest.mark.parametrize("chunks", [None, {"audit": 4}])
def test_completeness__is_mre_and_lc_of_each_epoch(epochs, chunks):
    table = lk.completeness(epochs if chunks is None else epochs.chunk(chunks))
    a, b = epochs["reconstruction"].values, epochs["epoch_change"].values
    np.testing.assert_allclose(table["mre"], np.abs(a - b).mean(1))
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(table["lc"], expected)
    assert table["epoch"].values.tolist() == [1, 2, 3, 4]
    assert table["mre"].attrs["units"] == "nat"
    assert table.attrs == {"complete": True}
    assert table["mre"].chunks is None


def test_completeness__counts_outputs_as_numbers(rng):
    a, b = rng.normal(size=(2, EPOCHS, N, 3))
    dims = ("epoch", "audit", "output")
    ds = xr.Dataset({"reconstruction": (dims, a), "epoch_change": (dims, b)})
    turned = ds.assign(epoch_change=ds["epoch_change"].transpose("output", "epoch", "audit"))
    for given in (ds, turned):
        table = lk.completeness(given)
        np.testing.assert_allclose(table["mre"], np.abs(a - b).mean((1, 2)))
        expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(table["lc"], expected)


def test_completeness__has_no_correlation_without_variance(epochs):
    assert np.isnan(lk.completeness(epochs.isel(audit=[0]))["lc"]).all()
    constant = epochs.assign(epoch_change=epochs["epoch_change"] * 0 + 0.1)
    assert np.isnan(lk.completeness(constant)["lc"]).all()
    exact = epochs.assign(reconstruction=epochs["epoch_change"])
    np.testing.assert_allclose(lk.completeness(exact)["lc"], 1, rtol=1e-14)
    assert (lk.completeness(exact)["mre"] == 0).all()


def test_completeness__refuses_what_is_no_audit(epochs):
    with pytest.raises(errors.SchemaError, match="no variable 'reconstruction'"):
        lk.completeness(epochs.drop_vars("reconstruction"))
    with pytest.raises(errors.SchemaError, match="expected \\('epoch', 'audit'\\)"):
        lk.completeness(epochs.isel(epoch=0))
    with pytest.raises(TypeError, match="must be the Dataset that lk.audit"):
        lk.completeness(epochs["reconstruction"])
