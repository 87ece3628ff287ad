"""Kernels with a control: exact where theory is, unbiased elsewhere, one Gram with signs."""

import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray.errors import SchemaError, UnreliableWarning
from lkarray.kernels.control import as_control, moments_of

LAW = {
    "law": "abc",
    "step_size": 0.1,
    "nbeta": 1.0,
    "gamma": 2.0,
    "outcome": "log_odds",
    "weights": "w",
    "observed_data": "d",
    "rank": 3,
}
DIMS = ("chain", "draw", "sample")
pytestmark = pytest.mark.filterwarnings("ignore:the control takes:lkarray.errors.UnreliableWarning")


def features_of(g, **attrs):
    feature = xr.DataArray(g.astype("f4"), dims=("mode", "sample"))
    return xr.Dataset({"feature": feature}, attrs=LAW | {"sketch": "none", "draws": 0} | attrs)


def made(rng, *, chains=4, draws=30, n=9, modes=12, noise=0.5, slope=1.0):
    """Outcomes that are a part predicted, and the kernels that they have in truth."""
    g = rng.normal(size=(modes, n)) / np.sqrt(modes)
    other = noise * rng.normal(size=(4, n))
    q, z = rng.normal(size=(chains, draws, modes)), rng.normal(size=(chains, draws, 4))
    p = q @ g
    o = 3 + slope * p + z @ other
    losses = xr.Dataset(
        {
            "log_odds": (DIMS, o.astype("f4"), {"link": "softplus"}),
            "log_odds_prediction": (DIMS, p.astype("f4"), LAW),
        }
    )
    return losses, features_of(g), slope**2 * g.T @ g + other.T @ other


def definition(losses, features, center="pooled"):
    """The kernel in float64, entry by entry of its definition."""
    o, p = (losses[v].values.astype(float) for v in ("log_odds", "log_odds_prediction"))
    g = features["feature"].values.astype(float)
    chains, draws, n = o.shape
    folds = [np.arange(chains)[::2], np.arange(chains)[1::2]]

    def within(x, fold):
        x = x[fold]
        mean = x.mean(1, keepdims=True) if center == "chain" else x.mean((0, 1), keepdims=True)
        degrees = len(fold) * (draws - 1) if center == "chain" else len(fold) * draws - 1
        return (x - mean).reshape(-1, n) / np.sqrt(degrees)

    total = np.zeros((n, n))
    for fold, others in (folds, folds[::-1]):
        a, b = within(o, others), within(p, others)
        slope = (a * b).sum(0) / (b * b).sum(0)
        a, b = within(o, fold), within(p, fold)
        correction = np.outer(slope, slope) * (g.T @ g - b.T @ b)
        total += len(fold) / chains * (a.T @ a + correction)
    return total


@pytest.mark.parametrize("center", ["pooled", "chain"])
@pytest.mark.parametrize("chains", [2, 5])
def test_covariance__is_its_definition_for_any_chunks(rng, center, chains):
    losses, features, _ = made(rng, chains=chains)
    expected = definition(losses, features, center)
    scale = np.abs(expected).max()
    for chunks in (None, {"chain": 1, "draw": 7, "sample": 4}):
        given = losses if chunks is None else losses.chunk(chunks)
        own = features if chunks is None else features.chunk({"mode": 5, "sample": 2})
        for memory in (None, "40MiB"):
            k = lk.covariance(given, control=own, center=center, memory=memory)
            np.testing.assert_allclose(k, expected, atol=2e-6 * scale)
            np.testing.assert_array_equal(k, k.values.T)
    assert k.dims == ("sample", "sample_2")
    assert k.attrs["control"] == "log_odds_prediction"
    root = np.sqrt(np.diag(expected))
    r = lk.correlation(losses, control=features, center=center)
    np.testing.assert_allclose(r, np.clip(expected / np.outer(root, root), -1, 1), atol=1e-5)
    np.testing.assert_array_equal(np.diag(r), 1)


def test_covariance__is_that_of_predictions_where_they_are_all_there_is(rng):
    losses, features, truth = made(rng, noise=0.0, slope=2.0)
    k = lk.covariance(losses, control=features)
    np.testing.assert_allclose(k, truth, atol=1e-5 * np.abs(truth).max())
    assert k.attrs["control_removed"] > 0.99999
    assert k.attrs["control_coefficient"] == "fitted to the other half"


def test_covariance__is_unbiased_and_has_less_noise(rng):
    sets, fixed = 500, np.random.default_rng(5)
    g, other = fixed.normal(size=(6, 5)), 0.4 * fixed.normal(size=(3, 5))
    truth = g.T @ g + other.T @ other
    # Data sets side by side, as samples of one call: each has draws of its own.
    p = rng.normal(size=(2, 6, sets, 6)) @ g
    o = p + rng.normal(size=(2, 6, sets, 3)) @ other
    flat = {"log_odds": o, "log_odds_prediction": p}
    variables = {name: (DIMS, x.reshape(2, 6, -1)) for name, x in flat.items()}
    losses = xr.Dataset(variables)
    losses["log_odds_prediction"].attrs = LAW
    k = lk.covariance(losses, control=features_of(np.tile(g, sets))).values
    controlled = np.array([k[a : a + 5, a : a + 5] for a in range(0, len(k), 5)])
    plain = np.array([np.cov(o[:, :, a].reshape(12, 5).T) for a in range(sets)])
    error = controlled.std(0) / np.sqrt(sets)
    assert np.abs((controlled.mean(0) - truth) / error).max() < 4
    assert np.median(controlled.std(0) / plain.std(0)) < 0.7


