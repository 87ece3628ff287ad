import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors, plots
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from tests.helpers.figures import drawn

M, N, LAYERS, EPOCHS = 60, 6, 3, 8


@pytest.fixture(params=["memory", "dask"])
def audit(request):
    rng = np.random.default_rng(0)
    decay = np.exp(-np.arange(EPOCHS) / 3) * np.array([[1], [10], [0.1]])
    values = rng.standard_t(3, size=(M, N, LAYERS, EPOCHS)) * decay
    change = values.sum((0, 2)).cumsum(1).T
    ds = xr.Dataset(
        {
            "influence": (
                ("example", "audit", "layer", "epoch"),
                values.astype("f4"),
                {"kernel": INFLUENCE_OPERATOR, "units": "nat"},
            ),
            "reconstruction": (("epoch", "audit"), change * (1 + 1e-4 * rng.normal(size=N))),
            "epoch_change": (("epoch", "audit"), change, {"units": "nat"}),
        },
        coords={
            "example": np.arange(M) + 100,
            "train_label": ("example", np.arange(M) % 4),
            "audit": np.arange(N) + 7,
            "label": ("audit", np.arange(N) % 4),
            "layer": ["conv1", "conv2", "fc"],
            "epoch": np.arange(EPOCHS),
        },
        attrs={"complete": True},
    )
    if request.param == "dask":
        ds["influence"] = ds["influence"].chunk({"example": 13, "layer": 1, "epoch": 1})
    return ds


@pytest.fixture
def images():
    return {100 + i: np.full((4, 5), i, float) for i in range(M)}


def test_completeness__spreads_correlations_near_one(audit):
    left, right = drawn(plots.completeness(audit))
    table = lk.completeness(audit)
    np.testing.assert_allclose(left.lines[0].get_ydata(), table["mre"])
    np.testing.assert_allclose(right.lines[0].get_ydata(), 1 - table["lc"])
    low, high = right.get_ylim()
    assert low > (1 - table["lc"]).max()
    assert 0 < high < (1 - table["lc"]).min()
    names = [label.get_text() for label in right.get_yticklabels()]
    assert len(set(names)) == len(names) > 1
    assert all(name == "0" or float(name) > 0.9 for name in names if "-" not in name)
    again = drawn(plots.completeness(table))
    np.testing.assert_array_equal(again[1].lines[0].get_ydata(), right.lines[0].get_ydata())


def test_completeness__draws_what_has_no_correlation_and_says_what_is_partial(audit):
    one = audit.isel(audit=[0]).assign_attrs(complete=False, incomplete="some steps are missing")
    figure = plots.completeness(one)
    assert np.isnan(drawn(figure)[1].lines[0].get_ydata()).all()
    assert "some steps are missing" in figure.get_suptitle()
    exact = audit.assign(reconstruction=audit["epoch_change"])
    assert (drawn(plots.completeness(exact))[1].lines[0].get_ydata() < 1e-12).all()


def test_decision__sorts_the_influences_on_one_example(audit):
    image = np.eye(5)
    left, right = drawn(plots.decision(audit, 9, image))
    np.testing.assert_array_equal(left.images[0].get_array(), image)
    assert "label 2" in left.get_title()
    values = audit["influence"].sel(audit=9).sum(("layer", "epoch")).values
    low, high = (line.get_ydata() for line in right.lines[:2])
    np.testing.assert_allclose(np.concatenate((low, high)), np.sort(values), rtol=1e-4)
    assert (low < 0).all()
    assert (high > 0).all()
    assert f"{values.sum():+.3g}" in right.get_title()
    assert len(drawn(plots.decision(audit["influence"], 9))) == 1


def test_decision__thins_long_curves_and_keeps_their_ends():
    values = np.random.default_rng(0).normal(size=(50_000, 1))
    (axes,) = drawn(plots.decision(xr.DataArray(values, dims=("example", "audit")), 0))
    shown = np.concatenate([line.get_ydata() for line in axes.lines[:2]])
    assert len(shown) <= 2000
    ordered = np.sort(values[:, 0])
    np.testing.assert_array_equal(shown[[0, 1, -2, -1]], ordered[[0, 1, -2, -1]])


