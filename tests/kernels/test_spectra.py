import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray.kernels import spectra
from tests.helpers.losses import (
    Forbidding,
    counting,
    numpy_correlation,
    numpy_covariance,
    random_losses,
)

OVER = ("chain", "draw")


def decaying(rng, draws, samples, noise=0.02):
    """A power-law spectrum with a tail of noise, as losses have it."""
    modes = min(draws, samples, 200)
    left = np.linalg.qr(rng.normal(size=(draws, modes)))[0] * np.arange(1, modes + 1) ** -0.8
    right = np.linalg.qr(rng.normal(size=(samples, modes)))[0]
    return (100 * left @ right.T + noise * rng.normal(size=(draws, samples))).astype("f4")


def tensor(matrix, chains=2):
    values = matrix.reshape(chains, -1, matrix.shape[1])
    return xr.DataArray(values, dims=("chain", "draw", "sample"), name="loss")


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40)])
@pytest.mark.parametrize("chunks", [None, {"chain": 1, "draw": 7, "sample": 25}])
@pytest.mark.parametrize("memory", [None, "300 KiB"])
def test_svd__equals_numpy(rng, shape, chunks, memory):
    matrix = decaying(rng, *shape)
    x = tensor(matrix) if chunks is None else tensor(matrix).chunk(chunks)
    modes = lk.svd(x, 6, over=OVER, memory=memory).compute()
    left, values, right = np.linalg.svd(matrix.astype("f8").T, full_matrices=False)
    np.testing.assert_allclose(modes["singular_value"], values[:6], rtol=1e-5)
    assert modes["u"].dims == ("sample", "mode")
    assert modes["v"].dims == (*OVER, "mode")
    sign = np.sign(np.take_along_axis(left, np.abs(left).argmax(0)[None], 0))[0, :6]
    np.testing.assert_allclose(modes["u"], left[:, :6] * sign, atol=1e-4)
    np.testing.assert_allclose(modes["v"].values.reshape(-1, 6), right[:6].T * sign, atol=1e-4)


@pytest.mark.parametrize("over", ["param", ("time", "param"), ("time", "example")])
def test_svd__of_any_unfolding(rng, over):
    x = xr.DataArray(rng.normal(size=(4, 20, 30)), dims=("time", "example", "param"), name="g")
    dims = (over,) if isinstance(over, str) else over
    free = tuple(d for d in x.dims if d not in dims)
    modes = lk.svd(x.chunk(time=1, example=7, param=20), 5, over=over).compute()
    assert modes["u"].dims == (*free, "mode")
    matrix = x.transpose(*free, *dims).values.reshape(np.prod([x.sizes[d] for d in free]), -1)
    expected = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(modes["singular_value"], expected[1][:5])
    product = (modes["u"] * modes["singular_value"] * modes["v"]).sum("mode")
    best = (expected[0][:, :5] * expected[1][:5]) @ expected[2][:5]
    np.testing.assert_allclose(product.transpose(*free, *dims).values.reshape(matrix.shape), best)


@pytest.mark.parametrize("shape", [(500, 3000), (3000, 500)])
def test_svd__iterates_more_accurately_than_dask(rng, shape, monkeypatch):
    import dask.array as da

    monkeypatch.setattr(spectra, "_EXACT_OPERATIONS", 0)
    monkeypatch.setattr(spectra, "_EXTRA", 5)
    matrix = decaying(rng, *shape)
    modes = lk.svd(tensor(matrix).chunk(sample=250), 20, over=OVER).compute()
    assert 3 <= int(modes["passes"]) <= 5
    reference = np.linalg.svd(matrix.astype("f8").T, full_matrices=False)
    theirs = da.linalg.svd_compressed(
        da.from_array(matrix.T, chunks=(250, shape[0])), 20, n_power_iter=4, compute=False
    )
    u, s, _ = dask.compute(*theirs)

    def angle(vectors):
        return np.linalg.norm(
            vectors - reference[0][:, :20] @ (reference[0][:, :20].T @ vectors), 2
        )

    error = np.abs(modes["singular_value"].values / reference[1][:20] - 1).max()
    assert error < 5e-4
    assert error <= np.abs(s / reference[1][:20] - 1).max()
    assert angle(modes["u"].values.astype("f8")) <= angle(u.astype("f8"))
    assert float(modes["residual"].max()) < 0.05


def test_svd__stops_once_it_has_converged(rng, monkeypatch):
    monkeypatch.setattr(spectra, "_EXACT_OPERATIONS", 0)
    low = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 1200))
    lazy, reads = counting(tensor(low.astype("f4")), (2, 150, 300))
    with dask.config.set(scheduler="synchronous"):
        modes = lk.svd(lazy, 4, over=OVER, memory="64 MiB").compute()
    assert int(modes["passes"]) == 3
    assert set(reads.values()) == {1}  # the cache holds it all
    np.testing.assert_allclose(
        modes["singular_value"], np.linalg.svd(low, compute_uv=False)[:4], rtol=1e-5
    )


def test_svd__of_too_low_a_rank_has_zero_vectors(rng):
    low = (rng.normal(size=(20, 2)) @ rng.normal(size=(2, 30))).astype("f8")
    modes = lk.svd(tensor(low), 4, over=OVER).compute()
    assert np.isfinite(modes["u"]).all()
    np.testing.assert_allclose(modes["singular_value"][2:], 0, atol=1e-6)


def test_spectra__compute_nothing_until_asked(rng):
    losses = random_losses(rng)
    losses = losses.copy(data=losses.chunk(sample=5).data)
    with dask.config.set(scheduler=Forbidding()):
        s = lk.svd(losses, 3, over=OVER)["singular_value"]
        lk.eigh(losses, over=OVER)
        lk.participation_ratio(s), lk.energy_rank(s)
        lk.cka(losses, losses * 2)
        lk.cka_curve(losses, 3)
        lk.frobenius(losses)
        lk.group_mean(losses, "label")
        lk.linear_operator(losses)


def test_svd__refuses_what_cannot_be(rng):
    losses = random_losses(rng)
    with pytest.raises(ValueError, match="between 1 and 17"):
        lk.svd(losses, 18, over=OVER)
    with pytest.raises(errors.SchemaError, match="lack"):
        lk.svd(losses, 3, over="param")
    with pytest.raises(errors.MemoryBudgetError, match="KiB can") as refusal:
        lk.svd(losses, 3, over=OVER, memory=10)
    enough = str(refusal.value).split("; ")[1].split(" can")[0]
    lk.svd(losses, 3, over=OVER, memory=enough)
    losses[0, 0, 3] = np.nan
    with pytest.raises(errors.NonFiniteError):
        lk.svd(losses, 3, over=OVER).compute()


@pytest.mark.parametrize("samples", [25, 90])
@pytest.mark.parametrize("normalize", ["count", "cosine"])
def test_eigh__equals_numpy_of_the_kernel(rng, samples, normalize):
    losses = random_losses(rng, samples=samples)
    spectrum = lk.eigh(losses, over=OVER, center="pooled", normalize=normalize).compute()
    kernel = (numpy_covariance if normalize == "count" else numpy_correlation)(losses)
    values = np.linalg.eigvalsh(kernel)[::-1][: min(samples, 60)]
    np.testing.assert_allclose(spectrum["eigenvalue"], values, atol=2e-6 * values[0])
    vectors = spectrum["eigenvector"].values.astype("f8")
    np.testing.assert_allclose(
        (vectors * spectrum["eigenvalue"].values) @ vectors.T, kernel, atol=1e-5 * values[0]
    )
