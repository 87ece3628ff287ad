import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from tests.helpers.gradients import tensor
from tests.helpers.influences import cut, influence


@pytest.fixture(params=["memory", "dask"])
def audit(request, rng):
    x = influence(rng)
    return (cut(x) if request.param == "dask" else x).to_dataset()


def test_net_and_gross_influence__keep_what_influence_is_split_by(audit):
    x = audit["influence"].astype(float).values
    net, gross = lk.net_influence(audit), lk.gross_influence(audit)
    assert net.dims == gross.dims == ("audit", "output", "layer", "epoch")
    np.testing.assert_allclose(net, x.sum(0))
    np.testing.assert_allclose(gross, np.abs(x).sum(0))
    assert net["layer"].values.tolist() == ["conv", "dense"]
    assert net.attrs == {"units": "nat"}
    assert net.dtype == gross.dtype == np.float64


def test_net_and_gross_influence__accumulate_before_magnitudes_are_taken(audit):
    so_far = audit["influence"].astype(float).values.cumsum(-1)
    np.testing.assert_allclose(lk.net_influence(audit, cumulative=True), so_far.sum(0))
    np.testing.assert_allclose(lk.gross_influence(audit, cumulative=True), np.abs(so_far).sum(0))


def test_gross_influence__ends_at_that_of_influence_over_time(rng):
    """Of gradients, step by step, and of the audit that they make."""
    G, other = tensor(rng), tensor(rng, example=7)
    steps = [
        -rate / 12 * G.values[t] @ other.values[t].T
        for t, rate in enumerate(G["learning_rate"].values)
    ]
    x = xr.DataArray(np.stack(steps, -1), dims=("example", "audit", "epoch"))
    expected = lk.influence_over_time(G, other)
    net, gross = (
        f(x, cumulative=True).transpose("epoch", "audit")
        for f in (lk.net_influence, lk.gross_influence)
    )
    np.testing.assert_allclose(net, expected["net"], atol=1e-12)
    np.testing.assert_allclose(gross, expected["gross"])


def test_net_influence__accumulates_over_time_only(rng):
    x = influence(rng, ("example", "audit"))
    with pytest.raises(errors.SchemaError, match="groups={'time': 'epoch'}"):
        lk.net_influence(x, cumulative=True)
    windows = influence(rng, ("example", "audit", "epoch")).rename(epoch="window")
    net = lk.net_influence(windows, cumulative=True)
    np.testing.assert_allclose(net[:, -1], windows.values.astype(float).sum((0, 2)))
