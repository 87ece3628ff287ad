"""Links: losses as smooth functions of outcomes, and their expansion in Hermite polynomials.

An outcome ``o`` (log-odds, a residual) is nearer to Gaussian over draws than the loss ``link(o)``
is. With ``o = m + s z`` and z standard normal, ``link(m + s z)`` is a series in the normalised
Hermite polynomials of z, whose coefficients give the covariance of two losses (Mehler's formula,
docs/methods/kernels.md). Plain arrays: no labels, no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lkarray.errors import NonFiniteError, SchemaError

#: Terms of an expansion, at most.
MOST_TERMS = 40
_POINTS = 200  # of the quadrature
_BLOCK = 32  # rows at once: few values are ever held, and BLAS starts no threads for products


def softplus(o: np.ndarray) -> np.ndarray:
    """Return ``log(1 + exp(o))``: the cross-entropy of log-odds against the target."""
    return np.logaddexp(0.0, o)


def square(o: np.ndarray) -> np.ndarray:
    """Return ``o**2``: the squared error of a residual."""
    return np.square(o)


def identity(o: np.ndarray) -> np.ndarray:
    """Return ``o``: of what is Gaussian itself, an observable."""
    return o


@dataclass(frozen=True)
class Link:
    """A loss as a function of its outcome.

    Attributes
    ----------
    name
        Of the function.
    function
        Of an array, elementwise.
    """

    name: str
    function: Callable[[np.ndarray], np.ndarray]

    def coefficients(self, mean: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r"""Return the Hermite coefficients of the link at Gaussian outcomes, and its variance.

        .. math:: a_k = E[\phi(m + s z) He_k(z)] / \sqrt{k!}, \quad k \ge 1

        Parameters
        ----------
        mean, sd
            Shape ``(rows,)``, float64: m and s of each outcome.

        Returns
        -------
        tuple
            ``(terms, rows)``, from the first term on, and the variance of the link, ``(rows,)``,
            which is the sum of the squares of all of them. Both zero where ``sd`` is zero.

        Raises
        ------
        NonFiniteError
            The link is NaN or infinite within a row's Gaussian.

        Notes
        -----
        Gauss-Hermite quadrature of 200 points, which is closed form for `square`. For `softplus`
        it is exact to rounding for standard deviations up to about 5 (its bend is ``1 / s`` wide
        in z).
        """
        if self.function is identity:
            return sd[np.newaxis].copy(), sd**2
        if self.function is square:
            return np.stack([2 * mean * sd, np.sqrt(2) * sd**2]), (4 * mean**2 + 2 * sd**2) * sd**2
        a, variance = np.empty((MOST_TERMS, len(mean))), np.empty(len(mean))
        for start in range(0, len(mean), _BLOCK):
            own = slice(start, start + _BLOCK)
            a[:, own], variance[own] = self._expanded(mean[own], sd[own])
        bad = ~np.isfinite(variance)
        if bad.any():
            first = int(np.argmax(bad))
            raise NonFiniteError(
                f"the link {self.name!r} is NaN or infinite for an outcome of mean "
                f"{mean[first]:.4g} and standard deviation {sd[first]:.4g}; leave that sample out, "
                'or use estimator="sample"'
            )
        return a, variance

    def _expanded(self, mean: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points, weights, basis = _rule()
        with np.errstate(all="ignore"):  # what is not finite is named by the caller
            origin = self.function(mean)
            # Relative to the link at the mean, so that little is lost where it hardly varies.
            values = self.function(mean[:, None] + sd[:, None] * points) - origin[:, None]
            values -= (values @ weights)[:, None]
            a, variance = basis @ values.T, np.square(values) @ weights
        constant = sd == 0
        a[:, constant], variance[constant] = 0, np.where(np.isfinite(origin[constant]), 0, np.nan)
        return a, variance


@lru_cache(maxsize=1)
def _rule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points and weights for means over a standard normal, and weighted polynomials.

    The last is ``(terms, points)``: ``He_k / sqrt(k!)`` at the points, times the weights. The
    recursion keeps every polynomial at variance 1, so nothing overflows.
    """
    from scipy.special import roots_hermitenorm

    points, weights = roots_hermitenorm(_POINTS)
    weights = weights / weights.sum()
    before, now = np.ones(_POINTS), points
    basis = np.empty((MOST_TERMS, _POINTS))
    for k in range(1, MOST_TERMS + 1):
        basis[k - 1] = now * weights
        before, now = now, (points * now - np.sqrt(k) * before) / np.sqrt(k + 1)
    return points, weights, basis


#: Links by name, as stores have them in the attribute ``link``.
LINKS = {link.__name__: Link(link.__name__, link) for link in (softplus, square)}


def as_link(given: Any, *, what: str) -> Link:
    """Return a link from its name, or from a function of an array.

    Raises
    ------
    SchemaError
        There is no such link.
    """
    if isinstance(given, Link):
        return given
    if callable(given):
        return Link(str(getattr(given, "__name__", "link")), given)
    if isinstance(given, str) and given in LINKS:
        return LINKS[given]
    raise SchemaError(
        f"{what} has the link {given!r}, and lkarray knows {sorted(LINKS)}; give the function "
        "itself, of an array: x.assign_attrs(link=numpy_function)"
    )
