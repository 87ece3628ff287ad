import sys

import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from tests.helpers.gradients import tensor
from tests.helpers.losses import Forbidding

SCALE = 0.1 / 12


@pytest.fixture(params=["memory", "dask"])
def gradients(request, rng):
    train, new = tensor(rng), tensor(rng, example=7)
    if request.param == "dask":
        train, new = (g.chunk({"time": 1, "example": 5, "param": 11}) for g in (train, new))
    return train, new


def test_audit_modes__are_those_of_the_kernel(gradients):
    kernel = lk.plgk(gradients[0])
    modes = lk.audit_modes(kernel, 5, scale=SCALE).compute()
    value, vector = np.linalg.eigh(kernel.values)
    value, vector = value[::-1][:5], vector[:, ::-1][:, :5]
    np.testing.assert_allclose(modes["eigenvalue"], value)
    assert modes["vector"].dims == ("example", "mode")
    np.testing.assert_allclose(np.abs((vector * modes["vector"].values).sum(0)), 1)
    np.testing.assert_allclose(modes["drive"], modes["vector"].sum("example"), atol=1e-12)
    assert modes["label"].dims == ("example",)
    assert modes.attrs == {"scale": SCALE, "weight": "none"}


def test_extend_audit__with_all_modes_is_the_column_sums(gradients):
    train, new = gradients
    kernel, cross = lk.plgk(train), lk.plgk(new, train)
    modes = lk.audit_modes(kernel, 12, scale=SCALE).compute()
    predicted = lk.extend_audit(modes, cross)
    assert predicted["change"].dims == ("example",)
    np.testing.assert_allclose(predicted["change"], -SCALE * cross.values.sum(1), rtol=1e-10)
    np.testing.assert_allclose(predicted["contribution"].sum("mode"), predicted["change"])
    assert predicted["contribution"].dims == ("mode", "example")
    assert predicted["label"].values.tolist() == new["label"].values.tolist()
    own = lk.extend_audit(modes, kernel)
    np.testing.assert_allclose(own["change"], -SCALE * kernel.values.sum(0), rtol=1e-10)


def test_extend_audit__splits_by_mode_as_printed(gradients):
    train, new = gradients
    cross = lk.plgk(train, new)
    modes = lk.audit_modes(lk.plgk(train), 4, scale=SCALE).compute()
    predicted = lk.extend_audit(modes, cross)
    q = modes["vector"].values
    expected = -SCALE * q.sum(0)[:, None] * (q.T @ cross.values)
    np.testing.assert_allclose(predicted["contribution"], expected, atol=1e-12)
    assert predicted["contribution"].dims == ("mode", "example_2")
    phi = train.transpose("example", "time", "param").values.reshape(12, -1)
    u, s, _ = np.linalg.svd(phi, full_matrices=False)
    star = new.transpose("example", "time", "param").values.reshape(7, -1)
    right = np.linalg.svd(phi, full_matrices=False)[2]
    by_svd = -SCALE * (u.sum(0) * s)[:4, None] * (right[:4] @ star.T)
    np.testing.assert_allclose(predicted["contribution"], by_svd, atol=1e-10)


def test_audit_modes__of_large_kernels_are_iterated(rng, monkeypatch):
    kernel = lk.plgk(tensor(rng).chunk({"example": 5}))
    dense = lk.audit_modes(kernel, 4, scale=1).compute()
    module = sys.modules["lkarray.analysis.audits.audit_modes"]  # whose name is the function's, too
    monkeypatch.setattr(module, "_DENSE", 11)
    iterated = lk.audit_modes(kernel, 4, scale=1).compute()
    xr.testing.assert_allclose(iterated, dense)


def test_extend_audit__converges_as_modes_are_added(rng):
    """A kernel whose eigenvalues fall by decades, of single precision too."""
    q = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    values = 10.0 ** -np.arange(0, 9, 0.15)
    features = q * np.sqrt(values)
    star = rng.normal(size=(5, 60)) * np.sqrt(values)
    for dtype, least in (("f8", 1e-12), ("f4", 1e-6)):
        kernel = xr.DataArray((features @ features.T).astype(dtype), dims=("example", "example_2"))
        cross = xr.DataArray((star @ features.T).astype(dtype), dims=("new", "example_2"))
        expected = -cross.values.astype(float).sum(1)
        error = []
        for k in (2, 10, 30, 60):
            modes = lk.audit_modes(kernel, k, scale=1).compute()
            change = lk.extend_audit(modes, cross)["change"]
            error.append(float(np.abs(change - expected).max()))
        assert error[0] > 3 * error[1] > 3 * error[2]
        assert error[-1] < least * np.abs(expected).max() * 60


