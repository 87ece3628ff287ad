import dask
import numpy as np
import pytest
import xarray as xr

from lkarray import engine, errors
from lkarray.analysis.gradients.gradient_kernels import (
    ips,
    plgk,
    temporal_kernel,
)
from lkarray.analysis.gradients.path_sums import root_weight, weighted
from tests.helpers.gradients import RATES, WEIGHTS, tensor
from tests.helpers.losses import Forbidding


@pytest.fixture
def stored(tmp_path, rng):
    """A float32 tensor as a store holds it, opened again."""
    ds = tensor(rng, "float32").to_dataset()
    encoding = {"gradient": {"chunks": (1, 5, 11)}}
    ds.to_zarr(tmp_path / "g.zarr", encoding=encoding, consolidated=False)
    return xr.open_zarr(tmp_path / "g.zarr", consolidated=False)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weighting__keeps_the_precision(rng, weight, dtype):
    g = tensor(rng, dtype)
    result = plgk(g.chunk({"time": 1}), weight=weight)
    assert result.dtype == np.result_type(dtype, np.float32)
    x = g.values.astype(np.float64)
    expected = np.einsum("t,tmp,tnp->mn", WEIGHTS[weight], x, x)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("over", "rows"),
    [
        (("time", "param"), "example"),
        (("time", "example"), "param"),
        (("example", "param"), "time"),
    ],
)
def test_weighting__leaves_reading_chunk_by_chunk(stored, weight, over, rows):
    g = stored["gradient"].assign_coords(learning_rate=stored["learning_rate"])
    plain = engine.Operand(g, over=over, each=(), rows=rows, center=None, cosine=False)
    scaled = engine.Operand(
        weighted(g, root_weight(g, weight)),
        over=over,
        each=(),
        rows=rows,
        center=None,
        cosine=False,
    )
    assert scaled.source_chunk() == plain.source_chunk() == 4 * 5 * 11
    assert scaled.variable.chunks == plain.variable.chunks
    assert scaled.name == "gradient"


def test_weighting__of_a_file_opened_without_dask_stays_lazy(tmp_path, stored):
    lazy = xr.open_zarr(tmp_path / "g.zarr", consolidated=False, chunks=None)
    assert not lazy["gradient"].variable._in_memory
    with dask.config.set(scheduler=Forbidding()):
        result = plgk(lazy, weight="lr")
    assert not lazy["gradient"].variable._in_memory
    np.testing.assert_allclose(result, plgk(stored.compute(), weight="lr"), rtol=1e-4, atol=1e-5)


def test_learning_rates__may_be_chunked(stored):
    assert stored["learning_rate"].chunks is not None
    assert plgk(stored, weight="lr").shape == (12, 12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
@pytest.mark.parametrize("weight", ["lr", "lr2"])
def test_weights__refuse_missing_learning_rates(G, bad, weight):
    rates = RATES.copy()
    rates[[1, 3]] = bad
    G = G.assign_coords(learning_rate=("time", rates))
    for function in (plgk, ips, temporal_kernel):
        with pytest.raises(errors.SchemaError, match=r"negative at the times \[10, 30\]; select"):
            function(G, weight=weight)
        with pytest.raises(errors.SchemaError, match="no coordinate learning_rate\\(time\\); add"):
            function(G.drop_vars("learning_rate"), weight=weight)
    bare = G.drop_vars("time")
    with pytest.raises(errors.SchemaError, match=r"at the times \[1, 3\]"):
        plgk(bare, weight=weight)
    with pytest.raises(errors.SchemaError, match=r"at the times \[0\]"):
        plgk(bare.isel(time=1), weight=weight)
    np.testing.assert_allclose(plgk(G), np.einsum("tmp,tnp->mn", G.values, G.values))
