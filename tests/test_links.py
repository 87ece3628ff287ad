"""Hermite coefficients of links: against quadrature in one and two dimensions, and closed forms."""

import numpy as np
import pytest

from lkarray.errors import NonFiniteError, SchemaError
from lkarray.links import LINKS, MOST_TERMS, Link, as_link, identity

_Z = np.linspace(-14, 14, 1_001)
_W = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()
ROWS = [(0.0, 1.0), (-20.0, 1.0), (20.0, 3.0), (-5.0, 3.0), (3.0, 0.01), (0.0, 5.0), (-20.0, 5.0)]


def by_quadrature(link, one, other, rho):
    """Cov(link(o), link(p)) of two Gaussians by the trapezoidal rule in both directions."""
    (m, s), (n, t) = one, other
    first = link.function(m + s * _Z)
    rest = np.sqrt(1 - rho**2)
    second = np.array([_W @ link.function(n + t * (rho * z + rest * _Z)) for z in _Z])
    return _W @ ((first - _W @ first) * second)


def series(link, one, other, rho):
    means, sds = np.array([one, other]).T
    a, variance = link.coefficients(means, sds)
    powers = rho ** np.arange(1, len(a) + 1)
    return (a[:, 0] * a[:, 1] * powers).sum() / np.sqrt(variance.prod()), np.sqrt(variance.prod())


@pytest.mark.parametrize("rho", [-0.9, 0.05, 0.6, 0.95])
@pytest.mark.parametrize("one", ROWS)
def test_series_of_softplus__is_the_integral(one, rho):
    for other in ROWS:
        value, scale = series(LINKS["softplus"], one, other, rho)
        expected = by_quadrature(LINKS["softplus"], one, other, rho) / scale
        # What 40 terms leave of wide outcomes (standard deviation 5) counts near correlation 1.
        left = np.sqrt((1 - share(one)) * (1 - share(other))) * abs(rho) ** (MOST_TERMS + 1)
        assert value == pytest.approx(expected, abs=2e-6 + left)


def share(row):
    """The share of the variance that the terms have."""
    a, variance = LINKS["softplus"].coefficients(*np.array([row]).T)
    return min((a[:, 0] ** 2).sum() / variance[0], 1)


def test_variance_of_softplus__is_the_integral():
    means, sds = np.array(ROWS).T
    a, variance = LINKS["softplus"].coefficients(means, sds)
    for m, s, own in zip(means, sds, variance, strict=True):
        values = np.logaddexp(0, m + s * _Z)
        expected = _W @ (values - _W @ values) ** 2
        assert own == pytest.approx(expected, rel=2e-7)
    shares = (a**2).sum(0) / variance
    assert a.shape == (MOST_TERMS, len(ROWS))
    assert (shares <= 1 + 1e-12).all()
    assert (shares[sds <= 3] > 1 - 1e-6).all()


def test_series_of_softplus__is_that_of_many_draws(rng):
    z = rng.standard_normal((2, 2_000_000))
    first, second = -2 + 2 * z[0], 1 + 3 * (0.7 * z[0] + np.sqrt(0.51) * z[1])
    drawn = np.corrcoef(np.logaddexp(0, first), np.logaddexp(0, second))[0, 1]
    value, _ = series(LINKS["softplus"], (-2.0, 2.0), (1.0, 3.0), 0.7)
    assert value == pytest.approx(drawn, abs=5e-3)


def test_small_deviations__leave_the_correlation():
    for m in (-20.0, -1.0, 0.0, 20.0):
        for name, link in LINKS.items():
            value, _ = series(link, (m, 1e-4), (m / 2, 1e-5), 0.3)
            if name == "softplus" or m:  # a square has no slope at 0
                assert value == pytest.approx(0.3, abs=1e-4), (name, m)


def test_square__has_its_closed_form():
    closed = LINKS["square"].coefficients(np.array([1.5, -2.0, 0.0]), np.array([0.5, 2.0, 0.0]))
    general = Link("other", np.square).coefficients(
        np.array([1.5, -2.0, 0.0]), np.array([0.5, 2.0, 0.0])
    )
    assert len(closed[0]) == 2
    np.testing.assert_allclose(general[0][:2], closed[0], rtol=1e-12)
    np.testing.assert_allclose(general[0][2:], 0, atol=1e-11)
    np.testing.assert_allclose(general[1], closed[1], rtol=1e-12)


def test_identity__is_linear():
    a, variance = Link("identity", identity).coefficients(np.array([3.0]), np.array([2.0]))
    assert a.tolist() == [[2.0]]
    assert variance.tolist() == [4.0]


def test_constant_outcomes__have_no_variance():
    for link in LINKS.values():
        a, variance = link.coefficients(np.array([-3.0, 0.0, 700.0]), np.zeros(3))
        assert not a.any()
        assert not variance.any()


def test_softplus__does_not_overflow():
    values = LINKS["softplus"].function(np.array([-800.0, -40.0, 0.0, 800.0]))
    np.testing.assert_allclose(values, [0, np.exp(-40), np.log(2), 800], rtol=1e-15)


def test_links__by_name_or_by_function():
    assert as_link("softplus", what="x") is LINKS["softplus"]
    assert as_link(np.exp, what="x") == Link("exp", np.exp)
    with pytest.raises(
        SchemaError, match=r"losses has the link 'probit'.*\['softplus', 'square'\]"
    ):
        as_link("probit", what="losses")


def test_link_that_is_not_finite__is_named():
    with pytest.raises(NonFiniteError, match="'log' is NaN or infinite for an outcome of mean 1"):
        Link("log", np.log).coefficients(np.array([1.0]), np.array([1.0]))
