import dask
import numpy as np
import pytest
import xarray as xr

from lkarray import errors
from lkarray.analysis.gradients.gradient_kernels import INFLUENCE, temporal_kernel
from lkarray.analysis.gradients.modes import (
    cancellation_ratio,
    mode_coefficients,
    modes,
    parameter_modes,
    temporal_modes,
)
from lkarray.analysis.gradients.online import OjaModes, online_modes
from lkarray.kernels.ranks import participation_ratio
from tests.helpers.gradients import WEIGHTS, tensor
from tests.helpers.losses import Forbidding


@pytest.fixture
def G(rng):
    return tensor(rng).chunk({"time": 1, "example": 5, "param": 11})


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
        temporal_modes(kernel.assign_attrs(kernel=INFLUENCE))
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


# --- online -----------------------------------------------------------------------------------


def stream(rng, batches, rows=50, params=40, dtype="float64"):
    """Batches of one distribution, whose directions are weaker by a factor each."""
    basis = np.linalg.qr(rng.normal(size=(params, params)))[0]
    scale = 0.75 ** np.arange(params)
    values = rng.normal(size=(batches, rows, params)) * scale @ basis
    return values.astype(dtype), basis


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_oja__finds_the_leading_space_at_any_scale(rng, scale, dtype, rate):
    values, basis = stream(rng, 60, dtype=dtype)
    values *= scale
    oja = OjaModes(5, learning_rate=rate)
    for batch in values[:-1]:
        oja.update(batch)
    directions = oja.directions
    assert directions.dtype == dtype
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-5)
    test = values[-1]
    best = np.linalg.svd(values[:-1].reshape(-1, 40), full_matrices=False)[2][:5]
    optimum = np.linalg.norm(test @ best.T) / np.linalg.norm(test)
    assert oja.energy(test) >= 0.99 * optimum
    cosines = np.linalg.svd(directions.T @ basis[:5].T, compute_uv=False)
    assert cosines[:3].min() > 0.97
    energies = (0.75 ** np.arange(5)) ** 2 * scale**2
    np.testing.assert_allclose(oja.energies, energies, rtol=0.3)


def test_oja__of_batches_smaller_than_its_modes(rng):
    values, _ = stream(rng, 400, rows=2)
    oja = OjaModes(6, learning_rate=0.01)
    assert np.isnan(oja.energy(values[0]))
    for batch in values:
        oja.update(batch)
    everything = values.reshape(-1, 40)
    s = np.linalg.svd(everything, compute_uv=False)
    assert oja.energy(everything) >= 0.99 * np.sqrt((s[:6] ** 2).sum() / (s**2).sum())


def test_oja__of_one_matrix_over_and_over_converges_to_its_svd(rng):
    values, _ = stream(rng, 1)
    oja = OjaModes(4, learning_rate=0.5)
    for _ in range(200):
        oja.update(values[0])
    v = np.linalg.svd(values[0])[2][:4]
    np.testing.assert_allclose(np.abs(oja.directions.T @ v.T), np.eye(4), atol=1e-6)


def test_oja__survives_batches_of_zeros(rng):
    oja = OjaModes(3)
    for batch in (np.zeros((4, 9)), np.zeros((4, 9)), rng.normal(size=(4, 9))):
        oja.update(batch)
    np.testing.assert_allclose(oja.directions.T @ oja.directions, np.eye(3), atol=1e-12)
    assert np.isnan(oja.energy(np.zeros((4, 9))))


def test_online_modes__are_oja_frozen_at_each_time(rng):
    values, _ = stream(rng, 6, rows=12, params=30)
    G = xr.DataArray(values, dims=("time", "example", "param"), coords={"time": np.arange(6) * 7})
    followed = online_modes(G.chunk({"time": 1, "example": 4}), 3, batch_size=5, seed=1).compute()
    oja = OjaModes(3, seed=1)
    for t, gradients in enumerate(values):
        energy = oja.energy(gradients)
        assert float(followed["energy_captured"][t]) == pytest.approx(energy, nan_ok=True)
        for start in (0, 5, 10):
            oja.update(gradients[start : start + 5])
        overlap = (followed["direction"].values[t] * oja.directions.T).sum(1)
        np.testing.assert_allclose(np.abs(overlap), 1)
    assert followed["direction"].dims == ("time", "mode", "param")
    assert followed["time"].values.tolist() == [0, 7, 14, 21, 28, 35]
    assert (followed["direction"].max("param") >= -followed["direction"].min("param")).all()


def test_online_modes__refuse_bad_requests(G):
    with pytest.raises(ValueError, match="between 1 and 30, the parameters"):
        online_modes(G, 31)
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        online_modes(G, 3, learning_rate=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        online_modes(G, 3, batch_size=0)
    with pytest.raises(errors.SchemaError, match="lack \\['time'\\]"):
        online_modes(G.isel(time=0), 3)
    with pytest.raises(errors.SchemaError, match="online_modes takes"):
        online_modes(G.expand_dims(output=2), 3)
    with pytest.raises(errors.NonFiniteError, match="'time': 2, 'example': 3"):
        online_modes(
            G.where(G["time"] + xr.DataArray(np.arange(12), dims="example") != 23), 3
        ).compute()
