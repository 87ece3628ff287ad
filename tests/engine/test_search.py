"""Low precision: candidates with a certificate, and products that are what they claim."""

import subprocess
import sys

import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import engine
from lkarray.engine import lowprecision, search
from tests.helpers.losses import numpy_correlation, random_losses


def found(losses, ask, precision, side=40):
    options = {"over": ("chain", "draw"), "each": (), "rows": "sample", "center": "pooled"}
    x = engine.Operand(losses, cosine=True, **options)
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
    position, value = found(losses, ask, "float32")
    again, other = found(losses, ask, "bfloat16")
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


def test_search__ranks_only_what_the_bound_cannot_rule_out(monkeypatch):
    losses = random_losses(np.random.default_rng(0), chains=4, draws=100, samples=600)
    pairs, whole = [], []
    dots, tile = search.products_of_pairs, search._whole_tile
    count = lambda *args: pairs.append(len(args[3])) or dots(*args)  # noqa: E731
    monkeypatch.setattr(search, "products_of_pairs", count)
    monkeypatch.setattr(search, "_whole_tile", lambda *args: whole.append(args) or tile(*args))
    found(losses, engine.Ask(5, True, None, None), "bfloat16", side=300)
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


def test_auto__is_float32_for_small_or_exact_work_and_says_what_it_used(monkeypatch, rng):
    losses = random_losses(rng)
    assert lk.correlation(losses, precision="auto").attrs["precision"] == "float32"
    monkeypatch.setattr(lowprecision, "_WORTH", 0)
    monkeypatch.setattr(lowprecision, "_WORTH_LOADED", 0)
    monkeypatch.setattr(lowprecision, "_is_faster", lambda: True)
    kernel = lk.correlation(losses, precision="auto")
    assert kernel.attrs["precision"] == "bfloat16"
    np.testing.assert_allclose(kernel, numpy_correlation(losses), atol=6e-3)
    assert lk.correlation(losses).attrs["precision"] == "float32"
    assert lk.correlation(losses.astype("f8"), precision="auto").attrs["precision"] == "float32"
    near = lk.neighbors(losses, 4, exclude="label")
    assert near.attrs["precision"] == "bfloat16"
    expected = lk.neighbors(losses, 4, exclude="label", precision="float32")
    xr.testing.assert_equal(near["neighbor"].compute(), expected["neighbor"].compute())
    with pytest.raises(ValueError, match="precision"):
        lk.neighbors(losses, 4, precision="half")


def test_auto__without_torch_is_float32(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lkarray.engine import lowprecision\n"
        "import numpy as np\n"
        "assert lowprecision.choose('auto', 1e15, np.dtype('f4')) == 'float32'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("largest", [True, False])
def test_neighbors__leave_out_what_a_rule_says(rng, largest):
    losses = random_losses(rng, samples=60)

    def rule(a, b):
        return (a["label"] == b["label"]) | (np.abs(a["sample"] - b["sample"]) < 3)

    near = lk.neighbors(losses, 5, exclude=rule, largest=largest, memory="40 KiB").compute()
    exact = numpy_correlation(losses) * (1 if largest else -1)
    at, label = losses["sample"].values, losses["label"].values
    out = (label[:, None] == label) | (np.abs(at[:, None] - at) < 3)
    best = np.argsort(-np.where(out, -np.inf, exact), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(near["neighbor"], best)
    with pytest.raises(ValueError, match=r"rule fails.*'label', 'sample'"):
        lk.neighbors(losses, 5, exclude=lambda a, b: a["colour"] == b["colour"])
    with pytest.raises(ValueError, match="booleans"):
        lk.neighbors(losses, 5, exclude=lambda a, b: a["label"] - b["label"])
