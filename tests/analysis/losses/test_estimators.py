"""Kernels of losses from outcomes taken as Gaussian: closed forms, any chunks, every function."""

import re
import warnings

import numpy as np
import pytest
import xarray as xr
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.engine.contraction import contraction_of
from lkarray.errors import MemoryBudgetError, NonFiniteError, SchemaError, StoreError
from lkarray.links import LINKS
from tests.helpers.losses import counting, numpy_covariance, random_losses

GAUSSIAN = {"estimator": "gaussian"}


def outcomes(rng, link="square", **sizes):
    """Outcomes of moderate size, as a DataArray with its link."""
    x = random_losses(rng, **({"chains": 4, "draws": 60, "samples": 23} | sizes))
    scale = np.abs(x).mean(("chain", "draw"))
    return (x / scale).astype(x.dtype).rename("residual").assign_attrs(link=link)


def of_squares(x, center="pooled"):
    """The closed form, in float64: 2 c^2 + 4 m_i m_j c."""
    c = numpy_covariance(x, center)
    m = x.astype("float64").mean(("chain", "draw")).values
    return 2 * c**2 + 4 * np.outer(m, m) * c


def of_softplus(x):
    """The series in float64 with all its terms, diagonal by quadrature."""
    c = numpy_covariance(x)
    m, s = x.astype("float64").mean(("chain", "draw")).values, np.sqrt(np.diag(c))
    a, variance = LINKS["softplus"].coefficients(m, s)
    rho = c / np.outer(s, s)
    k = sum(np.outer(row, row) * rho ** (power + 1) for power, row in enumerate(a))
    np.fill_diagonal(k, variance)
    return k


