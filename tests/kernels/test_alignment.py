import dask
import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import counting, numpy_correlation, numpy_covariance, random_losses


def pair(rng, samples, chains=3, draws=20):
    """Two runs on the same samples that share some structure, of unlike length."""
    a = random_losses(rng, chains=chains, draws=draws, samples=samples)
    b = random_losses(rng, chains=2, draws=draws + 3, samples=samples)
    b[:, :draws] = b[:, :draws] + 2 * a[:2]
    return a, b


def centred(kernel):
    h = np.eye(len(kernel)) - 1 / len(kernel)
    return h @ kernel @ h


def plain_cka(k, j):
    k, j = centred(k), centred(j)
    return (k * j).sum() / np.sqrt((k**2).sum() * (j**2).sum())


def hsic_1(k, j):
    """Song et al. 2012, as printed."""
    n, k, j = len(k), k - np.diag(np.diag(k)), j - np.diag(np.diag(j))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ j @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ j) + middle - 2 / (n - 2) * (one @ k @ j @ one)) / (n * (n - 3))


def unbiased_cka(k, j):
    return hsic_1(k, j) / np.sqrt(hsic_1(k, k) * hsic_1(j, j))


@pytest.mark.parametrize("samples", [15, 120])
@pytest.mark.parametrize("normalize", ["count", "cosine"])
@pytest.mark.parametrize("memory", [None, "700 KiB"])
def test_cka__equals_its_definition(rng, samples, normalize, memory):
    a, b = pair(rng, samples)
    kernel = numpy_covariance if normalize == "count" else numpy_correlation
    options = {"normalize": normalize, "memory": memory}
    lazy = a.chunk(draw=6, sample=40), b.chunk(sample=7)
    for k, l_, x, y in ((kernel(a), kernel(b), *lazy), (kernel(a), kernel(b), a, b)):
        assert float(lk.cka(x, y, **options)) == pytest.approx(plain_cka(k, l_), rel=1e-4)
        alignment = lk.cka(x, y, debiased="samples", **options)
        assert float(alignment) == pytest.approx(unbiased_cka(k, l_), rel=1e-3)
        assert alignment.dims == ()
        assert alignment.name == "cka"
    assert float(lk.cka(a, a)) == pytest.approx(1)
    expected = (kernel(a) * kernel(b)).sum()
    assert float(lk.frobenius(a, b, **options)) == pytest.approx(expected, rel=1e-5)
    assert float(lk.frobenius(a, **options)) == pytest.approx((kernel(a) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize("samples", [15, 120])
def test_cka__debiased_over_draws_takes_all_pairs_of_chains(rng, samples):
    a, b = pair(rng, samples, chains=5)
    kernels = [
        [centred(numpy_covariance(x.isel(chain=[c]))) for c in range(x.sizes["chain"])]
        for x in (a, b)
    ]

    def mean(one, two):
        pairs = [(k * m).sum() for i, k in enumerate(one) for j, m in enumerate(two) if i != j]
        return np.mean(pairs)

    own = mean(kernels[0], kernels[0]) * mean(kernels[1], kernels[1])
    alignment = float(lk.cka(a, b, debiased="draws"))
    assert alignment == pytest.approx(mean(*kernels) / np.sqrt(own), rel=1e-4)
    # Single draws, and draws about the chains' mean, have no kernel of one chain: halves.
    many = random_losses(rng, 8, 20, samples)
    for x, center in ((many.isel(draw=[0]), "pooled"), (many, "draw")):
        even, odd = (centred(numpy_covariance(x[i::2], center)) for i in (0, 1))
        both = float(lk.frobenius(x[::2], x[1::2], center=center))
        raw = [numpy_covariance(x[i::2], center) for i in (0, 1)]
        assert both == pytest.approx((raw[0] * raw[1]).sum(), rel=1e-3)
        assert float(lk.cka(x, x, debiased="draws", center=center)) == pytest.approx(1, rel=1e-3)
        assert (even * odd).sum() > 0
    assert float(lk.cka(a, a, debiased="draws")) == pytest.approx(1)
    with pytest.raises(ValueError, match="two chains"):
        lk.cka(a.isel(chain=[0]), b, debiased="draws")


def test_cka__does_not_cancel_where_a_common_mode_dominates(rng):
    """All losses rise together: K is nearly constant, and what is left decides."""
    a, b = pair(rng, 200)
    common = 300 * rng.normal(size=(3, 20, 1)).astype("f4")
    k = numpy_covariance((a + common).astype("f4"))
    expected = plain_cka(k, numpy_covariance(b))
    assert float(lk.cka((a + common).astype("f4"), b)) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("samples", [15, 120])
def test_curve__equals_cka_of_the_first_draws(rng, samples):
    losses = random_losses(rng, samples=samples)
    lazy, reads = counting(losses, (1, 20, 5))
    with dask.config.set(scheduler="synchronous"):
        curve = lk.cka_curve(lazy, [1, 5, 12, 20], memory="64 MiB").compute()
    assert set(reads.values()) == {1}
    for t in (1, 5, 12, 20):
        k = numpy_covariance(losses.isel(draw=slice(0, t)))
        expected = plain_cka(k, numpy_covariance(losses))
        assert float(curve.sel(draws=t)) == pytest.approx(expected, rel=1e-4)
    assert float(curve.sel(draws=20)) == pytest.approx(1)
    with pytest.raises(ValueError, match="between 1 and 20"):
        lk.cka_curve(losses, [30])


def test_cka__refuses_other_samples_and_names_the_first(rng):
    a, b = pair(rng, 15)
    moved = b.assign_coords(sample=np.arange(15) + (np.arange(15) > 6))
    with pytest.raises(errors.SchemaError, match="first at position 7: 7 and 8"):
        lk.cka(a, moved)
    with pytest.raises(errors.SchemaError, match="15 and 9 entries"):
        lk.cka(a, b.isel(sample=slice(9)))
    with pytest.raises(ValueError, match="debiased"):
        lk.cka(a, b, debiased=True)
