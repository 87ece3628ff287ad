import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray.analysis.gradients.gradient_kernels import ips, plgk
from lkarray.analysis.gradients.tangent_kernels import lntk
from lkarray.kernels.kinds import INFLUENCE_OPERATOR, require_kernel
from tests.helpers.gradients import tensor


@pytest.fixture
def G(rng):
    return tensor(rng).chunk({"time": 1, "example": 5, "param": 11})


@pytest.fixture
def outputs(rng):
    values = rng.normal(size=(5, 7, 3, 30))
    coords = {
        "time": np.arange(5) * 10,
        "output": ["a", "b", "c"],
        "label": ("example", np.arange(7)),
    }
    array = xr.DataArray(values, dims=("time", "example", "output", "param"), coords=coords)
    return array.chunk({"time": 1, "example": 2, "output": 3, "param": 11})


def test_require_kernel__refuses_influence_operators_only(G, outputs):
    require_kernel(plgk(G), "this")
    with pytest.raises(
        ValueError, match="this needs a kernel, and 'lntk' is an influence operator"
    ):
        require_kernel(lntk(G, outputs), "this")


def test_embed__refuses_an_influence_operator(G):
    square = ips(G).compute().assign_attrs(kernel=INFLUENCE_OPERATOR)
    with pytest.raises(ValueError, match="embed needs a kernel"):
        lk.embed(square)
