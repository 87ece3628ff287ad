"""Features stand for losses wherever a kernel is asked for: plain products over ``mode``."""

import numpy as np
import pytest
import xarray as xr
from zarr.storage import MemoryStore

import lkarray as lk

N, MODES = 12, 7
LABEL = np.repeat([0, 1, 2], 4)


@pytest.fixture
def values():
    # A common offset: what subtracts means over modes is far from the plain product.
    return np.random.default_rng(0).normal(size=(MODES, N)) + 3


@pytest.fixture
def features(values):
    array = xr.DataArray(values, dims=("mode", "sample"), coords={"label": ("sample", LABEL)})
    half = xr.DataArray(np.stack([values, values]), dims=("half", "mode", "sample"))
    return xr.Dataset({"feature": array, "feature_half": half})


def cosine(x):
    norm = np.linalg.norm(x, axis=0)
    return x.T @ x / np.outer(norm, norm)


def test_features__kernels_are_plain_products(values, features):
    np.testing.assert_allclose(lk.covariance(features).values, values.T @ values)
    np.testing.assert_allclose(lk.correlation(features).values, cosine(values))
    np.testing.assert_allclose(features.lk.covariance().values, values.T @ values)
    other = features.isel(sample=slice(5))
    expected = values.T @ values[:, :5]
    np.testing.assert_allclose(lk.covariance(features, other).values, expected)
    np.testing.assert_allclose(lk.influence(features, other).values, -expected)


def test_features__neighbors_groups_and_counts_are_of_the_cosine(values, features):
    kernel = cosine(values)
    near = lk.neighbors(features, 3).compute()
    np.fill_diagonal(kernel, -2)
    np.testing.assert_array_equal(near["neighbor"], np.argsort(-kernel, axis=1)[:, :3])
    assert near.attrs["over"] == ["mode"]
    assert near.attrs["center"] == "none"
    np.fill_diagonal(kernel, 1)
    means = kernel.reshape(3, 4, 3, 4).mean((1, 3))
    np.testing.assert_allclose(lk.group_mean(features, "label").values, means)
    counts = lk.histogram(features, bins=2)["count"].values.ravel()
    off = kernel[~np.eye(N, dtype=bool)]
    assert counts.tolist() == [(off < 0).sum(), (off >= 0).sum()]


def test_features__alignments_are_those_of_the_products(values, features):
    kernel = values.T @ values
    norm = lk.frobenius(features, normalize="count")
    np.testing.assert_allclose(norm.values, (kernel**2).sum())
    centred = np.eye(N) - 1 / N
    other = np.random.default_rng(1).normal(size=(3, 50, N))
    losses = xr.DataArray(other, dims=("chain", "draw", "sample"))
    flat = other.reshape(-1, N)
    flat = flat - flat.mean(0)
    a, b = centred @ kernel @ centred, centred @ flat.T @ flat @ centred
    expected = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(lk.cka(features, losses).values, expected)
    with pytest.raises(ValueError, match="features have none"):
        lk.cka(features, losses, debiased="draws")


def test_features__are_stored_and_decomposed(values, features):
    store = MemoryStore()
    saved = lk.save(lk.correlation(features), store)
    np.testing.assert_allclose(saved.values, cosine(values))
    s = np.linalg.svd(values, compute_uv=False)[:2]
    svd = features.lk.svd(2)
    np.testing.assert_allclose(svd["singular_value"].values, s, rtol=1e-6)
    assert svd["v"].dims == ("element", "mode")
    product = lk.linear_operator(features, kernel="covariance") @ np.ones(N)
    np.testing.assert_allclose(product, values.T @ values @ np.ones(N))


def test_features__lift_is_that_of_their_neighbours(features):
    tree = lk.Taxonomy.from_parents({0: "a", 1: "a", 2: "b", "a": "root", "b": "root"})
    lift = lk.taxonomic_lift(features, tree, k=3, replicates=5)
    expected = lk.taxonomic_lift(
        lk.neighbors(features, 3, exclude="label"), tree, k=3, replicates=5
    )
    xr.testing.assert_allclose(lift["lift"], expected["lift"])
    assert lift.attrs["chains_deleted"] == 0
    curve = lk.correlation_by_distance(features, tree, replicates=5)
    means = lk.group_mean(features, "label", self_pairs=False).values
    np.testing.assert_allclose(np.sort(curve["label_mean"].values, None), np.sort(means, None))


@pytest.mark.parametrize("of", [lk.mcse, lk.ledoit_wolf, lk.loss_variance, lk.diagnostics])
def test_features__are_refused_where_draws_are_needed(features, of):
    with pytest.raises(lk.errors.SchemaError, match=r"no draws|features|draw"):
        of(features)


def test_features__of_several_halves_are_to_be_selected(features):
    with pytest.raises(lk.errors.SchemaError, match="isel"):
        lk.covariance(features["feature_half"])
    half = features["feature_half"].isel(half=0)
    xr.testing.assert_allclose(lk.covariance(half), lk.covariance(features))