def test_coefficients__are_of_the_other_half(rng):
    losses, features, _ = made(rng, chains=4)
    before = moments_of(as_control(losses, features, center="pooled", estimator="sample"), None)
    changed = losses.copy(deep=True)
    changed["log_odds"][{"chain": [0, 2]}] = 7 * rng.normal(size=(2, 30, 9))
    after = moments_of(as_control(changed, features, center="pooled", estimator="sample"), None)
    np.testing.assert_array_equal(after.coefficient[0], before.coefficient[0])
    assert (after.coefficient[1] != before.coefficient[1]).all()


def test_gaussian__has_the_controlled_moments(rng):
    losses, features, _ = made(rng)
    losses["log_odds"].attrs["link"] = "square"
    c = lk.covariance(losses, control=features).values.astype(float)
    mean = moments_of(as_control(losses, features, center="pooled", estimator="sample"), None).mean
    expected = 2 * c**2 + 4 * np.outer(mean, mean) * c
    k = lk.covariance(losses, control=features, estimator="gaussian")
    np.testing.assert_allclose(k, expected, atol=1e-5 * expected.max())
    assert (k.attrs["estimator"], k.attrs["units"]) == ("gaussian", "nat^2")
    root = np.sqrt(np.diag(expected))
    r = lk.correlation(losses, control=features, estimator="gaussian")
    np.testing.assert_allclose(r, expected / np.outer(root, root), atol=1e-5)


def test_neighbors_and_save__take_the_same_kernel(rng, tmp_path):
    losses, features, _ = made(rng, n=12)
    for estimator in ("sample", "gaussian"):
        options = {"control": features, "estimator": estimator}
        r = lk.correlation(losses, **options).values.copy()
        np.fill_diagonal(r, -2)
        near = lk.neighbors(losses, 3, **options).compute()
        np.testing.assert_array_equal(near["neighbor"], np.argsort(-r, axis=1)[:, :3])
        assert near.attrs["control"] == "log_odds_prediction"
    kernel = lk.correlation(losses, control=features)
    lk.save(kernel, tmp_path / "k.zarr", group="derived/r")
    kept = lk.open(tmp_path / "k.zarr")["derived/r/correlation"]
    np.testing.assert_array_equal(kept, kernel)


def test_one_chain__has_coefficients_of_one(rng):
    losses, features, truth = made(rng, chains=1, draws=40, noise=0.1)
    k = lk.covariance(losses, control=features)
    assert k.attrs["control_coefficient"] == "1"
    np.testing.assert_allclose(k, truth, atol=0.15)
    other = losses.rename(log_odds="loss")
    with pytest.raises(ValueError, match="too few draws to fit"):
        lk.covariance(other, control=features)


def test_rows__that_do_not_vary_or_fall_below_zero(rng):
    losses, features, _ = made(rng, draws=4)
    losses["log_odds"][..., 2] = 1.0
    r = lk.correlation(losses, control=features)
    np.testing.assert_array_equal(r[2], 0)
    assert bool(lk.neighbors(losses, 2, control=features)["constant"][2])
    # Predictions that vary far more over these draws than they do in truth.
    small = features_of(features["feature"].values * 1e-3)
    k = lk.covariance(made(rng, noise=0.0, slope=3.0)[0], control=small)
    assert k.attrs["control_fallback"] >= 0
    r = lk.correlation(losses, control=small)
    assert (np.abs(r.values) <= 1).all()
    np.testing.assert_array_equal(np.diag(r)[[0, 1, 3]], 1)


@pytest.mark.filterwarnings("default:the control takes:lkarray.errors.UnreliableWarning")
def test_control__that_predicts_nothing_says_so_and_leaves_the_plain_estimate(rng):
    losses, features, _ = made(rng, draws=2000, slope=0.0)
    with pytest.warns(UnreliableWarning, match="degrades to the plain estimate"):
        k = lk.covariance(losses, control=features)
    plain = lk.covariance(losses["log_odds"])
    np.testing.assert_allclose(k, plain, atol=0.01)
    assert abs(k.attrs["control_removed"]) < 0.01


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"law": "other"}, "law 'other' where the predictions have 'abc'"),
        ({"step_size": 0.0}, "step_size 0.0"),
        ({"outcome": "loss"}, "outcome 'loss'"),
        ({"weights": None}, "weights None"),
        ({"sketch": 64}, "sketched"),
        ({"draws": 8}, "averaged over draws"),
    ],
)
def test_control__refuses_features_of_another_law(rng, attrs, message):
    losses, features, _ = made(rng)
    with pytest.raises(ValueError, match=message):
        lk.covariance(losses, control=features.assign_attrs(attrs))


def test_control__refuses_what_has_no_predictions(rng):
    losses, features, _ = made(rng)
    with pytest.raises(SchemaError, match="a DataArray has no predictions"):
        lk.correlation(losses["log_odds"], control=features)
    with pytest.raises(SchemaError, match="record it by"):
        lk.correlation(losses[["log_odds"]], control=features)
    with pytest.raises(SchemaError, match="sample"):
        lk.correlation(losses, control=features.isel(sample=slice(4)))
    with pytest.raises(TypeError, match=r"lk\.laplace returned"):
        lk.correlation(losses, control=xr.Dataset())
    for options in ({"y": losses}, {"device": "cpu"}, {"center": "draw"}):
        with pytest.raises(ValueError, match="control= "):
            lk.correlation(losses, control=features, **options)
    with pytest.raises(ValueError, match="leave control= out"):
        lk.covariance(losses, control=features, shrinkage=0.5)
    with pytest.raises(ValueError, match="of all draws"):
        lk.neighbors(losses, 2, control=features, crossfit=True)
