import numpy as np
import pytest
import xarray as xr

from lkarray import errors
from lkarray.analysis.gradients.tangent_kernels import lntk, pntk
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from tests.helpers.gradients import WEIGHTS, tensor


@pytest.mark.parametrize("weight", WEIGHTS)
def test_pntk__equals_einsum(G, outputs, weight):
    result = pntk(G, outputs, weight=weight)
    expected = np.einsum("t,tmp,tndp->mnd", WEIGHTS[weight], G.values, outputs.values)
    assert result.dims == ("example", "example_2", "output")
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
    assert result["output"].values.tolist() == ["a", "b", "c"]
    assert result["label"].dims == ("example",)
    assert result["label_2"].values.tolist() == list(range(7))
    assert result.attrs["kernel"] == INFLUENCE_OPERATOR


@pytest.mark.parametrize("times", [slice(None), 2])
def test_lntk__equals_einsum_at_each_time(G, outputs, times):
    g, o = G.isel(time=times), outputs.isel(time=times)
    result = lntk(g, o)
    assert result.dims[-3:] == ("example", "example_2", "output")
    expected = np.einsum("...mp,...ndp->...mnd", g.values, o.values)
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(lntk(G, outputs).sum("time"), pntk(G, outputs), atol=1e-10)


@pytest.mark.parametrize("chunks", [{}, {"output": 1}, {"example": 3, "output": 2, "param": 7}])
@pytest.mark.parametrize("memory", [None, "200 KiB"])
def test_pntk__is_the_same_for_every_chunking(rng, chunks, memory):
    g = tensor(rng, example=40)
    o = xr.DataArray(rng.normal(size=(5, 30, 3, 30)), dims=("time", "example", "output", "param"))
    expected = np.einsum("tmp,tndp->mnd", g.values, o.values)
    chunk = o.chunk({"time": 1} | chunks) if chunks else o
    result = pntk(g.drop_vars("time"), chunk.transpose("param", ...), memory=memory)
    np.testing.assert_allclose(result, expected, atol=1e-10)


def test_pntk__refuses_what_does_not_fit(G, outputs):
    with pytest.raises(errors.SchemaError, match="output_G.* lack \\['output'\\]"):
        pntk(G, G)
    with pytest.raises(errors.SchemaError, match="loss_G and output_G differ along 'time'"):
        pntk(G, outputs.assign_coords(time=np.arange(5)))
    with pytest.raises(errors.SchemaError, match="5 and 4 entries along 'time'"):
        pntk(G, outputs.isel(time=slice(4)))
    with pytest.raises(errors.SchemaError, match="must leave one"):
        pntk(outputs, outputs)
