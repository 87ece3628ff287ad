import dask
import numpy as np
import pytest
import xarray as xr
from scipy.linalg import subspace_angles

from lkarray import errors
from lkarray.analysis.gradients.difficulty import hidden_similarity, ips_scores
from lkarray.analysis.gradients.gradient_kernels import ips
from lkarray.analysis.gradients.influence_over_time import influence_over_time
from lkarray.analysis.gradients.overlaps import (
    activation_overlap,
    feature_overlap,
    subspace_overlap,
)
from tests.helpers.gradients import tensor
from tests.helpers.losses import Forbidding


@pytest.fixture
def audit(rng):
    return tensor(rng, example=7).chunk({"time": 1, "example": 3, "param": 11})


@pytest.mark.parametrize("reference", [-1, 0, 2])
def test_feature_overlap__is_the_mean_cosine(G, reference):
    g = G.values
    norm = np.linalg.norm(g, axis=-1)
    cosine = (g * g[reference]).sum(-1) / (norm * norm[reference])
    result = feature_overlap(G, reference=reference)
    np.testing.assert_allclose(result, cosine.mean(1), atol=1e-14)
    assert float(result[reference]) == pytest.approx(1)
    assert result.dims == ("time",)
    assert result.dtype == np.float64
    np.testing.assert_allclose(
        activation_overlap(G.rename(param="unit"), reference=reference), cosine.mean(1), atol=1e-14
    )


def test_feature_overlap__counts_examples_without_gradient_as_zero(G):
    silent = G.where(xr.DataArray(np.arange(12) >= 3, dims="example"), 0)
    assert float(feature_overlap(silent)[-1]) == pytest.approx(9 / 12)
    tiny = (silent * 1e-30).astype("float32")
    assert float(feature_overlap(tiny)[-1]) == pytest.approx(9 / 12)


@pytest.mark.parametrize("reference", [-1, 1])
@pytest.mark.parametrize("k", [1, 4])
def test_subspace_overlap__is_the_mean_cosine_of_principal_angles(G, reference, k):
    spaces = [np.linalg.svd(g)[2][:k].T for g in G.values]
    expected = [np.cos(subspace_angles(v, spaces[reference])).mean() for v in spaces]
    result = subspace_overlap(G, k, reference=reference)
    np.testing.assert_allclose(result, expected, atol=1e-7)
    assert result.indexes["time"].equals(G.indexes["time"])
    assert result.dims == ("time",)


def test_overlaps__refuse_bad_requests(G):
    for overlap in (feature_overlap, subspace_overlap):
        with pytest.raises(errors.SchemaError, match="position of a time, and there are 5"):
            overlap(G, reference=5)
        with pytest.raises(errors.SchemaError, match="lack \\['time'\\]"):
            overlap(G.isel(time=0))
    with pytest.raises(ValueError, match="k must be between 1 and 12"):
        subspace_overlap(G, 13)
    with pytest.raises(errors.SchemaError, match="must leave one"):
        activation_overlap(G.expand_dims(layer=2))
    with pytest.raises(TypeError, match="must be an xarray.DataArray"):
        activation_overlap(G.values)


def test_regime__computes_nothing_until_asked(G, audit):
    with dask.config.set(scheduler=Forbidding()):
        feature_overlap(G)
        subspace_overlap(G, 3)
        influence_over_time(G, audit)
        ips_scores(ips(audit, G), np.arange(12) % 3, np.arange(7) % 3)
        x, y = (g.isel(time=0).rename(param="unit") for g in (audit, G))
        hidden_similarity(x, y, np.arange(12) % 3, np.arange(7) % 3, k=2)