def test_extend_audit__is_the_change_of_losses_in_full_batch_descent(rng):
    """Linear regression, half squared error, of new examples: exact as the step vanishes."""
    x, y, new = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=(4, 3))
    aim, theta, eta, train, other = rng.normal(size=4), np.zeros(3), 1e-4, [], []
    first = (new @ theta - aim) ** 2 / 2
    for _ in range(50):
        train.append((x @ theta - y)[:, None] * x)
        other.append((new @ theta - aim)[:, None] * new)
        theta = theta - eta * train[-1].mean(0)
    dims = ("time", "example", "param")
    rates = {"learning_rate": ("time", np.full(50, eta))}
    G, H = (xr.DataArray(np.array(g), dims=dims, coords=rates) for g in (train, other))
    change = (new @ theta - aim) ** 2 / 2 - first
    for weight, scale in ((None, eta / 8), ("lr", 1 / 8)):
        modes = lk.audit_modes(lk.plgk(G, weight=weight), 8, scale=scale)
        predicted = lk.extend_audit(modes, lk.plgk(H, G, weight=weight))
        np.testing.assert_allclose(predicted["change"], change, rtol=2e-3)


def test_extend_audit__finds_the_training_examples(rng):
    G = tensor(rng)
    train = G.assign_coords(example=np.arange(12) + 100)
    new = tensor(rng).assign_coords(example=np.arange(12))
    modes = lk.audit_modes(lk.plgk(train), 12, scale=1).compute()
    expected = -lk.plgk(new, train).values.sum(1)
    for cross in (lk.plgk(new, train), lk.plgk(train, new)):  # by labels
        np.testing.assert_allclose(lk.extend_audit(modes, cross)["change"], expected)
    bare = lk.plgk(new, train).drop_vars(["example", "example_2"])  # the second, where both fit
    np.testing.assert_allclose(lk.extend_audit(modes, bare)["change"], expected)
    turned = bare.transpose("example_2", "example")
    predicted = lk.extend_audit(modes, turned, training="example_2")
    np.testing.assert_allclose(predicted["change"], expected)


def test_audit_modes__compute_nothing_until_asked(rng):
    G = tensor(rng).chunk({"time": 1, "example": 5, "param": 11})
    with dask.config.set(scheduler=Forbidding()):
        modes = lk.audit_modes(lk.plgk(G), 3, scale=1)
        predicted = lk.extend_audit(modes, lk.plgk(G))
    assert predicted["change"].chunks


def test_audit_modes__refuse_what_does_not_fit(rng):
    train, new = tensor(rng), tensor(rng, example=7)
    kernel, cross = lk.plgk(train), lk.plgk(new, train)
    with pytest.raises(errors.SchemaError, match="expected a square one"):
        lk.audit_modes(cross, 2, scale=1)
    other = train.assign_coords(example=np.arange(12) + 3)
    numbered = train.assign_coords(example=np.arange(12))
    with pytest.raises(errors.SchemaError, match="different examples"):
        lk.audit_modes(lk.plgk(numbered, other), 2, scale=1)
    with pytest.raises(TypeError, match="kernel must be an xarray.DataArray"):
        lk.audit_modes(kernel.values, 2, scale=1)
    with pytest.raises(ValueError, match="k must be between 1 and 12"):
        lk.audit_modes(kernel, 13, scale=1)
    modes = lk.audit_modes(kernel, 3, scale=1)
    with pytest.raises(errors.SchemaError, match="modes must be the Dataset"):
        lk.extend_audit(modes.drop_vars("drive"), cross)
    with pytest.raises(errors.SchemaError, match="of the 12 training examples"):
        lk.extend_audit(modes, lk.plgk(new))
    with pytest.raises(errors.SchemaError, match="expected two"):
        lk.extend_audit(modes, lk.lgk(new, train))
    with pytest.raises(errors.SchemaError, match="training='sample' is no dim"):
        lk.extend_audit(modes, cross, training="sample")
    with pytest.raises(ValueError, match="cross has weight='lr' and the modes' kernel 'none'"):
        lk.extend_audit(modes, lk.plgk(new, train, weight="lr"))
