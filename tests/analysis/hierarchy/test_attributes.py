import numpy as np
import pytest

import lkarray as lk
from tests.helpers.hierarchies import table


def test_attribute_lift__equals_the_definition():
    rng = np.random.default_rng(0)
    n, k = 90, 5
    color, label = rng.integers(0, 3, n), rng.integers(0, 12, n)
    neighbor = np.array([rng.choice(np.flatnonzero(label != y), k, replace=False) for y in label])
    near = table(neighbor, label, exclude="label").assign_coords(color=("sample", color))
    lifted = lk.attribute_lift(near, "color")
    for a in range(3):
        rows = neighbor[color == a]
        allowed = label[color == a][:, None] != label
        for b in range(3):
            rate = (color[rows] == b).mean()
            chance = ((color == b) & allowed).sum() / allowed.sum()
            assert lifted["transition"].sel(color=a, color_2=b) == pytest.approx(rate)
            assert lifted["base_rate"].sel(color=a, color_2=b) == pytest.approx(chance)
            if a == b:
                assert lifted["lift"].sel(color=a) == pytest.approx(rate / chance)
    assert lifted["low"].min() < 1 < lifted["high"].max()
    assert abs(lifted["pooled_lift"] - 1) < 4 * lifted["pooled_standard_error"]
    same = np.array(
        [np.flatnonzero((color == c) & (label != y))[:k] for c, y in zip(color, label, strict=True)]
    )
    near["neighbor"] = (("sample", "rank"), same)
    perfect = lk.attribute_lift(near, color)
    np.testing.assert_allclose(perfect["transition"].values, np.eye(3))
    assert (perfect["low"] > 1.5).all()


def test_color_groups__are_spread_out():
    rng = np.random.default_rng(0)
    palette = np.array([[255, 0, 0], [0, 0, 255], [128, 128, 128]])
    which = np.r_[rng.integers(0, 3, 50), 0, 1, 2]
    images = palette[which][:, None, None, :] + rng.integers(-4, 5, (53, 6, 5, 3))
    colors = lk.color_groups(images, 3)
    assert len({(a, b) for a, b in zip(which, colors.values, strict=True)}) == 3
    first = lk.color_groups(np.moveaxis(images, -1, 1), 3)
    assert np.array_equal(colors, first)
    np.testing.assert_allclose(colors["red"], images[..., 0].mean((1, 2)))
    assert len(colors.attrs["centers"]) == 3
    with pytest.raises(ValueError, match="expected \\(height, width, 3\\)"):
        lk.color_groups(np.zeros((4, 5, 6)))
    with pytest.raises(ValueError, match="between 1 and 1, the mean colours"):
        lk.color_groups(np.zeros((4, 5, 6, 3)))