def as_correlation(k):
    scale = np.sqrt(np.diag(k))
    return k / np.outer(scale, scale)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("center", ["pooled", "chain"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_square__is_the_closed_form(rng, center, dtype, device):
    x = outcomes(rng).astype(dtype)
    expected = of_squares(x, center)
    scale = np.sqrt(np.diag(expected))
    options = {"center": center, "device": device} | GAUSSIAN
    k, r = lk.covariance(x, **options), lk.correlation(x, **options)
    assert k.dtype == dtype
    bound = 2e-6 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(
        k.values / np.outer(scale, scale), as_correlation(expected), atol=bound
    )
    np.testing.assert_allclose(r.values, as_correlation(expected), atol=bound)
    assert (np.diag(r.values) == 1).all()
    some = lk.covariance(x, x.isel(sample=[3, 5]), **options).values
    np.testing.assert_allclose(
        some / np.outer(scale, scale[[3, 5]]), as_correlation(expected)[:, [3, 5]], atol=bound
    )


@pytest.mark.parametrize("device", [None, "cpu"])
def test_softplus__is_the_whole_series(rng, device):
    x = outcomes(rng, "softplus", samples=150) * np.linspace(0.1, 2, 150).astype("float32") - 2
    x = x.assign_attrs(link="softplus")
    x[..., 7] = x[..., 3] + 1  # a cosine of 1 far from the diagonal needs all terms
    expected = as_correlation(of_softplus(x))
    r = lk.correlation(x, device=device, **GAUSSIAN).values
    np.testing.assert_allclose(r, expected, atol=3e-6)
    assert (
        np.abs(r - lk.correlation(x).values).max() > 0.05
    )  # the correlation of outcomes it is not


def test_any_link__may_be_given_as_a_function(rng):
    x = outcomes(rng)
    own = x.assign_attrs(link=np.square)
    np.testing.assert_allclose(
        lk.correlation(own, **GAUSSIAN), lk.correlation(x, **GAUSSIAN), atol=2e-6
    )


def least_memory(function, *arguments, **options):
    with pytest.raises(MemoryBudgetError, match="KiB can") as refusal:
        function(*arguments, memory=1, **options)
    return re.search(r"(\d+ KiB) can", str(refusal.value)).group(1)


@pytest.mark.parametrize("chunks", [None, {"sample": 7}, {"chain": 1, "draw": 7, "sample": 5}])
@pytest.mark.parametrize("center", ["pooled", "chain"])
def test_chunks_and_pieces__change_nothing(rng, chunks, center):
    """The tightest budget has many tiles, contracted in pieces: means and norms come first then."""
    x = outcomes(rng, "softplus", chains=2, samples=24, draws=20)
    options = GAUSSIAN | {"center": center}
    expected = lk.correlation(x, **options)
    x = x if chunks is None else x.chunk(chunks)
    memory = least_memory(lk.correlation, x, **options)
    tight = lk.correlation(x, memory=memory, **options)
    plan = contraction_of(tight.data).plan
    assert len(plan.rows) > 1
    assert len(plan.pieces) > 1 or chunks == {"sample": 7}  # whose panels are read whole
    np.testing.assert_allclose(tight, expected, atol=2e-6)
    np.testing.assert_allclose(lk.correlation(x, **options), expected, atol=2e-6)


def test_dims_in_step__have_tables_of_their_own(rng):
    runs = [outcomes(rng), outcomes(rng) * 3 + 1]
    both = xr.concat(runs, "component").assign_attrs(link="square")
    for x in (both, both.chunk({"sample": 9})):
        k = lk.covariance(x, **GAUSSIAN)
        assert k.dims == ("component", "sample", "sample_2")
        for own, run in zip(k, runs, strict=True):
            expected = of_squares(run)
            np.testing.assert_allclose(own, expected, atol=2e-6 * np.diag(expected).max())


def test_constant_outcomes__have_zero_rows(rng):
    x = outcomes(rng, "softplus")
    x[..., [2, 9]] = -3.25
    for device in (None, "cpu"):
        for kernel in (lk.correlation, lk.covariance):
            k = kernel(x, device=device, **GAUSSIAN).values
            assert not k[[2, 9]].any()
            assert not k[:, [2, 9]].any()
            assert np.isfinite(k).all()


def test_outcomes__are_found_beside_losses(rng):
    x = outcomes(rng, "softplus").rename("log_odds")
    expected = lk.covariance(x, **GAUSSIAN).values
    losses = xr.Dataset({"loss": np.logaddexp(0, x).drop_attrs(), "log_odds": x})
    tree = xr.DataTree.from_dict({"losses": losses})
    for given in (losses, tree, tree["losses"], losses[["log_odds"]]):
        k = lk.covariance(given, **GAUSSIAN)
        np.testing.assert_array_equal(k.values, expected)
        assert k.attrs["estimator"] == "gaussian"
        assert k.attrs["link"] == "softplus"
    plain = lk.covariance(losses)
    assert plain.attrs["estimator"] == "sample"
    np.testing.assert_array_equal(plain.values, lk.covariance(losses["loss"]).values)
    np.testing.assert_array_equal(losses.lk.covariance(**GAUSSIAN).values, expected)


def test_no_outcomes__are_asked_for_by_name(rng):
    x = random_losses(rng)
    calls = (
        lambda given: lk.correlation(given, **GAUSSIAN),
        lambda given: lk.neighbors(given, 3, **GAUSSIAN),
        lambda given: lk.group_mean(given, "label", **GAUSSIAN),
        lambda given: lk.histogram(given, **GAUSSIAN),
        lambda given: lk.cka(given, given, **GAUSSIAN),
        lambda given: lk.influence(outcomes(rng), given, **GAUSSIAN),
    )
    for call in calls:
        for given in (x, x.to_dataset(), xr.DataTree.from_dict({"losses": x.to_dataset()})):
            with pytest.raises(SchemaError, match='outcomes=.*"log_odds".*lk.log_odds'):
                call(given)
    with pytest.raises(SchemaError, match="link 'probit'"):
        lk.correlation(x.assign_attrs(link="probit"), **GAUSSIAN)
    with pytest.raises(ValueError, match="estimator must be"):
        lk.correlation(x, estimator="gauss")
    with pytest.raises(ValueError, match="shrinkage is of the sample covariance"):
        lk.covariance(outcomes(rng), shrinkage=0.5, **GAUSSIAN)


def test_link_that_is_infinite__is_named_on_computing(rng):
    lazy = lk.correlation(outcomes(rng).assign_attrs(link=np.log), **GAUSSIAN)
    with pytest.raises(NonFiniteError, match="the link 'log' is NaN"):
        lazy.compute()


def test_influence__takes_outcomes_and_observables(rng):
    x = outcomes(rng)
    k = of_squares(x)
    queries = lk.influence(x, x.isel(sample=[4, 0]), **GAUSSIAN)
    np.testing.assert_allclose(queries, -k[:, [4, 0]], rtol=1e-4, atol=1e-5 * k.max())
    observable = x.isel(sample=4, drop=True).drop_attrs().rename("seen")
    own = lk.influence(x, observable, **GAUSSIAN)
    # Cov(o_i^2, o_j) = 2 m_i c_ij, of Gaussians
    expected = -2 * x.mean(("chain", "draw")).values * numpy_covariance(x)[:, 4]
    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert own.attrs["link"] == "square, identity"


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"memory": "tight"}])
def test_sinks__are_those_of_the_kernel(rng, options):
    x = outcomes(rng, "softplus", samples=60, chains=2, draws=20)
    y = outcomes(rng, "square", samples=60, chains=2, draws=20)
    if options.get("memory"):
        options = {"memory": least_memory(lk.cka, x, y, **GAUSSIAN)}
        assert len(contraction_of(lk.correlation(x, **options, **GAUSSIAN).data).plan.rows) > 1
    r = lk.correlation(x, **GAUSSIAN).values.astype("float64")
    options = options | GAUSSIAN
    near = lk.neighbors(x, 4, **options).compute()
    apart = np.where(np.eye(60, dtype=bool), -np.inf, r)
    np.testing.assert_allclose(near["similarity"], -np.sort(-apart, axis=1)[:, :4], atol=2e-6)
    assert near.attrs["estimator"] == "gaussian"
    least = lk.neighbors(x, 4, largest=False, **options)["similarity"]
    np.testing.assert_allclose(
        least, np.sort(np.where(np.eye(60), np.inf, r), axis=1)[:, :4], atol=2e-6
    )

    counts = lk.histogram(x, "label", bins=4, **options)
    expected = np.histogram(r[~np.eye(60, dtype=bool)], np.linspace(-1, 1, 5))[0]
    np.testing.assert_array_equal(counts["count"].sum(("label", "label_2")), expected)

    member = np.eye(4)[x["label"].values]
    sizes = member.sum(0)
    mean = lk.group_mean(x, "label", **options)
    np.testing.assert_allclose(mean, member.T @ r @ member / np.outer(sizes, sizes), atol=1e-6)
    others = lk.group_mean(x, "label", self_pairs=False, **options)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    np.testing.assert_allclose(others, member.T @ (r - np.eye(60)) @ member / pairs, atol=1e-6)