def test_influential_images__shows_the_best_of_either_sign(audit, images):
    helpful, harmful = drawn(plots.influential_images(audit, images, 8, 4))
    table = lk.most_influential(audit, 4).sel(audit=8).compute()
    for axes, name in ((helpful, "helpful"), (harmful, "harmful")):
        shown = axes.images[0].get_array()
        assert shown.shape == (10, 12)
        assert [shown[0, 0], shown[0, 6], shown[5, 0], shown[5, 6]] == [
            value - 100 for value in table[name].values
        ]
    again = drawn(plots.influential_images(lk.most_influential(audit, 9), images, 8, 4))
    np.testing.assert_array_equal(
        np.ma.filled(again[0].images[0].get_array(), -1),
        np.ma.filled(helpful.images[0].get_array(), -1),
    )


def test_influential_images__by_class_has_a_row_for_each(audit, images):
    axes = drawn(plots.influential_images(audit, images, 8, 4, by="train_label"))
    assert len(axes) == 8
    assert axes[6].get_title().startswith("train_label 3: most helpful")
    shown = axes[6].images[0].get_array()
    assert shown[0, 0] % 4 == 3
    one = lk.most_influential(audit, 4, by="train_label").sel(train_label=3)
    colours = {label: np.repeat(image[..., None] / M, 3, -1) for label, image in images.items()}
    single = drawn(plots.influential_images(one, colours, 8))
    assert len(single) == 2
    assert single[0].get_title() == axes[6].get_title()
    assert single[0].images[0].get_array().shape == (10, 12, 3)


def test_influential_images__leaves_out_the_other_sign(audit, images):
    down = audit.assign(influence=-abs(audit["influence"]))
    helpful, harmful = drawn(plots.influential_images(down, images, 8))
    assert len(helpful.images) == 1
    assert not harmful.images
    assert harmful.get_title() == "none harmful"


def test_concentration__draws_each_curve_or_their_spread(audit):
    (axes,) = drawn(plots.concentration(audit))
    share = lk.concentration(audit)
    assert len(axes.lines) == N + 2
    np.testing.assert_allclose(axes.lines[0].get_ydata(), share[:, 0])
    half = share["examples"].values[(share.median("audit") >= 0.5).values.argmax()]
    assert f"{half} of 60" in axes.texts[0].get_text()
    many = share.isel(audit=np.arange(200) % N)
    (axes,) = drawn(plots.concentration(many))
    assert len(axes.lines) == 2
    with pytest.raises(errors.SchemaError, match="no training example has influence"):
        plots.concentration(audit["influence"] * 0)


def test_layer_epoch__is_the_mean_over_audited_examples(audit):
    net, gross, *_ = drawn(plots.layer_epoch(audit))
    x = audit["influence"].values.astype(float)
    np.testing.assert_allclose(net.images[0].get_array(), x.sum(0).mean(0))
    np.testing.assert_allclose(gross.images[0].get_array(), np.abs(x).sum(0).mean(0))
    assert [t.get_text() for t in net.get_yticklabels()] == ["conv1", "conv2", "fc"]


def test_audit_figures__refuse_what_they_cannot_show(audit, images):
    with pytest.raises(errors.SchemaError, match="lack \\['epoch'\\]"):
        plots.layer_epoch(audit["influence"].sum("epoch"))
    with pytest.raises(errors.SchemaError, match="no audited example 99 among 6"):
        plots.decision(audit, 99)
    outputs = audit["influence"].expand_dims(output=3)
    for draw in (plots.decision, lambda x, at: plots.influential_images(x, images, at)):
        with pytest.raises(errors.SchemaError, match="select it with audit.isel\\(output"):
            draw(outputs, 8)
        with pytest.raises(errors.SchemaError, match="no 'audit' to find"):
            draw(outputs.isel(output=0, audit=0), 8)
