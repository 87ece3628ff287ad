"""Low precision: candidates with a certificate, and products that are what they claim."""

import dask
import numpy as np
import pytest

from lkarray import engine
from lkarray.engine import lowprecision, search
from tests.helpers.losses import numpy_correlation, random_losses
from tests.helpers.operands import operand


def best(losses, ask, precision, side=40):
    x = operand(losses)
    c = engine.Contraction(x, None, engine.make_plan(x, side=side), precision=precision)
    arrays = engine.top_k_arrays if precision == "float32" else engine.search_arrays
    return dask.compute(*arrays(c, ask))


def alike(losses, noise):
    """Inputs that all but move together: nearly every pair is within the rounding of another."""
    rng = np.random.default_rng(5)
    common = rng.normal(size=(*losses.shape[:2], 1))
    return (losses * noise + common).astype("f4")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", ["plain", "groups", "rule", "alike", "constant"])
def test_search__finds_what_float32_finds(seed, largest, kind):
    losses = random_losses(np.random.default_rng(seed), chains=4, draws=100, samples=150)
    groups = np.arange(150) % 7 if kind == "groups" else None
    rule = (lambda i, j: np.abs(i - j) < 5) if kind == "rule" else None
    if kind == "alike":
        losses = alike(losses, 1e-3)
    if kind == "constant":
        losses[..., 30:60] = 2.0
    ask = engine.Ask(6, largest, groups, rule)
    position, value = best(losses, ask, "float32")
    again, other = best(losses, ask, "bfloat16")
    np.testing.assert_allclose(other, value, atol=2e-6)
    exact = numpy_correlation(losses)
    differ = again != position
    np.testing.assert_allclose(
        np.take_along_axis(exact, again, 1)[differ],
        np.take_along_axis(exact, position, 1)[differ],
        atol=3e-6,
    )
    if kind == "plain":
        assert not differ.any()
    if kind == "constant":
        still = np.arange(30, 60)
        assert (again[still] == -1).all()
        assert not np.isin(again, still).any()
        np.testing.assert_array_equal(np.isnan(other), np.isnan(value))


def test_search__ranks_only_what_the_bound_cannot_rule_out(monkeypatch):
    losses = random_losses(np.random.default_rng(0), chains=4, draws=100, samples=600)
    pairs, whole = [], []
    dots, tile = search.products_of_pairs, search._whole_tile
    count = lambda *args: pairs.append(len(args[3])) or dots(*args)  # noqa: E731
    monkeypatch.setattr(search, "products_of_pairs", count)
    monkeypatch.setattr(search, "_whole_tile", lambda *args: whole.append(args) or tile(*args))
    best(losses, engine.Ask(5, True, None, None), "bfloat16", side=300)
    assert 600 * 5 <= sum(pairs) < 600 * 600 / 10
    assert whole == []


def test_bound__holds_for_every_entry():
    losses = random_losses(np.random.default_rng(3), chains=2, draws=300, samples=120)
    x = losses.values.reshape(-1, 120).astype(np.float64)
    x -= x.mean(0)
    x = (x / np.linalg.norm(x, axis=0)).astype("f4")
    low = lowprecision.LowPanel.of(x)
    coarse = lowprecision.multiply_coarse(low, low)
    coarse = coarse.slab(0, len(coarse.bits))
    exact = x.astype(np.float64).T @ x
    error = low.error[:, None] + low.error * (1 + low.error[:, None])
    assert (np.abs(coarse - exact) <= error + search._ROUNDING * np.abs(coarse) + 1e-5).all()
    # and the corrected product is as exact as its rounded operands are
    rounded = low.values.double().numpy()
    np.testing.assert_allclose(lowprecision.multiply_low(low, low), rounded @ rounded.T, atol=1e-5)
    assert np.abs(lowprecision.multiply_low(low, low) - exact).max() < 1e-3