@pytest.mark.parametrize("normalize", ["count", "cosine"])
def test_alignment__is_that_of_the_kernels(rng, normalize):
    x, y = outcomes(rng, "softplus", samples=60), outcomes(rng, "square", samples=60)
    kernel = lk.covariance if normalize == "count" else lk.correlation
    options = GAUSSIAN | {"normalize": normalize}

    def of(*tensors):
        return [kernel(x, **GAUSSIAN).values.astype("float64") for x in tensors]

    def centred(k):
        return k - k.mean(0) - k.mean(1)[:, None] + k.mean()

    def hsic(k, other):
        """HSIC_1 of Song et al. 2012, as printed."""
        k, other, n = k - np.diag(np.diag(k)), other - np.diag(np.diag(other)), len(k)
        sums = k.sum() * other.sum() / ((n - 1) * (n - 2))
        return (np.trace(k @ other) + sums - 2 / (n - 2) * (k @ other).sum()) / (n * (n - 3))

    k, other = of(x, y)
    assert float(lk.frobenius(x, y, **options)) == pytest.approx((k * other).sum(), rel=1e-6)
    a, b = centred(k), centred(other)
    expected = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(lk.cka(x, y, **options)) == pytest.approx(expected, abs=1e-5)
    expected = hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))
    assert float(lk.cka(x, y, debiased="samples", **options)) == pytest.approx(expected, abs=1e-5)
    # Of each chain about its own mean; products of different chains only.
    ours, theirs = ([centred(k) for k in of(*(z[[c]] for c in range(len(z))))] for z in (x, y))

    def mean(first, second):
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if i != j]
        return np.mean([(first[i] * second[j]).sum() for i, j in pairs])

    expected = mean(ours, theirs) / np.sqrt(mean(ours, ours) * mean(theirs, theirs))
    assert float(lk.cka(x, y, debiased="draws", **options)) == pytest.approx(expected, abs=1e-5)
    assert float(lk.cka(x, x, **options)) == pytest.approx(1)
    constant = xr.zeros_like(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(float(lk.cka(x, constant, **options)))


def test_save__goes_on_with_the_same_series(rng):
    x = outcomes(rng, "softplus").chunk({"sample": 7})
    kernel, store = lk.correlation(x, **GAUSSIAN), MemoryStore()
    stored = lk.save(kernel, store)
    np.testing.assert_array_equal(stored.values, kernel.values)
    assert stored.attrs["estimator"] == "gaussian"
    np.testing.assert_array_equal(lk.save(kernel, store).values, kernel.values)
    with pytest.raises(StoreError):
        lk.save(lk.correlation(x), store)  # another kernel of the same name


def test_nothing__is_read_before_it_is_asked_for(rng):
    x, reads = counting(outcomes(rng, "softplus", samples=30), (1, 20, 10))
    x = x.assign_attrs(link="softplus")
    lazy = lk.correlation(x, **GAUSSIAN), lk.neighbors(x, 3, **GAUSSIAN)
    lk.histogram(x, **GAUSSIAN), lk.group_mean(x, "label", **GAUSSIAN), lk.cka(x, x, **GAUSSIAN)
    assert not reads
    lazy[0].compute()
    assert set(reads.values()) == {1}  # means and norms come with the panels


def test_lift__searches_by_outcomes(rng):
    x = outcomes(rng, "softplus", samples=24)
    animals = lk.Taxonomy.from_parents(
        {"0": "a", "1": "a", "2": "b", "3": "b", "a": "root", "b": "root"}
    )
    label = x["label"].astype(str).values
    x = x.assign_coords(label=("sample", label))
    lift = lk.taxonomic_lift(x, animals, k=3, replicates=2, **GAUSSIAN)
    near = lk.neighbors(x, 3, exclude="label", **GAUSSIAN)
    expected = lk.taxonomic_lift(near, animals, replicates=2)
    np.testing.assert_array_equal(lift["lift"], expected["lift"])
    assert lift.attrs["estimator"] == "gaussian"


def test_gaussian_estimate__needs_fewer_draws(rng):
    """Losses with rare jumps: at equal draws the estimate from outcomes is nearer to the truth."""
    factors, means = rng.normal(size=(3, 30)), rng.normal(-4, 1, size=30)

    def draws(number):
        o = rng.normal(size=(4, number // 4, 3)) @ factors + means
        dims = ("chain", "draw", "sample")
        return xr.DataArray(o, dims=dims, name="log_odds", attrs={"link": "softplus"})

    c, pairs = factors.T @ factors, np.triu_indices(30, 1)
    x = draws(400)
    s = np.sqrt(np.diag(c))
    a, variance = LINKS["softplus"].coefficients(means, s)
    truth = sum(np.outer(r, r) * (c / np.outer(s, s)) ** (k + 1) for k, r in enumerate(a))
    truth = (truth / np.sqrt(np.outer(variance, variance)))[pairs]
    plain = lk.correlation(np.logaddexp(0, x)).values[pairs]
    gaussian = lk.correlation(x, **GAUSSIAN).values[pairs]
    assert np.std(gaussian - truth) < 0.5 * np.std(plain - truth)
