"""Figures that compare groups: what they draw, and what they refuse."""

import numpy as np
import pytest
import xarray as xr

from lkarray import errors, plots

KINDS = np.repeat(np.array(["clean", "adversarial"], dtype=object), 4)
TIMES = 5


@pytest.fixture
def curves(rng):
    values = rng.normal(size=(TIMES, 8)) + np.where(KINDS == "clean", 1, 3)
    return xr.DataArray(
        values,
        dims=("time", "example"),
        coords={"kind": ("example", KINDS), "time": np.arange(TIMES) * 10},
    )


def test_groups_along__draws_means_of_groups(curves):
    figure = plots.groups_along({"losses": curves}, by="kind", along="time", ylabel="loss (nats)")
    (axes,) = figure.axes
    assert axes.get_title() == "losses"
    assert axes.get_ylabel() == "loss (nats)"
    for line, kind in zip(axes.lines, ("clean", "adversarial"), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), curves["time"])
        np.testing.assert_allclose(line.get_ydata(), curves.values[:, kind == KINDS].mean(1))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "adversarial"]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_groups_along__panels_of_different_dims(curves):
    modes = curves.rename(time="mode").drop_vars("mode")
    figure = plots.groups_along(
        {"a": curves, "b": modes},
        by="kind",
        along=("time", "mode"),
        xlabel=("epoch", None),
        ylabel="ratio",
        rows=2,
        spread=False,
    )
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "leading modes"]
    assert figure.axes[1].lines[0].get_xdata()[0] == 1  # modes are counted from 1
    assert not figure.axes[0].collections


def test_groups_along__refuses_what_it_cannot_group(curves):
    with pytest.raises(errors.SchemaError, match=r"coordinate 'label'"):
        plots.groups_along({"a": curves}, by="label", along="time", ylabel="")
    with pytest.raises(errors.SchemaError, match="'mode' and one more dim"):
        plots.groups_along({"a": curves}, by="kind", along="mode", ylabel="")


def test_regime__has_both_axes(curves):
    metric = xr.DataArray(np.linspace(0, 1, TIMES), dims="time")
    figure = plots.regime(
        {"features": metric},
        {"loss": curves},
        by="kind",
        labels=np.arange(TIMES),
        ylabels=["loss (nats)"],
    )
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), metric)
    assert right.get_ylabel() == "loss (nats)"
    assert len(right.lines) == 2


def test_mode_scatter__marks_changes(rng):
    shifts = xr.Dataset(
        {"change": ("mode", [2.0, -1.0, 0.0])},
        coords={"singular_value": ("mode", [9.0, 3.0, 1.0]), "alignment": ("mode", [1.0, -1, 0])},
    )
    figure = plots.mode_scatter(shifts, other=shifts * 1)
    dots = figure.axes[0].collections[0]
    np.testing.assert_array_equal(dots.get_array(), [2, -1, 0])
    assert dots.get_clim() == (-2, 2)
    sizes = dots.get_sizes()
    assert sizes[0] > sizes[1] > sizes[2]
    assert "Random" in figure.axes[1].get_title()


def test_influence_against__fits_the_slope(rng):
    clean = rng.normal(size=300)
    figure = plots.influence_against(
        clean, {"adversarial": 2.5 * clean}, {"adversarial": np.array([0.9, 1.0])}
    )
    assert "slope 2.50" in figure.axes[0].get_title()
    assert "correlation 1.00" in figure.axes[0].get_title()


def test_influence_along_path__is_a_share_of_the_whole(rng):
    at = np.linspace(0, 1, 3)
    gross = xr.DataArray(
        rng.uniform(1, 2, size=(3, 4)),
        dims=("position", "epoch"),
        coords={"position": at, "epoch": np.arange(4)},
    )
    totals = {"adversarial": gross.sum("epoch"), "random": gross.sum("epoch")}
    figure = plots.influence_along_path(gross, totals)
    for line in figure.axes[0].lines:
        assert line.get_ydata()[-1] == pytest.approx(100)
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), gross.sum("epoch"))


def test_image_rows__differences_are_drawn_about_zero(rng):
    image = rng.uniform(size=(6, 5))
    coloured = rng.uniform(size=(6, 5, 3))
    figure = plots.image_rows([[image, image - 0.5], [coloured, coloured - 0.5]], ["a", "b"])
    shown = [axes.images[0] for axes in figure.axes]
    assert shown[0].get_clim() == (0, 1)
    low, high = shown[1].get_clim()
    assert low == -high
    assert figure.axes[0].get_title() == "a"
