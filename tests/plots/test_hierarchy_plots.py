"""Figures about hierarchies show what they are given."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import lkarray as lk
from lkarray import plots
from tests.helpers.hierarchies import binary, random_table, taxonomic_losses


@pytest.fixture(scope="module")
def losses():
    return taxonomic_losses(binary(3))


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert np.asarray(canvas.buffer_rgba())[..., :3].std() > 10


@pytest.fixture(scope="module")
def lift(losses):
    return lk.taxonomic_lift(losses, binary(3), k=5, replicates=20)


def test_lift_by_depth__draws_a_curve_for_each_query_depth(lift):
    figure = plots.lift_by_depth(lift)
    rendered(figure)
    (line,) = [ln for ln in figure.axes[0].lines if len(ln.get_xdata()) > 2]
    shown = lift.sel(query_depth=3)["lift"].dropna("depth")
    np.testing.assert_allclose(line.get_ydata(), shown)


def test_lift_curves__draws_each_kernel_about_its_value(lift):
    near = random_table(binary(3), 100, 5, np.random.default_rng(0))
    other = lk.taxonomic_lift(near, binary(3), replicates=20)
    figure = plots.lift_curves({"kernel": lift, "random": other})
    rendered(figure)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["kernel", "random"]


def test_hierarchy_matrices__show_mean_and_distance_in_order(losses):
    by_distance = lk.correlation_by_distance(losses, binary(3), replicates=5)
    figure = plots.hierarchy_matrices(by_distance)
    rendered(figure)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_allclose(images[0], by_distance["label_mean"])
    np.testing.assert_allclose(images[1], by_distance["label_distance"])
    curve = plots.correlation_against_distance({"kernel": by_distance})
    rendered(curve)
    np.testing.assert_allclose(curve.axes[0].lines[0].get_ydata(), by_distance["correlation"])


def test_transitions__bars_add_up_to_one(losses):
    color = np.arange(losses.sizes["sample"]) % 3
    top, bottom = (lk.neighbors(losses, 5, exclude="label", largest=end) for end in (True, False))
    lifts = {"top": lk.attribute_lift(top, color), "bottom": lk.attribute_lift(bottom, color)}
    figure = plots.transitions(lifts)
    rendered(figure)
    heights = np.array([bar.get_height() for bar in figure.axes[0].patches]).reshape(3, 3)
    np.testing.assert_allclose(heights.sum(0), 1)
    assert "bottom (lift" in figure.axes[1].get_title()


def test_neighbor_map__takes_hues_of_a_hierarchy(losses):
    taxonomy = binary(3)
    points = losses.isel(chain=0, draw=[0, 1]).transpose("sample", "draw")
    points = points.rename(draw="component")
    figure = plots.neighbor_map(points, by="label", hues=taxonomy.hues())
    rendered(figure)
    first, last = figure.axes[0].collections[0], figure.axes[0].collections[7]
    assert not np.allclose(first.get_facecolor()[0], last.get_facecolor()[0])
