import numpy as np
import pytest
import xarray as xr

from lkarray import errors
from lkarray.analysis.gradients.online_modes import OjaModes, online_modes


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
