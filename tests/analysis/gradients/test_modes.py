import dask
import numpy as np
import pytest
import xarray as xr

from lkarray import errors
from lkarray.analysis.gradients.gradient_kernels import temporal_kernel
from lkarray.analysis.gradients.modes import (
    cancellation_ratio,
    mode_coefficients,
    modes,
    parameter_modes,
    temporal_modes,
)
from lkarray.analysis.gradients.online_modes import online_modes
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from lkarray.kernels.ranks import participation_ratio
from tests.helpers.gradients import WEIGHTS
from tests.helpers.losses import Forbidding


@pytest.fixture
def at_end(G):
    return modes(G.isel(time=-1), 6).compute()


def test_modes__are_algorithm_one(G, at_end):
    u, s, v = np.linalg.svd(G.values[-1], full_matrices=False)
    sign = np.sign(np.take_along_axis(u, np.abs(u).argmax(0)[None], 0)[0])
    np.testing.assert_allclose(at_end["singular_value"], s[:6])
    np.testing.assert_allclose(at_end["left"], (u * sign)[:, :6], atol=1e-10)
    np.testing.assert_allclose(at_end["direction"], (v * sign[:, None])[:6], atol=1e-10)
    alignment = (u * sign).sum(0)[:6]
    np.testing.assert_allclose(at_end["alignment"], alignment, atol=1e-10)
    np.testing.assert_allclose(at_end["drive"], alignment * s[:6], atol=1e-9)
    assert at_end["direction"].dims == ("mode", "param")
    assert at_end["label"].dims == ("example",)
    assert float(participation_ratio(at_end["singular_value"])) < 6


def test_modes__add_up_to_the_change_of_a_loss(G):
    """Sum over modes of drive times coefficient is the sum over examples of the LGK."""
    g = G.values[-1]
    every = modes(G.isel(time=[-1]), 12).compute()
    c = mode_coefficients(every, G.isel(time=-1))
    np.testing.assert_allclose((every["drive"] * c).sum("mode"), (g @ g.T).sum(0))


def test_modes__refuses_several_times(G):
    with pytest.raises(errors.SchemaError, match="one time, and G has 5: select it with"):
        modes(G, 3)
    with pytest.raises(ValueError, match="k must be between 1 and 12"):
        modes(G.isel(time=0), 13)


def test_mode_coefficients__are_projections(G, at_end):
    v = at_end["direction"].values
    c = mode_coefficients(at_end, G)
    assert c.dims == ("time", "example", "mode")
    np.testing.assert_allclose(c, np.einsum("kp,tmp->tmk", v, G.values), atol=1e-12)
    assert c["label"].dims == ("example",)
    assert c.indexes["time"].equals(G.indexes["time"])
    one = mode_coefficients(at_end, G.isel(time=1))
    assert one.dims == ("example", "mode")
    np.testing.assert_allclose(one, c[1], atol=1e-12)
    np.testing.assert_allclose(c[-1].sum("example"), at_end["drive"], atol=1e-10)


def test_mode_coefficients__follow_directions_that_move(G):
    online = online_modes(G, 3, batch_size=5).compute()
    c = mode_coefficients(online, G)
    assert c.dims == ("time", "example", "mode")
    expected = np.einsum("tkp,tmp->tmk", online["direction"].values, G.values)
    np.testing.assert_allclose(c, expected, atol=1e-12)
    later = slice(1, None)
    frozen = mode_coefficients(online.shift(time=1).isel(time=later), G.isel(time=later))
    expected = np.einsum("tkp,tmp->tmk", online["direction"].values[:-1], G.values[1:])
    np.testing.assert_allclose(frozen, expected, atol=1e-12)
    moving = online.assign(drive=c.sum("example"))
    ratio = cancellation_ratio(moving, c)
    assert ratio.dims == ("time", "example", "mode")
    assert float(ratio.max()) <= 1


def test_mode_coefficients__refuse_what_does_not_fit(G, at_end):
    with pytest.raises(errors.SchemaError, match="Dataset with 'direction' along 'mode'"):
        mode_coefficients(at_end.drop_vars("direction"), G)
    with pytest.raises(errors.SchemaError, match="29 and 30 entries along 'param'"):
        mode_coefficients(at_end, G.isel(param=slice(29)))


def test_cancellation_ratio__equals_loops(G, at_end):
    c = mode_coefficients(at_end, G).compute()
    c[2, 3] = 0
    c[1, 4, 0] = 0
    ratio = cancellation_ratio(at_end, c)
    assert ratio.dims == ("time", "example", "mode")
    for t in range(5):
        for n in range(12):
            for k in range(6):
                parts = [float(at_end["drive"][i]) * float(c[t, n, i]) for i in range(k + 1)]
                gross = sum(map(abs, parts))
                expected = abs(sum(parts)) / gross if gross else np.nan
                assert float(ratio[t, n, k]) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert np.isnan(ratio[2, 3]).all()
    assert np.isnan(ratio[1, 4, 0])
    assert ratio.groupby("label").mean().dims == ("time", "label", "mode")


