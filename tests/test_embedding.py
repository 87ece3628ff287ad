import dask
import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr

import lkarray as lk
from lkarray import errors


def purity(points):
    """Share of points whose nearest other point on the map is of their own group."""
    xy = points.values
    distance = ((xy[:, None] - xy[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    group = points["group"].values
    return (group[distance.argmin(1)] == group).mean()


def test_embed__keeps_groups_together_and_labels_on(clusters):
    points = lk.embed(lk.neighbors(clusters, 10), seed=3)
    assert points.dims == ("sample", "component")
    assert points.shape == (90, 2)
    assert points["sample"].values[0] == 7
    assert purity(points) > 0.95
    again = lk.embed(lk.neighbors(clusters, 10), seed=3)
    np.testing.assert_array_equal(points, again)
    assert not np.array_equal(points, lk.embed(lk.neighbors(clusters, 10), seed=4))


def test_embed__takes_a_kernel_and_reads_it_by_rows(clusters, monkeypatch):
    monkeypatch.setattr("lkarray.embedding._ROWS", 17)
    kernel = lk.correlation(clusters, memory="40 KiB")
    assert len(kernel.chunks[0]) > 3
    from_table = lk.embed(lk.neighbors(clusters, 10), seed=3)
    with dask.config.set(scheduler="synchronous"):
        by_tiles = lk.embed(kernel, seed=3, k=10)
    np.testing.assert_array_equal(by_tiles, lk.embed(kernel.compute(), seed=3, k=10))
    assert by_tiles.shape == from_table.shape
    assert purity(by_tiles) > 0.95


def test_embed__with_one_label_excluded_mixes_groups(clusters):
    mixed = lk.embed(lk.neighbors(clusters, 10, exclude="group"), seed=3)
    assert purity(mixed) < 0.9


def test_embed__copes_with_samples_that_have_few_neighbours(clusters):
    few = clusters.assign_coords(group=("sample", np.r_[np.zeros(85, int), np.arange(5) + 1]))
    table = lk.neighbors(few, 10, exclude="group").compute()
    assert (table["neighbor"] == -1).any()
    assert np.isfinite(lk.embed(table)).all()


def test_embed__refuses_what_it_cannot_embed(clusters):
    with pytest.raises(ValueError, match="method must be 'umap'"):
        lk.embed(lk.neighbors(clusters, 3), method="tsne")
    with pytest.raises(ValueError, match="needs correlations"):
        lk.embed(lk.covariance(clusters) * 100)
    with pytest.raises(errors.SchemaError, match="must be square"):
        lk.embed(lk.correlation(clusters)[:5])
    with pytest.raises(errors.SchemaError, match=r"lacks \['neighbor', 'similarity'\]"):
        lk.embed(clusters)
    with pytest.raises(errors.SchemaError, match="must be square"):
        lk.embed(lk.correlation(clusters).rename(sample_2="other"))
    with pytest.raises(errors.SchemaError, match="no row has a neighbour"):
        lk.embed(lk.neighbors(clusters.isel(sample=slice(0, 30, 3)), 3, exclude="group"))
    with pytest.raises(ValueError, match="at least 4 samples"):
        lk.embed(lk.neighbors(clusters.isel(sample=[0, 1]), 1))
    with pytest.raises(TypeError, match="not ndarray"):
        lk.embed(np.eye(3))


@pytest.mark.parametrize("k", [8, 9])
def test_embed__takes_as_many_neighbours_as_there_are(clusters, k):
    ten = clusters.isel(sample=slice(10))
    assert np.isfinite(lk.embed(lk.neighbors(ten, k))).all()
    assert np.isfinite(lk.embed(lk.neighbors(ten, k).transpose("rank", "sample"))).all()


def test_similarity_by_distance__equals_a_loop_over_pairs(mapped):
    kernel, points, apart = mapped
    curves = lk.similarity_by_distance(kernel.chunk({"sample": 7}), points, bins=4)
    group = points["label"].values
    for name in ("within", "between"):
        pairs = [
            (kernel.values[i, j], apart[i, j])
            for i in range(30)
            for j in range(i)
            if (group[i] == group[j]) == (name == "within")
        ]
        low, high = min(d for _, d in pairs), max(d for _, d in pairs)
        bins = [[] for _ in range(4)]
        for value, d in pairs:
            bins[min(int(4 * (d - low) / (high - low)), 3)].append(value)
        row = curves.sel(pairs=name)
        assert row["count"].values.tolist() == [len(held) for held in bins]
        for at, held in enumerate(bins):
            if held:
                assert float(row["mean"][at]) == pytest.approx(np.mean(held))
                assert float(row["sd"][at]) == pytest.approx(np.std(held), abs=1e-12)
            else:
                assert np.isnan(row["mean"][at])
        assert float(row["rank_correlation"]) == pytest.approx(spearmanr(pairs).statistic)
        assert float(row["rank_correlation"]) == pytest.approx(-1)
        np.testing.assert_allclose(
            row["distance"], low + (high - low) * (np.arange(4) + 0.5) / 4, rtol=1e-6
        )
    one = lk.similarity_by_distance(kernel, points, np.zeros(30))
    assert np.isnan(one["rank_correlation"].sel(pairs="between"))
    assert int(one["count"].sum()) == 30 * 29 // 2


def test_similarity_by_distance__refuses_what_does_not_fit(mapped):
    kernel, points, _ = mapped
    with pytest.raises(errors.SchemaError, match="similarity_by_distance: a kernel must be square"):
        lk.similarity_by_distance(kernel[:, :5], points)
    with pytest.raises(errors.SchemaError, match="points have .*of 30 samples"):
        lk.similarity_by_distance(kernel, points[:5])
    with pytest.raises(errors.SchemaError, match="'wnid' is no coordinate"):
        lk.similarity_by_distance(kernel, points, "wnid")
    with pytest.raises(ValueError, match="bins must be at least 1"):
        lk.similarity_by_distance(kernel, points, bins=0)
    with pytest.raises(ValueError, match="similarity_by_distance needs a kernel"):
        lk.similarity_by_distance(kernel.assign_attrs(kernel="influence operator"), points)


@pytest.mark.parametrize("of", ["table", "kernel"])
def test_embed__leaves_constant_losses_out(clusters, of):
    still = np.arange(90) % 9 == 0
    clusters = clusters.assign(
        loss=clusters["loss"].where(xr.DataArray(~still, dims="sample"), 0.5)
    )
    table = lk.neighbors(clusters, 10) if of == "table" else lk.correlation(clusters)
    points = lk.embed(table, k=10, seed=3)
    np.testing.assert_array_equal(np.isnan(points).all("component"), still)
    np.testing.assert_array_equal(np.isnan(points).any("component"), still)
    assert points.attrs["left_out"] == 10
    assert purity(points.isel(sample=~still)) > 0.95
