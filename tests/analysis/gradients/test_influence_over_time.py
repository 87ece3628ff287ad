import numpy as np
import pytest
import xarray as xr

from lkarray import errors
from lkarray.analysis.gradients.gradient_kernels import plgk
from lkarray.analysis.gradients.influence_over_time import influence_over_time
from tests.helpers.gradients import RATES, tensor


@pytest.fixture
def audit(rng):
    return tensor(rng, example=7).chunk({"time": 1, "example": 3, "param": 11})


@pytest.mark.parametrize("weight", ["lr", None])
@pytest.mark.parametrize("memory", [None, "40 KiB"])
def test_influence_over_time__equals_brute_force(rng, weight, memory):
    train = tensor(rng, example=60).chunk({"time": 1, "example": 9, "param": 11})
    audit = tensor(rng, example=25).chunk({"time": 1, "example": 9, "param": 11})
    influences = influence_over_time(train, audit, weight=weight, memory=memory).compute()
    p, net, gross = np.zeros((60, 25)), [], []
    for t in range(5):
        p -= (RATES[t] if weight else 1) / 60 * train.values[t] @ audit.values[t].T
        net.append(p.sum(0))
        gross.append(np.abs(p).sum(0))
    np.testing.assert_allclose(influences["net"], net, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(influences["gross"], gross, rtol=1e-9)
    assert influences["net"].dims == ("time", "example_2")
    assert influences["label_2"].values.tolist() == audit["label"].values.tolist()
    assert "label" not in influences.coords
    assert (influences["gross"] >= abs(influences["net"]) - 1e-12).all()


def test_influence_over_time__is_cut_into_tiles_within_a_budget(rng):
    train = tensor(rng, example=60).chunk({"time": 1, "example": 9, "param": 11})
    cut = influence_over_time(train, train, memory="40 KiB")["net"]
    assert len(cut.data.chunks[1]) > 1
    np.testing.assert_allclose(cut, influence_over_time(train, train)["net"], atol=1e-12)


def test_influence_over_time__ends_at_the_weighted_plgk(G, audit):
    influences = influence_over_time(G, audit)
    p = -plgk(G, audit, weight="lr") / 12
    np.testing.assert_allclose(influences["net"][-1], p.sum("example"), atol=1e-12)
    np.testing.assert_allclose(influences["gross"][-1], abs(p).sum("example"))


def test_influence_over_time__is_the_change_of_the_losses_in_full_batch_descent(rng):
    """Linear regression, half squared error: exact as the step size vanishes."""
    x, y = rng.normal(size=(8, 3)), rng.normal(size=8)
    theta, eta, gradients, losses = np.zeros(3), 1e-4, [], []
    for _ in range(50):
        residual = x @ theta - y
        losses.append(residual**2 / 2)
        gradients.append(residual[:, None] * x)
        theta = theta - eta * gradients[-1].mean(0)
    change = (x @ theta - y) ** 2 / 2 - losses[0]
    G = xr.DataArray(
        np.array(gradients),
        dims=("time", "example", "param"),
        coords={"learning_rate": ("time", np.full(50, eta))},
    )
    influences = influence_over_time(G, G)
    np.testing.assert_allclose(influences["net"][-1], change, rtol=2e-3)


def test_influence_over_time__refuses_what_does_not_fit(G, audit):
    with pytest.raises(ValueError, match="weight must be one of \\(None, 'lr'\\)"):
        influence_over_time(G, audit, weight="lr2")
    with pytest.raises(errors.SchemaError, match="no coordinate learning_rate"):
        influence_over_time(G.drop_vars("learning_rate"), audit)
    with pytest.raises(errors.SchemaError, match="5 and 4 entries along 'time'"):
        influence_over_time(G, audit.isel(time=slice(4)))
    with pytest.raises(errors.SchemaError, match="30 and 3 entries along 'param'"):
        influence_over_time(G, audit.isel(param=slice(3)))
    with pytest.raises(errors.SchemaError, match="audit_G.* lack \\['time'\\]"):
        influence_over_time(G, audit.isel(time=0))
    with pytest.raises(errors.SchemaError, match="must leave one"):
        influence_over_time(G, audit.expand_dims(output=2))
