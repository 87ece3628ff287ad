"""Kernels equal numpy float64 for any shape, chunking, tile, budget and dtype."""

import re

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import lkarray as lk
from lkarray import engine, errors
from lkarray.engine.numbers import Moments, top_k
from lkarray.engine.plan import split
from tests.helpers.losses import numpy_correlation, numpy_covariance, random_losses

ANY = settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DTYPES = ["float16", "float32", "float64", "int16", "int32", "uint8"]


@st.composite
def tensors(draw, dtypes=DTYPES):
    """A loss tensor, in memory or in Dask chunks, with dims in any order."""
    sizes = {
        "chain": draw(st.integers(1, 4)),
        "draw": draw(st.integers(2, 13) | st.just(200)),
        "sample": draw(st.integers(2, 40)),
    }
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kind = "float32" if np.dtype(dtype).kind in "iu" else dtype
    losses = random_losses(rng, *sizes.values(), dtype=kind)
    if np.dtype(dtype).kind in "iu":
        losses = (np.abs(losses) * 7 % 100).round().astype(dtype)
    if draw(st.booleans()):
        # 0.1 has no exact sum, so a float64 mean of it is off by rounding
        constant = 3 if losses.dtype.kind in "iu" else 0.1
        losses[..., draw(st.integers(0, sizes["sample"] - 1))] = constant
    losses = losses.transpose(*draw(st.permutations(losses.dims)))
    if draw(st.booleans()):
        losses = losses.chunk({d: draw(st.integers(1, n)) for d, n in sizes.items()})
    return losses


def least_memory(function, *arguments, **options):
    """The budget that the refusal of a hopeless one names: it must work."""
    with pytest.raises(errors.MemoryBudgetError, match="KiB can") as refusal:
        function(*arguments, memory=1, **options)
    return re.search(r"(\d+ KiB) can", str(refusal.value)).group(1)


@ANY
@given(tensors(), st.sampled_from(["pooled", "chain", "draw"]), st.booleans())
def test_covariance__equals_numpy(losses, center, tight):
    assume(center != "draw" or losses.sizes["chain"] > 1)
    memory = least_memory(lk.covariance, losses, center=center) if tight else None
    result = lk.covariance(losses, center=center, memory=memory)
    expected = numpy_covariance(losses, center)
    bound = 1e-5 * max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(result.values, expected, rtol=1e-5, atol=bound)
    assert result.dtype == np.result_type(losses.dtype, np.float32)


@ANY
@given(tensors(), st.sampled_from(["pooled", "chain", "draw"]), st.booleans())
def test_correlation__equals_numpy_and_is_zero_without_variance(losses, center, tight):
    assume(center != "draw" or losses.sizes["chain"] > 1)
    memory = least_memory(lk.correlation, losses, center=center) if tight else None
    result = lk.correlation(losses, center=center, memory=memory).values
    np.testing.assert_allclose(result, numpy_correlation(losses, center), atol=1e-5)
    variance = losses.compute().astype(float)
    constant = (variance.max(("chain", "draw")) == variance.min(("chain", "draw"))).values
    assert not result[constant].any()
    assert not result[:, constant].any()


@ANY
@given(tensors(["float32", "float64"]), st.integers(1, 12), st.integers(1, 39), st.data())
def test_gram__is_the_same_for_every_tile_and_piece(losses, side, length, data):
    center = data.draw(st.sampled_from([None, "pooled", "chain", "draw"]))
    cosine = data.draw(st.booleans())
    options = {"over": ("chain", "draw"), "each": (), "center": center, "cosine": cosine}
    operand = engine.Operand(losses, rows="sample", **options)
    plan = engine.make_plan(operand, side=min(side, losses.sizes["sample"]))
    # Draws that are centred by themselves are never cut.
    pieces = split(operand.shape, length, operand.grain()[0] if center == "draw" else None)
    plan = engine.Plan(plan.rows, plan.cols, pieces, plan.budget, plan.cache)
    result = engine.gram_array(engine.Contraction(operand, None, plan)).compute()
    x = losses.transpose("chain", "draw", "sample").values.astype(np.float64)
    if center:
        axis = {"pooled": (0, 1), "chain": 1, "draw": 0}[center]
        x = x - x.mean(axis, keepdims=True)
    x = x.reshape(-1, x.shape[-1])
    if cosine:
        norm = np.linalg.norm(x, axis=0)
        x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-12 * max(norm.max(), 1))
    expected = x.T @ x
    np.testing.assert_allclose(result, expected, atol=2e-5 * max(np.abs(expected).max(), 1))