def test_cancellation_ratio__refuses_other_modes(G, at_end):
    c = mode_coefficients(at_end, G)
    with pytest.raises(errors.SchemaError, match="and there are 4 drives"):
        cancellation_ratio(at_end.isel(mode=slice(4)), c)
    with pytest.raises(errors.SchemaError, match="'drive' along 'mode'.*assign\\(drive=...\\)"):
        cancellation_ratio(at_end.drop_vars("drive"), c)
    part = slice(4)
    head = cancellation_ratio(at_end.isel(mode=part), c.isel(mode=part))
    np.testing.assert_allclose(head, cancellation_ratio(at_end, c)[..., :4])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_parameter_modes__are_eigenvectors_of_the_parameter_covariance(G, weight):
    covariance = np.einsum("t,tmp,tmq->pq", WEIGHTS[weight], G.values, G.values)
    value, vector = np.linalg.eigh(covariance)
    modes = parameter_modes(G, 4, weight=weight).compute()
    np.testing.assert_allclose(modes["eigenvalue"], value[::-1][:4])
    np.testing.assert_allclose(modes["share"], value[::-1][:4] / value.sum())
    overlap = np.abs(modes["direction"].values @ vector[:, ::-1][:, :4])
    np.testing.assert_allclose(overlap, np.eye(4), atol=1e-8)
    assert (modes["direction"].max("param") >= -modes["direction"].min("param")).all()


def test_parameter_modes__at_one_time_are_the_modes_up_to_sign(G, at_end):
    of_params = parameter_modes(G.isel(time=-1), 6).compute()
    np.testing.assert_allclose(of_params["eigenvalue"], at_end["singular_value"] ** 2)
    overlap = (of_params["direction"].values * at_end["direction"].values).sum(1)
    np.testing.assert_allclose(np.abs(overlap), 1)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_temporal_modes__decompose_the_temporal_kernel(G, weight):
    kernel = temporal_kernel(G, weight=weight)
    decomposed = temporal_modes(G, weight=weight).compute()
    xr.testing.assert_allclose(decomposed, temporal_modes(kernel).compute())
    loading, value = decomposed["loading"].values, decomposed["eigenvalue"].values
    np.testing.assert_allclose(loading * value @ loading.T, kernel, atol=1e-10)
    np.testing.assert_allclose(loading.T @ loading, np.eye(5), atol=1e-12)
    assert (np.diff(value) <= 0).all()
    assert float(decomposed["share"].sum()) == pytest.approx(1)
    assert (decomposed["loading"].max("time") >= -decomposed["loading"].min("time")).all()
    assert decomposed["time"].values.tolist() == G["time"].values.tolist()
    few = temporal_modes(kernel.compute(), 2)
    xr.testing.assert_allclose(few, decomposed.isel(mode=slice(2)))


def test_temporal_modes__of_nothing_hold_no_share(G):
    decomposed = temporal_modes(G * 0, weight=None).compute()
    assert not decomposed["eigenvalue"].any()
    assert decomposed["share"].isnull().all()


def test_temporal_modes__refuse_what_is_no_temporal_kernel(G):
    kernel = temporal_kernel(G)
    with pytest.raises(errors.SchemaError, match="takes a kernel \\(time, time_2\\), not"):
        temporal_modes(kernel[:3])
    with pytest.raises(errors.SchemaError, match="takes a kernel \\(time, time_2\\), not"):
        temporal_modes(kernel.rename(time="draw"))
    with pytest.raises(ValueError, match="temporal_modes needs a kernel"):
        temporal_modes(kernel.assign_attrs(kernel=INFLUENCE_OPERATOR))
    for k in (0, 6):
        with pytest.raises(ValueError, match="between 1 and 5, the number of times"):
            temporal_modes(kernel, k)


def test_modes__compute_nothing_until_asked(G, at_end):
    with dask.config.set(scheduler=Forbidding()):
        lazy = modes(G.isel(time=0), 3)
        cancellation_ratio(lazy, mode_coefficients(lazy, G))
        mode_coefficients(at_end, G)
        parameter_modes(G, 3, weight="lr2")
        temporal_modes(G, 2)
        online_modes(G, 3)


def test_mode_coefficients__of_lazy_modes_are_the_same(G, at_end):
    lazy = mode_coefficients(modes(G.isel(time=-1), 6), G)
    np.testing.assert_allclose(lazy, mode_coefficients(at_end, G), atol=1e-10)
