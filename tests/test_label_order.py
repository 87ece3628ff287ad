"""Tables of the same samples in other orders: brought into one, or refused."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors, plots
from lkarray.embedding import _from_kernel
from tests.helpers import labelled
from tests.helpers.labelled import INDEX, N


@pytest.fixture(scope="module")
def things():
    return labelled.things(labelled.losses())


def turned(x, *dims):
    for dim in dims:
        x = x.isel({dim: np.random.default_rng(5).permutation(x.sizes[dim])})
    return x


def test_similarity_by_distance__brings_points_and_columns_into_order(things):
    R, points = things["R"], things["points"]
    expected = lk.similarity_by_distance(R, points)
    xr.testing.assert_identical(lk.similarity_by_distance(R, turned(points, "sample")), expected)
    xr.testing.assert_identical(lk.similarity_by_distance(turned(R, "sample_2"), points), expected)
    with pytest.raises(errors.SchemaError, match="points has the index .* lacks 17"):
        lk.similarity_by_distance(R, points.assign_coords(sample=np.arange(N) * 2))


def test_embed_and_kernel_matrix__bring_columns_into_order(things):
    R = things["R"]
    tables = [_from_kernel(x, 4)[1] for x in (R, turned(R, "sample_2"))]  # what UMAP gets
    np.testing.assert_array_equal(*tables)
    pictures = [
        plots.kernel_matrix(x, by="label").axes[0].images[0].get_array()
        for x in (R, turned(R, "sample_2"))
    ]
    np.testing.assert_array_equal(*pictures)


def test_mode_functions__bring_examples_and_modes_into_order(rng):
    G = xr.DataArray(
        rng.normal(size=(9, 20)), dims=("example", "param"), coords={"example": np.arange(9) + 4}
    )
    modes = lk.modes(G, 4).compute()
    before = lk.mode_coefficients(modes, G).compute()
    after = before + rng.normal(size=before.shape)
    felt = before.copy(data=rng.uniform(size=before.shape))
    expected = lk.mode_shifts(modes, before, after, felt)
    both = (turned(x, "example", "mode") for x in (after, felt))
    xr.testing.assert_allclose(lk.mode_shifts(modes, before, *both), expected)
    with pytest.raises(errors.SchemaError, match="after has the index"):
        lk.mode_shifts(modes, before, after.assign_coords(example=np.arange(9)))
    ratio = lk.cancellation_ratio(modes, before)
    xr.testing.assert_allclose(lk.cancellation_ratio(turned(modes, "mode"), before), ratio)
    with pytest.raises(errors.SchemaError, match="drive has the index"):
        lk.cancellation_ratio(modes.assign_coords(mode=np.arange(4) + 1), before)


def test_temporal_modes__bring_columns_into_order(rng):
    G = xr.DataArray(
        rng.normal(size=(5, 4, 8)),
        dims=("time", "example", "param"),
        coords={"time": np.arange(5) * 10},
    )
    K = lk.temporal_kernel(G, weight=None).compute()
    expected = lk.temporal_modes(K)
    xr.testing.assert_identical(lk.temporal_modes(turned(K, "time_2")), expected)
    pair = (
        plots.temporal_structure(k, m, k=1)
        for k, m in ((K, expected), (turned(K, "time_2"), turned(expected, "time")))
    )
    first, second = (
        [a.images[0].get_array(), b.lines[0].get_ydata()]
        for a, b, *_ in (figure.axes for figure in pair)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b)


def test_extend_audit__brings_training_examples_into_order(rng):
    G, new = (
        xr.DataArray(
            rng.normal(size=(3, n, 8)),
            dims=("time", "example", "param"),
            coords={"example": np.arange(n) + start},
        )
        for n, start in ((6, 50), (4, 0))
    )
    modes = lk.audit_modes(lk.plgk(G), 4, scale=1).compute()
    cross = lk.plgk(new, G).compute()
    expected = lk.extend_audit(modes, cross)
    xr.testing.assert_allclose(lk.extend_audit(modes, turned(cross, "example_2")), expected)


def test_difficulty_table__brings_columns_into_order(rng):
    index = {"example": INDEX}
    wrong = xr.DataArray(np.arange(N) % 3 == 0, index, ("example",))
    score, loss = (xr.DataArray(rng.normal(size=N), index, ("example",)) for _ in range(2))
    expected = lk.difficulty_table({"a": score.values}, wrong.values, loss.values)
    for given in (
        ({"a": turned(score, "example")}, turned(wrong, "example"), loss),
        ({"a": score}, turned(wrong, "example").to_series(), loss),
        ({"a": score.values}, wrong, loss),
        ({"a": score}, wrong.to_series(), loss.values),
    ):
        xr.testing.assert_allclose(lk.difficulty_table(*given), expected)
    with pytest.raises(errors.SchemaError, match="'a' has no index, and 'wrong' and 'loss' have"):
        lk.difficulty_table({"a": score.values}, wrong, turned(loss, "example"))
    with pytest.raises(errors.SchemaError, match="'a' has the index"):
        lk.difficulty_table({"a": score}, pd.Series(wrong.values), loss)


def test_plots__bring_images_and_times_into_order(things, rng):
    points, images = things["points"], rng.uniform(size=(N, 3, 3))
    named = xr.DataArray(images, dims=("sample", "y", "x"), coords={"sample": INDEX})
    near = things["near"]
    for make in (
        lambda x: plots.axis_extremes(points, x, rows=2),
        lambda x: plots.top_correlated(near, x, INDEX[:2].tolist(), by="label", shown=3),
    ):
        first, second = (
            [axes.images[0].get_array() for axes in make(x).axes if axes.images]
            for x in (images, turned(named, "sample"))
        )
        np.testing.assert_array_equal(first, second)
    audit, train_images = things["audit"], dict(zip(INDEX.tolist(), images, strict=True))
    first, second = (
        [axes.images[0].get_array() for axes in plots.influential_images(audit, x, 1, 3).axes]
        for x in (train_images, turned(named, "sample").rename(sample="example"))
    )
    np.testing.assert_array_equal(first, second)
    curve = xr.DataArray(np.arange(5.0), dims="time", coords={"time": np.arange(5) * 10})
    epochs = xr.DataArray(np.arange(5) + 1, dims="time", coords={"time": np.arange(5) * 10})
    line = plots.over_training({"a": curve}, ylabel="", title="", labels=epochs[::-1]).axes[0].lines
    np.testing.assert_array_equal(line[0].get_xdata(), np.arange(5) + 1)
    panel = curve.expand_dims(example=2, axis=1).assign_coords(kind=("example", ["a", "b"]))
    left = plots.regime(
        {"m": curve[::-1]}, {"p": panel}, by="kind", labels=epochs[::-1], ylabels=[""]
    ).axes[0]
    np.testing.assert_array_equal(left.lines[0].get_xydata().T, [np.arange(5) + 1, np.arange(5)])
    one = xr.DataArray(rng.normal(size=N), {"example": INDEX}, ("example",))
    dots = plots.influence_against(one, {"k": turned(one, "example")}, {}).axes[0].lines[0]
    np.testing.assert_array_equal(*dots.get_xydata().T)


def test_color_groups__have_the_index_of_their_images(rng):
    images = rng.uniform(size=(9, 4, 4, 3))
    named = xr.DataArray(
        images, dims=("sample", "y", "x", "c"), coords={"sample": np.arange(9) + 3}
    )
    colors = lk.color_groups(named[::-1], 3)
    assert colors["sample"].values.tolist() == list(range(11, 2, -1))
    series = pd.Series(list(images), index=np.arange(9) + 3)
    assert lk.color_groups(series, 3)["sample"].values.tolist() == list(range(3, 12))
    assert lk.color_groups(images, 3)["sample"].values.tolist() == list(range(9))
