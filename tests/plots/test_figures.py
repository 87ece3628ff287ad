import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors, plots
from lkarray.engine.numbers import top_k
from tests.helpers.figures import drawn
from tests.helpers.losses import random_losses


def test_similarity_figures__draw_every_input_about_the_target(mapped):
    kernel, points, apart = mapped
    whole, own, *bars = drawn(plots.similarity_to_target(points, kernel[4], 4))
    assert [len(axes.collections[0].get_offsets()) for axes in (whole, own)] == [30, 9]
    for axes in (whole, own):
        np.testing.assert_array_equal(axes.collections[1].get_offsets()[0], points[4])
    assert sorted(whole.collections[0].get_array()) == sorted(kernel[4].values)
    assert [bar.get_ylabel() for bar in bars] == 2 * ["similarity to the target (star)"]
    by_distance = lk.similarity_by_distance(kernel, points, bins=4)
    within, between = drawn(plots.similarity_against_distance(points, kernel[4], 4, by_distance))
    assert within.get_title() == "Within classes: rank correlation -1.00"
    mates = np.arange(30) % 3 == 1
    for axes, at, pairs in ((within, mates, "within"), (between, ~mates, "between")):
        at = np.flatnonzero(at & (np.arange(30) != 4))
        expected = np.stack([apart[4], kernel.values[4]], 1)[at]
        np.testing.assert_allclose(axes.collections[0].get_offsets(), expected)
        row = by_distance.sel(pairs=pairs)
        shown = row["mean"].values[row["count"].values >= 30]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), shown)


def test_neighbor_map__draws_every_sample_once_and_rings_the_marked(clusters):
    points = xr.DataArray(
        np.random.default_rng(0).normal(size=(90, 2)),
        dims=("sample", "component"),
        coords=clusters.coords,
    ).drop_vars(["chain", "draw"], errors="ignore")
    (axes, *_) = drawn(plots.neighbor_map(points, by="group", mark="odd"))
    sizes = [len(c.get_offsets()) for c in axes.collections]
    assert sizes == [30, 30, 30, 45]
    with pytest.raises(errors.SchemaError, match="no coordinate 'wnid'"):
        plots.neighbor_map(points, by="wnid")


def test_kernel_matrix__is_sorted_by_the_label(clusters):
    kernel = lk.correlation(clusters)
    (axes, *_) = drawn(plots.kernel_matrix(kernel, by="group"))
    order = np.argsort(clusters["group"].values, kind="stable")
    image = np.asarray(axes.images[0].get_array())
    expected = kernel.values[np.ix_(order, order)]
    off = ~np.eye(90, dtype=bool)
    np.testing.assert_allclose(image[off], expected[off], atol=1e-6)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]


def test_kernel_matrix__shows_at_most_two_thousand_samples(rng):
    kernel = lk.correlation(random_losses(rng, samples=2500))
    (axes, *_) = drawn(plots.kernel_matrix(kernel, by="label"))
    assert axes.images[0].get_array().shape == (2000, 2000)


def test_top_correlated__shows_references_and_their_best(clusters):
    near = lk.neighbors(clusters, 4).compute()
    images = np.random.default_rng(0).random((90, 8, 8))
    axes = drawn(plots.top_correlated(near, images, [7, 50], by="group", mark="odd", shown=4))
    assert len(axes) == 10
    kernel = lk.correlation(clusters).values
    np.fill_diagonal(kernel, -9)
    best = top_k(kernel, 4)[43]
    for panel, sample in zip(axes[6:], best, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), images[sample])


def test_gain_against_loss__has_one_point_a_sample(clusters):
    (axes,) = drawn(plots.gain_against_loss(clusters, mark="odd"))
    assert [len(c.get_offsets()) for c in axes.collections] == [45, 45]
    np.testing.assert_allclose(
        axes.collections[0].get_offsets()[:, 1], lk.loss_gain(clusters)[::2], rtol=1e-6
    )


def test_neighbor_map__takes_labels_of_any_kind(clusters):
    points = xr.DataArray(
        np.random.default_rng(0).normal(size=(90, 2)),
        dims=("sample", "component"),
        coords={
            "day": ("sample", np.array("2026-01-01", "M8[ns]") + np.arange(90) % 3),
            "many": ("sample", np.arange(90)),
            "word": ("sample", np.array(["a", "b", "c"] * 30)),
        },
    )
    for name, collections in {"day": 3, "many": 1, "word": 3}.items():  # many: one, with a bar
        (axes, *_) = drawn(plots.neighbor_map(points, by=name))
        assert sum(len(c.get_offsets()) for c in axes.collections) == 90
        assert len(axes.collections) == collections


def test_neighbor_map__of_three_components_draws_three(clusters):
    rng = np.random.default_rng(0)
    points = xr.DataArray(
        rng.normal(size=(90, 3)), dims=("sample", "component"), coords={"group": clusters["group"]}
    )
    points[4] = np.nan
    (axes, *_) = drawn(plots.neighbor_map(points, by="group"))
    shown = np.concatenate([np.stack(c._offsets3d, axis=1) for c in axes.collections])
    assert sorted(shown.tolist()) == sorted(points.dropna("sample").values.tolist())
    assert axes.get_zlabel() == "UMAP 3"
    assert "89 inputs (1 without neighbours)" in axes.get_title()
    for wrong in (points[:, :1], xr.concat([points, points], "component")):
        with pytest.raises(errors.SchemaError, match="2 or 3 along 'component'"):
            plots.neighbor_map(wrong, by="group")