@ANY
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 40))
def test_split__covers_the_box_once_in_pieces_that_fit(shape, length):
    seen = np.zeros(shape, int)
    for piece in split(tuple(shape), length):
        part = tuple(slice(*bounds) for bounds in piece)
        assert seen[part].size <= length
        seen[part] += 1
    assert (seen == 1).all()


@ANY
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_moments__merge_to_those_of_the_whole(seed, groups, cut, centred):
    block = np.random.default_rng(seed).normal(size=(groups, 10, 4)) + 100
    whole = Moments.of(block, centred=centred)
    parts = [Moments.of(part, centred=centred) for part in (block[:, :cut], block[:, cut:])]
    merged = parts[0].merge(parts[1], centred=centred)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.squares, whole.squares, rtol=1e-9)
    np.testing.assert_array_equal(merged.count, whole.count)


@ANY
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 25), st.booleans())
def test_top_k__equals_a_full_sort_with_ties_by_position(seed, rows, columns, ties):
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    if ties:
        values = values.round()
    for k in {1, (columns + 1) // 2, columns}:
        expected = np.argsort(-values, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(top_k(values, k), expected)


@ANY
@given(tensors(["float32"]), st.integers(1, 9), st.booleans(), st.booleans(), st.data())
def test_neighbors__equal_a_sort_of_the_kernel(losses, k, largest, excluding, data):
    n = losses.sizes["sample"]
    k = min(k, n - 1)
    index = data.draw(st.permutations(range(100, 100 + n)))
    losses = losses.assign_coords(sample=list(index))
    memory = least_memory(lk.neighbors, losses, k) if data.draw(st.booleans()) else None
    kernel = lk.correlation(losses, memory=memory).values
    result = lk.neighbors(
        losses, k, exclude="label" if excluding else None, largest=largest, memory=memory
    ).compute()
    allowed = ~np.eye(n, dtype=bool)
    if excluding:
        label = losses["label"].values
        allowed &= label[:, None] != label
    varies = (losses.max(("chain", "draw")) > losses.min(("chain", "draw"))).values
    allowed &= varies[:, None] & varies  # what does not vary has no neighbours
    np.testing.assert_array_equal(result["constant"], ~varies)
    score = np.where(allowed, kernel if largest else -kernel, -np.inf)
    order = np.argsort(-score, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(score, order, axis=1)
    expected = np.where(np.isinf(best), np.nan, best if largest else -best)
    np.testing.assert_allclose(result["similarity"], expected, atol=1e-6)
    # Equal similarities may stand in another order than rounding gives them in the kernel.
    neighbor = result["neighbor"].values
    position = losses.indexes["sample"].get_indexer(neighbor.ravel()).reshape(neighbor.shape)
    there = position >= 0
    np.testing.assert_array_equal(there, ~np.isnan(expected))
    np.testing.assert_array_equal(neighbor[~there], -1)
    own = np.take_along_axis(score, np.maximum(position, 0), axis=1)
    np.testing.assert_allclose(own[there], best[there], atol=1e-6)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in position)


@pytest.mark.parametrize("each", [("time",), ("time", "model")])
def test_gram__keeps_dims_in_step(rng, each):
    x = xr.DataArray(
        rng.normal(size=(3, 2, 5, 7)).astype("f4"), dims=("time", "model", "example", "param")
    )
    over = [d for d in x.dims if d not in each and d != "example"]
    result = lk.gram(x.chunk({"time": 1, "param": 3}), over=over, each=each)
    expected = xr.dot(x.astype("f8"), x.astype("f8").rename(example="example_2"), dim=over)
    xr.testing.assert_allclose(result.compute().drop_attrs(), expected.rename("gram"), atol=1e-4)
